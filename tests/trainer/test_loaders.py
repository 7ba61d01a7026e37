"""Loaders of every kind are read beside the run: the right batches, once a round, with nothing taken or left behind."""

import itertools
import multiprocessing

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, get_worker_info

import lightning_softprune.trainer.isolation as isolation
from lightning_softprune import RandomSearch, prune
from lightning_softprune.trainer import ModuleRunner
from lightning_softprune.trainer.batches import FirstBatches
from lightning_softprune.trainer.scorer import ValidationScorer
from lightning_softprune.utilities.snapshot import Snapshot
from support.fits import ORDINARY_FITS, Polite, Probe, assert_equal, first_batches
from support.fits import trainer_of as plain_trainer
from support.modules import AutoEncoder, fit, made, softpruning, trainer_of, vectors

pytestmark = [
    *ORDINARY_FITS,
    pytest.mark.filterwarnings("ignore:.*no `IterableDataset` has `__len__`.*"),
    pytest.mark.filterwarnings("ignore:.*IterableDataset.*has `__len__` defined.*"),
]
SIZE = 8


def batches_of(n, seed):
    """Batches as a DataLoader yields them."""
    return list(DataLoader(vectors(n, seed), SIZE))


class StreamData(IterableDataset):
    """Samples in order without a length; each worker yields every so many-th batch, so the order stays."""

    def __init__(self, n, seed, endless=False):
        self.data, self.endless = vectors(n, seed), endless

    def __iter__(self):
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        while True:
            for batch in range(start, -(-len(self.data) // SIZE), step):
                for index in range(batch * SIZE, min(len(self.data), (batch + 1) * SIZE)):
                    yield self.data[index]
            if not self.endless:
                return


class Reiterable:
    """No DataLoader and no length; iterating it changes attributes of its own, as prefetchers' do."""

    def __init__(self, loader):
        self.loader, self.ahead = loader, None

    def __iter__(self):
        self.running = iter(self.loader)
        self.ahead = next(self.running, None)
        return self

    def __next__(self):
        if self.ahead is None:
            raise StopIteration
        batch, self.ahead = self.ahead, next(self.running, None)
        return batch


def mapped(n, seed, workers=0):
    return DataLoader(vectors(n, seed), SIZE, num_workers=workers)


def stream(n, seed, workers=0):
    return DataLoader(StreamData(n, seed), SIZE, num_workers=workers)


def own_class(n, seed, workers=0):
    return Reiterable(mapped(n, seed, workers))


def own_stream(n, seed, workers=0):
    return Reiterable(stream(n, seed, workers))


STREAMS = [stream, own_class, own_stream]


class Mean(AutoEncoder):
    """Takes what combined loaders give: batches in a dict, in a list, or alone."""

    def loss(self, batch):
        parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch[0], list) else [batch]
        return sum(super(Mean, self).loss(part) for part in parts if part is not None)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=SIZE)

    def on_validation_epoch_end(self):
        pass


