"""Oracles: the uninterrupted run, and the saved model's own outputs."""

import copy
import io
import itertools
import json
import pickle
import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_softprune import (
    PrunedCheckpointMixin,
    PruningResult,
    find_groups,
    load_from_checkpoint,
    resize,
)
from lightning_softprune.checkpoint import ModelShapes, keep_record
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support import zoo
from support.modules import (
    AtEpochStart,
    AutoEncoder,
    assert_optimizers_hold_live_parameters,
    count,
    loaders,
    made,
    softpruning,
    trainer_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Wrapped(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net


def prune(net, x, remove=lambda n: range(0, n, 2)):
    """Remove every other channel of each group, or as told."""
    groups = [group for group in find_groups(net, x) if group.prunable]
    apply_plan(
        net, groups, Plan(tuple(tuple(remove(group.num_channels))[: group.num_channels - 1] for group in groups))
    )
    return net


def record_of(net, dense):
    """The record that a checkpoint of this network would have."""
    module = Wrapped(net)
    keep_record(module, ModelShapes.of(Wrapped(dense)), [])
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    return in_file(checkpoint["softprune"])


def in_file(value):
    """Through a file that is loaded with `weights_only=True`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def built(case, seed=5):
    return case.make(seed)[0]


def assert_like(loaded, saved, x):
    assert {name: p.shape for name, p in loaded.named_parameters()} == {n: p.shape for n, p in saved.named_parameters()}
    assert str(loaded) == str(saved)
    with torch.no_grad():
        for a, b in zip(flat(loaded(x)), flat(saved(x)), strict=True):
            assert torch.equal(a, b)


def flat(output):
    return output if isinstance(output, tuple) else (output,)


CASES = [pytest.param(case, id=f"{case.name}{len(case.shape)}") for case in zoo.PRUNABLE]
REMOVE = {
    "half": lambda n: range(0, n, 2),
    "to_one": lambda n: range(n),  # all but the last
}

# ------------------------------------------------------------------------------------------------- resize, every layer


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("case", CASES)
def test_a_fresh_network_takes_the_shape_and_the_weights_of_a_pruned_one(case, remove):
    net, x = case.make()
    prune(net, x, REMOVE[remove])
    fresh = Wrapped(built(case))
    resize(fresh, {"softprune": record_of(net, built(case))})
    fresh.load_state_dict(Wrapped(net).state_dict())
    assert_like(fresh.net, net, x)


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("case", CASES)
def test_a_pruned_network_grows_back(case, remove):
    dense, x = case.make()
    net = Wrapped(prune(built(case), x, REMOVE[remove]))
    resize(net, record_of(dense, dense))
    net.load_state_dict(Wrapped(dense).state_dict())
    assert_like(net.net, dense, x)


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_alone_is_enough_where_shapes_tell(case):
    dense, x = case.make()
    net = prune(copy.deepcopy(dense), x)
    shrunk, grown = built(case), prune(built(case), x, lambda n: range(0, n, 3))
    resize(shrunk, net.state_dict())
    shrunk.load_state_dict(net.state_dict())
    assert_like(shrunk, net, x)
    resize(grown, dense.state_dict())
    grown.load_state_dict(dense.state_dict())
    assert_like(grown, dense, x)


class NoAffine(nn.Module):
    """Normalisations that have no tensor of their own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.layer_norm = nn.LayerNorm(8, elementwise_affine=False)
        self.inner = nn.Linear(8, 6)
        self.group_norm = nn.GroupNorm(2, 6, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.group_norm(self.inner(self.layer_norm(self.body(x)).relu())).relu())


def test_layers_without_tensors_are_sized_by_the_record_and_refused_without():
    net, x = NoAffine(), torch.randn(3, 5)
    dense = copy.deepcopy(net)
    prune(net, x)
    assert (net.layer_norm.normalized_shape, net.group_norm.num_channels) == ((4,), 2)
    fresh = Wrapped(NoAffine())
    resize(fresh, record_of(net, dense))
    fresh.load_state_dict(Wrapped(net).state_dict())
    assert_like(fresh.net, net, x)

    other = NoAffine()
    before = copy.deepcopy(other.state_dict()), str(other)
    with pytest.raises(ValueError, match=r"^layer_norm: no tensor of this LayerNorm tells its size.*whole checkpoint"):
        resize(other, net.state_dict())
    assert str(other) == before[1]
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), before[0].values(), strict=True))
    resize(other, dense.state_dict())  # nothing to change, nothing to ask
    other.body, other.layer_norm = nn.Identity(), nn.Identity()
    partial = {k: v for k, v in net.state_dict().items() if not k.startswith("body")}
    with pytest.raises(ValueError, match=r"^group_norm: no tensor of this GroupNorm"):
        resize(other, partial)


