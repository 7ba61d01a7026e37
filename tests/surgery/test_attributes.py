"""Buffers, tensors in plain attributes, and attributes that count channels: they follow the plan as layers do."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune.checkpoint import ModelShapes
from lightning_softprune.graph.groups import Count
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import References, apply_plan, probe_groups
from lightning_softprune.surgery.apply import select_channels
from support.attending import KINDS, Position, group, groups_of_reader, made_reader, masked_reader, sequences
from support.plans import assert_same, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(((0, 5, 6, 11), (1, 2)))
ONLY_HEADS = Plan(((), (0,)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_pruned_network_computes_what_the_masked_one_does(kind):
    model, x = made_reader(kind), sequences()
    expected, dense = masked_reader(model, PLAN)(x), model.pos.pe
    surgery = apply_plan(model, groups_of_reader(), PLAN)
    torch.testing.assert_close(model(x), expected)
    kept = [1, 2, 3, 4, 7, 8, 9, 10]
    assert torch.equal(model.pos.pe, dense[..., kept])
    assert torch.equal(surgery.kept["pos.pe"][2], torch.tensor(kept))
    assert torch.equal(surgery.slice("pos.pe", dense), model.pos.pe)
    assert (model.attn.num_heads, model.attn.all_head_size, model.d_model) == (2, 6, 8)
    assert model.sizes == 8 + 6
    assert surgery.counts["sizes"] == (24, 14)
    assert surgery.counts["attn.num_heads"] == (4, 2)
    assert {name: id(tensor) for name, tensor in surgery.unsaved.items()} == (
        {} if kind == "buffer" else {"pos.pe": id(dense)}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_stays_of_its_kind(kind):
    model = made_reader(kind).to(torch.float64)
    model.pos.pe = model.pos.pe.double()
    names, places = model.state_dict().keys(), [name for name, _ in model.named_buffers()]
    apply_plan(model, groups_of_reader(), PLAN)
    assert model.state_dict().keys() == names
    assert [name for name, _ in model.named_buffers()] == places
    assert ("pe" in vars(model.pos)) == (kind == "plain attribute")
    assert model.pos.pe.dtype == torch.float64
    assert type(model.pos.pe) is torch.Tensor
    assert model.double()(sequences().double()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_undo_brings_back_the_same_objects_and_values(kind):
    model, x = made_reader(kind), sequences()
    before, expected, pe = snapshot(model), model(x), model.pos.pe
    values = pe.clone()
    surgery = apply_plan(model, groups_of_reader(), PLAN)
    model(x)
    surgery.undo()
    assert_same(model, before)
    assert model.pos.pe is pe
    assert torch.equal(pe, values)
    assert torch.equal(model(x), expected)
    assert (model.attn.num_heads, model.attn.all_head_size, model.d_model, model.sizes) == (4, 12, 12, 24)


@pytest.mark.parametrize("kind", ["buffer", "plain attribute"])
def test_a_tensor_under_several_names_stays_one(kind):
    model = made_reader(kind)
    model.pos.again = model.pos.pe  # a plain attribute, also of a buffer
    model.spare = Position("buffer")
    model.spare.pe = model.pos.pe
    surgery = apply_plan(model, groups_of_reader(), PLAN)
    assert model.pos.pe is model.pos.again is model.spare.pe
    assert model.pos.pe.shape[-1] == 8
    assert {"pos.pe", "pos.again", "spare.pe"} <= surgery.kept.keys()
    surgery.undo()
    assert model.pos.pe is model.pos.again is model.spare.pe
    assert model.pos.pe.shape[-1] == 12


def test_undo_leaves_the_rest_of_a_module_that_counts_alone():
    model = made_reader()
    surgery = apply_plan(model, groups_of_reader(), ONLY_HEADS)
    model.notes = ["a trial"]
    model.attn.calls = 1
    surgery.undo()
    assert (model.notes, model.attn.calls, model.sizes, model.attn.num_heads) == (["a trial"], 1, 24, 4)


def test_a_parameter_that_is_also_a_plain_attribute_stays_one():
    model = made_reader()
    vars(model)["reading"] = model.head.weight
    apply_plan(model, groups_of_reader(), PLAN)
    assert model.reading is model.head.weight
    assert isinstance(model.reading, nn.Parameter)
    assert list(dict(model.named_parameters())) == list(dict(made_reader().named_parameters()))


class Spatial(nn.Module):
    """A mask over pixels, in the memory format of images, that may want a gradient."""

    channels = 6  # of the class

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 6, 3, padding=1)
        self.mask = torch.randn(1, 6, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        z = (self.body(x) * self.mask).view(len(x), self.channels, 4, 4)
        return self.head(z)


def test_memory_format_and_the_wish_for_a_gradient_are_kept_and_a_count_of_the_class_is_the_modules_own():
    model, x = Spatial(), torch.randn(3, 2, 4, 4)
    before, dense = snapshot(model), model.mask
    slots = ("body", "out"), ("mask", "dim1"), ("head", "in")
    found = group("body", np.arange(6), *slots, counts=(Count("", "channels", 1),))
    surgery = apply_plan(model, [found], Plan(((2, 3),)))
    assert model.mask.is_contiguous(memory_format=torch.channels_last)
    assert not model.mask.is_contiguous()
    assert torch.equal(model.mask, dense[:, [0, 1, 4, 5]])
    assert model.mask.is_leaf
    model(x).sum().backward()
    assert model.mask.grad.shape == model.mask.shape
    assert (model.channels, Spatial.channels) == (4, 6)
    surgery.undo()
    assert_same(model, before)
    assert "channels" not in vars(model)


def test_the_probe_counts_as_the_plan_does():
    model, x = made_reader("plain attribute"), sequences()
    found = groups_of_reader()
    before = snapshot(model)
    assert [g.reason for g in probe_groups(model, found, lambda: model(x))] == ["", ""]
    assert_same(model, before)
    uncounted = [group(g.name, g.members[0].owner, *((m.module, m.slot) for m in g.members)) for g in found]
    reasons = [g.reason for g in probe_groups(model, uncounted, lambda: model(x))]
    assert reasons[0] == ""
    assert "does not run with fewer channels" in reasons[1]


def test_a_copy_follows_with_its_counts_and_tensors():
    model, x = made_reader("plain attribute"), sequences()
    average = copy.deepcopy(model)
    model.others = [average]  # a list: it is none of its own parts
    shapes = ModelShapes.of(model).shapes
    surgery = apply_plan(model, groups_of_reader(), PLAN)
    references = References(model, surgery, shapes)
    references.carry("self", model)
    assert references.left == []
    assert torch.equal(average(x), model(x))
    assert (average.attn.num_heads, average.attn.all_head_size, average.sizes) == (2, 6, 14)
    assert average.pos.pe is not model.pos.pe
    references.undo()
    assert (average.attn.num_heads, average.attn.all_head_size, average.sizes) == (4, 12, 24)
    assert average.pos.pe.shape[-1] == 12


SHARED = {"heads": 4, "all": 12, "window": 3}


def with_numbers_in_containers():
    """The reader, which also keeps its counts in a dictionary of everybody's, and as pairs."""
    model, (width, heads) = made_reader("plain attribute"), groups_of_reader()
    model.attn.numbers, model.attn._pairs = SHARED, tuple(SHARED.items())
    more = Count("attn", "numbers[heads]", 1), Count("attn", "numbers[all]", 3), Count("attn", "_pairs[all]", 3)
    return model, [width, replace(heads, counts=(*heads.counts, *more))]


