"""Oracle: `Trainer.validate` of a deep copy of the module, by another Trainer."""

import copy
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_softprune.trainer.isolation import isolated_rng, untouched
from lightning_softprune.trainer.scorer import ValidationScorer, _results_that_stay
from lightning_softprune.trainer.steps import LoadedBatch, run_step, transfer
from support.fits import (
    ORDINARY_FITS,
    Batches,
    Polite,
    Probe,
    Tiny,
    TwoLoaders,
    assert_equal,
    data,
    first_batches,
    loader,
    trainer_of,
)

pytestmark = ORDINARY_FITS


class Terse(Polite):
    """Logs little: most of a pass's time is Lightning's logging."""

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_loss", loss + 0.1 * torch.rand(()))
        self.log("val_accuracy", self.accuracy)


def score_and_validate(tmp_path, module, val, *, passes=1, train=None, memory_limit=None, **kwargs):
    """Scores in the second epoch of a fit, and validates a copy made just before."""
    torch.manual_seed(0)

    def both(trainer, pl_module):
        pl_module.accuracy.update(torch.eye(2), torch.tensor([1, 0]))  # a metric in mid-use
        oracle = copy.deepcopy(pl_module)
        oracle._metric_attributes = None  # Lightning's cache of the original's metrics
        for metric in oracle.modules():
            if isinstance(metric, torchmetrics.Metric):
                metric.reset()
        with ValidationScorer(trainer, pl_module, memory_limit=memory_limit) as scorer:
            scores = [scorer.metrics() for _ in range(passes)]
        own = {key: kwargs[key] for key in ("limit_val_batches", "precision") if key in kwargs}
        other = trainer_of(tmp_path, **own)
        with isolated_rng(0):
            other.validate(oracle, val, verbose=False)
        return scores, {key: float(value) for key, value in other.callback_metrics.items()}

    probe = Probe(both)
    trainer_of(tmp_path, probe, **kwargs).fit(module, train or loader(drop_last=True), val)
    return probe.result


class TwoLoadersOneName(TwoLoaders):
    add_index = False


class Dicts(Polite):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        if isinstance(batch, dict):
            batch["x"] = batch["x"] * 0.5
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if isinstance(batch, dict):
            scale = 1.0 if self.trainer.training else 3.0
            return {"x": batch["x"] * scale, "y": batch["y"]}
        return batch

    def validation_step(self, batch, batch_idx):
        y = batch.pop("y")
        self.outputs.append(self.loss((batch["x"], y)))
        self.log("val_loss", self.outputs[-1])


class DictData(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        x, y = data()[index]
        return {"x": x, "y": y}


def equal(score, oracle):
    assert score.keys() == oracle.keys()
    noise = {"val_noise"}  # random in the step: no two runs agree on it, only two passes do
    assert {k: score[k] for k in score.keys() - noise} == pytest.approx(
        {k: oracle[k] for k in oracle.keys() - noise}, abs=1e-6
    )
    assert len(score) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"limit_val_batches": 2},
        {"limit_val_batches": 0.7},
        {"memory_limit": 0},
        {"memory_limit": 0, "limit_val_batches": 2},
        {"precision": "bf16-mixed"},
        {"logger": True},
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_a_pass_gives_what_validate_gives(tmp_path, kwargs):
    logger = {"logger": CSVLogger(tmp_path)} if kwargs.pop("logger", False) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scores, oracle = score_and_validate(tmp_path, Polite(), loader(seed=1), passes=2, **kwargs, **logger)
    equal(scores[0], oracle)
    assert scores[0] == scores[1]
    assert {"val_loss", "val_loss_epoch", "val_accuracy", "val_MulticlassF1Score", "val_epoch_end"} < set(scores[0])


def test_a_pass_does_not_look_through_what_is_logged_at_every_step(tmp_path, monkeypatch):
    looked, plain = [], _ResultMetric.to
    monkeypatch.setattr(_ResultMetric, "to", lambda self, *args, **kw: looked.append(self) or plain(self, *args, **kw))

    def score(trainer, pl_module):
        with ValidationScorer(trainer, pl_module) as scorer:
            looked.clear()
            return scorer.metrics(), len(looked)

    probe = Probe(score)
    trainer_of(tmp_path, probe).fit(Polite(), loader(drop_last=True), loader(96))
    metrics, times = probe.result
    assert len(metrics) > 4
    assert times <= 2 * len(metrics) < 12 * 4  # once for metrics of torchmetrics, and when the pass is over


