"""What other callbacks remember of the dense model, and twins."""

import copy
import csv
import gc
import math
import re
import weakref

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.round.commit as commit
import lightning_softprune.round.rehearsal as rehearsal
from lightning_softprune import RandomSearch
from lightning_softprune.report import log_values
from support.modules import made
from support.neighbours import Regressor, pruning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def loaders():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y = x @ torch.randn(8, 3, generator=generator)
    data = TensorDataset(x, y)
    return DataLoader(data, 16), DataLoader(data, 32)


def fit(module, tmp_path, *callbacks, ckpt_path=None, **arguments):
    L.seed_everything(0, verbose=False)
    arguments.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    trainer = L.Trainer(
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **{"max_epochs": 5, "accelerator": "cpu", "logger": False, **arguments},
    )  # fmt: skip
    trainer.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trainer


def test_the_metric_in_every_checkpoint_name_is_the_metric_of_the_file(tmp_path):
    files = ModelCheckpoint(tmp_path, "{epoch}-{val_loss:.5f}", monitor="val_loss", save_top_k=-1)
    fit(Regressor(), tmp_path, pruning(epochs=2), files)
    found = sorted(tmp_path.glob("*.ckpt"))
    assert len(found) == 5
    for path in found:
        state = torch.load(path, weights_only=True)["state_dict"]
        module = Regressor()
        widths = [state[f"body.{i}.weight"].shape[0] for i in (0, 2)]
        module.body = nn.Sequential(nn.Linear(8, widths[0]), nn.ReLU(), nn.Linear(*widths), nn.ReLU())
        module.head = nn.Linear(widths[1], 3)
        module.load_state_dict(state)
        validated = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        score = validated.validate(module, loaders()[1], verbose=False)[0]["val_loss"]
        assert score == pytest.approx(float(re.search(r"val_loss=([\d.]+)\.ckpt", path.name)[1]), abs=2e-5)