def test_layers_without_tensors_elsewhere_are_no_obstacle():
    def build():
        return nn.Sequential(nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))

    net, fresh, x = build(), build(), torch.randn(3, 5)
    resize(fresh, prune(net, x).state_dict())
    fresh.load_state_dict(net.state_dict())
    assert_like(fresh, net, x)


def test_bias_created_by_compensation_is_made_and_removed():
    dense = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    net, x = copy.deepcopy(dense), torch.randn(3, 4)
    prune(net, x)
    net[2].bias = nn.Parameter(torch.randn(2))
    record = record_of(net, dense)
    assert record["created_biases"] == ["net.2.bias"]
    for source in (record, Wrapped(net).state_dict()):
        fresh = Wrapped(copy.deepcopy(dense)).double().requires_grad_(False)
        resize(fresh, source)
        assert (fresh.net[2].bias.dtype, fresh.net[2].bias.requires_grad) == (torch.float64, False)
        assert list(dict(fresh.named_parameters())) == ["net.0.weight", "net.2.weight", "net.2.bias"]
        fresh.float().load_state_dict(Wrapped(net).state_dict())
        assert_like(fresh.net, net, x)
    back = Wrapped(net)
    resize(back, record_of(dense, dense))
    back.load_state_dict(Wrapped(dense).state_dict())
    assert_like(back.net, dense, x)


def test_new_tensors_are_like_the_old_ones():
    def build():
        net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3, bias=False)).to(
            memory_format=torch.channels_last, dtype=torch.bfloat16
        )
        net[0].weight.note = "kept"
        net[0].requires_grad_(False)
        return net

    net = prune(build(), torch.randn(1, 2, 8, 8, dtype=torch.bfloat16))
    fresh = build()
    weight = fresh[0].weight.clone()
    resize(fresh, net.state_dict())
    first, second = fresh[0].weight, fresh[2].weight
    assert isinstance(first, nn.Parameter)
    assert first.dtype == torch.bfloat16
    assert first.note == "kept"
    assert (first.requires_grad, second.requires_grad) == (False, True)
    assert second.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, weight[:4])


def test_tied_weights_stay_one_tensor_also_when_the_file_names_them_once():
    case = zoo.BY_NAME["Transformer"]
    net, x = case.make()
    prune(net, x)
    for state in (net.state_dict(), {k: v for k, v in net.state_dict().items() if k != "head.weight"}):
        fresh = built(case)
        resize(fresh, state)
        assert fresh.head.weight is fresh.embedding.weight
        assert fresh.head.weight.shape == (11, 4)


def test_meta_and_lazy_modules_are_no_obstacle():
    net = prune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    resize(fresh, net.state_dict())
    assert fresh[0].weight.is_meta
    fresh.load_state_dict(net.state_dict(), assign=True)
    assert_like(fresh, net, torch.randn(2, 4))
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    resize(lazy, net.state_dict())
    lazy.load_state_dict(net.state_dict())
    assert torch.equal(lazy(torch.ones(1, 4)), net(torch.ones(1, 4)))


# ------------------------------------------------------------------------------------------------------------- refusals


def mlp(*widths, **arguments):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, **arguments), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


OTHERS = {
    "another kind of layer": (mlp(4, 8, 2), nn.Sequential(nn.Conv1d(4, 8, 1), nn.ReLU(), nn.Linear(8, 2)), "0"),
    "deeper": (mlp(4, 8, 2), mlp(4, 8, 8, 2), "4"),
    "shallower": (mlp(4, 8, 8, 2), mlp(4, 8, 2), "4"),
    "other names": (mlp(4, 8, 2), nn.Sequential(nn.Sequential(mlp(4, 8, 2))), "0.0.0"),
    "kernel": (nn.Sequential(nn.Conv2d(1, 8, 3)), nn.Sequential(nn.Conv2d(1, 6, 5)), "0"),
    "vocabulary": (nn.Sequential(nn.Embedding(9, 8)), nn.Sequential(nn.Embedding(7, 6)), "0"),
    "heads": (
        nn.Sequential(nn.Linear(4, 12), nn.MultiheadAttention(12, 3)),
        nn.Sequential(nn.Linear(4, 8), nn.MultiheadAttention(8, 2)),
        "1",
    ),
    "groups": (nn.Sequential(nn.GroupNorm(4, 8)), nn.Sequential(nn.GroupNorm(3, 6)), "0"),
    "recurrent": (nn.Sequential(nn.LSTM(4, 8)), nn.Sequential(nn.LSTM(4, 6)), "0"),
    "computed weight": (
        nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))),
        nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))),
        "0",
    ),
    "two axes": (nn.Sequential(nn.LayerNorm((2, 8))), nn.Sequential(nn.LayerNorm((2, 6))), "0"),
}