def test_what_is_logged_is_moved_where_it_is_elsewhere(tmp_path):
    results = _results_that_stay(trainer_of(tmp_path))

    def logged(device):
        results.log("validation_step", "loss", torch.tensor(1.0, device=device), batch_size=1)
        (result,) = results.values()
        return result.value.device.type, result.cumulated_batch_size.device.type

    assert logged("cpu") == ("cpu", "cpu")
    assert logged("meta") == ("meta", "meta")


@pytest.mark.parametrize("module", [TwoLoaders, TwoLoadersOneName])
@pytest.mark.parametrize("limit", [1.0, 2])
def test_two_loaders_are_scored_as_validate_does(tmp_path, module, limit):
    val = [loader(22, 1), loader(9, 2, batch_size=4)]
    if module is TwoLoadersOneName:
        module = type("Named", (TwoLoadersOneName,), {})
    (score, again), oracle = score_and_validate(tmp_path, module(), val, passes=2, limit_val_batches=limit)
    equal(score, oracle)
    assert score == again


def test_what_is_added_up_over_the_data_is_known_with_its_loader(tmp_path):
    class Sums(TwoLoaders):
        def __init__(self):
            super().__init__()
            self.seen = torchmetrics.SumMetric()

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("mean", 1.0)
            self.log("sum", 1.0, reduce_fx="sum")
            self.log(f"own_{dataloader_idx}", 1.0, reduce_fx=sum, add_dataloader_idx=False)

        def on_validation_epoch_end(self):
            self.seen.update(1.0)
            self.log("object", self.seen)

    def sums(trainer, module):
        with ValidationScorer(trainer, module) as scorer:
            logged = scorer.metrics()
            return {name: scorer.sums[name] for name in logged if name in scorer.sums}

    probe = Probe(sums)
    trainer_of(tmp_path, probe).fit(Sums(), loader(drop_last=True), [loader(22, 1), loader(9, 2)])
    own = {f"{name}{number}": number for name in ("sum/dataloader_idx_", "own_") for number in (0, 1)}
    assert probe.result == {**own, "object": None}


def test_loaders_combined_in_another_mode_are_scored_as_validate_does(tmp_path):
    class Combined(Polite):
        def validation_step(self, batch, batch_idx):
            self.outputs.append(self.loss(batch["a"]) - self.loss(batch["b"]))
            self.log("val_loss", self.outputs[-1], batch_size=1)

    def val():
        return CombinedLoader({"a": loader(22, 1), "b": loader(9, 2, batch_size=4)}, "max_size_cycle")

    (score, again), oracle = score_and_validate(tmp_path, Combined(), val(), passes=2)
    equal(score, oracle)
    assert score == again


def test_dict_batches_and_transfer_hooks_are_scored_as_validate_does(tmp_path):
    (score, again), oracle = score_and_validate(tmp_path, Dicts(), DataLoader(DictData(), 8), passes=2)
    equal(score, oracle)
    assert score == again


def test_loaders_need_not_be_dataloaders(tmp_path):
    val = Batches(loader(seed=1))
    (score, again), oracle = score_and_validate(tmp_path, Polite(), val, passes=2)
    # this loader hands out its own tensors, and the careless step changes them: only the scorer's passes do not
    equal(score, oracle)
    assert score == again


def test_a_generator_as_validation_data_is_refused_by_name(tmp_path):
    def attempt(trainer, pl_module):
        with pytest.raises(MisconfigurationException, match=r"val_dataloaders.*generator"):
            ValidationScorer(trainer, pl_module).__enter__()

    val = (tuple(batch) for batch in loader(seed=1))
    trainer_of(tmp_path, Probe(attempt, 0), num_sanity_val_steps=0, max_epochs=1).fit(Polite(), loader(), val)


def test_missing_validation_is_refused_by_name(tmp_path):
    def attempt(message):
        def function(trainer, pl_module):
            with pytest.raises(MisconfigurationException, match=message):
                ValidationScorer(trainer, pl_module).__enter__()

        return Probe(function, 0)

    class Unvalidated(pl.LightningModule):
        training_step, forward, loss = Tiny.training_step, Tiny.forward, Tiny.loss

        def __init__(self):
            super().__init__()
            self.net, self.frozen = nn.Linear(4, 2), nn.Identity()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def run(probe, module, *val, **kwargs):
        trainer_of(tmp_path, probe, max_epochs=1, **kwargs).fit(module, loader(drop_last=True), *val)

    run(attempt("validation_step: Unvalidated has none"), Unvalidated())
    run(attempt("limit_val_batches: 0 leaves no batch"), Polite(), loader(), limit_val_batches=0)


