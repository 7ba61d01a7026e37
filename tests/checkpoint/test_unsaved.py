"""Counts of channels, and pruned tensors that no state dict has: they come from the record."""

import copy
import pickle
import re
from dataclasses import replace

import hypothesis
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import UniformBaseline, load_from_checkpoint, resize
from lightning_softprune.checkpoint import ModelShapes, keep_dense, keep_record
from lightning_softprune.graph import Count
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.attending import KINDS, Position, Reader, group, groups_of_reader, made_reader, sequences
from support.modules import FEATURES, AutoEncoder, fit, loaders, made, softpruning, trainer_of
from support.results import make_result

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(((0, 5, 6, 11), (1, 2)))
ONLY_HEADS = Plan(((), (0,)))
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def prune(model, plan=PLAN, groups=None):
    """What a round does of surgery, and what it then has the module remember."""
    dense = ModelShapes.of(model)
    surgery = apply_plan(model, groups or groups_of_reader(), plan)
    keep_dense(model, dense, {name: before for name, (before, _) in surgery.counts.items()}, surgery.unsaved)
    keep_record(model, dense, [make_result()])
    return model


def saved(model, tmp_path, name="model.ckpt"):
    trainer = trainer_of(tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / name, weights_only=True)
    return tmp_path / name


def in_memory(path):
    return torch.load(path, weights_only=True)


def resized(model, checkpoint):
    resize(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def counts(model):
    return model.attn.num_heads, model.attn.all_head_size, model.d_model, model.sizes


def assert_equal(model, other):
    x = sequences()
    assert counts(model) == counts(other)
    assert torch.equal(model.pos.pe, other.pos.pe)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("copied", [False, True])
def test_a_state_dict_alone_has_the_counts_with_it(copied, tmp_path):
    model = prune(made_reader(), ONLY_HEADS)
    torch.save((copy.deepcopy(model) if copied else model).state_dict(), tmp_path / "weights.pt")
    fresh = made_reader(seed=5)
    resize(fresh, in_memory(tmp_path / "weights.pt"))
    fresh.load_state_dict(model.state_dict())
    assert_equal(fresh, model)
    averaged = AveragedModel(made_reader(seed=5))
    resize(averaged, AveragedModel(model).state_dict())
    assert counts(averaged.module) == counts(model)


@pytest.mark.parametrize("alone", [True, False])
def test_numbers_in_containers_come_with_a_state_dict_and_with_the_record(alone, tmp_path):
    def made_with_numbers(seed=0):
        model = made_reader(seed=seed)
        model.attn.numbers, model.attn.pairs = {"heads": 4, "window": 3}, [("heads", 4), ("window", 3)]
        return model

    width, heads = groups_of_reader()
    counts = (*heads.counts, Count("attn", "numbers[heads]", 1), Count("attn", "pairs[heads]", 1))
    model = prune(made_with_numbers(), ONLY_HEADS, [width, replace(heads, counts=counts)])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = made_with_numbers(seed=5)
    resize(fresh, in_memory(tmp_path / "weights.pt" if alone else saved(model, tmp_path)))
    assert (fresh.attn.numbers, fresh.attn.pairs) == ({"heads": 3, "window": 3}, [("heads", 3), ("window", 3)])
    fresh.load_state_dict(model.state_dict())
    assert_equal(fresh, model)


def test_a_state_dict_tells_the_sizes_of_layers_without_weights_too(tmp_path):
    def made_with_norm(seed=0):
        model = made_reader(seed=seed)
        model.head = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2))
        return model

    found = group("head.0", np.arange(8), ("head.0", "out"), ("head.1", "both"), ("head.2", "in"))
    model = prune(made_with_norm(), Plan(((1, 4),)), [found])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = in_memory(tmp_path / "weights.pt")
    fresh = made_with_norm(seed=5)
    resize(fresh, state)
    fresh.load_state_dict(state)
    assert fresh.head[1].normalized_shape == model.head[1].normalized_shape == (6,)
    assert torch.equal(fresh(sequences()), model(sequences()))
    with pytest.raises(ValueError, match=r"^head\.1: no tensor of this LayerNorm tells its size"):
        resize(made_with_norm(), dict(state))  # which loses what stands beside the tensors