@pytest.mark.parametrize("with_record", [True, False], ids=["record", "state_dict"])
@pytest.mark.parametrize("what", OTHERS)
def test_another_architecture_is_refused_by_the_modules_name_and_nothing_changes(what, with_record):
    model, saved, name = OTHERS[what]
    if with_record:
        saved, model, name = Wrapped(saved), Wrapped(model), f"net.{name}"
        source = {"state_dict": saved.state_dict(), "softprune": record_of(saved.net, saved.net)}
    else:
        source = saved.state_dict()
    tensors, text, attributes = dict(model.named_parameters()), str(model), set(vars(model))
    with pytest.raises(ValueError, match=rf"^{name.replace('.', '[.]')}: "):
        resize(model, source)
    assert str(model) == text
    assert set(vars(model)) == attributes
    assert all(tensors[name] is parameter for name, parameter in model.named_parameters())


def test_a_tied_tensor_cannot_have_two_shapes():
    model = mlp(4, 4, 4)
    model[2].weight = model[0].weight
    saved = mlp(4, 4, 2)
    with pytest.raises(ValueError, match=r"^2: 2.weight is one tensor with 0.weight"):
        resize(model, saved.state_dict())


@pytest.mark.parametrize("source", [[1, 2], {}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": [1]}, None, "x.ckpt"])
def test_what_is_no_checkpoint_is_refused(source):
    with pytest.raises(ValueError, match=r"neither a checkpoint, nor its .softprune. record, nor a state dict"):
        resize(mlp(4, 8, 2), source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99; this version of lightning-softprune reads formats up to 1"),
        ({"format": None}, "it has no format version"),
        ({"layers": None}, "record is damaged"),
        ({"shapes": {"0.weight": "wide"}}, "record is damaged"),
    ],
)
def test_a_damaged_or_newer_record_is_refused(change, message):
    record = record_of(mlp(4, 8, 2), mlp(4, 8, 2)) | change
    with pytest.raises(ValueError, match=message):
        resize(Wrapped(mlp(4, 8, 2)), {"softprune": record})


# ------------------------------------------------------------------------------------------------------ in a training


class Scheduled(AutoEncoder):
    """No biases (compensation creates them), two parameter groups, Adam with a scheduler, LayerNorm without affine."""

    def __init__(self, hidden: int = 16, latent: int = 8):
        super().__init__(hidden, latent, bias=False)
        self.save_hyperparameters()
        self.norm = nn.LayerNorm(latent, elementwise_affine=False)
        self.loaded = []

    def forward(self, x):
        return self.decoder(self.norm(self.encoder(x)))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def on_load_checkpoint(self, checkpoint):
        self.loaded.append(tuple(self.encoder[0].weight.shape))

    def configure_optimizers(self):
        thin = [p for p in self.parameters() if p.ndim < 2]
        wide = [p for p in self.parameters() if p.ndim >= 2]
        optimizer = torch.optim.Adam([{"params": wide}, {"params": thin, "lr": 2e-2}], lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


class Stateful(DataLoader):
    """A loader that knows where it was."""

    position = start = 0

    def __iter__(self):
        self.position, start, self.start = self.start, self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.position = number + 1
                yield batch

    def state_dict(self):
        return {"position": self.position % len(self)}

    def load_state_dict(self, state):
        self.start = state["position"]


def data(module=None):
    plain = loaders(module)
    return plain | {"train_dataloaders": Stateful(plain["train_dataloaders"].dataset, batch_size=8)}


def keep_all(folder, **when):
    return ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **when)


def run(tmp_path, module, *callbacks, ckpt_path=None, seed=7, **arguments):
    pl.seed_everything(seed, verbose=False)
    has_checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = trainer_of(
        tmp_path, *callbacks, **{"max_epochs": 5, "enable_checkpointing": has_checkpoints, **arguments}
    )
    trainer.fit(module, **data(module), ckpt_path=ckpt_path)
    return trainer


ROUNDS = {"epochs": [1, 3], "target_sparsity": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run with two rounds, with a checkpoint after every epoch and after every second step, full and weights only."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    callback, module = softpruning(**ROUNDS), made(Scheduled)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = run(
        folder,
        module,
        callback,
        keep_all(folder / "epochs", every_n_epochs=1, save_last=True),
        keep_all(folder / "steps", every_n_train_steps=2),
        keep_all(folder / "weights", every_n_train_steps=6, save_weights_only=True),
    )
    torch.set_num_threads(threads)
    return folder, trainer, module, callback


def file_of(folder, kind, **at):
    (found,) = (folder / kind).glob("-".join(f"{name}={value}" for name, value in at.items()) + "*.ckpt")
    return found


def sizes(module):
    return [tuple(p.shape) for p in module.parameters()]


def pruned_elsewhere(module):
    """Bring a module into a shape that no checkpoint of the run has."""
    batch = next(iter(loaders(None)["train_dataloaders"]))
    groups = [group for group in find_groups(module, batch) if group.prunable]
    before = ModelShapes.of(module)
    apply_plan(module, groups, Plan(tuple((0,) for _ in groups)))
    keep_record(module, before, [])
    return module


def plans(results):
    return [(r.epoch, r.groups, r.costs_after, r.sparsity) for r in results]


STEPS = {
    "before": ("epochs", {"epoch": 0}, 0),
    "mid-epoch before": ("steps", {"epoch": 0, "step": 4}, 0),
    "at the first round": ("steps", {"epoch": 0, "step": 6}, 0),
    "mid-epoch after": ("steps", {"epoch": 1, "step": 8}, 1),
    "between": ("epochs", {"epoch": 1}, 1),
    "last step before the second": ("steps", {"epoch": 2, "step": 18}, 1),
    "at the second round": ("epochs", {"epoch": 2}, 1),
    "after": ("epochs", {"epoch": 3}, 2),
}


@pytest.mark.parametrize(
    ("where", "memory"), [*((where, "dense") for where in STEPS), ("before", "pruned"), ("between", "pruned")]
)
def test_a_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, where, memory):
    folder, _, whole, callback = uninterrupted
    kind, at, done = STEPS[where]
    path = file_of(folder, kind, **at)
    step = torch.load(path, weights_only=True)["global_step"]
    again, module = softpruning(**ROUNDS), made(Scheduled, seed=3)
    if memory == "pruned":
        pruned_elsewhere(module)
    module.losses.clear()
    seen = []

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((len(again.results), "on_load_checkpoint" in vars(pl_module)))

    trainer = run(tmp_path, module, again, AtStart(), ckpt_path=path, seed=99)
    assert seen == [(done, False)]
    assert len(module.losses) == len(whole.losses) - step
    assert max(abs(a - b) for a, b in zip(module.losses, whole.losses[step:], strict=True)) <= 1e-6
    assert plans(again.results) == plans(callback.results)
    assert sizes(module) == sizes(whole)
    assert_optimizers_hold_live_parameters(trainer, module)
    assert again.results[-1].sparsity == pytest.approx(1 - count(module) / count(Scheduled()), abs=1e-6)
    assert len(module.loaded) == 1  # the user's own hook


