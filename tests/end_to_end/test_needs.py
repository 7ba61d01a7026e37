"""Say what you need: budgets, constraints, components, one-shot and dry run. Scores are checked by plain validation."""

import copy
import json
import math
import random
import signal

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_softprune.trainer.runner as runner_module
from lightning_softprune import (
    GradientSearch,
    GridSearch,
    RandomSearch,
    SensitivitySearch,
    SoftPruning,
    UniformBaseline,
    find_groups,
    prune,
)
from lightning_softprune.graph.costs import record_macs
from support.costs import count_macs
from support.modules import (
    FEATURES,
    AtEpochStart,
    AutoEncoder,
    ConvClassifier,
    assert_same,
    count,
    fit,
    loaders,
    made,
    plain_validate,
    softpruning,
    trainer_of,
    training_state,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def macs_of(module, batch):
    with record_macs(module) as seen, torch.no_grad():
        module(batch)
    return count_macs(module, seen, len(batch))


# ------------------------------------------------------------------------------------------------------- constraints


def dense_score(tmp_path, epoch):
    """The PSNR of the module that `fit` has trained for so many epochs."""
    oracle = AtEpochStart(lambda trainer, module: float(trainer.callback_metrics["val_psnr"]), epoch)
    fit(tmp_path, made(), oracle, max_epochs=epoch + 1)
    return oracle.found


def test_constraints_that_hold_change_nothing(tmp_path):
    results = []
    for constraints in (None, ["val_psnr >= -100", "val_loss < 1e6"]):
        callback = softpruning(search=SensitivitySearch(levels=4), constraints=constraints)
        fit(tmp_path, made(), callback)
        results.append(callback.results[0])
    assert results[0].groups == results[1].groups
    assert [t.feasible for t in results[0].trials] == [t.feasible for t in results[1].trials]


def test_a_trial_that_violates_a_constraint_is_infeasible_and_not_chosen(tmp_path):
    free = softpruning(search=RandomSearch(num_candidates=12), constraints=["val_psnr >= -100"])
    fit(tmp_path, made(), free)
    scores = sorted(t.metrics["val_psnr"] for t in free.results[0].trials[:12])
    bound = (scores[5] + scores[6]) / 2
    callback = softpruning(
        monitor="val_constant", mode="min", search=RandomSearch(num_candidates=12), constraints=[f"val_psnr >= {bound}"]
    )
    module = made()
    oracle = AtEpochStart(lambda _, m: plain_validate(tmp_path, m, loaders(m)))
    fit(tmp_path, module, callback, oracle)
    [result] = callback.results
    assert [t.feasible for t in result.trials] == [t.metrics["val_psnr"] >= bound for t in result.trials]
    assert 0 < sum(t.feasible for t in result.trials) < len(result.trials)
    assert result.metrics_after["val_psnr"] >= bound
    assert oracle.found["val_psnr"] == pytest.approx(result.metrics_after["val_psnr"], abs=1e-5)
    assert result.trials[result.chosen].metrics == result.metrics_after


def test_the_search_is_drawn_to_where_constraints_on_other_metrics_hold(tmp_path):
    """The score is constant, so only the penalty tells one plan from another."""
    free = softpruning(search=GradientSearch())
    fit(tmp_path, made(), free)
    best = max(t.metrics["val_psnr"] for t in free.results[0].trials if t.feasible)
    bound = best - 0.1
    callback = softpruning(
        monitor="val_constant", mode="min", search=GradientSearch(), constraints=[f"val_psnr >= {bound}"]
    )
    fit(tmp_path, made(), callback)
    assert callback.results[0].applied
    assert callback.results[0].metrics_after["val_psnr"] >= bound


UNMET = {"constraints": ["val_psnr >= 500"], "search": RandomSearch(num_candidates=5)}


def test_unmet_constraints_are_skipped_with_a_warning(tmp_path):
    module, callback = made(), softpruning(**UNMET)
    dense = count(module)
    with pytest.warns(UserWarning, match=r"left as it is: none of the 5 scored plans meets .* misses val_psnr >= 500"):
        fit(tmp_path, module, callback)
    [result] = callback.results
    assert count(module) == dense
    assert not result.applied
    assert result.chosen is None
    assert "val_psnr >= 500" in result.reason
    assert result.score_after == result.score_before


def test_unmet_constraints_prune_all_the_same_if_so_wanted(tmp_path):
    module, callback = made(), softpruning(**UNMET, on_violation="prune")
    with pytest.warns(UserWarning, match=r"pruned all the same: none of the 5 scored plans meets"):
        fit(tmp_path, module, callback)
    [result] = callback.results
    assert result.applied
    assert result.reason == ""
    assert abs(result.sparsity - 0.5) <= 0.03
    psnr = [t.metrics["val_psnr"] for t in result.trials]
    assert result.metrics_after["val_psnr"] == max(psnr), "the least violating plan"
    assert count(module) == result.costs_after.params


def test_a_model_on_target_already_that_misses_a_constraint_is_named_so(tmp_path):
    """The first round goes past the target of the second, which has nothing left to remove."""
    arguments = {**UNMET, "epochs": [1, 2], "target_sparsity": [0.5, 0.5], "bounds": {"*": [0.0, 0.5]}}
    callback = softpruning(**{**arguments, "search": UniformBaseline()}, on_violation="prune")
    with pytest.warns(UserWarning, match="pruned all the same") as caught:
        fit(tmp_path, made(), callback)
    first, second = callback.results
    assert [r.applied for r in callback.results] == [True, True]
    assert second.costs_after == second.costs_before == first.costs_after
    [said] = [str(w.message) for w in caught if "SoftPruning: the model" in str(w.message)][1:]
    assert "misses val_psnr >= 500" in said


def test_unmet_constraints_are_an_error_if_so_wanted(tmp_path):
    module, callback = made(), softpruning(**UNMET, on_violation="error")
    before = AtEpochStart(training_state)
    trainer = trainer_of(tmp_path, before, callback)
    pl.seed_everything(7, verbose=False)
    with pytest.raises(MisconfigurationException, match=r"on_violation='error'.*val_psnr >= 500 \(it is "):
        trainer.fit(module, **loaders(module))
    assert_same(training_state(trainer, module), before.found)
    assert callback.results == []


@pytest.mark.parametrize("how", ["skip", "prune", "error"])
def test_nan_for_every_plan_is_treated_as_unmet_constraints(tmp_path, how):
    class Nan(AutoEncoder):
        def on_validation_epoch_end(self):
            self.log("val_nan", torch.tensor(math.nan))

    module, callback = made(Nan), softpruning(monitor="val_nan", mode="min", on_violation=how)
    dense = count(module)
    if how == "error":
        with pytest.raises(MisconfigurationException, match="val_nan is nan"):
            fit(tmp_path, module, callback)
    else:
        with pytest.warns(UserWarning, match="val_nan is nan"):
            fit(tmp_path, module, callback)
    assert (count(module) < dense) == (how == "prune")


def test_a_constrained_metric_that_is_not_logged(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"constraints\[0\]='val_acc >= 0.9': 'val_acc' is not logged"):
        fit(tmp_path, made(), softpruning(constraints=["val_acc >= 0.9"]))


# -------------------------------------------------------------------------------------------------- highest sparsity


@pytest.mark.parametrize("search", [SensitivitySearch(), GradientSearch(), UniformBaseline()])
def test_without_a_target_the_smallest_network_that_meets_the_constraint_is_found(tmp_path, search):
    bound = dense_score(tmp_path, 30) - 0.5
    module = made()
    arguments = {"monitor": "val_psnr", "mode": "max", "epochs": 30, "importance": "activation"}
    callback = softpruning(**arguments, target_sparsity=None, constraints=[f"val_psnr >= {bound}"], search=search)
    oracle = AtEpochStart(lambda _, m: plain_validate(tmp_path, m, loaders(m)), 30)
    fit(tmp_path, module, callback, oracle, max_epochs=31)
    [result] = callback.results
    assert result.applied
    assert result.target_sparsity is None
    assert oracle.found["val_psnr"] >= bound - 1e-5
    assert result.sparsity == max(t.sparsity for t in result.trials if t.feasible)
    assert result.sparsity == pytest.approx(1 - count(module) / result.costs_before.params, abs=1e-6)
    assert 0.1 < result.sparsity < 0.9
    if isinstance(search, UniformBaseline):
        return
    grid = softpruning(**arguments, search=GridSearch(levels=9), target_sparsity=result.sparsity + 0.08)
    fit(tmp_path, made(), grid, max_epochs=31)
    assert max(t.metrics["val_psnr"] for t in grid.results[0].trials) < bound, "brute force further up finds nothing"


def test_without_a_target_and_with_a_constraint_that_nothing_meets(tmp_path):
    module, callback = made(), softpruning(target_sparsity=None, constraints=["val_psnr >= 500"])
    dense = count(module)
    with pytest.warns(UserWarning, match="left as it is: none of the"):
        fit(tmp_path, module, callback)
    assert count(module) == dense
    assert not callback.results[0].applied


def test_without_a_target_and_with_bounds_that_keep_everything(tmp_path):
    callback = softpruning(target_sparsity=None, constraints=["val_loss <= 1e3"], bounds={"*": [0.0, 0.0]})
    with pytest.warns(UserWarning, match="left as it is: there was no plan to score"):
        fit(tmp_path, made(), callback)
    assert not callback.results[0].applied


def test_without_a_target_the_budget_of_the_strategy_is_kept(tmp_path):
    search = GradientSearch(max_evaluations=20)
    callback = softpruning(target_sparsity=None, constraints=["val_loss <= 1e3"], search=search, compensation="none")
    fit(tmp_path, made(), callback)
    assert callback.results[0].evaluations <= 20 + 2


def test_several_rounds_without_a_target(tmp_path):
    bound = dense_score(tmp_path, 30) - 0.5
    search, constraints = SensitivitySearch(levels=5), [f"val_psnr >= {bound}"]
    how = {"importance": "activation", "search": search}
    callback = softpruning(epochs=[30, 32], target_sparsity=None, constraints=constraints, **how)
    fit(tmp_path, made(), callback, max_epochs=33)
    first, second = callback.results
    assert first.applied
    assert second.sparsity > first.sparsity


# ----------------------------------------------------------------------------------------------------------- budgets


class Early(pl.LightningModule):
    """A convolutional network whose MACs are in its first layers and whose parameters are in its last."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 3))

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def image_loaders():
    return loaders(ConvClassifier())


def test_a_params_target_alone_leaves_macs_and_the_pair_of_budgets_does_not(tmp_path):
    batch = next(iter(image_loaders()["val_dataloaders"]))[0]
    shares = {}
    for limits in (None, {"macs": 0.35}):
        module = made(Early)
        dense = macs_of(module, batch)
        callback = softpruning(search=SensitivitySearch(levels=5), target_sparsity=0.4, limits=limits)
        fit(tmp_path, module, callback, data=image_loaders())
        [result] = callback.results
        assert abs(result.sparsity - 0.4) <= 0.03
        assert result.sparsity == pytest.approx(1 - count(module) / result.costs_before.params, abs=1e-6)
        shares[str(limits)] = macs_of(module, batch) / dense
        assert result.costs_after.macs == macs_of(module, batch)
        assert result.limits == (limits or {})
    assert shares["None"] > 0.5
    assert shares["{'macs': 0.35}"] <= 0.35


@pytest.mark.parametrize("search", [RandomSearch(num_candidates=8), GradientSearch(steps=3), GridSearch(levels=5)])
def test_every_feasible_trial_meets_every_limit(tmp_path, search):
    callback = softpruning(search=search, target_sparsity=0.5, limits={"macs": 0.4, "params": 0.5}, tolerance=0.05)
    fit(tmp_path, made(Early), callback, data=image_loaders())
    [result] = callback.results
    assert result.applied
    assert result.costs_after.macs <= 0.4 * result.costs_before.macs
    assert result.costs_after.params <= 0.5 * result.costs_before.params
    assert all(t.sparsity >= 0.5 - 1e-9 for t in result.trials if t.feasible)


def test_sparsity_in_macs(tmp_path):
    module = made(Early)
    batch = next(iter(image_loaders()["val_dataloaders"]))[0]
    dense = macs_of(module, batch)
    callback = softpruning(search=RandomSearch(num_candidates=4), target_sparsity=0.6, cost="macs")
    fit(tmp_path, module, callback, data=image_loaders())
    [result] = callback.results
    assert abs(result.sparsity - 0.6) <= 0.03
    assert result.sparsity == pytest.approx(1 - macs_of(module, batch) / dense, abs=1e-5)
    assert result.cost == "macs"


def test_limits_follow_the_schedule_of_one_target_for_several_rounds(tmp_path):
    callback = softpruning(epochs=[1, 2, 3], target_sparsity=0.7, limits={"macs": 0.29}, tolerance=0.05)
    fit(tmp_path, made(), callback, max_epochs=4)
    assert [result.applied for result in callback.results] == [True] * 3
    limits = [result.limits["macs"] for result in callback.results]
    targets = [result.target_sparsity for result in callback.results]
    assert limits == pytest.approx([1 - 0.71 * target / 0.7 for target in targets], abs=1e-4)
    assert limits[-1] == 0.29
    for result, limit in zip(callback.results, limits, strict=True):
        assert result.shares["macs"] <= limit
    listed = softpruning(epochs=[1, 2, 3], target_sparsity=targets, limits={"macs": 0.29}, tolerance=0.05)
    with pytest.raises(MisconfigurationException, match="cannot be met together"):
        fit(tmp_path, made(), listed, max_epochs=4)


def test_limits_hold_against_the_first_dense_model_in_later_rounds(tmp_path):
    callback = softpruning(epochs=[1, 2], target_sparsity=[0.3, 0.6], limits={"macs": 0.5})
    module = made(Early)
    batch = next(iter(image_loaders()["val_dataloaders"]))[0]
    dense = macs_of(module, batch)
    fit(tmp_path, module, callback, data=image_loaders(), max_epochs=4)
    assert macs_of(module, batch) <= 0.5 * dense


def test_a_limit_that_no_plan_meets(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"limits\['macs'\]=0.001 is out of reach: a share of 0.0"):
        fit(tmp_path, made(Early), softpruning(limits={"macs": 0.001}), data=image_loaders())


def test_budgets_that_do_not_meet_name_the_nearest_point_of_each(tmp_path):
    callback = softpruning(target_sparsity=0.1, limits={"macs": 0.1}, tolerance=0.01)
    with pytest.raises(MisconfigurationException) as raised:
        fit(tmp_path, made(Early), callback, data=image_loaders())
    message = str(raised.value)
    assert "target_sparsity=0.1" in message
    assert "limits={'macs': 0.1}" in message
    nearest = float(message.split("nearest reachable sparsity is ")[1].split(";")[0])
    share = float(message.split("found to work is ")[1].split(";")[0])
    for change in ({"target_sparsity": nearest}, {"limits": {"macs": share + 1e-3}}):
        again = softpruning(**{"target_sparsity": 0.1, "limits": {"macs": 0.1}, "tolerance": 0.01, **change})
        fit(tmp_path, made(Early), again, data=image_loaders())
        assert again.results[0].applied, change


def fake_clock(monkeypatch, seconds):
    """Validation steps that take as long as a function of the network says."""
    monkeypatch.setattr(runner_module, "time_validation_step", lambda trainer, module, scorer, **_: seconds(module))


def test_a_latency_limit_is_measured_on_finalists_only(tmp_path, monkeypatch):
    timed = []

    def seconds(module):
        timed.append(module.features[0].out_channels)
        return module.features[0].out_channels / 12

    fake_clock(monkeypatch, seconds)
    callback = softpruning(search=RandomSearch(num_candidates=20), limits={"latency": 0.6}, tolerance=0.1)
    fit(tmp_path, made(Early), callback, data=image_loaders())
    [result] = callback.results
    assert result.applied
    assert result.groups[0].channels_after <= 0.6 * 12
    assert result.latency_after <= 0.6 * result.latency_before
    assert 0 < len([n for n in timed if n < 12]) <= 2 * 7


def test_what_is_reported_is_what_was_decided_on(tmp_path, monkeypatch):
    times = iter([1.0, 0.5, 1.0, 0.5])  # whoever measures again finds something else
    fake_clock(monkeypatch, lambda module: next(times, 9.0))
    callback = softpruning(limits={"latency": 0.6})
    fit(tmp_path, made(Early), callback, data=image_loaders())
    [result] = callback.results
    assert (result.latency_before, result.latency_after, result.shares["latency"]) == (1.0, 0.5, 0.5)


def test_a_step_that_takes_its_batch_apart_can_be_timed(tmp_path):
    class Popping(Early):
        def validation_step(self, batch, batch_idx):
            y = batch.pop()
            self.log("val_loss", F.cross_entropy(self(batch.pop()), y), batch_size=len(y))

    callback = softpruning()
    fit(tmp_path, made(Popping), callback, data=image_loaders())
    assert callback.results[0].applied


def test_a_latency_limit_that_no_finalist_meets(tmp_path, monkeypatch):
    fake_clock(monkeypatch, lambda module: 1.0)
    callback = softpruning(limits={"latency": 0.6})
    with pytest.warns(UserWarning, match=r"limits\['latency'\]=0.6: the fastest of the 1 plans .* takes 1.000"):
        fit(tmp_path, made(Early), callback, data=image_loaders())
    assert not callback.results[0].applied
    pruned = softpruning(limits={"latency": 0.6}, on_violation="prune")
    with pytest.warns(UserWarning, match="pruned all the same"):
        fit(tmp_path, made(Early), pruned, data=image_loaders())
    assert pruned.results[0].applied


def test_latency_of_a_later_round_is_relative_to_the_first_dense_model(tmp_path, monkeypatch):
    fake_clock(monkeypatch, lambda module: float(count(module)))
    callback = softpruning(epochs=[1, 2], target_sparsity=[0.4, 0.6], limits={"latency": 0.7})
    fit(tmp_path, made(Early), callback, data=image_loaders(), max_epochs=4)
    assert [r.applied for r in callback.results] == [True, True]


def test_real_latency_is_measured_and_reported(tmp_path):
    callback = softpruning()
    fit(tmp_path, made(Early), callback, data=image_loaders())
    [result] = callback.results
    assert 0 < result.latency_after < 1
    assert 0 < result.latency_before < 1


# -------------------------------------------------------------------------------------------------------- components


def test_one_coefficient_per_component_and_inter_groups_keep_their_own(tmp_path):
    class Deep(AutoEncoder):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(
                nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 8)
            )

    callback = softpruning(granularity="component", search=SensitivitySearch(levels=4))
    fit(tmp_path, made(Deep), callback)
    [result] = callback.results
    assert [(g.component, g.kind) for g in result.groups] == [
        ("encoder", "intra"), ("encoder", "intra"), ("encoder+decoder", "inter"), ("decoder", "intra"),
    ]  # fmt: skip
    for trial in result.trials:
        assert abs(trial.coefficients[0] - trial.coefficients[1]) <= 1 / 16 + 1 / 20
    for group in result.groups[:2]:
        removed = 1 - group.channels_after / group.channels_before
        assert abs(removed - group.coefficient) <= 1 / group.channels_before
    assert [curve.group for curve in result.sensitivity] == ["encoder", result.groups[2].name, "decoder"]
    assert result.evaluations <= 1 + 3 * 4 + 3 + 1


def test_bounds_hold_for_components_and_for_the_latent_group_by_its_name(tmp_path):
    for granularity in ("group", "component"):
        name = "encoder.2"
        bounds = {"decoder": [0.0, 0.25], name: [0.5, 0.75]}
        callback = softpruning(granularity=granularity, bounds=bounds, search=RandomSearch(num_candidates=5))
        fit(tmp_path, made(), callback)
        [result] = callback.results
        found = {group.name: group for group in result.groups}
        assert found[name].kind == "inter"
        assert (found[name].low, found[name].high) == (0.5, 0.75)
        assert 0.25 <= found[name].channels_after / found[name].channels_before <= 0.5
        [decoder] = [group for group in result.groups if group.component == "decoder"]
        assert decoder.channels_after >= 0.75 * decoder.channels_before


def test_a_bounds_pattern_that_matches_nothing_names_what_is_near(tmp_path):
    for granularity in ("group", "component"):
        callback = softpruning(bounds={"decodr": [0, 0.5]}, granularity=granularity)
        with pytest.raises(MisconfigurationException, match=r"bounds.*'decodr'.*decoder"):
            fit(tmp_path, made(), callback)


def test_costs_of_a_group_are_what_goes_when_it_alone_is_pruned(tmp_path):
    callback = softpruning(bounds={"decoder": [0.0, 0.5]})
    fit(tmp_path, made(), callback)
    decoder = callback.results[0].groups[-1]
    # half of 16 units between 8 latent ones and 12 outputs; the readers' biases are there already
    assert decoder.params == 8 * (8 + 1) + 8 * FEATURES
    assert decoder.macs == 8 * 8 + 8 * FEATURES


# ---------------------------------------------------------------------------------------------------------- one-shot


def trained(tmp_path):
    module = made()
    fit(tmp_path, module, max_epochs=1)
    return module


def quiet(**arguments):
    return {"search": UniformBaseline(), "tolerance": 0.03, "verbose": False, "report": False, **arguments}


def test_prune_makes_a_trained_module_smaller_and_scores_it_right(tmp_path):
    module = trained(tmp_path)
    dense, data = count(module), loaders(module)
    result = prune(module, **data, **quiet(search=SensitivitySearch(levels=4), constraints=["val_loss <= 100"]))
    assert result.applied
    assert abs(result.sparsity - 0.5) <= 0.03
    assert count(module) == result.costs_after.params < dense == result.costs_before.params
    assert plain_validate(tmp_path, module, data)["val_loss"] == pytest.approx(result.score_after, abs=1e-6)
    assert len(result.trials) > 10


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loaders(AutoEncoder())["train_dataloaders"]

    def val_dataloader(self):
        return loaders(AutoEncoder())["val_dataloaders"]


def test_prune_takes_a_datamodule_and_the_modules_own_loaders(tmp_path):
    class Own(AutoEncoder):
        train_dataloader, val_dataloader = Data.train_dataloader, Data.val_dataloader

    assert prune(trained(tmp_path), Data(), **quiet()).applied
    assert prune(made(Own), **quiet()).applied


class Gathering(AutoEncoder):
    """Its steps need what its hooks make at the start of an epoch, some of it between two layers."""

    def on_validation_epoch_start(self):
        self.seen = self.now = []

    def on_train_epoch_start(self):
        self.steps = self.now = []

    def forward(self, x):
        z = self.encoder(x)
        self.now.append(len(z))
        return self.decoder(z)

    def training_step(self, batch, *rest):
        self.steps.append(len(self.losses))
        return super().training_step(batch, *rest)

    def validation_step(self, batch, *rest):
        self.seen.append(len(batch))
        return super().validation_step(batch, *rest)


@pytest.mark.parametrize("how", ["one-shot", "before the first epoch", "groups"])
def test_steps_find_what_hooks_make_at_the_start_of_an_epoch(tmp_path, how):
    module, plain = made(Gathering), made()
    data = loaders(plain)
    if how == "groups":
        batch = next(iter(data["val_dataloaders"]))
        found, wanted = (find_groups(m, batch) for m in (module, plain))
        assert [str(group) for group in found] == [str(group) for group in wanted]
        assert not {"seen", "steps", "now"} & set(vars(module))
        return
    if how == "one-shot":
        for m in (module, plain):
            prune(m, **data, **quiet())
    else:
        for m in (module, plain):
            torch.manual_seed(0)
            fit(tmp_path, m, softpruning(epochs=0), max_epochs=1, num_sanity_val_steps=0, data=loaders(m))
    assert count(module) == count(plain) < count(made())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_a_step_that_misses_an_attribute_all_the_same_says_so(tmp_path):
    class Lacking(Gathering):
        def on_train_epoch_start(self):
            """Makes nothing."""

    with pytest.raises(AttributeError, match="steps"):
        prune(made(Lacking), **loaders(AutoEncoder()), **quiet())


def test_prune_within_a_trainer_that_has_trained_leaves_its_count_of_epochs(tmp_path):
    module, data = made(), loaders(AutoEncoder())
    trainer = fit(tmp_path, module, max_epochs=2, data=data)
    callbacks = list(trainer.callbacks)
    losses = len(module.losses)
    result = prune(module, **data, trainer=trainer, **quiet())
    assert result.applied
    assert (trainer.current_epoch, trainer.max_epochs, trainer.callbacks) == (2, 2, callbacks)
    assert len(module.losses) == losses, "nothing was trained"
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, **data)
    assert len(module.losses) == losses * 3 // 2


def test_prune_within_a_trainer_that_wants_so_many_steps_trains_none(tmp_path):
    module, trainer = made(), trainer_of(tmp_path, min_steps=5)
    assert prune(module, **loaders(module), trainer=trainer, **quiet()).applied
    assert (trainer.min_steps, trainer.global_step, module.losses) == (5, 0, [])


def test_prune_keeps_modes_and_twice_is_measured_against_the_module_as_given(tmp_path):
    module, data = trained(tmp_path), loaders(AutoEncoder())
    module.eval()
    module.encoder[1].train()
    flags = [m.training for m in module.modules()]
    first = prune(module, **data, **quiet(target_sparsity=0.3))
    assert [m.training for m in module.modules()] == flags
    second = prune(module, **data, **quiet(target_sparsity=0.3))
    assert second.costs_before == first.costs_after
    assert abs(second.sparsity - 0.3) <= 0.03


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 3}, TypeError, "epochs: 3"),
        ({"finetune_epochs": 0}, TypeError, "finetune_epochs: 0"),
        ({"target_sparsty": 0.5}, TypeError, "target_sparsty"),
        ({"target_sparsity": 2.0}, ValueError, "target_sparsity: 2.0"),
        ({"monitor": "val_acc"}, MisconfigurationException, "monitor='val_acc' is not logged"),
        (
            {"target_sparsity": 0.99999},
            MisconfigurationException,
            r"the nearest reachable sparsity is 0\.\d{4} \(\d+ % of the parameters are in prunable groups",
        ),
        ({"round_to": 64}, MisconfigurationException, r"is 0\.0000 \(round_to=64 keeps \d groups whole; "),
    ],
)
def test_prune_with_wrong_arguments_leaves_the_module_alone(tmp_path, arguments, error, message):
    module = trained(tmp_path)
    before = [(id(p), p.clone()) for p in module.parameters()]
    with pytest.raises(error, match=message):
        prune(module, **loaders(module), **{**quiet(), **arguments})
    for (place, value), parameter in zip(before, module.parameters(), strict=True):
        assert id(parameter) == place
        assert torch.equal(parameter, value)


def test_prune_refuses_what_is_no_lightning_module_and_a_trainer_that_prunes_already(tmp_path):
    with pytest.raises(TypeError, match="model: Linear is not a LightningModule"):
        prune(nn.Linear(2, 2))
    with pytest.raises(MisconfigurationException, match="trainer: it has a SoftPruning callback"):
        prune(made(), **loaders(AutoEncoder()), trainer=trainer_of(tmp_path, softpruning()))
    with pytest.raises(TypeError, match="trainer: 'cpu' is not a Trainer"):
        prune(made(), **loaders(AutoEncoder()), trainer="cpu")


@pytest.mark.parametrize(
    ("left_out", "arguments", "error", "message"),
    [
        ("train_dataloaders", {}, MisconfigurationException, "train_dataloaders: None, .* in AutoEncoder; "),
        ("train_dataloaders", {"datamodule": pl.LightningDataModule()}, MisconfigurationException, "train_dataloaders"),
        ("val_dataloaders", {}, MisconfigurationException, "val_dataloaders: None"),
        ("", {"datamodule": [1]}, TypeError, r"datamodule: \[1\] is not a LightningDataModule"),
        ("", {"datamodule": pl.LightningDataModule}, TypeError, "datamodule: .* is not a LightningDataModule"),
    ],
)
def test_prune_names_the_data_that_are_missing(left_out, arguments, error, message):
    data = {name: data for name, data in loaders(AutoEncoder()).items() if name != left_out}
    with pytest.raises(error, match=message):
        prune(made(), **data, **arguments, **quiet())


def test_prune_refuses_a_trainer_without_training_batches(tmp_path):
    trainer = trainer_of(tmp_path, limit_train_batches=0)
    with pytest.raises(MisconfigurationException, match="limit_train_batches=0"):
        prune(made(), **loaders(AutoEncoder()), trainer=trainer, **quiet())


class FailsOnceCommitted(AutoEncoder):
    """The validation that a fit runs by itself fails, or is interrupted."""

    error = ConnectionError

    def on_validation_epoch_end(self):
        committed = "on_save_checkpoint" in vars(self)
        if committed:
            self.decoder[0].weight.grad = torch.ones_like(self.decoder[0].weight)
            raise self.error("after the commit")


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_where_the_validation_after_the_commit_fails_the_module_is_as_it_was(monkeypatch, error):
    monkeypatch.setattr(FailsOnceCommitted, "error", error)
    module, handler = made(FailsOnceCommitted), signal.getsignal(signal.SIGINT)
    modes = [part.training for part in module.eval().modules()]
    before = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in module.parameters()]
    attributes = {name: set(vars(part)) for name, part in module.named_modules()}
    try:
        with pytest.raises((error, SystemExit)):
            prune(module, **loaders(module), **quiet())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further interrupts from then on
    for (parameter, value, gradient), now in zip(before, module.parameters(), strict=True):
        assert now is parameter
        assert torch.equal(now, value)
        assert now.grad is gradient
    assert {name: set(vars(part)) for name, part in module.named_modules()} == attributes
    assert [part.training for part in module.modules()] == modes
    monkeypatch.setattr(FailsOnceCommitted, "on_validation_epoch_end", lambda self: None)
    assert prune(module, **loaders(module), **quiet()).applied


def test_where_the_fit_fails_the_module_is_where_it_came_from():
    """The trainer's precision moves a module as its device does."""

    class Doubled(FailsOnceCommitted):
        def on_validation_epoch_end(self):
            if self.decoder[0].weight.dtype == torch.float64:
                raise ConnectionError("moved")

    module = made(Doubled)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, precision="64-true", logger=False, enable_checkpointing=False)
    with pytest.raises(ConnectionError, match="moved"):
        prune(module, **loaders(module), trainer=trainer, **quiet())
    assert {value.dtype for value in (*module.parameters(), *module.buffers())} == {torch.float32}