def test_counts_of_a_state_dict_that_names_other_modules_do_not_matter():
    state = prune(made_reader(), ONLY_HEADS).state_dict()
    state._metadata["elsewhere"] = {"softprune": {"num_heads": 2, "attn": "x"}}
    state._metadata[""]["softprune"] |= {"attn.nothing": 1, "attn.num_heads": 10**30}
    state._metadata["attn"]["softprune"] |= {"nothing": 1, "num_heads": 10**30}
    fresh = made_reader(seed=5)
    resize(fresh, state)
    assert (fresh.attn.num_heads, fresh.attn.all_head_size) == (4, 9)


@EVERY_KIND
def test_a_fresh_module_gets_the_counts_and_tensors_of_the_file(kind, tmp_path):
    model = prune(made_reader(kind))
    path = saved(model, tmp_path)
    record = in_memory(path)["softprune"]
    assert record["counts"] == {"attn.num_heads": 2, "attn.all_head_size": 6, "d_model": 8, "sizes": 14}
    assert record["dense"]["counts"] == {"attn.num_heads": 4, "attn.all_head_size": 12, "d_model": 12, "sizes": 24}
    assert ("unsaved" in record) == (kind != "buffer")
    fresh = resized(made_reader(kind, seed=5), in_memory(path))
    assert_equal(fresh, model)
    assert ("pe" in vars(fresh.pos)) == (kind == "plain attribute")
    again = resized(made_reader(kind, seed=6), in_memory(saved(fresh, tmp_path, "again.ckpt")))
    assert_equal(again, model)
    assert_equal(load_from_checkpoint(Reader, path), model)
    assert_equal(copy.deepcopy(fresh), model)


@EVERY_KIND
def test_a_record_alone_shapes_a_module_wholly(kind, tmp_path):
    model, fresh = prune(made_reader(kind)), made_reader(kind, seed=5)
    resize(fresh, in_memory(saved(model, tmp_path))["softprune"])
    assert counts(fresh) == counts(model)
    assert fresh.pos.pe.shape == model.pos.pe.shape
    assert ModelShapes.of(fresh) == ModelShapes.of(model)


class Plain(torch.nn.Module):
    """The same parts in a module that knows nothing of Lightning."""

    def __init__(self, reader):
        super().__init__()
        self.embed, self.pos, self.attn, self.head = reader.embed, reader.pos, reader.attn, reader.head
        self.d_model, self.sizes = reader.d_model, reader.sizes

    forward = Reader.forward


@EVERY_KIND
def test_a_module_that_is_not_lightnings_is_shaped_too(kind, tmp_path):
    model = prune(made_reader(kind))
    assert_equal(resized(Plain(made_reader(kind, seed=5)), in_memory(saved(model, tmp_path))), model)


@pytest.mark.parametrize("seen", ["in this process", "in the file"])
@EVERY_KIND
def test_a_pruned_module_becomes_dense_again_by_a_dense_checkpoint(kind, seen, tmp_path):
    dense = made_reader(kind)
    path, model = saved(dense, tmp_path, "dense.ckpt"), prune(copy.deepcopy(dense))
    if seen == "in the file":
        model = resized(made_reader(kind, seed=5), in_memory(saved(model, tmp_path)))
    assert_equal(resized(model, in_memory(path)), dense)
    assert "on_save_checkpoint" not in vars(model)
    again: dict[str, object] = {}
    model.on_save_checkpoint(again)
    assert again == {}


@EVERY_KIND
def test_a_module_that_lost_other_channels_takes_those_of_the_file(kind, tmp_path):
    model = prune(made_reader(kind))
    other = prune(made_reader(kind, seed=5), Plan(((1, 2, 3, 4), (0, 3))))  # of the very same shapes
    assert_equal(resized(other, in_memory(saved(model, tmp_path))), model)


@EVERY_KIND
def test_what_a_files_rounds_have_left_alone_is_dense_there(kind, tmp_path):
    model = prune(made_reader(kind), ONLY_HEADS)
    record = in_memory(saved(model, tmp_path))["softprune"]
    assert record["counts"].keys() == {"attn.num_heads", "attn.all_head_size", "sizes"}
    other = prune(copy.deepcopy(made_reader(kind)))
    assert_equal(resized(other, in_memory(tmp_path / "model.ckpt")), model)