@pytest.mark.parametrize("place", ["before the callback", "after the callback"])
def test_a_checkpoint_from_the_start_of_the_rounds_epoch_is_resumed(tmp_path, place):
    path = tmp_path / "start.ckpt"

    def save(trainer, pl_module):
        trainer.save_checkpoint(path)

    whole, callback = made(Scheduled), softpruning(epochs=1)
    saving = AtEpochStart(save, epoch=1)
    run(tmp_path, whole, *([saving, callback] if place == "before the callback" else [callback, saving]), max_epochs=2)
    module, again = made(Scheduled, seed=3), softpruning(epochs=1)
    run(tmp_path, module, again, ckpt_path=path, max_epochs=3)  # Lightning counts such an epoch twice
    assert plans(again.results) == plans(callback.results)
    assert max(abs(a - b) for a, b in zip(module.losses[:6], whole.losses[6:], strict=True)) <= 1e-6


@pytest.mark.parametrize("first", ["averaging", "pruning"])
def test_a_run_with_averaged_weights_is_resumed(tmp_path, first):
    def callbacks(*more):
        pair = [softpruning(epochs=1), EMAWeightAveraging(decay=0.5)]
        return [*(pair if first == "pruning" else pair[::-1]), *more]

    whole, module = made(Scheduled), made(Scheduled, seed=3)
    run(tmp_path, whole, *callbacks(keep_all(tmp_path)), max_epochs=3)
    (path,) = tmp_path.glob("epoch=1*.ckpt")
    run(tmp_path, module, *callbacks(), max_epochs=3, ckpt_path=path)
    assert max(abs(a - b) for a, b in zip(module.losses, whole.losses[12:], strict=True)) <= 1e-6
    averaged = zip(module.state_dict().values(), whole.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in averaged)


