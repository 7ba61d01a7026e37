"""Mistakes and failures: who is told what, and that nothing has changed."""

import copy
import inspect
import itertools
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import nn
from torch.utils.data import DataLoader

import lightning_softprune.round.preparing.tracing as tracing
import lightning_softprune.round.rehearsal as rehearsal
from lightning_softprune import GradientSearch, GridSearch, LayerSpec, RandomSearch, SoftPruning, UniformBaseline
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.trainer import ModuleRunner
from support.modules import (
    FEATURES,
    AutoEncoder,
    ConvClassifier,
    assert_optimizers_hold_live_parameters,
    assert_same,
    count,
    fit,
    loaders,
    made,
    run_state,
    softpruning,
    trainer_of,
    training_state,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Before(Callback):
    """Keeps everything as it was when a round began: put it in front of SoftPruning."""

    def __init__(self, epoch=1):
        self.epoch, self.state = epoch, None

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.state = training_state(trainer, pl_module)


def fails(tmp_path, module, callback, error=MisconfigurationException, **arguments):
    """Fit, expect an exception from the round, and check that nothing has changed since the round began."""
    before = Before(max(callback.epochs))
    pl.seed_everything(7, verbose=False)
    trainer = trainer_of(tmp_path, before, callback, **arguments)
    with pytest.raises(error) as raised:
        trainer.fit(module, **loaders(module))
    assert before.state is not None, "the round was reached"
    assert_same(training_state(trainer, module), before.state)
    assert callback.results == []
    return raised.value


def refused(tmp_path, module, *callbacks, **arguments):
    """Fit, expect to be refused before anything runs."""
    weights = copy.deepcopy(module.state_dict())
    trainer = trainer_of(tmp_path, *callbacks, **arguments)
    with pytest.raises(MisconfigurationException) as raised:
        trainer.fit(module, **loaders(module))
    assert trainer.global_step == 0
    assert_same(module.state_dict(), weights)
    return str(raised.value)


def assert_says(message, *parts):
    for part in parts:
        assert part in str(message), (part, str(message))


# ----------------------------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize("target", [0, 1, 0.0, 1.0, -0.2, 1.5, float("nan"), float("inf"), [0.2, 1.0], [0.0, 0.5]])
def test_sparsity_lies_between_zero_and_one(target):
    value = next((t for t in target if not 0 < t < 1), None) if isinstance(target, list) else target
    with pytest.raises(ValueError, match="target_sparsity") as raised:
        SoftPruning(target_sparsity=target, epochs=[1, 2])
    assert_says(raised.value, str(value), "between 0 and 1")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"epochs": [1, 2], "target_sparsity": [0.5, 0.4]}, ["target_sparsity", "[0.5, 0.4]", "decreases"]),
        ({"epochs": [1, 2], "target_sparsity": [0.5]}, ["target_sparsity", "1 values", "2 epochs"]),
        ({"epochs": []}, ["epochs", "empty"]),
        ({"epochs": [2, 1]}, ["epochs", "[2, 1]", "increasing"]),
        ({"epochs": [1, 1]}, ["epochs", "[1, 1]", "increasing"]),
        ({"epochs": -1}, ["epochs", "-1", "0"]),
        ({"monitor": ""}, ["monitor", "''"]),
        ({"mode": "maximum"}, ["mode", "'maximum'", "'min'", "'max'"]),
        ({"search": "sensitivty"}, ["search", "'sensitivty'", "did you mean 'sensitivity'?"]),
        ({"tolerance": -0.1}, ["tolerance", "-0.1", "between 0 and 1"]),
        ({"tolerance": 1.0}, ["tolerance", "1.0", "between 0 and 1"]),
        ({"tolerance": float("nan")}, ["tolerance", "nan"]),
        ({"importance": "l1"}, ["importance", "'l1'", "'magnitude'", "'activation'", "'taylor'", "'random'"]),
        ({"healing": -1}, ["healing", "-1", "less than 0"]),
        ({"teacher": -0.5}, ["teacher", "-0.5", "between 0 and inf"]),
        ({"teacher": float("nan")}, ["teacher", "nan", "between 0 and inf"]),
        ({"teacher": 0.5, "finetune_epochs": 0}, ["teacher", "0.5", "finetune_epochs=0"]),
        ({"round_to": 0}, ["round_to", "0", "less than 1"]),
        ({"search_batches": 0}, ["search_batches", "0", "less than 1"]),
        ({"memory_limit": 0}, ["memory_limit", "0", "positive"]),
        ({"memory_limit": float("nan")}, ["memory_limit", "nan", "positive"]),
        ({"calibration_batches": 0}, ["calibration_batches", "0", "less than 1"]),
        ({"finetune_epochs": -1}, ["finetune_epochs", "-1", "less than 0"]),
        ({"seed": -1}, ["seed", "-1", "less than 0"]),
        ({"bounds": {"encoder": [0.5]}}, ["bounds['encoder']", "[0.5]", "[low, high]"]),
        ({"bounds": {"encoder": [0.9, 0.1]}}, ["bounds['encoder']", "[0.9, 0.1]", "low <= high"]),
        ({"bounds": {"encoder": [-0.1, 0.5]}}, ["bounds['encoder']", "[-0.1, 0.5]", "0 <= low"]),
        ({"bounds": {"encoder": [0.0, 1.5]}}, ["bounds['encoder']", "[0.0, 1.5]", "<= 1"]),
    ],
)
def test_a_value_out_of_range_is_a_value_error_with_name_value_and_range(arguments, parts):
    with pytest.raises(ValueError, match=parts[0].split("[")[0]) as raised:
        SoftPruning(**arguments)
    assert_says(raised.value, *parts)


