"""What a round leaves alone, what it depends on, and what its arguments do."""

import copy
import csv
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_softprune.round.preparing.prepare as prepare
import lightning_softprune.round.searching as searching
from lightning_softprune import (
    GradientSearch,
    GridSearch,
    NormBaseline,
    RandomSearch,
    SearchStrategy,
    SensitivitySearch,
    UniformBaseline,
    prune,
)
from lightning_softprune.calibration import IMPORTANCES, collect_statistics, sum_over_channels
from lightning_softprune.round import Goal, run_round
from lightning_softprune.round.decision import check_agreement
from lightning_softprune.round.preparing import PruningProblem
from lightning_softprune.search import Plan
from lightning_softprune.trainer import ModuleRunner
from support.modules import (
    AtEpochStart,
    AutoEncoder,
    ConvClassifier,
    Manual,
    assert_optimizers_hold_live_parameters,
    assert_same,
    count,
    fit,
    keeping_monitors,
    loaders,
    made,
    no_compensation,
    plain_validate,
    rng_state,
    run_state,
    softpruning,
    trainer_of,
    training_state,
    vectors,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Scheduled(AutoEncoder):
    """Keeps state wherever a module can: dropout draws, a frozen part in eval mode, lists, a plateau scheduler."""

    def __init__(self):
        super().__init__()
        self.encoder.insert(1, nn.BatchNorm1d(16))
        self.encoder.append(nn.Dropout(0.1))
        self.aside = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        self.outputs, self.nested = [], {"seen": [0]}

    def on_train_epoch_start(self):
        self.aside.eval()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.outputs.append(batch_idx)
        self.nested["seen"].append(batch_idx)
        np.random.rand()  # noqa: NPY002 - users do
        torch.rand(())

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.outputs.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        step = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [{"scheduler": step, "interval": "step"}, {"scheduler": plateau, "monitor": "val_loss"}]


def csv_rows(trainer, drop):
    with open(f"{trainer.log_dir}/metrics.csv", newline="") as file:
        rows = [
            {k: v for k, v in row.items() if k not in drop and not k.startswith(drop)} for row in csv.DictReader(file)
        ]
    return [row for row in rows if any(value for name, value in row.items() if name not in ("epoch", "step"))]


def whole_run(tmp_path, name, module, *callbacks, **arguments):
    """Everything a run ends with, and its logger's rows without the round's own."""
    trainer = fit(tmp_path, module, *callbacks, logger=CSVLogger(tmp_path, name=name), **arguments)
    end = training_state(trainer, module)
    del end["objects"], end["held"]
    return end, csv_rows(trainer, ("softprune/",))


# ------------------------------------------------------------------------------------------------- what stays the same


@pytest.mark.parametrize("kind", [Scheduled, ConvClassifier, Manual])
def test_a_round_leaves_all_but_the_weights_as_in_a_run_without_the_callback(tmp_path, kind):
    def spy(trainer, module):
        state = {
            **run_state(trainer),
            "modes": {name: m.training for name, m in module.named_modules()},
            "lists": {k: copy.deepcopy(v) for k, v in vars(module).items() if isinstance(v, list) and k != "_hook"},
            "buffers": {k: v.clone() for k, v in module.named_buffers() if v.ndim == 0},
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "defaults": [
                {k: v for k, v in g.items() if k != "params"} for o in trainer.optimizers for g in o.param_groups
            ],
            "nested": copy.deepcopy(getattr(module, "nested", None)),
        }
        return state, count(module)

    found = {}
    for name, callbacks in {
        "without": [],
        "with": [softpruning(search=RandomSearch(num_candidates=3), **keeping_monitors())],
    }.items():
        for epoch in (0, 1):
            for callback in callbacks:
                callback.epochs = [epoch]
            probe = AtEpochStart(spy, epoch)
            fit(tmp_path, made(kind), *callbacks, probe, max_epochs=2)
            found[name, epoch] = probe.found
    for epoch in (0, 1):
        state, size = found["with", epoch]
        expected, dense = found["without", epoch]
        assert size < dense
        assert_same(state, expected)


@pytest.mark.parametrize("kind", [Scheduled, ConvClassifier])
def test_one_trial_or_fifty_give_the_same_run(tmp_path, kind):
    """All plans score the same, so the first is taken: only the number of trials differs."""
    kind = type(kind.__name__, (kind,), {"validation_step": constant(kind)})
    runs = {}
    for number in (1, 50):
        callback = softpruning(monitor="val_same", mode="min", search=RandomSearch(num_candidates=number))
        runs[number] = whole_run(tmp_path, str(number), made(kind), callback), callback.results[0]
    assert len(runs[50][1].trials) >= 20 > 2 >= len(runs[1][1].trials)
    assert [g.channels_after for g in runs[1][1].groups] == [g.channels_after for g in runs[50][1].groups]
    assert_same(runs[1][0], runs[50][0])
    assert runs[1][0][1], "there are rows to compare"


def constant(kind):
    def validation_step(self, batch, batch_idx):
        kind.validation_step(self, batch, batch_idx)
        self.log("val_same", 1.0)

    return validation_step


class Doubtful(Scheduled):
    """A score that is NaN for every pruned network, or (always) for every network."""

    always = False

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        whole = self.encoder[0].out_features + self.encoder[3].out_features + self.decoder[0].out_features == 40
        self.log("val_doubtful", float("nan") if self.always or not whole else 1.0)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(
    "search", [UniformBaseline(), GradientSearch(steps=1, start="uniform"), SensitivitySearch(levels=3)]
)
def test_nan_for_every_plan_leaves_a_run_bit_identical_and_warns(tmp_path, search, always, monkeypatch):
    monkeypatch.setattr(Doubtful, "always", always)
    expected = whole_run(tmp_path, "without", made(Doubtful))
    callback = softpruning(monitor="val_doubtful", mode="min", search=search)
    with pytest.warns(UserWarning, match="nan"):
        found = whole_run(tmp_path, "with", made(Doubtful), callback)
    [result] = callback.results
    assert not result.applied
    assert "val_doubtful" in result.reason
    assert result.sparsity == 0.0
    assert result.costs_after == result.costs_before
    assert not any(trial.feasible for trial in result.trials)
    assert_same(found, expected)


def test_nan_for_some_plans_makes_those_infeasible(tmp_path):
    class Picky(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log(
                "val_picky", float("nan") if self.encoder[2].out_features % 2 else float(self.encoder[2].out_features)
            )

    module = made(Picky)
    callback = softpruning(monitor="val_picky", mode="min", search=RandomSearch(num_candidates=20))
    fit(tmp_path, module, callback)
    [result] = callback.results
    nan = [trial for trial in result.trials if trial.score != trial.score]
    assert nan
    assert not any(trial.feasible for trial in nan)
    assert result.applied
    assert module.encoder[2].out_features % 2 == 0
    assert result.score_after == min(trial.score for trial in result.trials if trial.feasible)


# ----------------------------------------------------------------------------------------------------------- same seed


class Noisy(Callback):
    """Draws random numbers of its own before a round."""

    def on_train_epoch_start(self, trainer, pl_module):
        torch.rand(5)
        np.random.rand(5)  # noqa: NPY002
        random.random()


def test_a_plan_depends_on_seed_and_epoch_alone(tmp_path):
    def plan(seed, *others):
        callback = softpruning(
            seed=seed, epochs=0, search=RandomSearch(num_candidates=5), importance="random", **no_compensation()
        )
        probe = AtEpochStart(lambda _, m: dict(copy.deepcopy(m.state_dict())), epoch=0)
        fit(tmp_path, made(), *others, callback, probe, max_epochs=1)
        return [trial.coefficients for trial in callback.results[0].trials], probe.found

    first, weights = plan(3)
    again, same = plan(3, Noisy())
    assert again == first
    assert_same(same, weights)
    other, _ = plan(4)
    assert other != first


def test_rounds_of_several_epochs_draw_different_numbers(tmp_path, monkeypatch):
    original, seeds = searching.SearchLoop, []
    monkeypatch.setattr(
        searching, "SearchLoop", lambda f, seed, *a, **k: seeds.append(seed) or original(f, seed, *a, **k)
    )
    fit(tmp_path, made(), softpruning(epochs=[0, 1]), max_epochs=2)
    assert len(set(seeds)) == 2


def test_the_strategy_given_is_not_changed_and_serves_two_callbacks(tmp_path):
    strategy = RandomSearch(num_candidates=3)
    before = copy.deepcopy(vars(strategy))
    one, two = softpruning(search=strategy), softpruning(search=strategy)
    first, second = made(), made()
    fit(tmp_path, first, one)
    assert vars(strategy) == before
    assert one.search is not strategy
    assert vars(one.search) == before, "nor is the callback's own"
    fit(tmp_path, second, two)
    assert [t.score for t in one.results[0].trials] == [t.score for t in two.results[0].trials]
    assert_same(dict(first.state_dict()), dict(second.state_dict()))


def test_the_default_strategy_is_not_shared(tmp_path):
    one, two = softpruning(), softpruning()
    assert one.search is not two.search


# ------------------------------------------------------------------------------------------------------ the strategies


class Once(SearchStrategy):
    """A strategy of the user's own."""

    def propose(self, space, rng):
        yield space.project(np.full(space.size, 0.3))
        return "done"


@pytest.mark.parametrize(
    "search",
    [
        GridSearch(levels=4),
        GradientSearch(steps=2),
        GradientSearch(steps=2, difference="spsa", start="uniform"),
        GradientSearch(steps=2, difference="forward"),
        SensitivitySearch(levels=3, refine=2),
        RandomSearch(num_candidates=3),
        UniformBaseline(),
        NormBaseline(),
        Once(),
    ],
    ids=lambda search: type(search).__name__,
)
def test_every_strategy_prunes_to_the_target(tmp_path, search):
    module = made()
    dense = count(module)
    callback = softpruning(search=search, tolerance=0.05)
    trainer = fit(tmp_path, module, callback, max_epochs=2)
    [result] = callback.results
    assert result.applied
    assert result.strategy == type(search).__name__
    assert result.stop_reason
    assert abs(result.sparsity - 0.5) <= 0.05
    assert result.sparsity == pytest.approx(1 - count(module) / dense, abs=1e-6)
    feasible = [t.score for t in result.trials if t.feasible]
    assert result.score_after == min(feasible)
    assert_optimizers_hold_live_parameters(trainer, module)
    for group, coefficient in zip(result.groups, [g.coefficient for g in result.groups], strict=True):
        gone = group.channels_before - group.channels_after
        assert abs(coefficient * group.channels_before - gone) <= 1 + 1e-9


# ------------------------------------------------------------------------------------------------------- the arguments


def kept_rows(before, after):
    return [int((before == row).all(1).nonzero()) for row in after]


def kept_by(tmp_path, importance, **arguments):
    """Which channels of the encoder's first layer are kept."""
    module = made()
    with torch.no_grad():
        module.encoder[0].weight[:4] *= 3.0  # large weights whose channels nobody listens to
        module.encoder[2].weight[:, :4] *= 1e-3
        module.encoder[0].weight[4:8] *= 1e-2  # small weights
    before = module.encoder[0].weight.detach().clone()
    probe = AtEpochStart(lambda _, m: m.encoder[0].weight.detach().clone(), epoch=0)
    callback = softpruning(
        epochs=0,
        target_sparsity=0.3,
        bounds={"encoder.0": [0.5, 0.5], "encoder.2": [0, 0]},
        tolerance=0.2,
        importance=importance,
        **{**no_compensation(), **arguments},
    )
    fit(tmp_path, module, callback, probe, max_epochs=1)
    return set(kept_rows(before, probe.found))


def test_importance_decides_which_channels_go(tmp_path):
    kept = {importance: kept_by(tmp_path, importance) for importance in IMPORTANCES}
    assert {len(channels) for channels in kept.values()} == {8}
    assert kept["magnitude"] >= {0, 1, 2, 3}
    for importance in ("activation", "taylor", "reconstruction"):
        assert not kept.get(importance, set()) & {0, 1, 2, 3}, importance
    assert kept["random"] != kept_by(tmp_path, "random", seed=1)
    own = kept_by(tmp_path, lambda model, group: sum_over_channels(model, group, torch.square))
    assert own == kept["magnitude"]
    assert kept_by(tmp_path, lambda _, group: torch.arange(group.num_channels, 0, -1)) == set(range(8))


def test_calibration_batches_is_how_many_training_batches_are_looked_at(tmp_path):
    seen = {}

    class Counting(AutoEncoder):
        def training_step(self, batch, batch_idx):
            if not self.training and self.global_step:  # before training, the very first batch is looked at
                key = tuple(batch[0][:, 0].tolist())
                seen.setdefault(key, 0)
            return super().training_step(batch, batch_idx)

    for number in (1, 3, 100):
        seen.clear()
        fit(tmp_path, made(Counting), softpruning(calibration_batches=number), num_sanity_val_steps=0)
        # an epoch has four; a step that uses all of the module is looked at for branches no further, and once in short
        assert len(seen) == min(number, 4) + 1


def looked_at(tmp_path, *, hidden, length, **arguments):
    """How many training batches of 4 samples a round looks at, of an epoch of this many; the loader is started once."""
    seen, starts = set(), []

    class Noting(AutoEncoder):
        def training_step(self, batch, batch_idx):
            if not self.training and len(batch[0]) == 4:  # not: a part of a batch
                seen.add(tuple(batch[0][:, 0].tolist()))
            return super().training_step(batch, batch_idx)

    class Counting(DataLoader):
        def __iter__(self):
            starts.append(self)
            return super().__iter__()

    module = made(Noting, hidden=hidden)
    data = {**loaders(module), "train_dataloaders": Counting(vectors(4 * length), batch_size=4, shuffle=True)}
    trainer = trainer_of(tmp_path, max_epochs=1, limit_val_batches=1)
    quiet = {"search": UniformBaseline(), "report": False, "verbose": False}
    prune(module, trainer=trainer, monitor="val_loss", **quiet, **data, **arguments)
    assert len(starts) == 2  # the fit's own, and a copy for the round
    return len(seen)


def test_where_a_layer_sees_few_rows_more_training_batches_are_looked_at_within_an_epoch(tmp_path):
    assert looked_at(tmp_path, hidden=24, length=400) == 20  # 8 * 24 samples would be 48 batches
    assert looked_at(tmp_path, hidden=8, length=400) == 16
    assert looked_at(tmp_path, hidden=4, length=400) == 8 + 8  # the latent space has 8
    assert looked_at(tmp_path, hidden=24, length=160) == 8
    assert looked_at(tmp_path, hidden=24, length=700) == 32
    assert looked_at(tmp_path, hidden=24, length=400, calibration_batches=3) == 3
    assert looked_at(tmp_path, hidden=24, length=400, compensation="bias") == 8


def test_search_batches_is_how_many_validation_batches_score_a_trial(tmp_path):
    scores = {}
    for number in (1, 2, None):
        module, data = made(), loaders(made())
        callback = softpruning(epochs=0, search_batches=number, **no_compensation())
        probe = AtEpochStart(lambda _, m, data=data: _means(m, data), epoch=0)
        fit(tmp_path, module, callback, probe, data=data, max_epochs=1)
        losses, sizes = probe.found
        [result] = callback.results
        shares = [trial.share for trial in result.trials]
        assert shares == ([1.0] if number is None else [number / 3, 1.0])
        assert result.trials[-1].score == result.score_after == pytest.approx(np.average(losses, weights=sizes))
        assert (result.chosen, result.evaluations) == (len(shares) - 1, 2)
        assert result.passes == pytest.approx(1 + sum(shares) + (0 if number is None else number / 3))
        expected = np.average(losses[:number], weights=sizes[:number])
        scores[number] = result.trials[0].score
        assert scores[number] == pytest.approx(expected, abs=1e-6)
    assert len(set(scores.values())) == 3


def many(samples=4000, **arguments):
    """Validation data; by default enough to score trials on a part."""
    train, val = DataLoader(vectors(960, 1), 12, shuffle=True), DataLoader(vectors(samples, 2), 50, **arguments)
    return {"train_dataloaders": train, "val_dataloaders": val}


def test_plans_are_told_apart_on_a_part_and_the_committed_one_is_scored_on_all(tmp_path):
    module, data = made(), many()
    callback = softpruning(epochs=1, finetune_epochs=0, search=SensitivitySearch(levels=3))
    fit(tmp_path, module, callback, data=data, max_epochs=2)
    [result] = callback.results
    part, finals = [[t for t in result.trials if (t.share == 1.0) is whole] for whole in (False, True)]
    assert {trial.share for trial in part} == {0.3}
    assert result.trials[result.chosen] in finals
    assert plain_validate(tmp_path, module, data)["val_loss"] == pytest.approx(result.score_after, rel=1e-5)
    assert result.metrics_after["val_loss"] == result.score_after
    assert result.passes < 0.75 * result.evaluations
    curve = result.sensitivity[0]
    assert curve.scores[0] == pytest.approx(result.score_before), "estimates for all, like the dense model's score"


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*")
def test_a_round_that_reads_its_data_again_finds_what_one_that_keeps_them_finds(tmp_path):
    found = []
    for limit in (None, 1e-9):
        arguments = {"compensation": "none", "importance": "magnitude"}  # statistics have no room either
        callback = softpruning(search=RandomSearch(num_candidates=3), memory_limit=limit, search_batches=2, **arguments)
        fit(tmp_path, made(), callback, data=many(400, shuffle=True), max_epochs=2)
        found.append([(trial.coefficients, trial.metrics, trial.share) for trial in callback.results[0].trials])
    assert found[0] == found[1]
    assert {share for _, _, share in found[0]} == {0.25, 1.0}


@torch.no_grad()
def _means(module, data):
    module.eval()
    batches = list(data["val_dataloaders"])
    losses = [module.loss(batch).item() for batch in batches]
    module.train()
    return losses, [len(batch[0]) for batch in batches]


def test_bounds_limit_the_coefficients_of_groups_and_components(tmp_path):
    module = made()
    callback = softpruning(
        search=RandomSearch(num_candidates=10),
        target_sparsity=0.4,
        bounds={"decoder": [0.0, 0.25], "encoder.0": [0.5, 0.6]},
    )
    fit(tmp_path, module, callback)
    [result] = callback.results
    names = [group.name for group in result.groups]
    assert {group.component for group in result.groups} == {"encoder", "decoder", "encoder+decoder"}
    for trial in result.trials:
        by_name = dict(zip(names, trial.coefficients, strict=True))
        assert 0.5 - 1e-9 <= by_name["encoder.0"] <= 0.6 + 1e-9
        assert by_name["decoder.0"] <= 0.25 + 1e-9
    assert module.decoder[0].out_features >= 12
    assert 16 * 0.4 <= module.encoder[0].out_features <= 8


def test_bounds_that_fix_a_group_keep_it_whole(tmp_path):
    module = made()
    fit(tmp_path, module, softpruning(bounds={"encoder.2": [0, 0]}))
    assert module.encoder[2].out_features == 8


def test_readers_of_groups_that_bounds_keep_whole_are_not_measured(tmp_path, monkeypatch):
    measured = []

    def collect(model, readers, *args, **kwargs):
        measured.extend(reader.name for reader in readers)
        return collect_statistics(model, readers, *args, **kwargs)

    monkeypatch.setattr(prepare, "collect_statistics", collect)
    fit(tmp_path, made(), softpruning(bounds={"encoder.2": [0, 0]}))
    assert measured == ["encoder.2", "decoder.2"]  # and not decoder.0, which reads encoder.2


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_what_neither_the_ranking_nor_the_compensation_reads_is_not_measured(tmp_path, monkeypatch, importance):
    monkeypatch.delattr(prepare, "collect_statistics")
    monkeypatch.delattr(prepare, "find_read_positions")
    callback = softpruning(importance=importance, compensation="none")
    fit(tmp_path, made(), callback)
    assert callback.results[0].applied
    with pytest.raises(NameError):
        fit(tmp_path, made(), softpruning(importance="activation", compensation="none"))


@pytest.mark.parametrize(
    ("search", "compensation", "told"),
    [
        (GradientSearch(), "least_squares", True),
        (SensitivitySearch(), "least_squares", True),
        (GradientSearch(), "bias", False),
        (SensitivitySearch(levels=3), "least_squares", False),
        (GradientSearch(start="uniform", steps=1), "least_squares", False),
        (UniformBaseline(), "least_squares", False),
    ],
)
def test_outputs_are_compared_where_the_search_begins_with_what_they_say(tmp_path, search, compensation, told):
    callback = softpruning(search=search, compensation=compensation)
    fit(tmp_path, made(), callback)
    (result,) = callback.results
    assert (result.numbers.errors is not None) == told


def test_a_strategy_of_ones_own_that_wants_errors_finds_shapes_in_its_space(tmp_path):
    class Told(SearchStrategy):
        wants_errors = True

        def propose(self, space, rng):
            assert [shape.errors[0] for shape in space.shapes] == [0.0] * space.size
            yield space.scale(np.ones(space.size))
            return "told"

    callback = softpruning(search=Told())
    fit(tmp_path, made(), callback)
    assert callback.results[0].stop_reason == "told"


def test_outputs_are_compared_on_whole_batches_where_a_step_takes_no_others(tmp_path):
    class Strict(AutoEncoder):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) != 72:
                raise ValueError(f"batches of 72, not of {len(batch[0])}")
            return super().training_step(batch, batch_idx)

    data = {
        "train_dataloaders": DataLoader(vectors(144, 1), batch_size=72),
        "val_dataloaders": DataLoader(vectors(20, 2), batch_size=8),
    }
    callback = softpruning(search=GradientSearch())
    fit(tmp_path, made(Strict), callback, data=data)
    assert callback.results[0].numbers.errors is not None


@pytest.mark.parametrize(("importance", "correlation", "factor"), [("activation", 0.95, 4.0), (None, 0.8, 12.0)])
def test_what_is_expected_is_what_the_networks_outputs_miss(tmp_path, monkeypatch, importance, correlation, factor):
    """Each group alone pruned, on the same samples; the module's outputs are seen by a hook of the test's own."""
    compared, original = [], PruningProblem.expected_errors

    def compare(problem, runner, judged, step):
        tables, module = original(problem, runner, judged, step), runner.module

        def output():
            seen = []
            handle = module.register_forward_hook(lambda _, __, found: seen.append(found.detach().clone()))
            with torch.no_grad():
                step()
            handle.remove()
            return seen[0]

        dense = output()
        for number, (counts, errors) in enumerate(zip(tables.counts, tables.errors, strict=True)):
            for gone, expected in zip(counts[1:-1], errors[1:-1], strict=True):
                plan = problem.realisation.plan_that_removes(
                    [gone if n == number else 0 for n in range(len(problem.groups))]
                )
                surgery = problem.prune(module, plan)
                missed = (output() - dense).square().mean() / (dense - dense.mean(0)).square().mean()
                surgery.undo()
                compared.append((float(missed), expected))
        return tables

    monkeypatch.setattr(PruningProblem, "expected_errors", compare)
    callback = softpruning(target_sparsity=0.4, search=GradientSearch(), importance=importance)
    fit(tmp_path, made(hidden=24, latent=12), callback)
    exact = [abs(missed - expected) <= 1e-3 * expected for missed, expected in compared]
    assert sum(exact) >= 5  # those that were measured
    logs = np.log([[missed, expected] for missed, expected in compared if missed > 1e-3])
    # where channels that others stand for go first, nearly nothing is missed below what is measured, or much beyond it
    assert np.corrcoef(logs.T)[0, 1] > correlation
    assert np.abs(logs[:, 0] - logs[:, 1]).max() < np.log(factor)


@pytest.mark.parametrize("step", [4, 8])
def test_round_to_keeps_multiples(tmp_path, step):
    module = made(hidden=24, latent=16)
    callback = softpruning(round_to=step, tolerance=0.1, search=RandomSearch(num_candidates=5))
    fit(tmp_path, module, callback)
    sizes = [module.encoder[0].out_features, module.encoder[2].out_features, module.decoder[0].out_features]
    assert sizes != [24, 16, 24]
    assert all(size % step == 0 for size in sizes)


def test_ignore_keeps_outputs_and_inputs(tmp_path):
    module = made()
    callback = softpruning(ignore=["decoder.0"], target_sparsity=0.2)
    fit(tmp_path, module, callback)
    assert (module.decoder[0].in_features, module.decoder[0].out_features) == (8, 16)
    assert [group.name for group in callback.results[0].groups] == ["encoder.0"]
    assert module.encoder[0].out_features < 16


def test_components_name_the_groups(tmp_path):
    callback = softpruning(components={"front": ["encoder"], "back": ["decoder.*"]})
    fit(tmp_path, made(), callback)
    groups = {group.name: (group.component, group.kind) for group in callback.results[0].groups}
    assert groups == {
        "encoder.0": ("front", "intra"),
        "encoder.2": ("front+back", "inter"),
        "decoder.0": ("back", "intra"),
    }
    callback = softpruning(components={"all": ["encoder", "decoder"]})
    fit(tmp_path, made(), callback)
    assert {(group.component, group.kind) for group in callback.results[0].groups} == {("all", "intra")}


def test_mode_decides_what_is_best(tmp_path):
    for mode, best in (("min", min), ("max", max)):
        callback = softpruning(monitor="val_psnr", mode=mode, search=RandomSearch(num_candidates=8))
        fit(tmp_path, made(), callback)
        [result] = callback.results
        assert len({t.score for t in result.trials if t.feasible}) > 1
        assert result.score_after == best(t.score for t in result.trials if t.feasible)


def test_tolerance_decides_what_is_feasible(tmp_path):
    for tolerance in (0.005, 0.02):
        callback = softpruning(tolerance=tolerance, search=SensitivitySearch(levels=3))
        fit(tmp_path, made(), callback)
        [result] = callback.results
        assert abs(result.sparsity - 0.5) <= tolerance
        assert [t.feasible for t in result.trials] == [abs(t.sparsity - 0.5) <= tolerance for t in result.trials]
        assert not all(t.feasible for t in result.trials)


def test_a_search_without_commit_leaves_the_run_bit_identical(tmp_path):
    def search(trainer, module):
        settings = softpruning(search=RandomSearch(num_candidates=3))._settings(trainer)
        before = training_state(trainer, module)
        result = run_round(trainer, module, settings, Goal(1, 0.5, commit=False))
        assert_same(training_state(trainer, module), before)
        return result

    expected = whole_run(tmp_path, "without", made(Scheduled))
    probe = AtEpochStart(search)
    assert_same(whole_run(tmp_path, "with", made(Scheduled), probe), expected)
    assert not probe.found.applied
    assert abs(probe.found.sparsity - 0.5) <= 0.03


def test_a_users_hook_that_writes_to_weights_while_scoring_does_not_reach_the_model(tmp_path):
    class Writer(AutoEncoder):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            if self.trainer.current_epoch == 1 and self.trainer.global_step == 4:
                with torch.no_grad():
                    self.decoder[2].bias.add_(1.0)

    weights = {}
    for kind in (AutoEncoder, Writer):
        probe = AtEpochStart(lambda _, m: dict(copy.deepcopy(m.state_dict())))
        fit(tmp_path, made(kind), softpruning(**no_compensation()), probe, max_epochs=2)
        weights[kind] = probe.found
    assert_same(weights[Writer], weights[AutoEncoder])


def test_after_the_fit_random_states_are_those_of_a_fit_without_the_callback(tmp_path):
    states = []
    for callbacks in ([], [softpruning()]):
        fit(tmp_path, made(), *callbacks)
        states.append(rng_state())
    assert_same(*states)


@pytest.mark.parametrize("trials", [1, 6])
def test_validation_data_are_read_once_per_round(tmp_path, trials):
    reads = []

    class Counted(DataLoader):
        def __iter__(self):
            reads.append(None)
            return super().__iter__()

    module = made()
    data = loaders(module)
    data["val_dataloaders"] = Counted(data["val_dataloaders"].dataset, batch_size=8)
    before, after = (AtEpochStart(lambda *_: len(reads)) for _ in range(2))
    fit(tmp_path, module, before, softpruning(search=RandomSearch(num_candidates=trials)), after, data=data)
    assert after.found - before.found == 1


def test_processes_that_found_different_plans_prune_nothing():
    def runner_with(plan):
        strategy = SimpleNamespace(broadcast=lambda mine: plan, reduce_boolean_decision=lambda same, all: same)
        return ModuleRunner(SimpleNamespace(strategy=strategy), made())

    mine, its = Plan(((1,), (0, 2))), Plan(((0,), (0, 2)))
    check_agreement(runner_with(Plan(((1,), (0, 2)))), mine)
    check_agreement(runner_with(None), None)
    for other in (its, None):
        with pytest.raises(RuntimeError, match="the processes found different plans, so nothing was pruned"):
            check_agreement(runner_with(other), mine)


class OfParameters(AutoEncoder):
    """Computes with parameters alone: no layer whose multiply-accumulates are counted."""

    def __init__(self):
        super().__init__()
        del self.encoder, self.decoder
        self.up, self.down = nn.Parameter(torch.randn(12, 16)), nn.Parameter(torch.randn(16, 12))

    def forward(self, x):
        return (x @ self.up).relu() @ self.down


def test_what_the_dense_model_has_none_of_has_no_share(tmp_path, capsys):
    module = made(OfParameters)
    result = prune(module, **loaders(module), trainer=trainer_of(tmp_path))
    assert (result.costs_before.macs, result.costs_after.macs) == (0, 0)
    assert result.shares.keys().isdisjoint({"macs"})
    assert "MACs -100" not in capsys.readouterr().out