class MeanOfEach(Mean):
    """For validation loaders one after another."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        super().validation_step(batch, batch_idx)


def combined(kind, mode):
    loaders = {"a": kind(40, 1), "b": kind(20, 2)}
    return CombinedLoader(list(loaders.values()) if mode == "sequential" else loaders, mode)


def data_of(kind, mode):
    """Training loaders that take turns are refused by Lightning."""
    return combined(kind, "max_size_cycle" if mode == "sequential" else mode), combined(kind, mode)


def plan_and_scores(tmp_path, train, val, kind=Mean, **arguments):
    """Of a round in a fit: all that data decide."""
    monitor = "val_loss" if kind is Mean else "val_loss/dataloader_idx_1"
    callback = softpruning(search=RandomSearch(num_candidates=3), tolerance=0.1, monitor=monitor)
    module = made(kind)
    data = {"train_dataloaders": train, "val_dataloaders": val}
    fit(tmp_path, module, callback, data=data, max_epochs=2, num_sanity_val_steps=0, **arguments)
    for loader in (train, val):
        vars(loader).pop("running", None)  # workers end at once; those of an iterator in a cycle of garbage do not
    (result,) = callback.results
    assert result.applied
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    plan = [group.channels_after for group in result.groups]
    return plan, [trial.score for trial in result.trials], result.metrics_after, weights


MODES = ["max_size_cycle", "min_size", "sequential"]
LIMITS = [{}, {"limit_train_batches": 3, "limit_val_batches": 2}, {"val_check_interval": 2}]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "limits"), [*((0, limits) for limits in LIMITS), (2, LIMITS[1])])
def test_a_round_on_a_stream_is_that_on_the_same_data_with_a_length(tmp_path, workers, limits):
    expected = plan_and_scores(tmp_path, mapped(40, 1), mapped(20, 2), **limits)
    for kind in STREAMS:
        found = plan_and_scores(tmp_path, kind(40, 1, workers), kind(20, 2, workers), **limits)
        assert_equal(expected, found, kind.__name__)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "limits"), list(zip(MODES, [LIMITS[1], {}, LIMITS[1]], strict=True)), ids=str)
def test_a_round_on_combined_streams_is_that_on_the_same_data_with_a_length(tmp_path, mode, limits):
    module = MeanOfEach if mode == "sequential" else Mean
    expected = plan_and_scores(tmp_path, *data_of(mapped, mode), module, **limits)
    for kind in STREAMS:
        assert_equal(expected, plan_and_scores(tmp_path, *data_of(kind, mode), module, **limits), kind.__name__)


@pytest.mark.slow
def test_prune_takes_streams(tmp_path):
    results = []
    for kind in (mapped, stream, own_stream):
        module = made(Mean)
        arguments = {"search": RandomSearch(num_candidates=3), "tolerance": 0.1, "verbose": False, "report": False}
        trainer = trainer_of(tmp_path, max_epochs=1)
        data = {"train_dataloaders": kind(40, 1), "val_dataloaders": kind(20, 2)}
        result = prune(module, **data, trainer=trainer, **arguments)
        results.append(([group.channels_after for group in result.groups], [trial.score for trial in result.trials]))
    assert results[0] == results[1] == results[2]


def read(tmp_path, train, val, n=99, *, memory_limit=None, **arguments):
    """The batches of a round at the start of a fit: training's, validation's."""

    def function(trainer, module):
        with ModuleRunner(trainer, module, memory_limit=memory_limit, calibration_batches=n) as runner:
            return runner.training_batches(n), [list(batches) for batches in runner.validation_batches]

    probe = Probe(function, 0)
    defaults = {"max_epochs": 1, "max_steps": 1, "num_sanity_val_steps": 0}
    plain_trainer(tmp_path, probe, **{**defaults, **arguments}).fit(made(Mean), train, val)
    return probe.result


@pytest.mark.parametrize("mode", [*MODES, "max_size"])
@pytest.mark.parametrize("kind", STREAMS)
def test_streams_give_the_batches_that_data_with_a_length_give(tmp_path, kind, mode):
    for limits in LIMITS[:2]:
        expected = read(tmp_path, *data_of(mapped, mode), **limits)
        assert_equal(expected, read(tmp_path, *data_of(kind, mode), **limits), mode)
        assert [len(batches) for batches in expected[1]] == (
            [2, 2] if limits else [3, 3] if mode == "min_size" else [5, 3]
        )
        assert len(expected[0]) == (3 if limits or mode == "min_size" else 5)


def endless():
    return DataLoader(StreamData(40, 1, endless=True), SIZE)


def test_of_endless_streams_only_what_is_asked_for_is_read(tmp_path):
    expected = batches_of(40, 1) * 2
    train, (val,) = read(tmp_path, endless(), endless(), 7, limit_val_batches=6)
    assert_equal(train, expected[:7], "training")
    assert_equal(val, expected[:6], "limit_val_batches")


def test_combined_loaders_of_which_one_is_endless_are_read_up_to_the_end_of_the_others(tmp_path):
    val = CombinedLoader({"a": endless(), "b": mapped(20, 2)}, "min_size")
    train = CombinedLoader({"a": endless(), "b": mapped(20, 2)}, "min_size")
    found, scored = read(tmp_path, train, val)
    assert_equal(scored, [batches_of(40, 1)[:3], batches_of(20, 2)], "validation")
    assert_equal([row["a"] for row in found], scored[0], "training")


def test_an_endless_validation_stream_is_scored_as_validate_does(tmp_path):
    probe = Probe(lambda trainer, module: _scored(trainer, module), 1)
    module = made(Mean)
    trainer = plain_trainer(tmp_path, probe, max_epochs=2, limit_val_batches=3, limit_train_batches=2)
    trainer.fit(module, endless(), endless())
    assert probe.result["val_loss"] == probe.before


def _scored(trainer, module):
    trainer.callbacks[0].before = float(trainer.callback_metrics["val_loss"])  # nothing was trained on since
    with ValidationScorer(trainer, module) as scorer:
        return scorer.metrics()


def test_lightning_itself_refuses_a_share_of_a_stream(tmp_path):
    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        read(tmp_path, stream(40, 1), mapped(20, 2), limit_train_batches=0.5)


# -------------------------------------------------------------------------------------------------------- read once


def endless_generator():
    while True:
        yield from batches_of(40, 1)


class HoldsGenerator:
    """Can be iterated, and goes on where it was: an endless source."""

    def __init__(self):
        self.source = endless_generator()

    def __iter__(self):
        for batch in self.source:  # noqa: UP028 - `yield from` would end the source where an epoch is cut short
            yield batch


class HoldsGeneratorInDataset(IterableDataset):
    def __init__(self):
        self.source = itertools.chain.from_iterable(zip(*batch, strict=True) for batch in endless_generator())

    def __iter__(self):
        return self.source


class Caches:
    """Notes what it has read of its source, and gives that again before it goes on."""

    def __init__(self):
        self.source, self.noted = endless_generator(), []

    def __iter__(self):
        yield from list(self.noted)
        for batch in self.source:
            self.noted.append(batch)
            yield batch


class InPlace(HoldsGenerator):
    """Changes what it gets of its source."""

    def __iter__(self):
        for batch in self.source:
            batch[0].add_(1)
            yield batch


class LooksAhead(HoldsGenerator):
    """Keeps what it has read and not yet given, as those do that shuffle a stream."""

    def __init__(self):
        super().__init__()
        self.held = []

    def __iter__(self):
        while True:
            while len(self.held) < 2:
                self.held.append(next(self.source))
            yield self.held.pop(0)


class HoldsRunningLoader(HoldsGenerator):
    def __init__(self):
        self.source = iter(endless())


ONE_SHOT = {
    "generator": endless_generator,
    "map": lambda: map(list, endless_generator()),
    "running DataLoader": lambda: iter(endless()),
    "held running DataLoader": HoldsRunningLoader,
}
HELD = {
    "held generator": HoldsGenerator,
    "wrapped": lambda: Nested(HoldsGenerator()),
    "in a dataset": lambda: DataLoader(HoldsGeneratorInDataset(), SIZE),
    "cached": Caches,
    "changed in place": InPlace,
    "looking ahead": LooksAhead,
}


@pytest.mark.parametrize(
    ("which", "name"),
    [
        *(("train_dataloaders", name) for name in ONE_SHOT),
        *(("val_dataloaders", name) for name in ONE_SHOT | HELD if name != "cached"),  # of which it has a batch
    ],
)
def test_what_can_be_read_only_once_is_refused_before_a_batch_is_taken(tmp_path, name, which):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch[0].clone())

    def attempt(trainer, module):
        with (
            pytest.raises(MisconfigurationException, match=f"{which}: a .* can be read only once"),
            ModuleRunner(trainer, module) as runner,
        ):
            runner.training_batches(2)
        return True

    data = {"train_dataloaders": endless(), "val_dataloaders": mapped(20, 2), which: (ONE_SHOT | HELD)[name]()}
    probe = Probe(attempt, 1)
    limits = {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    plain_trainer(tmp_path, probe, Watch(), max_epochs=2, **limits).fit(made(Mean), **data)
    assert probe.result
    if which == "train_dataloaders":
        again = itertools.chain.from_iterable(batches_of(40, 1) for _ in range(9))
        wanted = [batch[0] for batch in itertools.islice(again, 12)]
        # a fetcher that looks ahead drops a batch between epochs, where it begins anew
        assert_equal(seen[:3], wanted[:3], "first epoch")
        assert any(torch.equal(seen[3], batch) for batch in wanted[3:5])


@pytest.mark.parametrize("name", HELD)
def test_of_a_stream_that_a_training_loader_holds_the_run_gets_what_was_read_ahead(tmp_path, name):
    """Twice in a fit, with what was read changed in place."""

    def seen_by(*callbacks):
        seen = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                seen.append(batch[0].clone())

        limits = {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        plain_trainer(tmp_path, *callbacks, Watch(), max_epochs=4, **limits).fit(
            made(Mean), HELD[name](), mapped(20, 2)
        )
        return seen

    def ahead(trainer, module):
        with ModuleRunner(trainer, module, calibration_batches=n) as runner:
            found = [batch[0].clone() for batch in runner.training_batches(n)]
            for batch in runner.training_batches(n):
                batch[0].zero_()
        return found

    n = 3
    without, first, second = seen_by(), Probe(ahead, 1), Probe(ahead, 2)
    assert_equal(seen_by(first, second), without, "the run")
    assert_equal(first.result, without[3:6], "before the second epoch")
    assert_equal(second.result, without[6:9], "before the third epoch")


# ----------------------------------------------------------------------------------------------- kinds of DataLoaders


class Forever:
    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        while True:
            yield from self.batch_sampler


class Repeating(DataLoader):
    """Goes on and on through one iterator, whose workers it keeps: as timm's and Ultralytics' loaders do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        vars(self)["batch_sampler"] = Forever(self.batch_sampler)
        self.running = super().__iter__()

    def __len__(self):
        return len(self.batch_sampler.batch_sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.running)