@pytest.mark.parametrize("reset", [True, False])
def test_the_best_checkpoint_after_a_round_is_a_pruned_one_only_if_monitors_start_afresh(tmp_path, reset):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)

    class Worse(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            module.offset = (
                100.0 if trainer.current_epoch >= 2 else 0.0
            )  # nothing after the round beats the dense model

    fit(Regressor(), tmp_path, pruning(epochs=2, compensation="none", reset_monitors=reset), best, Worse())

    def rows(path):
        return torch.load(path, weights_only=True)["state_dict"]["body.0.weight"].shape[0]

    assert (rows(best.best_model_path) < 16) == reset
    assert 16 in map(rows, tmp_path.glob("*.ckpt")), "the best dense model's file stays"


@pytest.mark.parametrize(("reset", "epochs"), [(True, 6), (False, 3)])
def test_early_stopping_waits_anew_after_a_round(tmp_path, reset, epochs):
    class Worse(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            module.offset = 100.0 - trainer.current_epoch * 10 if trainer.current_epoch >= 2 else 0.0

    stopping = EarlyStopping("val_loss", patience=1)
    trainer = fit(Regressor(), tmp_path, pruning(epochs=2, reset_monitors=reset), stopping, Worse(), max_epochs=6)
    assert trainer.current_epoch == epochs


@pytest.mark.parametrize("reset", [True, False])
def test_the_plateau_scheduler_does_not_cut_the_rate_because_of_a_round(tmp_path, reset):
    class Worse(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            module.offset = 100.0 - trainer.current_epoch * 10 if trainer.current_epoch >= 2 else 0.0

    trainer = fit(Regressor(plateau=True), tmp_path, pruning(epochs=2, reset_monitors=reset), Worse(), max_epochs=3)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-2 if reset else 1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_pruned_by_the_same_plan(tmp_path, first):
    averaging = EMAWeightAveraging(decay=0.9)
    module = Regressor()
    callback = pruning(epochs=2)
    fit(module, tmp_path, *((callback, averaging) if first else (averaging, callback)))
    shapes = [tuple(p.shape) for p in module.parameters()]
    assert [tuple(p.shape) for p in averaging._average_model.module.parameters()] == shapes
    assert shapes[0][0] < 16


class NormedRegressor(Regressor):
    def __init__(self):
        super().__init__()
        self.body.insert(1, nn.BatchNorm1d(16))
        self.register_buffer("mask", torch.tensor([-torch.inf, 0.0]))


@pytest.mark.parametrize("kind", [Regressor, NormedRegressor])
@pytest.mark.parametrize("healing", [0, 40])
def test_averaged_weights_are_refitted_and_healed_as_the_module_is(tmp_path, monkeypatch, kind, healing):
    """The oracle: an average that forgets at once is the module itself."""

    class AfterTheRound(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 3:
                self.pairs = [
                    (name, value.clone(), averaging._average_model.module.state_dict()[name].clone())
                    for name, value in module.state_dict().items()
                ]

    averaging, after = EMAWeightAveraging(decay=0.0, use_buffers=False), AfterTheRound()
    callback, refitted = pruning(epochs=3, healing=healing), []
    original = rehearsal.refit_readers
    monkeypatch.setattr(rehearsal, "refit_readers", lambda *given: refitted.append(original(*given)))
    fit(made(kind), tmp_path, averaging, callback, after)
    assert refitted
    assert (callback.results[0].healing is not None) == (healing > 0)
    for name, value, averaged in after.pairs:
        torch.testing.assert_close(averaged, value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_fit_that_ends_with_an_average_says_that_its_score_is_another(tmp_path):
    module, callback = made(Regressor), pruning(epochs=3, finetune_epochs=0)
    with pytest.warns(
        UserWarning, match=r"ends with averaged weights, whose val_loss is ([\d.]+); score_after, "
    ) as told:
        trainer = fit(module, tmp_path, EMAWeightAveraging(decay=0.9), callback)
    trained, averaged = callback.results[0].score_after, float(trainer.callback_metrics["val_loss"])
    assert averaged != pytest.approx(trained, rel=1e-2)
    assert any(f"val_loss is {averaged:.4g}; score_after, {trained:.4g}" in str(one.message) for one in told)
    with torch.no_grad():
        losses = [nn.functional.mse_loss(module(x), y).item() for x, y in loaders()[1]]
    assert sum(losses) / len(losses) == pytest.approx(averaged, abs=1e-5)


def test_with_averaged_weights_the_score_before_is_that_of_the_weights_which_are_pruned(tmp_path):
    class Seen(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                self.averaged = float(trainer.callback_metrics["val_loss"])
                with torch.no_grad():
                    self.own = [nn.functional.mse_loss(module(x), y).item() for x, y in loaders()[1]]

    callback, seen = pruning(epochs=2), Seen()
    fit(made(Regressor), tmp_path, seen, EMAWeightAveraging(decay=0.9), callback)
    assert callback.results[0].score_before == pytest.approx(sum(seen.own) / len(seen.own), abs=1e-5)
    assert callback.results[0].score_before != pytest.approx(seen.averaged, rel=1e-2)


@pytest.mark.filterwarnings("ignore:.*Swapping scheduler.*")
@pytest.mark.parametrize(("start", "epoch"), [(4, 2), (2, 3)], ids=["afterwards", "meanwhile"])
@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_goes_on_after_a_round(tmp_path, first, start, epoch):
    module = Regressor()
    averaging, callback = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=start), pruning(epochs=epoch)
    fit(module, tmp_path, *((callback, averaging) if first else (averaging, callback)), max_epochs=6)
    assert module.body[0].out_features < 16
    assert [p.shape for p in averaging._average_model.parameters()] == [p.shape for p in module.parameters()]


@pytest.mark.filterwarnings("ignore:.*Swapping scheduler.*")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.parametrize("first", [True, False])
def test_a_fresh_model_is_validated_from_a_pruned_checkpoint_beside_an_average(tmp_path, first):
    def callbacks():
        both = [pruning(epochs=2), StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
        return both if first else both[::-1]

    files = ModelCheckpoint(tmp_path, save_last=True)
    trained = fit(Regressor(), tmp_path, *callbacks(), files, max_epochs=4).lightning_module
    fresh = Regressor()
    trainer = L.Trainer(
        callbacks=callbacks(), default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.validate(fresh, loaders()[1], ckpt_path=files.last_model_path, verbose=False)
    assert fresh.body[0].out_features == trained.body[0].out_features < 16


class Compiler:
    """A backend that counts what it compiles, and runs it eagerly."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


class Compiled(Regressor):
    def __init__(self, compiler):
        super().__init__()
        self.body = torch.compile(self.body, backend=compiler)


class Silent(Regressor):
    """Can be compiled as a whole: torch's compiler does not get through Lightning's `self.log`."""

    def training_step(self, batch):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    @torch.compiler.disable
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch)


@pytest.mark.parametrize("part", ["body", "module"])
def test_a_compiled_module_is_compiled_anew_once_per_round_and_not_per_trial(tmp_path, part):
    compiler, counts = Compiler(), []

    class Count(L.Callback):
        def on_train_epoch_start(self, *_):
            counts.append(compiler.graphs)

        on_train_batch_end = on_train_epoch_start

    torch._dynamo.reset()
    module = made(Silent) if part == "module" else made(Compiled, compiler=compiler)
    compiled = torch.compile(module, backend=compiler) if part == "module" else module
    callback = pruning(epochs=1, target_sparsity=0.3)
    callback.search = RandomSearch(num_candidates=12)
    fit(compiled, tmp_path, Count(), callback, Count(), max_epochs=3, num_sanity_val_steps=0)
    assert callback.results[0].evaluations >= 10
    assert callback.results[0].applied
    epochs = list(zip(*[iter(counts)] * 10, strict=True))  # two at the start, then two for each of four batches
    begun, ended = [epoch[:2] for epoch in epochs], [epoch[-1] for epoch in epochs]
    assert begun[1][0] == begun[1][1] > 0, "the round compiles nothing"
    assert epochs[1][2] > begun[1][1], "training compiles the pruned network"
    assert epochs[1][2] - begun[1][1] == epochs[0][2] - begun[0][1], "as it did the dense one"
    assert ended[2] - begun[2][1] == 0, "once"


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions_are_kept(tmp_path, precision):
    module = Regressor()
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)

    class Cast(L.Callback):  # the data are single precision
        def on_fit_start(self, trainer, module):
            self.dtypes = {p.dtype for p in module.parameters()}

    cast = Cast()
    fit(module, tmp_path, pruning(epochs=1), cast, max_epochs=3, precision=precision)
    assert module.head.in_features < 12
    assert cast.dtypes == {dtype}
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Scales(L.Callback):
    """The loss scaler's state at the start of every epoch and after every step, and the losses."""

    def __init__(self):
        self.starts, self.steps, self.losses, self.failed = [], [], [], None

    def on_train_epoch_start(self, trainer, module):
        self.starts.append(trainer.precision_plugin.scaler.state_dict())

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.steps.append(trainer.precision_plugin.scaler.state_dict())
        self.losses.append(float(outputs["loss"]))

    def on_exception(self, trainer, *_):
        self.failed = trainer.precision_plugin.scaler.state_dict()


DEVICES = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param(
        "cuda", "gpu", id="gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step")
@pytest.mark.parametrize(("device", "accelerator"), DEVICES)
def test_the_loss_scaler_goes_on_as_without_a_round_and_is_resumed(tmp_path, monkeypatch, device, accelerator):
    def run(folder, *callbacks, **arguments):
        scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=3)
        plugin = MixedPrecision("16-mixed", device, scaler)
        before, after = Scales(), Scales()
        try:
            trainer = fit(
                made(Regressor), folder, before, *callbacks, after, plugins=[plugin], accelerator=accelerator,
                devices=1, **arguments,
            )  # fmt: skip
            assert trainer.precision_plugin.scaler is scaler
        finally:
            scales.append((before, after))
        return after

    scales = []
    plain = run(tmp_path)
    files = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    pruned = run(tmp_path, pruning(epochs=2), files)
    before, after = scales[-1]
    assert before.starts == after.starts
    assert pruned.steps == plain.steps
    assert plain.steps[-1]["scale"] > plain.steps[0]["scale"], "it grows"
    assert pruned.losses[:8] == plain.losses[:8]
    assert pruned.losses[8:] != plain.losses[8:]

    resumed = run(tmp_path, pruning(epochs=2), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.steps == pruned.steps[12:]
    assert resumed.losses == pytest.approx(pruned.losses[12:], abs=1e-6)

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(commit, "wrap_again", fail)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "failed", pruning(epochs=2))
    failed, _ = scales[-1]
    assert failed.failed == failed.starts[2] == before.starts[2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loggers_get_each_rounds_scalars_once_and_the_users_as_without_a_round(tmp_path, accumulate):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def run(name, *callbacks):
        loggers = [TensorBoardLogger(tmp_path / name, "events"), CSVLogger(tmp_path / name, "rows")]
        fit(
            made(Regressor), tmp_path, *callbacks, logger=loggers, log_every_n_steps=1,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        events = accumulator.EventAccumulator(loggers[0].log_dir).Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        with open(f"{loggers[1].log_dir}/metrics.csv", newline="") as file:
            rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        return scalars, rows

    callback = pruning(epochs=[2, 3])
    plain, plain_rows = run("plain")
    pruned, pruned_rows = run("pruned", callback)
    at = [2 * 4 // accumulate, 3 * 4 // accumulate]
    own = {tag: pruned.pop(tag) for tag in list(pruned) if tag.startswith("softprune/")}
    finetuned = own.pop("softprune/score_finetuned")
    assert [value for _, value in finetuned] == [pytest.approx(callback.results[-1].score_finetuned)]
    expected = [log_values(result) for result in callback.results]
    assert own.keys() == expected[0].keys()
    for tag, found in own.items():
        assert found == [(step, pytest.approx(values[tag])) for step, values in zip(at, expected, strict=True)]
    assert pruned.keys() == plain.keys() >= {"train_loss_step", "train_loss_epoch", "val_loss", "epoch"}
    for tag, found in pruned.items():
        assert [step for step, _ in found] == [step for step, _ in plain[tag]]
        early = [(one, other) for one, other in zip(found, plain[tag], strict=True) if one[0] < at[0]]
        assert all(one == other for one, other in early)

    rows = [row for row in pruned_rows if "softprune/sparsity" in row]
    assert [int(row["step"]) for row in rows] == at
    for row, values in zip(rows, expected, strict=True):
        assert {tag: float(value) for tag, value in row.items() if tag in values} == pytest.approx(values)
    others = [{tag for tag in row if not tag.startswith("softprune/")} for row in pruned_rows]
    steps = [(row["step"], tags) for row, tags in zip(pruned_rows, others, strict=True) if tags != {"step"}]
    assert steps == [(row["step"], set(row)) for row in plain_rows]


def test_clipping_accumulation_and_the_rate_monitor_go_on(tmp_path):
    class Logs(L.Callback):
        def on_train_end(self, trainer, module):
            self.epoch = trainer.current_epoch

    logs = Logs()
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        max_epochs=3, accumulate_grad_batches=3, gradient_clip_val=0.1, log_every_n_steps=1,
        logger=L.pytorch.loggers.CSVLogger(tmp_path), enable_checkpointing=False,
        callbacks=[pruning(epochs=1), LearningRateMonitor(), logs],
    )  # fmt: skip
    module = Regressor()
    trainer.fit(module, *loaders())
    assert module.head.in_features < 12
    assert [id(p) for p in trainer.optimizers[0].param_groups[0]["params"]] == [id(p) for p in module.parameters()]


class WithTarget(L.LightningModule):
    """A network and a slowly following copy of it that gives the targets."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, 6)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.target = copy.deepcopy(self.model).requires_grad_(False)

    def training_step(self, batch):
        z = self.encoder(batch[0])
        with torch.no_grad():
            target = self.target(z)
        return nn.functional.mse_loss(self.model(z), 0.5 * target + 0.5 * batch[1])

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 0.05)

    def validation_step(self, batch):
        self.log("val_loss", nn.functional.mse_loss(self.model(self.encoder(batch[0])), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam([*self.encoder.parameters(), *self.model.parameters()], 1e-2)


@pytest.mark.parametrize("compensation", ["none", "least_squares"])
def test_a_twin_gets_the_plan_of_the_module_it_mirrors(tmp_path, compensation):
    module = WithTarget()
    kept = {}

    class Remember(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                kept.update({name: p.detach().clone() for name, p in module.named_parameters()})

    class Compare(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                rows = [[(old == new).all(1).nonzero()[0].item() for new in now] for old, now in (
                    (kept[f"{name}.0.bias"][:, None], module.get_submodule(name)[0].bias[:, None])
                    for name in ("model", "target")
                )]  # fmt: skip
                kept["rows"] = rows

    callback = pruning(epochs=1, twins={"target": "model"}, compensation=compensation)
    arguments = (Remember(), callback, Compare()) if compensation == "none" else (callback,)
    fit(module, tmp_path, *arguments, max_epochs=3)
    assert [tuple(p.shape) for p in module.target.parameters()] == [tuple(p.shape) for p in module.model.parameters()]
    assert module.target[0].out_features < 16
    assert module.target[0].in_features < 6
    assert not any(group.name.startswith("target") for group in callback.results[0].groups)
    assert not any(p.requires_grad for p in module.target.parameters())
    if compensation == "none":
        assert kept["rows"][0] == kept["rows"][1]


@pytest.mark.parametrize(
    ("twins", "message"),
    [
        ({"targte": "model"}, r"twins.*'targte' matches no module; near names: 'target'"),
        ({"target": "encoder"}, r"twins: 'target' does not mirror 'encoder'"),
    ],
)
def test_twins_that_do_not_fit_are_refused(tmp_path, twins, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(WithTarget(), tmp_path, pruning(epochs=1, twins=twins), max_epochs=3)


def test_a_twin_leaves_the_component_of_the_module_it_mirrors(tmp_path):
    """What only `model` and its twin share is inside `model`: names, bounds and shared coefficients stay."""
    twin = WithTarget()
    bounds = {"model": [0.25, 0.25]}
    callback = pruning(epochs=1, twins={"target": "model"}, bounds=bounds, granularity="component", target_sparsity=0.4)
    fit(twin, tmp_path, callback, max_epochs=3)
    found = {group.name: (group.component, group.kind) for group in callback.results[0].groups}
    assert found == {"encoder": ("encoder+model", "inter"), "model.0": ("model", "intra")}
    assert twin.model[0].out_features == twin.target[0].out_features == 12


def test_without_twins_a_target_network_is_in_the_way(tmp_path):
    class Fixed(WithTarget):
        def on_train_batch_end(self, *_):
            """The target stays as it is: it could not follow a network of another shape."""

    with pytest.raises(MisconfigurationException, match=r"twins=\{'target': 'model'\}"):
        fit(Fixed(), tmp_path, pruning(epochs=1, target_sparsity=0.3), max_epochs=3)
    callback = pruning(epochs=1, target_sparsity=0.3, ignore=["target"])
    fit(Fixed(), tmp_path, callback, max_epochs=3)
    assert "encoder" not in {group.name for group in callback.results[0].groups}


def test_twenty_rounds_keep_no_old_parameters_alive_and_memory_flat(tmp_path):
    seen, tensors, hooks = [], [], []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append([weakref.ref(p) for p in module.parameters()])
            gc.collect()
            found = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
            tensors.append((len(found), sum(item.untyped_storage().nbytes() for item in found)))
            hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()))

    class Wide(Regressor):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
            self.head = nn.Linear(64, 3)

    rounds = 20
    targets = [0.03 * k for k in range(1, rounds + 1)]
    callback = pruning(epochs=list(range(1, rounds + 1)), target_sparsity=targets)
    gc.freeze()  # what was there before is nobody's business, and looking through it takes long
    try:
        trainer = fit(Wide(), tmp_path, Watch(), callback, max_epochs=rounds + 1)
        gc.collect()
    finally:
        gc.unfreeze()
    assert sum(result.applied for result in callback.results) == rounds
    alive = [sum(ref() is not None for ref in epoch) for epoch in seen]
    assert sum(alive[:-1]) == 0
    numbers, sizes = zip(*tensors, strict=True)
    assert max(numbers[2:]) <= numbers[1], numbers
    assert sizes[-1] < sizes[1]
    assert set(hooks) == {0}
    assert math.isfinite(float(trainer.callback_metrics["val_loss"]))