def test_numbers_in_containers_are_counts_too_and_the_containers_are_the_modules_own():
    model, found = with_numbers_in_containers()
    before, average = snapshot(model), copy.deepcopy(model)
    model.others, shapes = [average], ModelShapes.of(model).shapes
    surgery = apply_plan(model, found, PLAN)
    references = References(model, surgery, shapes)
    references.carry("self", model)
    for attn in (model.attn, average.attn):
        assert attn.numbers == {"heads": 2, "all": 6, "window": 3}
        assert attn._pairs == (("heads", 4), ("all", 6), ("window", 3))
    assert SHARED == {"heads": 4, "all": 12, "window": 3}
    assert surgery.counts["attn.numbers[all]"] == (12, 6)
    references.undo()
    assert average.attn.numbers == SHARED
    with surgery.undone():
        assert model.attn.numbers is SHARED
    assert model.attn.numbers == {"heads": 2, "all": 6, "window": 3}
    surgery.undo()
    del model.others
    assert_same(model, before)
    assert model.attn.numbers is SHARED


class Odd(nn.Module):
    flag, name, empty = True, "four", None

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.width, self.table, self.sizes = 4, torch.zeros(4, 3), {"width": 4}

    @property
    def computed(self):
        return 4


BODY = ("body", "out"), ("head", "in")
MISFITS = {
    "flag": (BODY, Count("", "flag", 1), r"flag: .* no integer attribute"),
    "text": (BODY, Count("", "name", 1), r"name: .* no integer attribute"),
    "nothing": (BODY, Count("head", "gone", 1), r"head\.gone: .* no integer attribute"),
    "computed": (BODY, Count("", "computed", 1), r"computed: .* no integer attribute"),
    "no key": (BODY, Count("", "sizes[heads]", 1), r"sizes\[heads\]: .* no integer attribute"),
    "no module": (BODY, Count("tail", "width", 1), r"tail\.width: .* no module 'tail'"),
    "below one": (BODY, Count("", "width", 4), r"width: it counts channels, and would fall from 4 to 0"),
    "no tensor": ((*BODY, ("gone", "dim0")), None, r"gone: the group expects a tensor here"),
    "nothing there": ((*BODY, ("empty", "dim0")), None, r"empty: the group expects a tensor here"),
    "no owner": ((*BODY, ("tail.table", "dim0")), None, r"tail\.table: .* no module 'tail'"),
    "another size": ((*BODY, ("table", "dim1")), None, r"table: the group expects 4 channels, there are 3"),
    "another rank": ((*BODY, ("table", "dim2")), None, r"table: the group expects 4 channels, there are 0"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_written(misfit):
    slots, count, message = MISFITS[misfit]
    model = Odd()
    before = snapshot(model)
    counts = (Count("", "width", 1), *([count] if count else []))
    found = group("body", np.arange(4), *slots, counts=counts if misfit != "below one" else (count,))
    with pytest.raises(ValueError, match=message):
        apply_plan(model, [found], Plan(((1,),)))
    assert_same(model, before)
    apply_plan(model, [found], Plan(((),)))  # nothing goes: nothing is asked
    assert_same(model, before)


def test_an_attribute_that_is_no_integer_any_more_is_named():
    model, found = made_reader(), groups_of_reader()
    apply_plan(model, found, PLAN).undo()
    model.attn.num_heads = 4.0
    with pytest.raises(ValueError, match=r"attn\.num_heads: .* no integer attribute"):
        apply_plan(model, found, PLAN)
    with pytest.raises(ValueError, match=r"attn\.all_head_size: .* would fall from 12 to 0"):
        select_channels(model, {}, {}, {("attn", "all_head_size"): 0})
