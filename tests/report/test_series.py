"""The data behind tables and charts."""

import dataclasses
import math

import pytest

from lightning_softprune.report.series import (
    best_so_far,
    evaluations_line,
    healing_errors,
    healing_line,
    knobs_line,
    narrowed_features,
    score_limits,
    stages,
)
from lightning_softprune.results import (
    GroupResult,
    Healing,
    Trial,
)
from support.results import full_result, make_result


def test_best_so_far_counts_feasible_trials_only() -> None:
    scores = [(math.nan, True), (5.0, True), (9.0, False), (5.0, True), (6.0, True), (4.0, True)]
    trials = tuple(Trial((0.0, 0.0), 0.5, score, {}, feasible, 0.0) for score, feasible in scores)

    assert best_so_far(full_result(trials=trials, chosen=None)) == [(1, 5.0), (4, 6.0)]
    assert best_so_far(full_result(trials=trials, chosen=None, mode="min")) == [(1, 5.0), (5, 4.0)]


def test_the_best_is_the_one_that_a_round_would_choose() -> None:
    points = [(0.69, 9.0), (0.71, 5.0), (0.7, 6.0), (0.699, 8.0)]
    trials = tuple(Trial((0.0, 0.0), sparsity, score, {}, True, 0.0) for sparsity, score in points)

    assert best_so_far(full_result(trials=trials, chosen=None)) == [(0, 9.0), (1, 5.0), (2, 6.0)]
    assert best_so_far(full_result(trials=trials, chosen=None, target_sparsity=None)) == [(0, 9.0), (1, 5.0)]


@pytest.mark.parametrize(
    ("changes", "knobs"),
    [
        ({"latency": 0.64}, None),  # gains more than half of 70 %
        ({"latency": 0.66}, ['cost="macs"', 'limits={"latency": 0.65}', "round_to=8"]),
        ({"latency": 1.1, "cost": "macs", "limits": {"latency": 0.9}}, ["round_to=8"]),
        ({"latency": None}, None),
    ],
)
def test_knobs_are_named_where_latency_gains_less_than_half_of_the_target(changes, knobs) -> None:
    shares = {"params": 0.3, "latency": changes.pop("latency")}
    shares = {name: share for name, share in shares.items() if share is not None}
    line = knobs_line(make_result(shares=shares, **{"limits": {}, **changes}))

    assert bool(line) == (knobs is not None)
    every = ('cost="macs"', 'limits={"latency": 0.65}', "round_to=8")
    assert [knob for knob in every if knob in line] == (knobs or [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"score_before": 20.0, "score_after": 19.7}, "val_psnr fell by 1.5%: with healing=N"),
        ({"score_before": 20.0, "score_after": 19.81}, ""),
        ({"score_before": 20.0, "score_after": 22.0}, ""),
        ({"score_before": 0.5, "score_after": 0.6, "mode": "min"}, "val_psnr rose by 20.0%: with healing=N"),
        ({"score_before": 0.5, "score_after": 0.4, "mode": "min"}, ""),
        ({"score_before": -150.0, "score_after": -160.0}, "val_psnr fell by 6.7%: with healing=N"),
        ({"score_before": 0.0, "score_after": -1.0}, ""),  # a fraction of nothing
        ({"score_before": 20.0, "score_after": math.nan}, ""),
    ],
)
def test_healing_is_named_where_more_than_a_hundredth_of_the_score_is_lost(changes, told) -> None:
    asked = {"healing": "0", "finetune_epochs": "0"}
    result = make_result(monitor="val_psnr", **changes)

    assert healing_line(dataclasses.replace(result, configuration=asked)).startswith(told)
    assert bool(healing_line(dataclasses.replace(result, configuration=asked))) == bool(told)
    for other in ({"healing": "8"}, {"finetune_epochs": "None"}):
        assert not healing_line(dataclasses.replace(result, configuration={**asked, **other}))
    skipped = {"applied": False, "outcome": "skipped", "chosen": None}
    assert not healing_line(dataclasses.replace(result, configuration=asked, **skipped))