class Scaled(DataLoader):
    """An `__iter__` of its own and attributes that are not for pickling."""

    def __init__(self, *args, scale, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale, self.count = scale, [0]
        self.other = DataLoader(self.dataset, self.batch_size, num_workers=1, persistent_workers=True)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "scale"}

    def __iter__(self):
        for (x,), (y,) in zip(super().__iter__(), self.other, strict=True):
            yield [x * self.scale + 0 * y]


def batch_sampled():
    data = vectors(40, 1)
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), SIZE, False))


class Nested:
    """A pipeline: loaders in lists in objects."""

    def __init__(self, *stages):
        self.stages, self.scale = list(stages), 1.0

    def __iter__(self):
        for batch in self.stages[0]:
            yield [x * self.scale for x in batch]


def shuffled(**kwargs):
    return DataLoader(vectors(40, 1), SIZE, shuffle=True, **kwargs)


KINDS = {
    "repeating": lambda: Repeating(vectors(40, 1), SIZE, shuffle=True),
    "repeating, workers": lambda: Repeating(vectors(40, 1), SIZE, shuffle=True, num_workers=1),
    "own __iter__": lambda: Scaled(vectors(40, 1), SIZE, scale=2.0),
    "batch sampler": batch_sampled,
    "prefetching": lambda: Reiterable(shuffled()),
    "nested": lambda: Nested(Reiterable(shuffled(num_workers=1, persistent_workers=True))),
    "nested twice": lambda: Nested(Nested(shuffled(num_workers=1, persistent_workers=True))),
    "stream": lambda: stream(40, 1),
}


