"""A stored search answers other targets: costs as in the round, losses from the curves, corrected by scored plans."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from lightning_softprune import SensitivitySearch, prune
from lightning_softprune.results import PruningResult
from lightning_softprune.search import Known, OutOfReachError, best_plan, run_search
from lightning_softprune.search.solving import predicted_losses
from support.modules import loaders, made
from support.networks import coupled, mlp_space, plan_loss, steep


def known_of(space, loss):
    search, points, losses = SensitivitySearch(), [], []

    def keep(x, value, _):
        points.append(x)
        losses.append(value)

    run_search(search, space, loss, seed=0, on_asked=keep)
    return Known(search.sensitivity, np.stack(points), np.array(losses), loss(space.low))


def brute_force(space, loss):
    points, sparsities, _ = space.table
    return min(loss(x) for x in points[space.within(sparsities)])


@pytest.mark.parametrize("target", [0.3, 0.6, 0.7, 0.8])
def test_another_target_is_solved_to_nearly_the_best_of_all_plans_where_losses_add_up(target):
    measured = mlp_space([64, 48, 64, 32, 10], 0.7)
    loss = plan_loss(measured, steep([1.0, 0.5, 2.0]))
    space = mlp_space([64, 48, 64, 32, 10], target)
    x, predicted, _ = best_plan(space, known_of(measured, loss))
    dense = loss(space.low)
    assert space.on_target(x)
    assert loss(x) - dense <= 1.15 * (brute_force(space, loss) - dense)
    assert predicted - dense == pytest.approx(loss(x) - dense, rel=0.15 if target >= 0.6 else 0.7)


def test_a_plan_that_was_scored_has_its_own_score():
    space = mlp_space([64, 48, 64, 32, 10], 0.7)
    loss = plan_loss(space, coupled([1.0, 0.5, 2.0]))
    x, found, measured = best_plan(space, known_of(space, loss))
    assert measured
    assert found == loss(x)


def test_what_groups_cost_together_is_learnt_from_the_plans_that_prune_several():
    """The loss of coupled groups exceeds the sum of the curves; near the plans that were scored, that is known."""
    space = mlp_space([64, 48, 64, 32, 10], 0.7)
    loss = plan_loss(space, coupled([1.0, 0.5, 2.0]))
    known = known_of(space, loss)
    alone = Known(known.curves, known.points[:0], known.losses[:0], known.dense)
    x = space.scale(np.ones(3))
    true = loss(x)
    corrected, summed = (float(predicted_losses(space, which, x[None])[0]) for which in (known, alone))
    assert abs(corrected - true) < 0.5 * abs(summed - true)


@pytest.fixture(scope="module")
def result() -> PruningResult:
    module = made()
    return prune(module, **loaders(module), monitor="val_loss", search=SensitivitySearch(), report=False)


def test_the_stored_costs_are_those_of_the_pruned_model(result):
    again = PruningResult.from_dict(json.loads(json.dumps(result.to_dict())))
    removed = [[group.channels_before - group.channels_after for group in result.groups]]
    assert int(again.numbers.costs.count("params", np.array(removed))[0]) == result.costs_after.params
    solution = again.solve()
    assert solution.measured
    assert solution.score == pytest.approx(max(t.score for t in result.trials if t.feasible) if result.mode == "max"
                                           else min(t.score for t in result.trials if t.feasible))  # fmt: skip
    assert solution == result.solve()


def test_errors_that_were_expected_are_stored_and_are_what_lies_between_points(result):
    plain = json.loads(json.dumps(result.to_dict()))
    again = PruningResult.from_dict(plain)
    assert again.numbers.errors == result.numbers.errors
    shapes = again.numbers.shapes()
    assert [shape.coefficients[0] for shape in shapes] == [0.0] * len(result.groups)
    assert all(np.diff(shape.errors).min() >= 0 and shape.errors[-1] > 0 for shape in shapes)
    assert again.solve(0.35) == result.solve(0.35)
    wrong = {**plain["numbers"]["errors"], "errors": [[0.0] * len(row) for row in result.numbers.errors.errors]}
    flat = PruningResult.from_dict({**plain, "numbers": {**plain["numbers"], "errors": wrong}})
    assert flat.solve(0.35).score != result.solve(0.35).score


def test_a_result_of_an_older_version_is_solved_by_its_curves_alone(result):
    plain = json.loads(json.dumps(result.to_dict()))
    del plain["numbers"]["errors"]
    older = PruningResult.from_dict(plain)
    assert older.numbers.errors is None
    assert older.solve(0.35).sparsity == pytest.approx(0.35, abs=older.tolerance)


def test_bounds_limits_and_costs_are_kept(result):
    name = result.groups[0].name
    solution = result.solve(0.4, bounds={name: [0.0, 0.2]})
    assert solution.coefficients[name] <= 0.2
    limited = result.solve(0.4, limits={"macs": 0.61})
    assert limited.macs <= 0.61 * result.costs_before.macs + 1
    assert abs(result.solve(0.5, cost="macs").macs / result.costs_before.macs - 0.5) <= result.tolerance + 1e-6


def test_a_plan_that_new_bounds_forbid_is_not_what_was_measured(result):
    """Moved into the bounds, it would be another plan with the score of the first."""
    chosen = result.solve()
    assert chosen.measured
    most = max(chosen.coefficients, key=chosen.coefficients.get)
    at = [group.name for group in result.groups].index(most)
    high = chosen.coefficients[most] - 0.05
    miracle = dataclasses.replace(result.trials[result.chosen], score=0.001)
    trials = [t for t in result.trials if t.coefficients[at] <= high]
    narrowed = dataclasses.replace(result, trials=(miracle, *trials), chosen=0).solve(
        bounds={most: [0.0, high]}, tolerance=0.1
    )
    assert narrowed.coefficients[most] <= high
    assert narrowed.score > 1


def test_a_trial_whose_coefficients_stand_for_another_plan_is_not_what_was_measured(result):
    """Of a coefficient that several groups share, each group reports its own, and the first may stand for another."""
    trial = dataclasses.replace(result.trials[result.chosen], score=0.001)
    other = dataclasses.replace(trial, coefficients=tuple(0.5 for _ in trial.coefficients))
    found = dataclasses.replace(result, trials=(other,), chosen=0).solve(tolerance=0.3)
    assert found.score > 1
    assert dataclasses.replace(result, trials=(trial,), chosen=0).solve().score == 0.001


def test_what_is_asked_for_is_reached_as_a_round_would(result):
    """A plan below the target loses less, and no round would commit it."""
    wide = {"tolerance": 0.1}
    assert result.solve(**wide).coefficients == result.solve().coefficients
    for target in (0.2, 0.35, 0.5, 0.65):
        solution = result.solve(target, **wide)
        assert target <= solution.sparsity <= target + 0.1
        assert not solution.is_below
        assert "below" not in str(solution)
    with pytest.raises(OutOfReachError) as refused:
        result.solve(1.0)
    highest = float(str(refused.value).split()[-1])
    target = round(highest + 0.01, 3)
    short = result.solve(target, tolerance=0.02)
    assert short.is_below
    assert str(short).startswith(f"sparsity {short.sparsity:.3f}, below the target of {target:g}: ")


def test_beyond_the_bounds_of_the_round_nothing_is_free():
    module = made()
    bounded = prune(
        module, **loaders(module), monitor="val_loss", search=SensitivitySearch(), report=False,
        bounds={"encoder.0": [0.1, 0.3]}, target_sparsity=0.3,
    )  # fmt: skip
    (name,) = {group.name for group in bounded.groups if group.low == 0.1}
    line = bounded.modelled_sensitivity()[name]
    inside = [score for x, score in line if x <= 0.3]
    beyond = [score for x, score in line if x > 0.3]
    assert len(beyond) > 10
    risen = max(inside) - inside[0]
    assert beyond[len(beyond) // 2] - inside[0] > 2 * risen > 0
    assert beyond[-1] - inside[0] > 4 * risen
    shape = bounded.numbers.shapes()[bounded.numbers.coefficients.index(name)]
    (lowest,) = {curve.coefficients[0] for curve in bounded.sensitivity if curve.group == name}
    assert np.interp([0.0, lowest], shape.coefficients, shape.errors).tolist() == [0.0, 0.0]
    solution = bounded.solve(0.6, bounds={"*": [0.0, 1.0]})
    without = bounded.solve(0.6, bounds={name: [0.0, 0.3], "*": [0.0, 1.0]})
    assert solution.coefficients[name] > 0.3
    assert solution.score <= without.score


def test_what_cannot_be_solved_is_said(result):
    with pytest.raises(TypeError, match=r"limits: \[1\] is not a dictionary"):
        result.solve(0.5, limits=[1])
    with pytest.raises(OutOfReachError, match=r"target_sparsity=1.0: .* the nearest has 0\.\d+"):
        result.solve(1.0)
    with pytest.raises(ValueError, match="limits"):
        result.solve(0.5, limits={"latency": 0.5})
    with pytest.raises(ValueError, match="target_sparsity"):
        result.solve(1.5)
    with pytest.raises(ValueError, match="tolerance"):
        result.solve(0.5, tolerance=-0.1)
    with pytest.raises(ValueError, match=r"bounds\['encoder.0'\]"):
        result.solve(0.5, bounds={"encoder.0": [0.9, 0.1]})
    with pytest.raises(ValueError, match="bounds"):
        result.solve(0.5, bounds={"nothing of the sort": [0.1, 0.9]})
    assert [s.target_sparsity for s in result.solve_targets([0.3, 0.5, 1.0])] == [0.3, 0.5]