def test_prune_moves_no_random_state():
    module, data = made(), loaders(AutoEncoder())
    states = torch.get_rng_state(), random.getstate()
    assert prune(module, **data, **quiet()).applied
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_prune_names_training_loaders_that_yield_no_batch(recwarn):
    data = loaders(AutoEncoder())
    few = data["train_dataloaders"].dataset
    data["train_dataloaders"] = DataLoader(few, len(few) + 1, drop_last=True)
    with pytest.raises(MisconfigurationException, match="train_dataloaders: they yield no batch"):
        prune(made(), **data, **quiet())
    assert not [str(warning.message) for warning in recwarn if "prune(" in str(warning.message)]


def test_prune_says_what_ended_its_fit_before_the_round(tmp_path):
    class Stops(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.should_stop = True

    trainer = trainer_of(tmp_path, Stops(), min_epochs=0)
    with pytest.raises(RuntimeError, match=r"ended its fit before the round began: .*should_stop` was set"):
        prune(made(), **loaders(AutoEncoder()), trainer=trainer, **quiet())


# ----------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("kind", [AutoEncoder, ConvClassifier])
def test_validate_is_a_dry_run_that_changes_nothing(tmp_path, kind):
    def validated(*callbacks):
        module = made(kind)
        pl.seed_everything(3, verbose=False)
        trainer = trainer_of(tmp_path, *callbacks)
        metrics = trainer.validate(module, dataloaders=loaders(module)["val_dataloaders"], verbose=False)
        return {
            "metrics": metrics,
            "state": {name: value.clone() for name, value in module.state_dict().items()},
            "ids": len({id(p) for p in module.parameters()}),
            "rng": torch.get_rng_state(),
            "training": [m.training for m in module.modules()],
            "callback_metrics": dict(trainer.callback_metrics),
        }

    callback = softpruning(search=SensitivitySearch(levels=3), report=True)
    assert_same(validated(callback), validated())
    [result] = callback.results
    assert not result.applied
    assert result.reason == "this was a dry run"
    assert abs(result.sparsity - 0.5) <= 0.03
    assert result.trials[result.chosen].score == result.score_after
    assert result.sensitivity
    assert any("output" in left.reason for left in result.left_out)
    saved = json.loads((tmp_path / "softprune" / "epoch=1" / "result.json").read_text())
    assert saved["left_out"]
    assert saved["coverage"] == result.coverage
    assert "% of the parameters are in prunable groups; largest left out: " in result.coverage
    assert saved["configuration"]["target_sparsity"] == "0.5"
    assert set(saved["versions"]) >= {"lightning_softprune", "torch", "lightning"}


def test_a_dry_run_says_what_the_fit_then_does(tmp_path):
    """With `epochs=0` and the same data the two see the same weights and batches."""

    dry = softpruning(epochs=0, search=SensitivitySearch(levels=3))
    trainer_of(tmp_path, dry).validate(made(), datamodule=Data(), verbose=False)
    real = softpruning(epochs=0, search=SensitivitySearch(levels=3))
    trainer_of(tmp_path, real, max_epochs=1).fit(made(), datamodule=Data())
    assert [g.name for g in dry.results[0].groups] == [g.name for g in real.results[0].groups]
    ours, theirs = dry.results[0].trials, real.results[0].trials[: len(dry.results[0].trials)]
    assert [t.coefficients for t in ours] == [t.coefficients for t in theirs]
    # products in single precision depend on where in memory their operands lie
    assert [t.score for t in ours] == pytest.approx([t.score for t in theirs], rel=1e-6)
    assert dry.results[0].costs_after == real.results[0].costs_after


def test_a_dry_run_is_not_a_round_that_has_run(tmp_path):
    callback = softpruning(epochs=1)
    module = made(ConvClassifier)
    trainer = trainer_of(tmp_path, callback)
    trainer.validate(module, dataloaders=loaders(module)["val_dataloaders"], verbose=False)
    assert [result.applied for result in callback.results] == [False]
    trainer.fit(module, **loaders(module))
    assert [result.applied for result in callback.results] == [True]


def test_after_the_last_round_validation_is_just_validation(tmp_path):
    module, callback = made(), softpruning(epochs=1)
    trainer = fit(tmp_path, module, callback)
    results, weights = list(callback.results), [p.clone() for p in module.parameters()]
    trainer.validate(module, dataloaders=loaders(module)["val_dataloaders"], verbose=False)
    assert callback.results == results
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))