def test_numbers_of_numpy_are_numbers():
    callback = SoftPruning(epochs=np.int64(3), target_sparsity=np.float32(0.5), healing=np.int32(4))
    assert (callback.epochs, callback.targets, callback.healing) == ([3], [0.5], 4)
    assert [type(value) for value in (*callback.epochs, *callback.targets, callback.healing)] == [int, float, int]
    scheduled = SoftPruning(epochs=[np.int8(1), 2], target_sparsity=np.float32(0.5), limits={"macs": 0.5})
    assert scheduled.targets == SoftPruning(epochs=[1, 2]).targets
    assert scheduled._has_schedule
    with pytest.raises(TypeError, match="epochs: array"):
        SoftPruning(epochs=np.arange(3))


WRONG = {
    "monitor": [5, None, ["val_loss"]],
    "mode": [5, None, ["min"]],
    "epochs": ["1", 1.0, None, True, [1, "2"], {"a": 1}],
    "target_sparsity": ["0.5", {"a": 0.5}, ["0.5"], True],
    "tolerance": ["0.02", None, [0.02], True],
    "cost": [5, None, ["macs"], "flops"],
    "limits": [["macs"], "macs", 0.5, {"macs": "0.5"}, {"macs": None}, {"macs": True}, {5: 0.5}],
    "constraints": ["val_loss < 1", 5, [5], {"val_loss": 1}, [["val_loss < 1"]]],
    "on_violation": [5, None, ["skip"], True],
    "granularity": [5, None, ["group"]],
    "search": ["GradientSearch", None, GradientSearch, 5],
    "components": [["encoder"], "encoder", {"a": "encoder"}, {"a": [5]}, {"a": 5}, {5: ["encoder"]}],
    "ignore": ["encoder", 5, [5], {"encoder": 1}, [["encoder"]]],
    "layers": ["nn.Linear", 5, {"type": "torch.nn.Linear"}],
    "twins": [["a"], "a", 5, {"a": 5}, {5: "a"}],
    "bounds": [[0.1, 0.2], "encoder", {"a": ["0", "1"]}, {5: [0, 1]}, {"a": [None, 1]}, {"a": [float("nan"), 1]}],
    "importance": [5, True, ["taylor"]],
    "compensation": [5, None, ["bias"]],
    "healing": ["1", 1.0, None, True],
    "teacher": ["1", None, True, [0.5]],
    "round_to": ["1", 1.0, None, True],
    "search_batches": ["1", 1.5, True, [1]],
    "memory_limit": ["1", True, [1.0]],
    "latency_batch": ["1", 1.0, True],
    "calibration_batches": ["1", 1.0, False],
    "finetune_epochs": ["1", 1.0, True],
    "reset_monitors": ["yes", 1, None],
    "seed": ["0", 0.5, None, True],
    "report": ["yes", 1, None],
    "verbose": ["no", 0, None],
}
KNOWN = inspect.signature(SoftPruning).parameters


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values if n in KNOWN])
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name) as raised:
        SoftPruning(**{name: value})
    shown = next(iter(value.values())) if isinstance(value, dict) and all(isinstance(k, str) for k in value) else value
    shown = shown[-1] if name in ("epochs", "target_sparsity") and isinstance(shown, list) else shown
    assert repr(value) in str(raised.value) or repr(shown) in str(raised.value), str(raised.value)