def test_no_trace_of_loading_is_left(uninterrupted):
    _, trainer, module, _ = uninterrupted
    assert "on_load_checkpoint" not in vars(module)
    dense = made(Scheduled)
    before = set(vars(dense))
    trainer.validate(dense, loaders(None)["val_dataloaders"], verbose=False)
    assert set(vars(dense)) - before <= {"_trainer"}


def test_a_checkpoint_is_plain_and_has_a_record_from_the_first_round_on(uninterrupted):
    folder, _, module, callback = uninterrupted
    for kind in ("epochs", "weights"):
        found = [torch.load(file_of(folder, kind, epoch=e), weights_only=True).get("softprune") for e in range(5)]
        assert found[0] is None
        for epoch, record in enumerate(found[1:], start=1):
            results = [PruningResult.from_dict(result) for result in record["results"]]
            assert results == [result for result in callback.results if result.epoch <= epoch]
            json.dumps(record)
        assert ModelShapes.from_dict(found[4]) == ModelShapes.of(module)
        assert ModelShapes.from_dict(found[4]["dense"]) == ModelShapes.of(Scheduled())
        assert set(found[4]["created_biases"]) >= {"decoder.0.bias"}


@pytest.mark.parametrize("memory", ["dense", "pruned"])
@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize("kind", ["epochs", "weights"])
def test_validate_test_and_predict_take_any_checkpoint_into_any_shape(uninterrupted, tmp_path, kind, epoch, memory):
    folder, *_ = uninterrupted
    path = file_of(folder, kind, epoch=epoch)
    oracle = load_from_checkpoint(Scheduled, path)
    val = loaders(None)["val_dataloaders"]
    module = made(Scheduled, seed=3)
    if memory == "pruned":
        pruned_elsewhere(module)
    trainer = trainer_of(tmp_path, softpruning(**ROUNDS))
    with torch.no_grad():
        expected = torch.cat([oracle(x) for (x,) in val])
        loss = oracle.loss([torch.cat([x for (x,) in val])]).item()
    assert torch.equal(torch.cat(trainer.predict(module, val, ckpt_path=path)), expected)
    for run_of, name in ((trainer.validate, "val_loss"), (trainer.test, "test_loss")):
        (metrics,) = run_of(module, val, ckpt_path=path, verbose=False)
        assert metrics[name] == pytest.approx(loss, abs=1e-6)
        assert "on_load_checkpoint" not in vars(module)


def test_best_and_last_work_after_a_fit_and_leave_its_results_alone(tmp_path):
    callback, module = softpruning(epochs=2, reset_monitors=False), made(Scheduled)
    trainer = run(
        tmp_path,
        module,
        callback,
        ModelCheckpoint(tmp_path, save_last=True, monitor="epoch_number", mode="min", save_top_k=-1),
        EpochNumber(),
    )
    val = loaders(None)["val_dataloaders"]
    pruned, results = sizes(module), list(callback.results)
    trainer.test(module, val, ckpt_path="best", verbose=False)  # the dense model of the first epoch
    assert sizes(module) == sizes(Scheduled())
    assert callback.results == results
    trainer.test(module, val, ckpt_path="last", verbose=False)
    assert sizes(module) == pruned
    fresh = softpruning(epochs=2)
    trainer_of(tmp_path, fresh).test(made(Scheduled), val, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert fresh.results == results


class EpochNumber(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("epoch_number", float(trainer.current_epoch))


def test_a_saved_model_is_right_when_saved_again_in_any_way(uninterrupted, tmp_path):
    folder, *_ = uninterrupted
    val = loaders(None)["val_dataloaders"]
    loaded = load_from_checkpoint(Scheduled, file_of(folder, "weights", epoch=4))
    (x,) = next(iter(val))
    for number, model in enumerate((loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))):
        trainer = run(tmp_path / str(number), model, max_epochs=1)  # another run, without the callback
        model.eval()
        for weights_only in (True, False):
            path = tmp_path / f"{number}-{weights_only}.ckpt"
            trainer.save_checkpoint(path, weights_only=weights_only)
            again = load_from_checkpoint(Scheduled, path).eval()
            assert torch.equal(again(x), model(x))
            assert again.on_save_checkpoint.module is again


def test_history_after_another_round_is_that_of_the_new_run_and_dense_stays_dense(uninterrupted, tmp_path):
    folder, *_ = uninterrupted
    loaded = load_from_checkpoint(Scheduled, file_of(folder, "epochs", epoch=4))
    before = count(loaded)
    callback = softpruning(epochs=1, target_sparsity=0.3)
    trainer = run(tmp_path, loaded, callback, max_epochs=2)
    assert callback.results[0].costs_before.params == before
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    record = torch.load(tmp_path / "again.ckpt", weights_only=True)["softprune"]
    assert [result["epoch"] for result in record["results"]] == [1]
    assert ModelShapes.from_dict(record["dense"]) == ModelShapes.of(Scheduled())
    again = load_from_checkpoint(Scheduled, tmp_path / "again.ckpt").eval()
    (x,) = next(iter(loaders(None)["val_dataloaders"]))
    assert torch.equal(again(x), loaded.eval()(x))


def test_a_second_fit_starts_afresh_and_a_continued_one_does_not_repeat(tmp_path):
    callback, module = softpruning(epochs=1), made(Scheduled)
    trainer = run(tmp_path, module, callback, max_epochs=2)
    first = list(callback.results)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, **data(module))
    assert callback.results == first
    assert len(module.losses) == 3 * len(data()["train_dataloaders"])
    other = made(Scheduled)
    run(tmp_path, other, callback, max_epochs=2)
    assert plans(callback.results) == plans(first)
    assert callback.results is not first
    assert sizes(other) == sizes(module)