def everything(trainer, module):
    """All that a pass could leave behind, as values to compare."""
    metrics = [m for m in module.modules() if isinstance(m, torchmetrics.Metric)]
    optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = {
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),  # noqa: NPY002
        "weights": module.state_dict(),
        "metrics": [(m._copy_state_dict(), m._update_count, m._computed, m._forward_cache) for m in metrics],
        "modes": [(m.training, id(m)) for m in module.modules()],
        "flags": [p.requires_grad for p in module.parameters()],
        "gradients": [p.grad for p in module.parameters()],
        "own": (module.outputs, module.nested, sorted(map(str, module.names)), list(module.recent), module.count),
        "plain": module.plain,
        "identity": [id(v) for v in (module.outputs, module.nested, module.nested["a"], module.names, module.seen)],
        "gradient identity": [id(p.grad) for p in module.parameters()],
        "parameters": [id(p) for p in module.parameters()],
        "scheduler": {k: v for k, v in vars(scheduler).items() if k != "optimizer" and not callable(v)},
        "groups": groups,
        "optimizer": optimizer.state_dict()["state"],
        "trainer": (trainer.should_stop, trainer.global_step, trainer.state.stage, trainer.state.fn),
        "time": trainer._last_val_time,
        "metrics seen": (dict(trainer.callback_metrics), dict(trainer.logged_metrics)),
        "connector": id(trainer._logger_connector),
        "loops": id(trainer.fit_loop.epoch_loop.val_loop),
        "loop": trainer.fit_loop.epoch_loop.val_loop.state_dict(),
        "callbacks": list(map(id, trainer.callbacks)),
        "loggers": list(map(id, trainer.loggers)),
        "profiler": id(trainer.profiler),
        "model": id(trainer.strategy.model),
        "fx": module._current_fx_name,
        "log": "log" in vars(module),
        "loaders": id(trainer.val_dataloaders),
    }
    return copy.deepcopy(state)


def assert_same(before, after):
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True, msg=name) if isinstance(
            before[name], torch.Tensor
        ) else assert_equal(before[name], after[name], name)