def test_a_misspelt_argument_is_answered_with_what_was_meant():
    message = r"SoftPruning\(\) got an unexpected keyword argument 'target_sparsty'; did you mean 'target_sparsity'\?"
    with pytest.raises(TypeError, match=message):
        SoftPruning(target_sparsty=0.5)


@pytest.mark.parametrize(("name", "kind"), [("gradient", GradientSearch), ("uniform", UniformBaseline)])
def test_a_strategy_goes_by_its_name(name, kind):
    assert type(SoftPruning(search=name).search) is kind


def test_every_argument_has_its_wrong_values_here():
    assert set(KNOWN) == set(WRONG)


def test_arguments_are_not_changed_or_kept():
    arguments = {
        "epochs": [1, 2],
        "target_sparsity": [0.2, 0.3],
        "ignore": ["a"],
        "bounds": {"b": [0, 1]},
        "components": {"c": ["d"]},
    }
    given = copy.deepcopy(arguments)
    callback = SoftPruning(**given)
    assert given == arguments
    given["epochs"].append(3)
    given["ignore"].append("x")
    given["bounds"]["b"][1] = 9
    given["components"]["c"].append("y")
    assert (callback.epochs, callback.ignore) == ([1, 2], ("a",))
    assert (callback.bounds, callback.components) == ({"b": [0.0, 1.0]}, {"c": ["d"]})


# ------------------------------------------------------------------------------- wrong for this trainer or this model


def test_epochs_beyond_the_last(tmp_path):
    for epoch in (3, 7, [1, 3]):
        message = refused(tmp_path, made(), softpruning(epochs=epoch), max_epochs=3)
        assert_says(message, f"epochs={epoch if isinstance(epoch, int) else 3}", "max_epochs=3", "2")


def test_fine_tuning_beyond_the_last_epoch(tmp_path):
    message = refused(tmp_path, made(), softpruning(epochs=1, finetune_epochs=3), max_epochs=3)
    assert_says(message, "finetune_epochs=3", "max_epochs=3", "4")


def test_fine_tuning_that_min_epochs_forbids(tmp_path):
    message = refused(tmp_path, made(), softpruning(epochs=1, finetune_epochs=1), max_epochs=6, min_epochs=5)
    assert_says(message, "finetune_epochs=1", "min_epochs=5")
    message = refused(tmp_path, made(), softpruning(epochs=0, finetune_epochs=0), max_epochs=6, min_steps=5)
    assert_says(message, "finetune_epochs=0", "min_steps=5")