def test_a_checkpoint_from_a_run_without_the_callback_brings_no_history(tmp_path):
    run(tmp_path, made(Scheduled), keep_all(tmp_path), max_epochs=1)
    callback = softpruning(epochs=1)
    module = made(Scheduled)
    run(tmp_path, module, callback, max_epochs=2)
    (path,) = tmp_path.glob("epoch=0*.ckpt")
    trainer = run(tmp_path, module, callback, max_epochs=2, ckpt_path=path)  # grown back, then pruned anew
    assert [result.epoch for result in callback.results] == [1]
    assert callback.results[0].costs_before.params == count(Scheduled())
    assert_optimizers_hold_live_parameters(trainer, module)


@pytest.mark.parametrize(("horizon", "epochs"), [(1, 2), (3, 4), (None, 6)])
def test_a_new_finetune_horizon_works(tmp_path, horizon, epochs):
    run(tmp_path, made(Scheduled), softpruning(epochs=1, finetune_epochs=1), keep_all(tmp_path), max_epochs=6)
    (path,) = tmp_path.glob("epoch=1*.ckpt")
    module, callback = made(Scheduled), softpruning(epochs=1, finetune_epochs=horizon)
    trainer = run(tmp_path, module, callback, max_epochs=6, ckpt_path=path)
    assert trainer.current_epoch == epochs
    assert len(callback.results) == 1


@pytest.mark.parametrize("epoch", [0, 1, 3])
@pytest.mark.parametrize(("horizon", "end"), [(None, 5), (2, None)])
def test_a_run_that_only_pruned_is_finetuned_later_as_if_it_had_been_at_once(tmp_path, epoch, horizon, end):
    whole = made(Scheduled)
    run(tmp_path, whole, softpruning(epochs=epoch, finetune_epochs=horizon))
    folder = tmp_path / "pruned"
    pruned = softpruning(epochs=epoch, finetune_epochs=0)
    trainer = run(tmp_path, made(Scheduled), pruned, keep_all(folder, save_last=True))
    trainer.save_checkpoint(folder / "afterwards.ckpt")
    assert trainer.current_epoch == epoch
    for path in (folder / "last.ckpt", folder / "afterwards.ckpt"):
        module, callback = made(Scheduled, seed=3), softpruning(epochs=epoch, finetune_epochs=horizon)
        trainer = run(tmp_path, module, callback, ckpt_path=path)
        assert plans(callback.results) == plans(pruned.results)
        assert trainer.current_epoch == (end or epoch + horizon)
        assert trainer.global_step == len(whole.losses)
        tuned = whole.losses[6 * epoch :]
        assert len(module.losses) == len(tuned) > 0
        assert max(abs(a - b) for a, b in zip(module.losses, tuned, strict=True)) <= 1e-6
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), whole.parameters(), strict=True)
        )