def test_a_later_round_adds_what_it_changes_and_dense_stays_dense(tmp_path):
    dense = made_reader("plain attribute")
    model = prune(copy.deepcopy(dense), Plan(((), (0,))), groups_of_reader())
    prune(model, Plan(((4,), (0,))), groups_of_reader(heads=3))
    prune(model, Plan(((4,), ())), groups_of_reader(heads=2, width=11))
    record = in_memory(saved(model, tmp_path))["softprune"]
    assert record["counts"] == {"attn.num_heads": 2, "attn.all_head_size": 6, "d_model": 10, "sizes": 16}
    assert record["dense"]["counts"] == {"attn.num_heads": 4, "attn.all_head_size": 12, "d_model": 12, "sizes": 24}
    assert torch.equal(record["dense"]["unsaved"]["pos.pe"], dense.pos.pe)
    assert torch.equal(record["unsaved"]["pos.pe"], model.pos.pe)


@pytest.mark.parametrize("kind", ["late", "late and unknown"])
def test_a_tensor_that_a_fresh_module_has_not_made_yet_is_there_after_loading(kind, tmp_path):
    model = made_reader(kind)
    model(sequences())
    prune(model)
    fresh = resized(made_reader(kind, seed=5), in_memory(saved(model, tmp_path)))
    assert_equal(fresh, model)
    assert_equal(load_from_checkpoint(Reader, tmp_path / "model.ckpt"), model)


def test_a_temporary_buffer_that_a_fresh_module_has_not_filled_yet_is_filled(tmp_path):
    model, fresh = prune(made_reader("temporary buffer")), made_reader("temporary buffer", seed=5)
    fresh.pos.pe = None
    assert_equal(resized(fresh, in_memory(saved(model, tmp_path))), model)
    assert "pe" in fresh.pos._buffers
    assert "pos.pe" not in fresh.state_dict()


@EVERY_KIND
def test_what_is_one_tensor_stays_one(kind, tmp_path):
    def tied(seed):
        model = made_reader(kind, seed)
        model.pos.again = model.pos.pe
        model.spare = Position(kind)
        model.spare.pe = model.pos.pe
        return model

    model = prune(tied(0))
    record = in_memory(saved(model, tmp_path))["softprune"]
    fresh = resized(tied(5), in_memory(tmp_path / "model.ckpt"))
    assert fresh.pos.pe is fresh.pos.again is fresh.spare.pe
    assert_equal(fresh, model)
    if kind == "plain attribute":
        assert record["unsaved"].keys() == {"pos.pe", "pos.again", "spare.pe"}
        late = tied(5)
        late.pos.pe = late.pos.again = late.spare.pe = None
        resized(late, in_memory(tmp_path / "model.ckpt"))
        assert late.pos.pe is late.pos.again is late.spare.pe
        assert_equal(late, model)


def test_dtype_and_device_are_the_modules_and_no_memory_is_shared(tmp_path):
    model, fresh = prune(made_reader("plain attribute")), made_reader("plain attribute", seed=5)
    fresh.pos.pe = fresh.pos.pe.to("cpu", torch.float64).requires_grad_()
    checkpoint = in_memory(saved(model, tmp_path))
    resize(fresh, checkpoint)
    assert (fresh.pos.pe.dtype, fresh.pos.pe.requires_grad) == (torch.float64, True)
    assert torch.equal(fresh.pos.pe.detach().float(), model.pos.pe)
    late = made_reader("late", seed=5)
    resize(late, checkpoint)
    checkpoint["softprune"]["unsaved"]["pos.pe"].zero_()
    assert torch.equal(late.pos.pe, model.pos.pe)


@pytest.mark.parametrize("view", [torch.randn(100, 100, 12)[7:8], torch.randn(12).expand(1, 50, 12)])
def test_the_file_holds_a_tensor_whole_and_no_more_of_what_it_is_a_view_of(view, tmp_path):
    model = made_reader("plain attribute")
    model.pos.pe = view
    path = saved(prune(model), tmp_path)
    assert path.stat().st_size < 40_000
    assert_equal(resized(made_reader("late"), in_memory(path)), model)