PERSISTENT = {"repeating, workers", "own __iter__", "nested", "nested twice"}
"""Torch takes seconds to end such workers once the run's loader is forgotten."""


def trained_on(tmp_path, make, function, **arguments):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append([x.clone() for x in batch])
            if batch_idx == 1:
                function(trainer, module)

    pl.seed_everything(3, verbose=False)
    plain_trainer(tmp_path, Watch(), limit_val_batches=0, **arguments).fit(made(Mean), make())
    return seen


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in PERSISTENT else ()) for name in KINDS]
)
def test_reading_in_mid_epoch_disturbs_no_kind_of_loader(tmp_path, name):
    found = []

    def read_some(trainer, module):
        found.append(first_batches(trainer, 3, seed=5))

    expected = trained_on(tmp_path, KINDS[name], lambda trainer, module: None)
    assert_equal(expected, trained_on(tmp_path, KINDS[name], read_some), name)
    assert_equal(found[0], found[1], "the same seed, the same batches")
    assert len(found[0]) == 3
    rows = {tuple(row.tolist()) for (x,) in expected for row in x}
    assert all(tuple(row.tolist()) in rows for (x,) in found[0] for row in x)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling.*")
def test_overfitted_batches_are_those_that_are_read(tmp_path):
    seen = trained_on(tmp_path, shuffled, lambda *_: None, overfit_batches=2, max_epochs=1)
    train, _ = read(tmp_path, shuffled(), mapped(20, 2), overfit_batches=2)
    assert_equal(train, seen, "overfit_batches")