def pending_gradients(module):
    for parameter in module.net.parameters():
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("outcome", ["scores", "raises"])
def test_nothing_is_left_behind(tmp_path, outcome):
    logger = CSVLogger(tmp_path)

    def function(trainer, module):
        module.trainer.should_stop = False
        logger.save()
        rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_bytes()
        with torch.no_grad():
            module.accuracy.update(torch.randn(3, 2), torch.zeros(3).long())
        pending_gradients(module)
        before = everything(trainer, module)
        module.broken = outcome == "raises"
        with ValidationScorer(trainer, module) as scorer:
            assert_same(before, everything(trainer, module))
            for _ in range(3):
                if module.broken:
                    with pytest.raises(ZeroDivisionError, match="the user's own"):
                        scorer.metrics()
                else:
                    assert scorer.metrics()["val_loss"] > 0
                assert_same(before, everything(trainer, module))
            scorer.first_batch()
        assert scorer.batches == []
        module.broken = False
        assert_same(before, everything(trainer, module))
        logger.save()
        assert (tmp_path / "lightning_logs/version_0/metrics.csv").read_bytes() == rows
        module.net.zero_grad()
        trainer.should_stop = True
        return True

    probe = Probe(function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer_of(tmp_path, probe, logger=logger, log_every_n_steps=1, num_sanity_val_steps=0, min_epochs=2).fit(
            ScheduledLate(), loader(drop_last=True), loader(seed=1)
        )
    assert probe.result


class ScheduledLate(Tiny):
    """Misbehaves while it is scored only: the run itself must go on."""

    def on_validation_epoch_end(self):
        if self.trainer.current_epoch == 1:
            super().on_validation_epoch_end()


def test_hooks_may_look_at_callbacks_metrics_and_loggers(tmp_path):
    looked = []

    class Looks(Polite):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            if self.trainer.current_epoch == 1:
                looked.append(self.trainer.callback_metrics["train_loss"])
                looked.append(self.trainer.log_dir)
                looked.append(self.trainer.val_dataloaders.dataset)
                assert any(isinstance(callback, Probe) for callback in self.trainer.callbacks)
                self.logger.experiment.add_image("reconstruction", 1)
                self.logger.log_metrics({"mine": 1.0})

    def function(trainer, module):
        with ValidationScorer(trainer, module) as scorer:
            score = scorer.metrics()
        assert "train_loss" not in score
        assert looked[1:] == [trainer.log_dir, trainer.val_dataloaders.dataset]
        trainer.should_stop = True
        return True

    probe = Probe(function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = trainer_of(tmp_path, probe, logger=CSVLogger(tmp_path))
        trainer.fit(Looks(), loader(drop_last=True), loader(seed=1))  # stops before its own validation of epoch 1
    assert probe.result


class RandomData(Dataset):
    """Augments with a generator of its own, in whichever process reads it."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.reads = 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.reads += 1
        x, y = data(24)[index]
        return x + 0.1 * float(self.rng.normal()) + 0.1 * torch.randn(()), y


def plain_fit(tmp_path, make_train, make_val, function=None, **kwargs):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    callbacks = [Probe(function, None)] if function else []
    module = Terse()
    trainer = trainer_of(tmp_path, *callbacks, **{"max_epochs": 2, **kwargs})
    trainer.fit(module, make_train(), make_val())
    return module.state_dict(), torch.get_rng_state(), {k: float(v) for k, v in trainer.callback_metrics.items()}


def five_passes(trainer, module):
    with ValidationScorer(trainer, module) as scorer:
        scores = [scorer.metrics() for _ in range(5)]
        batch = scorer.first_batch()
        with untouched(trainer, module), isolated_rng(1):
            run_step(trainer, module, "validation_step", batch)
    assert all(score == scores[0] for score in scores)
    for item in first_batches(trainer, 2):
        with untouched(trainer, module), isolated_rng(1):
            moved = transfer(trainer, module, item, step="training_step")
            run_step(trainer, module, "training_step", LoadedBatch(moved)).returned.backward()


def shuffled(**kwargs):
    return lambda: loader(24, shuffle=True, **kwargs)


def with_generator():
    return loader(24, shuffle=True, generator=torch.Generator().manual_seed(3))


LOADERS = {
    "shuffle": (shuffled(), shuffled()),
    "generator": (with_generator, with_generator),
    "own random state": (lambda: DataLoader(RandomData(), 8, shuffle=True), lambda: DataLoader(RandomData(), 8)),
    "persistent workers": (
        shuffled(num_workers=1, persistent_workers=True),
        lambda: DataLoader(RandomData(), 8, num_workers=1, persistent_workers=True),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_fit_that_scores_ends_with_the_weights_of_one_that_does_not(tmp_path, name, sanity):
    if name == "persistent workers" and sanity:
        pytest.skip("slow, and covered without sanity check")
    make_train, make_val = LOADERS[name]
    expected = plain_fit(tmp_path, make_train, make_val, num_sanity_val_steps=sanity)
    scored = plain_fit(tmp_path, make_train, make_val, five_passes, num_sanity_val_steps=sanity)
    assert_equal(expected, scored, name)


def test_scoring_works_inside_validate_and_training_data_may_be_missing(tmp_path):
    class InValidate(Callback):
        def on_validation_start(self, trainer, module):
            self.done = getattr(self, "done", 0) + 1
            before = copy.deepcopy(module.state_dict())
            with ValidationScorer(trainer, module) as scorer:
                self.scores = [scorer.metrics() for _ in range(2)]
                self.size = scorer.batch_size
                batch = scorer.first_batch().data
            assert not any(tensor.is_inference() for tensor in batch)
            assert first_batches(trainer, 3) == []
            assert_equal(before, module.state_dict(), "weights")
            with torch.inference_mode(False), torch.enable_grad(), untouched(trainer, module), isolated_rng(0):
                run_step(trainer, module, "training_step", LoadedBatch(batch)).returned.backward()

    callback, module = InValidate(), Polite()
    trainer = trainer_of(tmp_path, callback)
    with isolated_rng(0):
        (result,) = trainer.validate(module, loader(seed=1), verbose=False)
    assert callback.done == 1
    assert callback.size == 8
    assert callback.scores[0] == callback.scores[1]
    assert {k: v for k, v in callback.scores[0].items() if k != "val_noise"} == pytest.approx(
        {k: float(v) for k, v in trainer.callback_metrics.items() if k != "val_noise"}, abs=1e-6
    )
    assert result["val_loss_epoch"] == pytest.approx(callback.scores[0]["val_loss"])