def test_records_of_older_versions_load_and_are_written_where_nothing_is_counted(tmp_path):
    model = made_reader("buffer")
    plain = [replace(g, counts=()) for g in groups_of_reader()]
    prune(model, Plan(((0, 5), ())), plain)
    record = in_memory(saved(model, tmp_path))["softprune"]
    assert record["format"] == 1
    assert not {"counts", "unsaved"} & {*record, *record["dense"]}
    assert resized(made_reader(seed=5), in_memory(tmp_path / "model.ckpt")).pos.pe.shape[-1] == 10
    assert in_memory(saved(prune(made_reader()), tmp_path))["softprune"]["format"] == 2


def test_a_form_that_an_older_version_has_pickled_is_read():
    form = ModelShapes.of(made_reader())
    for name in ("counts", "unsaved"):
        del form.__dict__[name]
    again = pickle.loads(pickle.dumps(form))
    assert (again.counts, again.unsaved) == ({}, {})
    assert copy.deepcopy(form) == ModelShapes.of(made_reader())


def loader():
    return DataLoader(TensorDataset(sequences(count=8)), batch_size=4)


def loss_of(model):
    with torch.no_grad():
        return float(sum((model(x) - 1).square().mean() for (x,) in loader()) / 2)


@EVERY_KIND
def test_a_trainer_takes_dense_and_pruned_files_in_any_order(kind, tmp_path):
    dense = made_reader(kind)
    models = {"dense": dense, "pruned": prune(copy.deepcopy(dense))}
    files = {name: saved(model, tmp_path, f"{name}.ckpt") for name, model in models.items()}
    module = made_reader(kind, seed=5)
    for name in ("pruned", "dense", "pruned"):
        trainer = trainer_of(tmp_path, softpruning())
        (metrics,) = trainer.test(module, loader(), ckpt_path=files[name], verbose=False)
        assert metrics["test_loss"] == pytest.approx(loss_of(models[name]), abs=1e-6)
        assert_equal(module, models[name])


@pytest.mark.slow
@EVERY_KIND
def test_a_fit_that_prunes_is_resumed_by_a_fresh_module(kind, tmp_path):
    """The whole way through the callback."""

    def fit(model, epochs, **arguments):
        callback = softpruning(epochs=1, search=UniformBaseline(), report=False)
        trainer = trainer_of(tmp_path, callback, max_epochs=epochs)
        pl.seed_everything(3, verbose=False)
        trainer.fit(model, loader(), loader(), **arguments)
        return trainer, callback

    model = made_reader(kind)
    trainer, callback = fit(model, 2)
    assert [result.applied for result in callback.results] == [True]
    assert counts(model) != counts(made_reader())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    record = in_memory(tmp_path / "full.ckpt")["softprune"]
    assert record["counts"]["attn.num_heads"] == model.attn.num_heads
    assert record["dense"]["counts"]["attn.num_heads"] == 4
    fresh = made_reader(kind, seed=5)
    fit(fresh, 3, ckpt_path=tmp_path / "full.ckpt")
    fit(model, 3, ckpt_path=tmp_path / "full.ckpt")
    assert_equal(fresh, model)


def test_a_large_tensor_is_loaded_by_what_the_record_holds_of_it():
    model = made_reader("plain attribute")
    model.pos.pe = torch.randn(1, 600_000, 12)  # more than what is believed without a tensor
    prune(model)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert_equal(resized(made_reader("late"), checkpoint), model)


# ------------------------------------------------------------------------------ what the module's state dict leaves out


class Frozen(AutoEncoder):
    """A frozen encoder that `__init__` loads, and that checkpoints do without."""

    def __init__(self, bias=True, how="state_dict"):
        super().__init__(bias=bias, norm=True)
        self.how, self.strict_loading = how, False
        generator = torch.Generator().manual_seed(7)
        for parameter in self.encoder.requires_grad_(False).parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return without_encoder(state) if self.how == "state_dict" else state

    def on_save_checkpoint(self, checkpoint):
        if self.how == "on_save_checkpoint":
            checkpoint["state_dict"] = without_encoder(checkpoint["state_dict"])