def test_outside_of_a_fit_limits_count_too(tmp_path):
    class Dry(Callback):
        def on_validation_end(self, trainer, module):
            self.found = first_batches(trainer, 99)

    class WithData(Mean):
        def train_dataloader(self):
            return self.data()

    for make, limit, number in (
        (lambda: mapped(40, 1), 3, 3),
        (lambda: mapped(40, 1), 0.5, 2),
        (lambda: mapped(40, 1), 1.0, 5),
        (lambda: stream(40, 1), 3, 3),
        (lambda: stream(40, 1), 1.0, 5),
        (lambda: CombinedLoader([mapped(40, 1), stream(20, 2)], "sequential"), 2, 4),
    ):
        module, callback = made(WithData), Dry()
        module.data = make
        plain_trainer(tmp_path, callback, limit_train_batches=limit).validate(module, mapped(20, 2), verbose=False)
        assert len(callback.found) == number


# ----------------------------------------------------------------------------------------------------------- read once


class Counted(DataLoader):
    starts = 0

    def __iter__(self):
        type(self).starts += 1
        return super().__iter__()


class Training(Counted):
    pass


class Validation(Counted):
    pass


WORKERS = multiprocessing.Value("i", 0)


def count_worker(_):
    with WORKERS.get_lock():
        WORKERS.value += 1


class Data(pl.LightningDataModule):
    """Counts how often it is asked, and how often its loaders and their workers are started."""

    def __init__(self, workers=0, loaders=1):
        super().__init__()
        self.asked = {"train": 0, "val": 0}
        self.workers, self.loaders = workers, loaders
        Training.starts = Validation.starts = WORKERS.value = 0

    def make(self, kind, n):
        arguments = {"num_workers": self.workers, "worker_init_fn": count_worker} if self.workers else {}
        made = [kind(vectors(n, seed), SIZE, **arguments) for seed in range(self.loaders)]
        return made[0] if self.loaders == 1 else made

    def train_dataloader(self):
        self.asked["train"] += 1
        return self.make(Training, 40)

    def val_dataloader(self):
        self.asked["val"] += 1
        loaders = self.make(Validation, 20)
        return loaders if self.loaders == 1 else CombinedLoader(loaders, "max_size_cycle")

    def counts(self):
        return {**self.asked, "training": Training.starts, "validation": Validation.starts, "workers": WORKERS.value}


def counts_of(tmp_path, callbacks, how="fit", workers=0, loaders=1, **arguments):
    data = Data(workers, loaders)
    trainer = trainer_of(tmp_path, *callbacks, **arguments)
    getattr(trainer, how)(made(Mean), datamodule=data)
    return data.counts()


def a_round(epoch=1):
    return softpruning(epochs=epoch, search=RandomSearch(num_candidates=3), tolerance=0.2, compensation="least_squares")


def difference(tmp_path, **arguments):
    callback = a_round(arguments.pop("epoch", 1))
    without = counts_of(tmp_path, [], **arguments)
    found = counts_of(tmp_path, [callback], **arguments)
    return {name: found[name] - without[name] for name in found}


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_round_starts_every_loader_once(tmp_path, loaders):
    """And the look before training starts those of validation for a batch."""
    more = difference(tmp_path, loaders=loaders)
    # of two training loaders that take turns none runs out: they have one length
    assert more == {"train": 0, "val": 0, "training": loaders, "validation": 2 * loaders, "workers": 0}


@pytest.mark.slow
def test_a_round_starts_every_worker_once(tmp_path):
    more = difference(tmp_path, workers=2)
    assert more == {"train": 0, "val": 0, "training": 1, "validation": 2, "workers": 6}


@pytest.mark.slow
def test_before_the_first_epoch_no_loader_is_asked_for_either(tmp_path):
    for sanity in (0, 2):
        more = difference(tmp_path, epoch=0, num_sanity_val_steps=sanity)
        assert more == {"train": 0, "val": 0, "training": 1, "validation": 1, "workers": 0}


def test_a_dry_run_asks_for_training_data_once(tmp_path):
    more = difference(tmp_path, how="validate")
    assert more == {"train": 1, "val": 0, "training": 1, "validation": 1, "workers": 0}