def test_a_dry_run_without_a_plan_says_so(tmp_path):
    for how in ("skip", "prune", "error"):
        callback = softpruning(**UNMET, on_violation=how)
        module = made()
        trainer_of(tmp_path, callback).validate(module, dataloaders=loaders(module)["val_dataloaders"], verbose=False)
        [result] = callback.results
        assert not result.applied
        assert "dry run" in result.reason
        assert "val_psnr >= 500" in result.reason


# ----------------------------------------------------------------------------------------------------------- results


def test_pareto_optimal_trials_are_marked(tmp_path):
    callback = softpruning(search=SensitivitySearch(levels=4), report=True)
    fit(tmp_path, made(), callback)
    [result] = callback.results
    marked = {id(trial) for trial in result.pareto}
    for trial in result.trials:
        beaten = any(
            o.sparsity >= trial.sparsity
            and o.score <= trial.score
            and (o.sparsity, o.score) != (trial.sparsity, trial.score)
            for o in result.trials
        )
        assert (id(trial) in marked) == (not beaten)
    rows = (tmp_path / "softprune" / "epoch=1" / "trials.csv").read_text().splitlines()
    column = rows[0].split(",").index("pareto")
    assert sum(row.split(",")[column] == "True" for row in rows[1:]) == len(result.pareto)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"cost": "flops"}, ValueError, ["cost", "'flops'", "'params'", "'macs'"]),
        ({"limits": {"flops": 0.5}}, ValueError, ["limits", "'flops'", "'macs'", "'latency'"]),
        ({"limits": {"macs": 0}}, ValueError, ["limits['macs']", "0", "(0, 1]"]),
        ({"limits": {"macs": 1.5}}, ValueError, ["limits['macs']", "1.5", "(0, 1]"]),
        ({"limits": {"macs": float("nan")}}, ValueError, ["limits['macs']", "nan"]),
        ({"limits": {"macs": "half"}}, TypeError, ["limits['macs']", "'half'"]),
        ({"constraints": ["val_acc => 3"]}, ValueError, ["constraints[0]", "character 9", "^"]),
        ({"constraints": ["val_acc > 3", "x"]}, ValueError, ["constraints[1]", "character 2"]),
        ({"constraints": "val_acc > 3"}, TypeError, ["constraints", "'val_acc > 3'"]),
        ({"on_violation": "warn"}, ValueError, ["on_violation", "'warn'", "'skip'", "'prune'", "'error'"]),
        ({"granularity": "layer"}, ValueError, ["granularity", "'layer'", "'group'", "'component'"]),
        ({"target_sparsity": None}, ValueError, ["target_sparsity", "None", "constraints"]),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, error, parts):
    with pytest.raises(error) as raised:
        SoftPruning(**arguments)
    assert all(part in str(raised.value) for part in parts), str(raised.value)