def test_two_callbacks(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SoftPruning`"):
        trainer_of(tmp_path, softpruning(), softpruning(epochs=2))  # Lightning's own words
    module, trainer = made(), trainer_of(tmp_path, softpruning())
    trainer.callbacks.append(softpruning(epochs=2))
    with pytest.raises(MisconfigurationException, match=r"2 SoftPruning callbacks in one Trainer.*several `epochs`"):
        trainer.fit(module, **loaders(module))
    assert trainer.global_step == 0


def test_barebones(tmp_path):
    module = made()
    arguments = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps"]
    )
    trainer = trainer_of(tmp_path, softpruning(), **arguments, barebones=True)
    with pytest.raises(MisconfigurationException, match="barebones=True"):
        trainer.fit(module, **loaders(module))


def test_the_callback_that_masks_weights(tmp_path):
    masking = ModelPruning("l1_unstructured", amount=0.2)
    module, trainer = made(), trainer_of(tmp_path, softpruning(), masking)
    with pytest.raises(MisconfigurationException, match=r"callbacks: ModelPruning .*target_sparsity"):
        trainer.fit(module, **loaders(module))
    assert trainer.global_step == 0


def test_no_validation_step(tmp_path):
    class Blind(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(FEATURES, 3)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = trainer_of(tmp_path, softpruning())
    with pytest.raises(MisconfigurationException, match="validation_step") as raised:
        trainer.fit(Blind(), loaders(made())["train_dataloaders"])
    assert_says(raised.value, "Blind")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*")
def test_no_validation_data(tmp_path):
    module, trainer = made(), trainer_of(tmp_path, softpruning())
    with pytest.raises(MisconfigurationException, match="val_dataloader"):
        trainer.fit(module, loaders(module)["train_dataloaders"])
    assert trainer.global_step == 0


def test_no_validation_batches_allowed(tmp_path):
    assert_says(refused(tmp_path, made(), softpruning(), limit_val_batches=0), "limit_val_batches")


@pytest.mark.parametrize("batches", [0, 2])
def test_an_unknown_monitor_lists_what_is_logged(tmp_path, batches):
    error = refused(tmp_path, made(), softpruning(monitor="val_los"), num_sanity_val_steps=batches)
    assert_says(error, "monitor='val_los'", "'val_loss'", "'val_psnr'", "'val_constant'", "did you mean 'val_loss'?")
    assert "train_loss" not in str(error)


class TwoLoaders(AutoEncoder):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ({}, "monitor='val_loss' is"),
        ({"monitor": "val_psnr", "constraints": ["val_constant <= 1"]}, "constraints[0]='val_constant <= 1': 'val_con"),
    ],
)
def test_a_metric_that_each_of_two_loaders_has_for_itself(tmp_path, arguments, asked, batches):
    module = made(TwoLoaders)
    data = loaders(module)
    trainer = trainer_of(tmp_path, softpruning(epochs=2, **arguments), num_sanity_val_steps=batches)
    with pytest.raises(MisconfigurationException) as raised:
        trainer.fit(module, data["train_dataloaders"], [data["val_dataloaders"]] * 2)
    assert_says(raised.value, asked, "name one of", "/dataloader_idx_0'", "/dataloader_idx_1'")
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("ignore", ["encodr"], "'encoder'"),
        ("ignore", ["decoder.*", "decoder.9"], "'decoder."),
        ("components", {"front": ["encoderr"]}, "'encoder'"),
        ("components", {"front": ["encoder"], "back": ["nothing*"]}, "'encoder'"),
    ],
)
def test_a_pattern_that_matches_no_module_is_refused_with_near_names(tmp_path, name, value, near):
    message = refused(tmp_path, made(), softpruning(**{name: value}))
    pattern = value[-1] if isinstance(value, list) else list(value.values())[-1][0]
    assert_says(message, name, repr(pattern), near)


@pytest.mark.parametrize("pattern", ["encoder.00", "latent", "decodr"])
def test_bounds_that_match_no_group_are_refused_with_near_names(tmp_path, pattern):
    error = refused(tmp_path, made(), softpruning(bounds={pattern: [0, 0.5]}))
    assert_says(error, "bounds", repr(pattern), "encoder")


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ({"target_sparsity": 0.99, "tolerance": 0.001}, None),
        ({"target_sparsity": 0.5, "tolerance": 0.0}, None),
        ({"target_sparsity": 0.9, "bounds": {"*": [0, 0.25]}}, None),
        ({"target_sparsity": 0.1, "bounds": {"*": [0.75, 1]}}, None),
    ],
)
def test_a_target_out_of_reach_gives_the_nearest_sparsity(tmp_path, arguments, nearest):
    module = made()
    error = refused(tmp_path, module, softpruning(**arguments))
    found = float(str(error).split("nearest reachable sparsity is ")[1].split()[0].rstrip("."))
    assert_says(error, f"target_sparsity={arguments['target_sparsity']}", "tolerance=")
    low, high = arguments.get("bounds", {"*": [0, 1]})["*"]
    plans = [
        (a, b, c)
        for a in range(16)
        if low <= a / 16 <= high
        for b in range(8)
        if low <= b / 8 <= high
        for c in range(16)
        if low <= c / 16 <= high
    ]
    dense = count(module)
    sparsities = [1 - size(16 - a, 8 - b, 16 - c) / dense for a, b, c in plans]
    assert size(16, 8, 16) == dense
    target = arguments["target_sparsity"]
    assert abs(found - target) == pytest.approx(min(abs(s - target) for s in sparsities), abs=6e-5)


def test_what_only_measures_is_no_part_of_what_can_be_reached(tmp_path):
    """A frozen network of the loss, however large, is known to stay before anything is trained."""

    class Measured(AutoEncoder):
        def __init__(self):
            super().__init__()
            self.perceptual = nn.Sequential(nn.Linear(FEATURES, 200), nn.ReLU(), nn.Linear(200, 3))
            self.perceptual.requires_grad_(False)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            out, target = self.perceptual(self(batch[0])), self.perceptual(batch[0])
            self.log("val_perceptual", nn.functional.mse_loss(out, target))

    arguments = {"target_sparsity": 0.95, "tolerance": 0.001}
    messages = [str(refused(tmp_path, made(kind), softpruning(**arguments))) for kind in (AutoEncoder, Measured)]
    nearest = [message.split("nearest reachable sparsity is ")[1].split()[0] for message in messages]
    assert nearest[0] == nearest[1]


def size(hidden, latent, back):
    widths = [FEATURES, hidden, latent, back, FEATURES]
    return sum(a * b + b for a, b in itertools.pairwise(widths))


def test_round_to_that_allows_no_plan_is_out_of_reach_too(tmp_path):
    error = refused(tmp_path, made(), softpruning(round_to=16, target_sparsity=0.5))
    assert_says(error, "target_sparsity=0.5", "nearest reachable sparsity is 0.0000")


def test_nothing_prunable_names_the_modules_in_the_way(tmp_path):
    class OneLayer(AutoEncoder):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(FEATURES, FEATURES), nn.Identity()

    class Stubborn(AutoEncoder):
        def forward(self, x):
            return self.decoder(self.encoder(x).view(-1, 8)) + 0 * self.encoder[0](x).view(-1, 16).sum()

        def loss(self, batch):
            hidden = self.decoder[1](self.decoder[0](self.encoder(batch[0]))).view(-1, 16)
            return nn.functional.mse_loss(self.decoder[2](hidden), batch[0]) + 0 * self(batch[0]).sum()

    assert_says(refused(tmp_path, made(OneLayer), softpruning()), "nothing that can be pruned", "encoder")
    assert_says(
        refused(tmp_path, made(), softpruning(ignore=["*"])), "encoder.0", "encoder.2", "decoder.0", "decoder.2"
    )
    assert_says(refused(tmp_path, made(Stubborn), softpruning()), "encoder.0", "encoder.2", "decoder.0")


def test_a_grid_that_is_too_large_names_levels_and_the_number(tmp_path):
    error = refused(tmp_path, made(), softpruning(search=GridSearch(levels=150)))
    assert_says(error, "search", "levels=150", f"{150**3:,}")


@pytest.mark.parametrize("on_violation", ["skip", "prune"])
def test_a_grid_without_a_point_on_the_target_is_refused(tmp_path, on_violation):
    callback = softpruning(search=GridSearch(levels=2), tolerance=0.02, on_violation=on_violation)
    error = refused(tmp_path, made(), callback)
    assert_says(error, "search: GridSearch(levels=2)", "within 0.02 of target_sparsity=0.5", "more levels")


def test_a_grid_with_points_below_the_target_alone_searches_those(tmp_path):
    callback = softpruning(search=GridSearch(levels=2), target_sparsity=0.5, tolerance=0.1)
    fit(tmp_path, made(), callback)
    (result,) = callback.results
    assert result.applied
    assert {trial.sparsity < 0.5 for trial in result.trials} == {True}


@pytest.mark.parametrize(
    ("kind", "arguments", "parts"),
    [
        (AutoEncoder, {"constraints": ["val_acc >= 0.5"]}, ["constraints[0]", "'val_acc' is not logged"]),
        (AutoEncoder, {"limits": {"macs": 0.01}}, ["limits['macs']=0.01 is out of reach"]),
        (AutoEncoder, {"epochs": [1, 2], "target_sparsity": [0.5, 0.99]}, ["target_sparsity=0.99", "0.9408"]),
        (AutoEncoder, {"monitor": "val_psnr"}, ["mode='auto'", 'mode="max"']),
        (ConvClassifier, {"monitor": "val_acc", "mode": "min"}, ["mode='min'", "higher_is_better is True"]),
    ],
)
def test_what_a_round_would_refuse_is_refused_before_training(tmp_path, kind, arguments, parts):
    assert_says(refused(tmp_path, made(kind), softpruning(**arguments)), *parts)


class LoggedLate(AutoEncoder):
    """Logs a metric at some epochs only."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        if self.current_epoch >= 1:
            self.log("val_late_loss", 1.0)
        if self.global_step > 4:
            self.log("val_later_loss", 1.0)


def test_a_metric_that_is_logged_later_is_no_mistake(tmp_path):
    fit(tmp_path, made(LoggedLate), softpruning(monitor="val_late_loss", epochs=1), max_epochs=2)
    with pytest.warns(UserWarning, match="'val_later_loss' is not logged in a validation before training"):
        fit(tmp_path, made(LoggedLate), softpruning(monitor="val_later_loss", epochs=2))


def test_a_validation_that_needs_training_first_is_no_mistake(tmp_path):
    class Taught(AutoEncoder):
        centre = None

        def training_step(self, batch, batch_idx):
            self.centre = batch[0].mean()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert self.centre is not None
            super().validation_step(batch, batch_idx)

    callback = softpruning()
    fit(tmp_path, made(Taught), callback, num_sanity_val_steps=0)
    assert callback.results[0].applied


def test_the_training_loader_is_started_once_by_a_round_and_not_before(tmp_path):
    class Counting(DataLoader):
        begun = 0

        def __iter__(self):
            Counting.begun += 1
            return super().__iter__()

    module, callback = made(), softpruning(epochs=1)
    data = loaders(module)
    data["train_dataloaders"] = Counting(data["train_dataloaders"].dataset, batch_size=12, shuffle=True)
    fit(tmp_path, module, callback, data=data, max_epochs=2)
    assert Counting.begun == 2 + 1


def test_a_run_that_is_refused_leaves_the_files_of_an_earlier_one(tmp_path):
    fit(tmp_path, made(), softpruning(report=True), max_epochs=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(tmp_path, made(), softpruning(report=True, monitor="val_los"))
    assert before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --------------------------------------------------------------------------------------------------- failures, midway


class OopsError(Exception):
    """The user's own."""


CALLS: dict[str, list[str]] = {}  # what the round was doing when a step was called
DOING = ["else"]


class Trap(AutoEncoder):
    """Raises at one of the steps that a round runs; they are numbered out of the module's reach."""

    where, at, error = "validation_step", -1, OopsError

    def __init__(self):
        super().__init__()
        CALLS.update(validation_step=[], training_step=[])

    def _step(self, name):
        if self.trainer.current_epoch == 1 and self.trainer.global_step == 4:
            CALLS[name].append(DOING[-1])
            if name == self.where and len(CALLS[name]) == self.at:
                self.encoder[0].train(not self.encoder[0].training)  # and it leaves a mess
                self.losses.append(float("nan"))
                torch.rand(3)
                raise self.error("the user's own")

    def validation_step(self, batch, batch_idx):
        self._step("validation_step")
        super().validation_step(batch, batch_idx)

    def training_step(self, batch, batch_idx):
        self._step("training_step")
        return super().training_step(batch, batch_idx)


@pytest.fixture
def trap(monkeypatch, tmp_path):
    """Numbers of the calls to a step that a round makes: while it probes, while it scores a trial, or else."""

    def noted(owner, name, what):
        original = getattr(owner, name)

        def run(*arguments, **more):
            DOING.append(what)
            try:
                return original(*arguments, **more)
            finally:
                DOING.pop()

        monkeypatch.setattr(owner, name, run)

    def calls(step, what="else", **arguments):
        found = []

        class Count(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 1:
                    found.extend(n + 1 for n, doing in enumerate(CALLS[step]) if doing == what)

        fit(tmp_path, made(Trap), softpruning(**arguments), Count(), num_sanity_val_steps=0, max_epochs=2)
        monkeypatch.setattr(Trap, "where", step)
        return found

    noted(tracing, "probe_with_counts", "probing")
    noted(ModuleRunner, "few", "probing")  # what fails on a few samples is tried on whole batches
    noted(ModuleRunner, "probing", "probing")  # so are the steps to probe by
    noted(Evaluator, "score", "trial")
    monkeypatch.setattr(Trap, "at", -1)
    return calls


@pytest.mark.parametrize("step", ["validation_step", "training_step"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_the_users_exception_reaches_the_user_with_everything_as_before(tmp_path, monkeypatch, trap, step, share):
    """From the first step of the round to the last, in the rehearsal of the pruned model; but for probes and trials."""
    arguments = {"search": RandomSearch(num_candidates=3), "calibration_batches": 2}
    calls = trap(step, **arguments)
    assert len(calls) >= 4
    monkeypatch.setattr(Trap, "at", calls[round(share * (len(calls) - 1))])
    module = made(Trap)
    error = fails(tmp_path, module, softpruning(**arguments), Exception, num_sanity_val_steps=0)
    assert isinstance(error, OopsError) or isinstance(error.__cause__, OopsError), repr(error)
    monkeypatch.setattr(Trap, "at", -1)
    size, callback = count(module), softpruning(**arguments)
    trainer = fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert count(module) < size
    assert_optimizers_hold_live_parameters(trainer, module)


def test_an_exception_in_the_rehearsal_rolls_the_committed_prune_back(tmp_path):
    class Fragile(AutoEncoder):
        """Takes one narrow layer in its stride, but not the final plan while training."""

        def training_step(self, batch, batch_idx):
            if self.training and self.encoder[0].out_features < 16:
                raise OopsError("too narrow to train")
            return super().training_step(batch, batch_idx)

    for search in (UniformBaseline(), GradientSearch(steps=1)):
        module = made(Fragile)
        error = fails(tmp_path, module, softpruning(search=search), Exception)
        assert isinstance(error, OopsError) or isinstance(error.__cause__, OopsError)
        assert module.encoder[0].out_features == 16
        fit(tmp_path, module, max_epochs=1)


@pytest.mark.parametrize("where", ["repair_optimizers", "rehearse"])
def test_a_failure_inside_the_commit_rolls_back_weights_and_optimizers(tmp_path, where, monkeypatch):
    owner = ModuleRunner if where == "rehearse" else rehearsal
    original = getattr(owner, where)

    def failing(*arguments, **named):
        original(*arguments, **named)
        raise MemoryError("no memory")

    monkeypatch.setattr(owner, where, failing)
    fails(tmp_path, made(), softpruning(), MemoryError)
    fails(tmp_path, made(ConvClassifier), softpruning(), MemoryError)


def test_a_step_that_fails_in_one_trial_makes_it_infeasible_and_leaves_no_mess(tmp_path, monkeypatch, trap):
    arguments = {"search": RandomSearch(num_candidates=6)}
    calls = trap("validation_step", "trial", **arguments)
    monkeypatch.setattr(Trap, "at", calls[4])
    module, callback = made(Trap), softpruning(**arguments)
    trainer = fit(tmp_path, module, callback, num_sanity_val_steps=0)
    reasons = [trial.reason for trial in callback.results[0].trials]
    assert sum("the user's own" in reason for reason in reasons) == 1
    assert callback.results[0].applied
    assert all(part.training for part in module.modules())
    assert float("nan") not in module.losses
    assert_optimizers_hold_live_parameters(trainer, module)


def test_a_keyboard_interrupt_in_a_trial_leaves_everything_as_before(tmp_path, monkeypatch, trap, caplog):
    calls = trap("validation_step", "trial", search=RandomSearch(num_candidates=6))
    monkeypatch.setattr(Trap, "error", KeyboardInterrupt)
    monkeypatch.setattr(Trap, "at", calls[-8])
    handler = signal.getsignal(signal.SIGINT)
    module, before, callback = made(Trap), Before(), softpruning(search=RandomSearch(num_candidates=6))
    pl.seed_everything(7, verbose=False)
    trainer = trainer_of(tmp_path, before, callback, num_sanity_val_steps=0)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            trainer.fit(module, **loaders(module))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further interrupts from then on
    assert_same(training_state(trainer, module), before.state)
    [line] = [line for line in caplog.messages if "can go on" in line]
    assert_says(line, str(tmp_path / "softprune" / "journal" / "epoch=1.jsonl"), "Start the same run again")
    assert callback.results == []
    monkeypatch.setattr(Trap, "at", -1)
    fit(tmp_path, module, softpruning())


def test_an_exception_in_epoch_zero_leaves_everything_as_before(tmp_path):
    class First(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if count(self) < 450:  # less than one group alone, narrowed to be probed
                raise OopsError("narrow")

    fails(tmp_path, made(First), softpruning(epochs=0), OopsError, num_sanity_val_steps=0)


def test_an_exception_in_a_later_round_keeps_the_earlier_prune(tmp_path):
    class Later(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.trainer.current_epoch == 2 and self.trainer.training is False and count(self) < 350:
                raise OopsError("later")

    module, before = made(Later), Before(2)
    callback = softpruning(epochs=[1, 2], target_sparsity=[0.4, 0.7])
    trainer = trainer_of(tmp_path, before, callback)
    with pytest.raises(OopsError):
        trainer.fit(module, **loaders(module))
    assert [result.epoch for result in callback.results] == [1]
    assert callback.results[0].costs_after.params == count(module)
    assert_same(training_state(trainer, module), before.state)
    assert_optimizers_hold_live_parameters(trainer, module)


def test_a_score_that_is_missing_for_pruned_networks_only_is_an_error_with_everything_as_before(tmp_path):
    class Silent(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.encoder[0].out_features == 16:
                self.log("val_sometimes", 1.0)

    assert_says(
        fails(tmp_path, made(Silent), softpruning(monitor="val_sometimes", mode="min")),
        "monitor='val_sometimes'",
        "'val_loss'",
    )


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (None, "returns None for"),
        ("abc", "returns 'abc' for"),
        ([1.0, 2.0], r"returns list of the shape (2,) for"),
        ([1.0] * 15 + [float("nan")], "returns 1 times NaN for"),
        ([1j] * 16, "returns complex numbers for"),
    ],
)
def test_an_importance_of_ones_own_that_does_not_score_channels_is_told_before_training(tmp_path, scores, told):
    def strange(model, group):
        return scores

    message = refused(tmp_path, made(), softpruning(epochs=1, importance=strange))
    assert_says(message, "importance: ", "strange", told, "'encoder.0'", "channels")


def test_an_importance_of_ones_own_that_fails_is_told_before_training(tmp_path):
    def crooked(model, group):
        raise OopsError("no such attribute")

    def short(model):
        return [1.0] * 16

    message = refused(tmp_path, made(), softpruning(epochs=2, importance=crooked))
    assert_says(message, "importance: ", "crooked fails", "'encoder.0'", "OopsError: no such attribute")
    message = refused(tmp_path, made(), softpruning(epochs=2, importance=short))
    assert_says(message, "importance: ", "short fails", "TypeError", "positional argument")


def test_the_exception_of_an_importance_of_ones_own_is_the_cause_of_ours(tmp_path):
    called = []

    def later(model, group):
        called.append(group)
        if len(called) > 3:  # after the look ahead
            raise OopsError("later")
        return range(group.num_channels)

    error = fails(tmp_path, made(), softpruning(importance=later), ValueError)
    assert_says(error, "importance: ", "OopsError: later")
    assert isinstance(error.__cause__, OopsError)


class Mirrored(AutoEncoder):
    """A frozen copy of the encoder, of the same widths or of others, that validation runs."""

    def __init__(self, latent=8):
        super().__init__()
        self.copied = AutoEncoder(latent=latent).encoder.requires_grad_(False)

    def forward(self, x):
        self.copied(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("twins", "parts"),
    [
        ({"copied": "encoder"}, ["'copied' does not mirror 'encoder'", "'2.bias', '2.weight'"]),
        ({"copied": "copied"}, ["'copied' is given as its own twin"]),
        ({"encoder.0": "decoder.2", "decoder.2": "encoder.0"}, ["'encoder.0' mirrors 'decoder.2', which is a twin"]),
        ({"copied": "encodr"}, ["'encodr' matches no module", "near names: 'encoder'"]),
        ({"copied.*": "encoder.*"}, ["'copied.*' matches no module", "'copied.0'"]),
        ({"copied.0.weight": "encoder.0.weight"}, ["'copied.0.weight' matches no module"]),
        ({"copied": ""}, ["'' matches no module"]),
    ],
    ids=str,
)
def test_wrong_twins_are_told_before_training(tmp_path, twins, parts):
    assert_says(refused(tmp_path, made(Mirrored, latent=6), softpruning(epochs=2, twins=twins)), "twins: ", *parts)


def test_a_check_of_ours_that_fails_in_the_users_step_is_told_before_training(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x * self.weight

    class Net(AutoEncoder):
        def __init__(self):
            super().__init__()
            self.encoder.append(Own())

    layer = LayerSpec(Own, channels={"weight": 0}, channel_dim=5)
    assert_says(refused(tmp_path, made(Net), softpruning(epochs=2, layers=[layer])), "channel_dim: 5", "Own")


def test_a_loss_without_gradient_for_taylor(tmp_path):
    class Detached(AutoEncoder):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.training else torch.zeros(())

    error = fails(tmp_path, made(Detached), softpruning(importance="taylor"), (ValueError, MisconfigurationException))
    assert_says(error, "importance", "'taylor'", "'activation'")


def test_run_state_is_part_of_what_is_compared(tmp_path):
    """The comparisons above can fail."""
    module = made()
    trainer = fit(tmp_path, module, max_epochs=1)
    state = training_state(trainer, module)
    assert set(run_state(trainer)) < set(state)
    assert_same(training_state(trainer, module), state)
    for change in (
        lambda: torch.rand(1),
        lambda: module.encoder[0].weight.data.add_(1e-7),
        lambda: module.encoder.eval(),
        lambda: trainer.optimizers[0].state[module.encoder[0].weight]["exp_avg"].add_(1e-7),
        lambda: module.losses.append(1.0),
        lambda: setattr(module.encoder[0], "weight", nn.Parameter(module.encoder[0].weight.detach().clone())),
    ):
        state = training_state(trainer, module)
        change()
        with pytest.raises(AssertionError):
            assert_same(training_state(trainer, module), state)