@pytest.mark.slow
def test_a_dry_run_starts_every_worker_once(tmp_path):
    more = difference(tmp_path, how="validate", workers=1, loaders=2)
    assert more == {"train": 1, "val": 0, "training": 2, "validation": 2, "workers": 4}


def test_the_batches_of_a_round_are_the_same_whoever_asks(tmp_path):
    class Careless(Polite):
        def training_step(self, batch):
            batch[0].zero_()
            return super().training_step(batch)

    def function(trainer, module):
        with ModuleRunner(trainer, module, seed=4, calibration_batches=3) as runner:
            first = runner.training_batches(2)
            torch.rand(3)
            more = runner.training_batches(4)
            torch.rand(3)
            steps, raw = runner.calibration(3)
            with torch.no_grad():
                steps[0]()
            afresh = first_batches(trainer, 4, seed=4)
        assert_equal(afresh[:2], first, "two")
        assert_equal(afresh[:3], raw, "three")
        assert_equal(afresh, more, "more than was said")
        assert not torch.equal(afresh[0][0], torch.zeros_like(afresh[0][0]))
        assert runner._first_batches is None
        return True

    probe = Probe(function, 0)
    data = DataLoader(list(zip(torch.randn(40, 4), torch.randint(0, 2, (40,)), strict=True)), SIZE, shuffle=True)
    plain_trainer(tmp_path, probe, max_epochs=1).fit(Careless(), data, data)
    assert probe.result


def test_validation_batches_are_dropped_also_where_the_training_loader_does_not_end(tmp_path, monkeypatch):
    def close(_):
        raise OSError("a worker does not end")

    def use(runner):
        with runner:
            runner.training_batches(1)
            assert runner.validation_batches
            monkeypatch.setattr(FirstBatches, "close", close)

    def function(trainer, module):
        runner = ModuleRunner(trainer, module)
        with pytest.raises(OSError, match="a worker does not end"):
            use(runner)
        return runner.validation_batches, runner._first_batches

    probe = Probe(function, 0)
    data = DataLoader(list(zip(torch.randn(8, 4), torch.randint(0, 2, (8,)), strict=True)), SIZE)
    plain_trainer(tmp_path, probe, max_epochs=1).fit(Polite(), data, data)
    assert probe.result == ([], None)


def test_steps_run_as_one_see_the_module_as_it_is_and_leave_it_so(tmp_path, monkeypatch):
    class Counting(Polite):
        def __init__(self):
            super().__init__()
            self.register_buffer("tally", torch.zeros(()))
            self.noted = []

        def training_step(self, batch):
            counts.append((float(self.tally), list(self.noted)))
            self.tally += 1
            self.noted.append(1)
            return super().training_step(batch)

    counts, memories = [], []
    monkeypatch.setattr(isolation, "Snapshot", lambda *args: memories.append(1) or Snapshot(*args))

    def function(trainer, module):
        with ModuleRunner(trainer, module, calibration_batches=3) as runner, torch.no_grad():
            steps, _ = runner.calibration(3)
            counts.clear()
            handle = module.register_forward_hook(lambda *_: None)
            memories.clear()
            with runner.steady():
                for step in steps:
                    step()
            assert len(memories) == 1
            steps[1]()
            handle.remove()
        assert (float(module.tally), module.noted, module._forward_hooks) == (0.0, [], {})
        return True

    probe = Probe(function, 0)
    data = DataLoader(list(zip(torch.randn(40, 4), torch.randint(0, 2, (40,)), strict=True)), SIZE)
    plain_trainer(tmp_path, probe, max_epochs=1, limit_train_batches=3).fit(Counting(), data, data)
    assert probe.result
    assert counts[:4] == [(0.0, [])] * 4


def test_steps_run_as_one_find_metrics_fresh(tmp_path):
    class Metered(Polite):
        def __init__(self):
            super().__init__()
            self.total = torchmetrics.SumMetric()

        def training_step(self, batch):
            totals.append(float(self.total.sum_value))
            self.total.update(1.0)
            return super().training_step(batch)

    totals = []

    def function(trainer, module):
        module.total.update(5.0)
        with ModuleRunner(trainer, module, calibration_batches=2) as runner, torch.no_grad():
            steps, _ = runner.calibration(2)
            totals.clear()
            with runner.steady():
                for step in steps:
                    step()
        return list(totals)

    probe = Probe(function, 0)
    data = DataLoader(list(zip(torch.randn(40, 4), torch.randint(0, 2, (40,)), strict=True)), SIZE)
    plain_trainer(tmp_path, probe, max_epochs=1, limit_train_batches=3).fit(Metered(), data, data)
    assert probe.result == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------ workers' ends