def test_a_run_that_only_pruned_is_finetuned_by_the_same_trainer(tmp_path):
    module, callback = made(Scheduled), softpruning(epochs=1, finetune_epochs=0)
    trainer = run(tmp_path, module, callback)
    callback.finetune_epochs = None
    trainer.fit(module, **data(module))
    assert [result.epoch for result in callback.results] == [1]
    assert trainer.current_epoch == 5
    assert len(module.losses) == 5 * len(data()["train_dataloaders"])


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")  # Lightning looks for a checkpoint of an earlier exception
def test_an_exception_leaves_no_trace_and_its_checkpoint_has_the_record(tmp_path):
    class Broken(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise ZeroDivisionError

    module = made(Scheduled)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, module, softpruning(epochs=1), Broken(), OnExceptionCheckpoint(tmp_path, "broken"))
    assert "on_load_checkpoint" not in vars(module)
    loaded = load_from_checkpoint(Scheduled, tmp_path / "broken.ckpt")
    assert sizes(loaded) == sizes(module)
    other = mlp(4, 8, 2)
    dense = made(AutoEncoder)
    with pytest.raises((ValueError, RuntimeError)):
        trainer_of(tmp_path, softpruning()).validate(
            dense, loaders(None)["val_dataloaders"], ckpt_path=wrong(tmp_path, other)
        )
    assert "on_load_checkpoint" not in vars(dense)


def wrong(tmp_path, net):
    checkpoint = {
        "state_dict": net.state_dict(),
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    return tmp_path / "wrong.ckpt"


def test_on_load_checkpoint_of_the_instance_comes_back(uninterrupted, tmp_path):
    folder, *_ = uninterrupted
    module, calls = made(Scheduled), []
    module.on_load_checkpoint = calls.append
    own = module.on_load_checkpoint
    trainer = trainer_of(tmp_path, softpruning())
    trainer.validate(
        module, loaders(None)["val_dataloaders"], ckpt_path=file_of(folder, "epochs", epoch=4), verbose=False
    )
    assert len(calls) == 1
    assert vars(module)["on_load_checkpoint"] is own


def test_the_users_hook_may_make_an_old_checkpoint_fit(tmp_path):
    class Renamed(Scheduled):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {k.removeprefix("old_"): v for k, v in checkpoint["state_dict"].items()}

    net = made(Scheduled)
    state = {f"old_{name}": value for name, value in net.state_dict().items()}
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": state, "pytorch-lightning_version": pl.__version__, "epoch": 0, "global_step": 0}, path)
    module = made(Renamed, seed=3)
    trainer_of(tmp_path, softpruning()).validate(
        module, loaders(None)["val_dataloaders"], ckpt_path=path, verbose=False
    )
    assert torch.equal(module.encoder[0].weight, net.encoder[0].weight)
    assert torch.equal(load_from_checkpoint(Renamed, path).encoder[0].weight, net.encoder[0].weight)


# ------------------------------------------------------------------------------------------------- without a trainer


class Mixed(PrunedCheckpointMixin, Scheduled):
    pass


@pytest.mark.parametrize("kind", ["epochs", "weights"])
@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize("load", ["function", "mixin", "both"])
def test_loading_needs_no_trainer_and_no_callback(uninterrupted, load, epoch, kind):
    folder, *_ = uninterrupted
    path = file_of(folder, kind, epoch=epoch)
    if load == "function":
        module = load_from_checkpoint(Scheduled, path)
    elif load == "mixin":
        module = Mixed.load_from_checkpoint(path, map_location="cpu", strict=True)
    else:
        module = load_from_checkpoint(Mixed, path)
    saved = torch.load(path, weights_only=True)
    assert type(module) is (Scheduled if load == "function" else Mixed)
    assert module.state_dict().keys() == saved["state_dict"].keys()
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in module.state_dict().items())
    if "softprune" in saved:
        assert ModelShapes.of(module) == ModelShapes.from_dict(saved["softprune"])
    assert module.loaded == [tuple(saved["state_dict"]["encoder.0.weight"].shape)]
    for cls in (Mixed, Scheduled, AutoEncoder):
        assert ("on_load_checkpoint" in vars(cls)) == (cls is Scheduled)