def test_every_evaluation_is_accounted_for() -> None:
    shares = [((0.1, 0.2), 0.5), ((0.3, 0.4), 0.5), ((0.3, 0.4), 1.0), ((0.3, 0.4), 1.0)]
    trials = tuple(Trial(coefficients, 0.5, 1.0, {}, True, 0.0, share=share) for coefficients, share in shares)
    result = full_result(trials=trials, chosen=3, evaluations=4)

    assert stages(result) == ["search", "search", "finalist", "committed"]
    told = "4 evaluations: the dense model, 2 of the search, 1 of the plan as it is committed"
    assert evaluations_line(result) == f"{told}; besides, 1 finalist on all validation batches"

    refined = dataclasses.replace(trials[3], score=1.25)
    result = dataclasses.replace(result, trials=(*trials[:3], refined))
    assert f"{told} ({result.monitor} 1 before that); besides" in evaluations_line(result)


def test_best_so_far_does_not_compare_a_part_with_all() -> None:
    scores = [(5.0, 0.5), (6.0, 0.5), (5.5, 1.0), (5.0, 1.0)]
    trials = tuple(Trial((0.0, 0.0), 0.5, score, {}, True, 0.0, share=share) for score, share in scores)

    assert best_so_far(full_result(trials=trials, chosen=None)) == [(0, 5.0), (1, 6.0), (2, 5.5)]


def test_a_long_curve_of_healing_is_drawn_by_means_and_without_what_is_not_finite() -> None:
    errors = (*(1.0 / n for n in range(1, 10)), math.nan, math.inf)
    healed = full_result(score_compensated=19.4, healing=Healing(19.7, True, errors))

    assert healing_errors(healed, 400) == [(float(n), 1.0 / n) for n in range(1, 10)]
    means = [(2.0, 11 / 18), (5.0, 37 / 180), (8.0, (1 / 7 + 1 / 8 + 1 / 9) / 3)]
    assert healing_errors(healed, 4) == [(place, pytest.approx(mean)) for place, mean in means]
    assert healing_errors(full_result(), 4) == []


@pytest.mark.parametrize("scores", [[], [math.nan], [1.0], [0.0, 0.0], [1e300, -1e300, math.inf], [3.0, 3.0, 3.0]])
def test_limits_of_an_axis_are_never_empty(scores: list[float]) -> None:
    low, high = score_limits(scores, [])

    assert low < high
    assert math.isfinite(high - low)


def test_a_component_that_hands_on_fewer_features_is_named() -> None:
    latent = GroupResult("net.encoder.4", "encoder+decoder", "inter", 32, 12, 0.6)
    groups = (
        GroupResult("net.encoder.0", "encoder", "intra", 64, 20, 0.7),
        latent,
        GroupResult("encoder.6", "encoder+decoder", "inter", 8, 8, 0.0),
        GroupResult("stem", "stem+encoder", "inter", 16, 9, 0.5),
    )
    line = "features instead of 32 (net.encoder.4)"
    assert narrowed_features(make_result(groups=groups, trials=(), chosen=None)) == [f"encoder now gives 12 {line}"]
    skipped = make_result(groups=groups, trials=(), chosen=None, applied=False)
    assert narrowed_features(skipped) == [f"encoder would give 12 {line}"]


def test_components_that_were_seen_to_give_fewer_channels_are_named_wherever_these_are_made() -> None:
    groups = (
        GroupResult("stem", "stem+encoder", "inter", 16, 9, 0.5, outputs={"encoder": 16, "": 48}),
        GroupResult("body", "body", "intra", 16, 16, 0.0, outputs={"body": 16}),
    )
    assert narrowed_features(make_result(groups=groups, trials=(), chosen=None)) == [
        "encoder now gives 9 features instead of 16 (stem)",
        "forward now gives 9 of 16 channels among 48 features (stem)",
    ]
    many = [GroupResult(f"b{i}", "a", "intra", 4, 3, 0.25, outputs={f"b{i}": 4}) for i in range(11)]
    lines = narrowed_features(make_result(groups=tuple(many), trials=(), chosen=None))
    assert lines[7:] == ["b7 now gives 3 features instead of 4 (b7)", "and 3 more outputs with fewer features"]