class Broken(StreamData):
    def __iter__(self):
        yield from itertools.islice(super().__iter__(), 4 * SIZE)
        raise ZeroDivisionError("the user's own")


BROKEN = {
    "alone": lambda: DataLoader(Broken(200, 1), SIZE, num_workers=2),
    "wrapped": lambda: Nested(Reiterable(DataLoader(Broken(200, 1), SIZE, num_workers=1))),
    "of several": lambda: CombinedLoader([shuffled(num_workers=1), DataLoader(Broken(200, 1), SIZE, num_workers=1)]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_workers_end_with_the_reading_also_where_it_fails(tmp_path, name):
    def attempt(trainer, module):
        before = set(multiprocessing.active_children())
        with pytest.raises(ZeroDivisionError) as caught:
            first_batches(trainer, 99)
        assert caught.value.__traceback__ is not None  # its frames hold on to the iterators
        assert set(multiprocessing.active_children()) <= before
        return True

    probe = Probe(attempt, 0)
    trainer = plain_trainer(tmp_path, probe, max_epochs=1, limit_val_batches=0, max_steps=1)
    trainer.fit(made(Mean), BROKEN[name]())
    assert probe.result


@pytest.mark.parametrize("end", ["calibration", "round"])
def test_workers_live_until_no_more_batches_are_wanted(tmp_path, end):
    def function(trainer, module):
        before = set(multiprocessing.active_children())
        with ModuleRunner(trainer, module, calibration_batches=2) as runner:
            assert len(runner.training_batches(1)) == 1
            assert set(multiprocessing.active_children()) - before
            if end == "calibration":
                assert len(runner.calibration(3)[1]) == 3
                assert set(multiprocessing.active_children()) <= before
                assert len(runner.training_batches(9)) == 3
        assert set(multiprocessing.active_children()) <= before
        return True

    probe = Probe(function, 0)
    plain_trainer(tmp_path, probe, max_epochs=1, max_steps=1).fit(made(Mean), shuffled(num_workers=1), shuffled())
    assert probe.result


@pytest.mark.parametrize(("share", "number"), [(1.0, 9), (0.5, 5), (0.1, 2)])
def test_calibration_takes_no_larger_share_of_an_epoch_than_it_may(tmp_path, share, number):
    def function(trainer, module):
        with ModuleRunner(trainer, module, seed=1, calibration_batches=2) as runner:
            steps, raw = runner.calibration(9, share)
            assert_equal(raw, first_batches(trainer, number, seed=1), "the first")
            return len(steps)

    probe = Probe(function, 0)
    plain_trainer(tmp_path, probe, max_epochs=1, max_steps=1).fit(made(Mean), mapped(10 * SIZE, 1), mapped(SIZE, 2))
    assert probe.result == number


def test_every_process_takes_as_many_batches_for_calibration_as_rank_zero(tmp_path, monkeypatch):
    def function(trainer, module):
        with ModuleRunner(trainer, module, calibration_batches=2) as runner:
            monkeypatch.setattr(runner, "broadcast", lambda value: 4)  # where an epoch is shorter than here
            return len(runner.calibration(9, 0.5)[0])

    probe = Probe(function, 0)
    plain_trainer(tmp_path, probe, max_epochs=1, max_steps=1).fit(made(Mean), mapped(10 * SIZE, 1), mapped(SIZE, 2))
    assert probe.result == 4


@pytest.mark.slow
def test_persistent_workers_of_the_run_go_on(tmp_path):
    held = []

    def function(trainer, module):
        (loader,) = (
            trainer.train_dataloader if isinstance(trainer.train_dataloader, list) else [trainer.train_dataloader]
        )
        held.append(([w.pid for w in loader._iterator._workers], loader._iterator))
        assert len(first_batches(trainer, 3)) == 3
        assert loader._iterator is held[-1][1]
        assert all(worker.is_alive() for worker in loader._iterator._workers)

    trained_on(tmp_path, lambda: shuffled(num_workers=1, persistent_workers=True), function)
    assert len(held) == 2
    assert held[0][0] == held[1][0]