class NoBias(PrunedCheckpointMixin, AutoEncoder):
    """Compensation creates its biases; the optimizer is given names, or not."""

    def __init__(self, names=False):
        super().__init__(bias=False)
        self.save_hyperparameters()

    def configure_optimizers(self):
        rates = [{"params": part, "lr": rate} for part, rate in zip(self.parts(), (1e-2, 3e-3), strict=True)]
        return torch.optim.Adam(rates)

    def parts(self):
        for part in (self.encoder, self.decoder):
            yield list(part.named_parameters()) if self.hparams.names else list(part.parameters())


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.parametrize("load", ["function", "mixin"])
@pytest.mark.parametrize("names", [True, False])
def test_training_goes_on_without_the_callback_also_with_biases_that_a_round_created(tmp_path, load, names):
    whole = made(NoBias, names=names)
    trainer = run(tmp_path, whole, softpruning(epochs=1), keep_all(tmp_path), max_epochs=4)
    (path,) = tmp_path.glob("epoch=2*.ckpt")
    assert len(torch.load(path, weights_only=True)["softprune"]["created_biases"]) >= 2
    module = load_from_checkpoint(NoBias, path) if load == "function" else NoBias.load_from_checkpoint(path)
    again = run(tmp_path, module, max_epochs=4, ckpt_path=path, seed=99)
    expected = whole.losses[18:]
    assert len(module.losses) == len(expected) == 6
    assert max(abs(a - b) for a, b in zip(module.losses, expected, strict=True)) <= 1e-6
    (one,), (other,) = trainer.optimizers, again.optimizers
    for group, same in zip(one.param_groups, other.param_groups, strict=True):
        assert group.get("param_names") == same.get("param_names")
        for parameter, twin in zip(group["params"], same["params"], strict=True):
            torch.testing.assert_close(parameter, twin, rtol=0, atol=1e-6)
            state = one.state[parameter]["exp_avg"], other.state[twin]["exp_avg"]
            torch.testing.assert_close(*state, rtol=0, atol=1e-6)
    if names:
        assert [group["param_names"] for group in again.optimizers[0].param_groups] == [
            [name for name, _ in part.named_parameters()] for part in (module.encoder, module.decoder)
        ]


def test_hyperparameters_are_those_of_the_file_unless_given(tmp_path):
    module = made(Scheduled, hidden=20, latent=6)
    trainer = run(tmp_path, module, softpruning(epochs=1), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_from_checkpoint(Scheduled, tmp_path / "x.ckpt")
    assert dict(loaded.hparams) == {"hidden": 20, "latent": 6}
    assert sizes(loaded) == sizes(module)
    other = load_from_checkpoint(Scheduled, tmp_path / "x.ckpt", hidden=24, map_location="cpu")
    assert other.hparams["hidden"] == 24
    assert sizes(other) == sizes(module)
    (tmp_path / "hparams.yaml").write_text("hidden: 12\nlatent: 10\n")
    assert (
        load_from_checkpoint(Scheduled, tmp_path / "x.ckpt", hparams_file=str(tmp_path / "hparams.yaml")).hparams[
            "latent"
        ]
        == 10
    )
    with open(tmp_path / "x.ckpt", "rb") as file:
        assert sizes(load_from_checkpoint(Scheduled, file)) == sizes(module)


def test_strict_is_the_users_choice(uninterrupted):
    class More(Scheduled):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.extra = nn.Linear(3, 3)

    folder, *_ = uninterrupted
    path = file_of(folder, "epochs", epoch=4)
    with pytest.raises(RuntimeError, match=r"extra\.weight"):
        load_from_checkpoint(More, path)
    with pytest.warns(UserWarning, match=r"extra\.weight"):
        module = load_from_checkpoint(More, path, strict=False)
    assert sizes(module)[:2] == sizes(load_from_checkpoint(Scheduled, path))[:2]


def test_another_class_is_refused_by_the_modules_name(uninterrupted):
    class Other(pl.LightningModule):
        def __init__(self, **_):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv1d(1, 2, 3))

    folder, *_ = uninterrupted
    with pytest.raises(ValueError, match=r"^encoder\.0: "):
        load_from_checkpoint(Other, file_of(folder, "epochs", epoch=4))


@pytest.mark.parametrize("content", [[1, 2], {"a": torch.ones(2)}])
def test_a_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt"):
        load_from_checkpoint(Scheduled, tmp_path / "foreign.ckpt")


def test_a_subclass_named_in_the_file_is_resized_too(uninterrupted):
    class Child(Scheduled):
        def on_load_checkpoint(self, checkpoint):
            super().on_load_checkpoint(checkpoint)
            self.loaded.append("child")

    folder, *_ = uninterrupted
    path = file_of(folder, "epochs", epoch=4)
    assert len(load_from_checkpoint(Child, path).loaded) == 2
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_from_checkpoint(Child, path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert "on_load_checkpoint" not in vars(AutoEncoder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint at all", b"\x80\x02}q\x00."])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ckpt: this file (cannot be read as|is not) a"):
        load_from_checkpoint(AutoEncoder, path)
    with pytest.raises(ValueError, match=r"model\.ckpt' is a path and neither a checkpoint.*load it first"):
        resize(AutoEncoder(), path)
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        load_from_checkpoint(AutoEncoder, tmp_path / "absent.ckpt")