class Moving(AutoEncoder):
    """Its steps move a weight, a buffer and a list, and read gradients that are pending."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.seen = []

    def loss(self, batch):
        with torch.no_grad():
            self.encoder[0].weight.mul_(1.01)
            self.steps += 1
        self.seen.append(self.decoder[0].weight.grad is None)
        return super().loss(batch)


def test_find_groups_leaves_what_steps_move_as_it_was():
    module = made(Moving)
    module.decoder[0].weight.grad = torch.ones_like(module.decoder[0].weight)
    before, gradient = copy.deepcopy(module.state_dict()), module.decoder[0].weight.grad
    groups = find_groups(module, next(iter(loaders(AutoEncoder())["val_dataloaders"])))
    assert [group.name for group in groups if group.prunable] == ["encoder.0", "encoder.2", "decoder.0"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.decoder[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert module.seen == []


def test_find_groups_lists_everything_with_reasons():
    groups = find_groups(made(), next(iter(loaders(AutoEncoder())["val_dataloaders"])))
    assert [(g.name, g.kind, g.prunable) for g in groups] == [
        ("encoder.0", "intra", True), ("encoder.2", "inter", True), ("decoder.0", "intra", True),
        ("decoder.2", "intra", False),
    ]  # fmt: skip
    assert all(bool(g.reason) != g.prunable for g in groups)