class FrozenWithNorm(Frozen):
    """Its second layer has no bias: what compensation adds to its outputs goes into the running mean behind it."""

    def __init__(self):
        super().__init__()
        first, norm, relu, second = self.encoder
        self.encoder = nn.Sequential(
            first, norm, relu, nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8).requires_grad_(False)
        )
        self.encoder[3].weight = nn.Parameter(second.weight.detach().clone(), requires_grad=False)


def without_encoder(state):
    return {name: value for name, value in state.items() if not name.startswith("encoder")}


def outputs(module):
    with torch.no_grad():
        return module.eval()(torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(5)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
@pytest.mark.parametrize("how", ["state_dict", "on_save_checkpoint"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_modules_state_dict_leaves_out_comes_from_the_record(tmp_path, bias, how):
    module, path = made(Frozen, bias=bias, how=how), tmp_path / "model.ckpt"
    fit(tmp_path, module, softpruning(), max_epochs=2).save_checkpoint(path)
    assert module.encoder[0].out_features < 16
    checkpoint = in_memory(path)
    assert checkpoint["softprune"]["format"] == 2
    assert {"encoder.0.weight", "encoder.1.running_mean", "encoder.3.weight"} <= set(
        checkpoint["softprune"]["left_out"]
    )
    assert all(name.startswith("encoder") for name in checkpoint["softprune"]["left_out"])
    loaded = load_from_checkpoint(Frozen, path, bias=bias, how=how)
    assert torch.equal(outputs(loaded), outputs(module))
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    fresh = made(Frozen, bias=bias, how=how)
    trainer = trainer_of(tmp_path, softpruning(), max_epochs=3)
    trainer.fit(fresh, **loaders(fresh), ckpt_path=path)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = load_from_checkpoint(Frozen, tmp_path / "again.ckpt", bias=bias, how=how)
    assert torch.equal(outputs(again), outputs(fresh))
    assert torch.equal(again.encoder[0].weight, module.encoder[0].weight)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["of before the round", "without the values"])
def test_parameters_of_which_nobody_has_values_are_named(tmp_path, file):
    path, module = tmp_path / "model.ckpt", made(Frozen)
    trainer = fit(tmp_path, module, max_epochs=1)
    trainer.save_checkpoint(path)
    trainer = fit(tmp_path, module, softpruning(), max_epochs=2)
    if file == "without the values":
        trainer.save_checkpoint(path)
        checkpoint = in_memory(path)
        del checkpoint["softprune"]["left_out"]
        torch.save(checkpoint, path)
        module = made(Frozen)
    data = loaders(module)["val_dataloaders"]
    with pytest.warns(UserWarning, match=r"SoftPruning: encoder\.0\.weight, .*no values of these"):
        trainer_of(tmp_path, softpruning()).validate(module, data, ckpt_path=path)


class Renaming(Reader):
    """All tensors are in its state dict, by other names."""

    def state_dict(self, *args, **kwargs):
        return {f"net.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


@pytest.mark.parametrize("kind", [Reader, Renaming])
def test_what_is_in_the_state_dict_is_not_in_the_record_too(kind, tmp_path):
    model = made_reader()
    model.__class__ = kind
    assert "left_out" not in in_memory(saved(prune(model), tmp_path))["softprune"]


# ------------------------------------------------------------------------------------------------------ damaged records


def damaged(checkpoint, *path, value):
    checkpoint = {**checkpoint, "softprune": copy.deepcopy(checkpoint["softprune"])}
    place = checkpoint["softprune"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return checkpoint


@pytest.fixture(scope="module", params=["temporary buffer", "plain attribute"])
def file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    return request.param, in_memory(saved(prune(made_reader(request.param)), folder))


HUGE = torch.zeros(()).expand(1, 10, 2**40)
BAD_TENSORS = [None, 3, "x", [1.0], HUGE, torch.zeros(1, 10, 8).to_sparse(), torch.zeros(1, 10, 8, device="meta")]
DAMAGES = [
    *((("counts",), value, "counts: ") for value in (None, 3, [], "x")),
    *((("unsaved",), value, "unsaved: ") for value in (None, 3, [], "x", HUGE)),
    *(
        ((*where, "counts", "d_model"), value, rf"{dense}counts\['d_model'\]: ")
        for where, dense in (((), ""), (("dense",), r"dense\."))
        for value in (None, "8", 8.0, True, 0, -1, 2**63, 10**5000, [8], float("nan"))
    ),
    *(
        ((*where, "unsaved", "pos.pe"), value, rf"{dense}unsaved\['pos.pe'\]: ")
        for where, dense in (((), ""), (("dense",), r"dense\."))
        for value in BAD_TENSORS
    ),
    (("counts", "d_model"), 13, r"counts\['d_model'\]: 13 is more than the 12 of dense\.counts"),
    (("counts", "attn.unknown"), 1, r"dense\.counts: it has not 'attn\.unknown'"),
    (("dense", "counts"), {}, r"dense\.counts: it has not "),
    (("dense", "unsaved"), {}, r"dense\.unsaved: it has not 'pos\.pe'"),
    (("counts", 5), 1, "counts: the key 5"),
    (("unsaved", 5), torch.ones(1), "unsaved: the key 5"),
    *((("left_out",), value, "left_out: ") for value in (None, 3, [], "x", HUGE)),
    *(
        (("left_out",), {"head.weight": value}, r"left_out\['head\.weight'\]: ")
        for value in (*BAD_TENSORS, torch.ones(1))
    ),
    (("left_out",), {"head.unknown": torch.ones(1)}, r"shapes: it has not 'head\.unknown', left_out has"),
]


def state_of(module):
    """All that a resize may change, by identity."""
    return [
        (id(part), {name: v if isinstance(v, (int, str, tuple, bool)) else id(v) for name, v in held.items()})
        for part in module.modules()
        for held in (vars(part), part._parameters, part._buffers)
    ]


@pytest.mark.parametrize(("path", "value", "field"), DAMAGES, ids=[f"{number}" for number in range(len(DAMAGES))])
def test_a_damaged_field_is_named_and_nothing_changes(file, path, value, field):
    kind, checkpoint = file
    module = made_reader(kind)
    before = state_of(module)
    with pytest.raises(ValueError, match=rf"^the 'softprune' record is damaged: {field}") as raised:
        resize(module, damaged(checkpoint, *path, value=value))
    assert state_of(module) == before
    assert len(str(raised.value)) < 500


UNFITTING = {
    "a count that the module has not": (("counts", "attn.unknown"), 1, r"^attn: the checkpoint has 'attn\.unknown'"),
    "a count of no module": (("counts", "tail.unknown"), 1, r"^tail: the checkpoint has 'tail\.unknown'"),
    "a count that is a switch": (("counts", "training"), 1, r"^training: the checkpoint has 'training'"),
    "a count that is computed": (("counts", "global_step"), 1, r"^global_step: the checkpoint has 'global_step'"),
    "a tensor for a method": (("unsaved", "attn.forward"), 1, r"^attn: the checkpoint has the tensor 'attn\.forward'"),
    "a tensor for a module": (("unsaved", "attn.q"), 1, r"^attn: the checkpoint has the tensor 'attn\.q'"),
    "a tensor for PyTorch": (("unsaved", "attn._compiled_call_impl"), 1, r"^attn: the checkpoint has the tensor"),
    "a tensor for a property": (("unsaved", "trainer"), 1, r"^trainer: the checkpoint has the tensor 'trainer'"),
    "a tensor for a number": (("unsaved", "d_model"), 1, r"^d_model: the checkpoint has the tensor 'd_model'"),
    "a tensor of no module": (("unsaved", "tail.pe"), 1, r"^tail: the checkpoint has the tensor 'tail\.pe'"),
    "a tensor of no name": (("unsaved", "attn."), 1, r"^attn: the checkpoint has the tensor 'attn\.'"),
}


@pytest.mark.parametrize("case", UNFITTING)
def test_what_the_module_cannot_have_is_named_and_nothing_changes(file, case):
    kind, checkpoint = file
    path, value, message = UNFITTING[case]
    value = torch.ones(2) if path[0] == "unsaved" else value
    module = made_reader(kind)
    before = state_of(module)
    with pytest.raises(ValueError, match=message):
        resize(module, damaged(damaged(checkpoint, *path, value=value), "dense", *path, value=value))
    assert state_of(module) == before


def test_a_tensor_of_another_rank_is_refused(file):
    kind, checkpoint = file
    module = made_reader(kind)
    before = state_of(module)
    with pytest.raises(ValueError, match=r"pos: a tensor has the shape|unsaved\['pos\.pe'\]: a tensor of shape"):
        resize(module, damaged(checkpoint, "unsaved", "pos.pe", value=torch.ones(2, 8)))
    assert state_of(module) == before


@pytest.mark.parametrize("shape", [(2**62, 0), (0, 2**62, 3)])
def test_an_empty_tensor_of_absurd_strides_is_refused(shape):
    class Late(torch.nn.Module):
        table = None

    model = made_reader("late")
    model.late = Late()
    checkpoint = {"softprune": {**ModelShapes.of(model).to_dict(), "format": 2, "created_biases": [], "results": []}}
    record = checkpoint["softprune"]
    record["unsaved"] = {"late.table": torch.empty(0).as_strided(shape, [1] * len(shape))}
    record["dense"] = {name: record[name] for name in ("layers", "shapes", "unsaved")}
    before = state_of(model)
    with pytest.raises(ValueError, match=r"^the 'softprune' record asks for new tensors"):
        resize(model, checkpoint)
    assert state_of(model) == before


# ----------------------------------------------------------------------------------------------------------------- fuzz

TENSORS = st.sampled_from(
    [
        *(HUGE, torch.ones(1, 10, 8), torch.ones(1, 10, 12), torch.ones(()), torch.ones(0), torch.ones(3).to_sparse()),
        *(torch.arange(80).view(1, 10, 8), torch.ones(1, 10, 8, dtype=torch.bfloat16), torch.ones(8).expand(1, 10, 8)),
    ]
)
NAMES = st.sampled_from(
    [
        *("pos.pe", "d_model", "attn.num_heads", "attn", "training", "pos.new", "head.weight", "head.in_features"),
        *("", ".", "_version", "trainer", "attn.forward", "pos._buffers"),
    ]
) | st.text(max_size=3)
VALUES = st.integers() | st.integers(0, 13) | st.none() | st.floats() | NAMES | TENSORS
FIELDS = st.dictionaries(NAMES, VALUES, max_size=3) | VALUES
CHANGES = st.lists(
    st.tuples(st.sampled_from(["", "dense", "both"]), st.sampled_from(["counts", "unsaved"]), st.booleans(), FIELDS),
    min_size=1,
    max_size=3,
)
REFUSED = (
    r"the 'softprune' record |neither a checkpoint|[^:]*: (the checkpoint has |a tensor has the shape )|.* one tensor"
)


def refusal(module, source):
    """What resizing complains about, if it does."""
    try:
        resize(module, source)
    except ValueError as error:
        return str(error)
    return None


@hypothesis.settings(
    max_examples=400,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(changes=CHANGES)
def fuzz(kind, checkpoint, changes):
    record = copy.deepcopy(checkpoint["softprune"])
    for where, field, whole, content in changes:
        for form in [record] * (where != "dense") + [record["dense"]] * (where != ""):
            old = form.get(field)
            both = isinstance(old, dict) and isinstance(content, dict) and not whole
            form[field] = {**old, **content} if both else content
    module = made_reader(kind)
    before = state_of(module)
    error = refusal(module, {**checkpoint, "softprune": record})
    if error is not None:
        assert re.match(REFUSED, error), error
        assert state_of(module) == before
        return
    module.load_state_dict(checkpoint["state_dict"])
    assert sum(t.numel() for t in (*module.parameters(), *module.buffers())) < 2000
    again: dict[str, object] = {}
    module.on_save_checkpoint(again)
    resize(made_reader(kind), again["softprune"])  # what it says now is a record again


@pytest.mark.slow
def test_any_change_of_the_fields_is_refused_by_name_or_harmless(file):
    fuzz(*file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
def test_so_does_a_running_mean_of_a_layer_that_keeps_its_channels(tmp_path):
    module, path = made(FrozenWithNorm), tmp_path / "model.ckpt"
    callback = softpruning(bounds={"encoder.3": [0.0, 0.0]}, tolerance=0.3)
    fit(tmp_path, module, callback, max_epochs=2).save_checkpoint(path)
    assert (module.encoder[0].out_features < 16, module.encoder[3].out_features) == (True, 8)
    assert torch.equal(outputs(load_from_checkpoint(FrozenWithNorm, path)), outputs(module))
