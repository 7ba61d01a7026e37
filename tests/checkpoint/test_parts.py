"""A part of a pruned module, saved by itself: what no tensor tells of it is kept too."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune import record, resize, resizing
from lightning_softprune.checkpoint import ModelShapes, is_recorded, keep_dense, keep_record
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.attending import KINDS, group, groups_of_reader, made_reader
from support.results import make_result

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(kind="buffer", removed=((0, 5, 6, 11), (1, 2))):
    model = made_reader(kind)
    dense = ModelShapes.of(model)
    surgery = apply_plan(model, groups_of_reader(), Plan(removed))
    keep_dense(model, dense, {name: before for name, (before, _) in surgery.counts.items()}, surgery.unsaved)
    keep_record(model, dense, [make_result()])
    return model


def assert_attends_alike(one, other):
    x = torch.randn(2, 5, one.q.in_features, generator=torch.Generator().manual_seed(0))
    assert (one.num_heads, one.all_head_size) == (other.num_heads, other.all_head_size)
    assert torch.equal(one(x), other(x))


def twice(module):
    return pickle.loads(pickle.dumps(copy.deepcopy(module)))


@pytest.mark.parametrize("kept", [lambda module: module, twice], ids=["itself", "a copy"])
def test_the_record_of_a_part_has_its_numbers_of_heads(kept):
    part, fresh = kept(pruned().attn), made_reader(seed=5).attn
    found = record(part)
    assert found["counts"] == {"num_heads": 2, "all_head_size": 6}
    assert found["results"] == []
    resize(fresh, found)
    fresh.load_state_dict(part.state_dict())
    assert_attends_alike(fresh, part)
    assert record(fresh)["counts"] == found["counts"]
    assert not is_recorded(fresh)


def test_the_state_dict_of_a_part_tells_its_numbers_of_heads(tmp_path):
    part = pruned(removed=((), (0,))).attn
    torch.save({"network": part.state_dict()}, tmp_path / "part.pt")
    state = torch.load(tmp_path / "part.pt", weights_only=True)["network"]
    fresh = made_reader(seed=5).attn
    with resizing():
        fresh.load_state_dict(state)
    assert_attends_alike(fresh, part)
    assert fresh.num_heads == 3


def test_the_state_dict_of_a_part_tells_the_sizes_of_layers_without_weights():
    def made_with_norm(seed=0):
        model = made_reader(seed=seed)
        model.head = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2))
        return model

    model, fresh = made_with_norm(), made_with_norm(seed=5)
    dense = ModelShapes.of(model)
    found = group("head.0", np.arange(8), ("head.0", "out"), ("head.1", "both"), ("head.2", "in"))
    apply_plan(model, [found], Plan(((1, 4),)))
    keep_dense(model, dense, {}, {})
    resize(fresh.head, model.head.state_dict())
    assert fresh.head[1].normalized_shape == (6,)
    with pytest.raises(ValueError, match="tells its size"):
        resize(made_with_norm().head, dict(model.head.state_dict()))


def test_a_part_around_a_part_knows_what_is_inside_of_it():
    model = pruned()
    around = nn.ModuleDict({"first": model.attn, "again": model.attn})
    assert record(around)["counts"].keys() == {
        f"{name}.{attribute}" for name in ("first", "again") for attribute in ("num_heads", "all_head_size")
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "buffer"])
def test_the_record_of_a_part_has_its_tensors_that_no_state_dict_has(kind):
    model, fresh = pruned(kind), made_reader(kind, seed=5)
    resize(fresh.pos, record(model.pos))
    assert torch.equal(fresh.pos.pe, model.pos.pe)


def test_a_part_of_a_dense_module_has_nothing_to_tell():
    found = record(made_reader().attn)
    assert "counts" not in found
    assert found["format"] == 1
