import dataclasses
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from lightning_softprune.results import (
    DRY_RUN,
    Costs,
    PruningResult,
    Sensitivity,
    format_change,
    pareto_front,
)
from support.results import make_result, make_trial


def through_a_json_file(data: dict[str, Any]) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json.dumps(data), parse_constant=refuse)


def plain_types(value: Any) -> set[type]:
    if isinstance(value, Mapping):
        return {type(value)}.union(*map(plain_types, value.keys()), *map(plain_types, value.values()))
    if isinstance(value, (list, tuple)):
        return {type(value)}.union(*map(plain_types, value))
    return {type(value)}


def test_a_result_survives_a_json_file() -> None:
    result = make_result()

    again = PruningResult.from_dict(through_a_json_file(result.to_dict()))

    assert again == result
    assert isinstance(again.trials, tuple)
    assert isinstance(again.trials[1].coefficients, tuple)
    assert isinstance(again.costs_after, Costs)


def test_a_result_survives_a_checkpoint_loaded_with_weights_only() -> None:
    result = make_result(trials=(make_trial(score=math.inf),), target_sparsity=None)
    file = io.BytesIO()
    torch.save({"softprune": result.to_dict()}, file)
    file.seek(0)

    assert PruningResult.from_dict(torch.load(file, weights_only=True)["softprune"]) == result


def test_the_dict_holds_plain_types_only_even_if_the_result_does_not() -> None:
    trial = make_trial(np.float64(0.7), np.float32(19.5), feasible=np.bool_(True), coefficients=np.array([0.7, 0.2]))
    result = make_result(
        trials=(trial,), evaluations=np.int64(41), score_after=torch.tensor(19.5), metrics_after={"a": np.float64(1)}
    )

    data = result.to_dict()

    assert plain_types(data) <= {dict, list, str, int, float, bool, type(None)}
    assert data["evaluations"] == 41
    assert data["score_after"] == 19.5
    assert data["trials"][0]["coefficients"] == [0.7, 0.2]
    assert data["trials"][0]["feasible"] is True


def test_nan_and_infinities_are_strings_in_the_file_and_floats_again_after_it() -> None:
    trial = make_trial(score=math.nan, metrics={"a": math.inf, "b": -math.inf})
    result = make_result(trials=(trial,), score_after=math.nan)

    data = through_a_json_file(result.to_dict())
    again = PruningResult.from_dict(data)

    assert data["score_after"] == "nan"
    assert data["trials"][0]["metrics"] == {"a": "inf", "b": "-inf"}
    assert math.isnan(again.score_after)
    assert math.isnan(again.trials[0].score)
    assert again.trials[0].metrics == {"a": math.inf, "b": -math.inf}
    assert again.to_dict() == data


def test_keys_of_a_newer_version_are_ignored() -> None:
    data = make_result().to_dict()
    data["latency"] = 3.5
    data["groups"][0]["colour"] = "red"

    assert PruningResult.from_dict(data) == make_result()


def test_fields_with_a_default_may_be_missing() -> None:
    data = make_result(sensitivity=(), reason="").to_dict()
    del data["sensitivity"], data["reason"]

    assert PruningResult.from_dict(data) == make_result(sensitivity=(), reason="")


@pytest.mark.parametrize(
    "field",
    [f.name for f in dataclasses.fields(PruningResult) if f.default is f.default_factory is dataclasses.MISSING],
)
def test_a_missing_field_is_named(field: str) -> None:
    data = make_result().to_dict()
    del data[field]

    with pytest.raises(ValueError, match=rf"{field} is missing"):
        PruningResult.from_dict(data)


def test_a_missing_field_inside_a_trial_is_named_with_its_place() -> None:
    data = make_result().to_dict()
    del data["trials"][1]["score"]

    with pytest.raises(ValueError, match=r"trials\[1\]\.score is missing"):
        PruningResult.from_dict(data)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epoch", "10", "epoch: '10' is not an integer"),
        ("epoch", True, "epoch: True is not an integer"),
        ("score_after", None, "score_after: None is not a number"),
        ("score_after", "NaN", "score_after: 'NaN' is not a number"),
        ("score_after", False, "score_after: False is not a number"),
        ("applied", 1, "applied: 1 is not true or false"),
        ("strategy", 3, "strategy: 3 is not a string"),
        ("groups", {}, "groups: {} is not a list"),
        ("metrics_after", [1], r"metrics_after: \[1\] is not a dict"),
        ("metrics_after", {"a": "b"}, r"metrics_after\['a'\]: 'b' is not a number"),
        ("costs_after", [1, 2], r"costs_after: \[1, 2\] is not a dict"),
        ("mode", "maximum", "mode: 'maximum' is not one of 'min', 'max'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(field: str, value: object, expected: str) -> None:
    data = make_result().to_dict()
    data[field] = value

    with pytest.raises(ValueError, match=expected):
        PruningResult.from_dict(data)


@pytest.mark.parametrize(
    ("field", "inside", "value", "expected"),
    [
        ("latency_before", (), -0.1, "latency_before: -0.1 is less than 0"),
        ("evaluations", (), -3, "evaluations: -3 is less than 0"),
        ("costs_after", ("macs",), -1, "macs: -1 is less than 0"),
        ("groups", (0, "channels_before"), -4, r"channels_before of group 'encoder\.0': -4 is less than 0"),
        ("groups", (1, "channels_after"), -4, r"channels_after of group 'encoder\.4': -4 is not between 0 and 32"),
        ("groups", (1, "channels_after"), 33, r"channels_after of group 'encoder\.4': 33 is not between 0 and 32"),
    ],
)
def test_a_number_that_cannot_be_is_named(field: str, inside: tuple[Any, ...], value: float, expected: str) -> None:
    data = make_result().to_dict()
    holder, path = data, [field, *inside]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value

    with pytest.raises(ValueError, match=expected):
        PruningResult.from_dict(data)


@pytest.mark.parametrize("data", [[], "text", 3, None])
def test_what_is_no_dict_at_all_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"the whole: .* is not a dict"):
        PruningResult.from_dict(data)


def test_a_trial_needs_one_coefficient_per_group() -> None:
    with pytest.raises(ValueError, match=r"trials\[1\]: 1 coefficients for 2 groups"):
        make_result(trials=(make_trial(), make_trial(coefficients=(0.5,))))


def test_a_sensitivity_curve_needs_one_score_per_coefficient() -> None:
    with pytest.raises(ValueError, match=r"scores: 1 of group 'encoder\.0' for 2 coefficients"):
        Sensitivity("encoder.0", (0.0, 0.5), (1.0,))


@pytest.mark.parametrize(
    ("applied", "reason", "outcome"),
    [(True, "", "applied"), (False, "no plan meets val_psnr >= 25", "skipped"), (False, DRY_RUN, "dry run")],
)
def test_the_outcome_of_a_result_without_one_is_read_off_its_reason(applied: bool, reason: str, outcome: str) -> None:
    result = make_result(applied=applied, reason=reason)
    data = result.to_dict()
    assert data["outcome"] == outcome
    del data["outcome"]  # as 0.1.0 wrote it
    again = PruningResult.from_dict(data)
    assert again == result
    assert again.is_dry_run == (outcome == "dry run")


def test_the_outcome_and_not_the_reason_says_whether_a_round_was_a_dry_run() -> None:
    assert make_result(applied=False, reason="for a look", outcome="dry run").is_dry_run
    assert not make_result(applied=False, reason=f"{DRY_RUN}, said somebody", outcome="skipped").is_dry_run


def test_an_outcome_that_is_unknown_or_contradicts_is_named() -> None:
    with pytest.raises(ValueError, match="outcome: 'wet run' is not one of 'applied', 'skipped', 'dry run'"):
        make_result(outcome="wet run")
    with pytest.raises(ValueError, match="outcome: 'skipped' contradicts applied=True"):
        make_result(applied=True, outcome="skipped")
    with pytest.raises(ValueError, match="outcome: 'applied' contradicts applied=False"):
        make_result(applied=False, outcome="applied")


def test_summary_of_an_applied_round() -> None:
    assert make_result().summary == (
        "epoch 10: 1,079,344 -> 322,102 parameters (-70.2 %), val_psnr 19.97 -> 19.71 "
        "after 41 evaluations in 3.2 s (GradientSearch: patience)"
    )


def test_summary_says_why_nothing_was_applied() -> None:
    costs = Costs(1000, 1000)
    result = make_result(
        applied=False,
        reason="no plan meets val_psnr >= 25",
        costs_before=costs,
        costs_after=costs,
        score_after=math.nan,
        evaluations=1,
    )

    assert result.summary == (
        "epoch 10, not applied (no plan meets val_psnr >= 25): 1,000 -> 1,000 parameters (0.0 %), "
        "val_psnr 19.97 -> nan after 1 evaluation in 3.2 s (GradientSearch: patience)"
    )


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(100, 30, "-70.0 %"), (100, 105, "+5.0 %"), (10**6, 10**6 - 1, "0.0 %"), (0, 0, "0.0 %")],
)
def test_format_change(before: float, after: float, text: str) -> None:
    assert format_change(before, after) == text


@pytest.mark.parametrize("mode", ["min", "max"])
def test_pareto_front_equals_the_definition_on_random_points(mode: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        points = generator.integers(0, 5, size=(generator.integers(0, 12), 2)).astype(float)
        points[generator.random(points.shape) < 0.05] = math.nan
        gain = points * (1.0 if mode == "max" else np.array([1.0, -1.0]))
        expected = {
            i
            for i, a in enumerate(gain)
            if not np.isnan(a).any() and not any((b >= a).all() and (b > a).any() for b in gain)
        }

        front = pareto_front(points[:, 0].tolist(), points[:, 1].tolist(), mode)

        assert set(front) == expected
        assert [points[i, 0] for i in front] == sorted(points[i, 0] for i in front)


def test_pareto_trials_follow_the_mode() -> None:
    trials = (make_trial(0.7, 19.0), make_trial(0.5, 20.0), make_trial(0.6, 18.0), make_trial(0.9, math.nan))

    assert make_result(trials=trials, mode="max").pareto == (trials[1], trials[0])
    assert make_result(trials=trials, mode="min").pareto == (trials[2], trials[0])


def test_pareto_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode: 'best' is not one of 'min', 'max'"):
        pareto_front([0.1], [1.0], "best")


def test_a_part_is_no_point_of_the_pareto_front_and_passes_are_told() -> None:
    part, whole = make_trial(score=20.5, share=0.25), make_trial(score=19.7)
    result = make_result(trials=(part, whole), evaluations=2, passes=2.25)

    assert result.pareto == (whole,)
    assert "after 2 evaluations (2.2 passes) in" in result.summary
    assert make_result().passes == make_result().evaluations
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_result_is_its_summary_and_in_a_notebook_a_small_table() -> None:
    result = make_result(monitor="<b>psnr</b>")

    assert repr(result) == f"<PruningResult, {result.summary}>"
    page = result._repr_html_()
    assert len(page) < 2000
    assert "&lt;b&gt;psnr" in page
    assert "<b>" not in page
    assert "1,079,344" in page
    assert sum(page.count(bar) for bar in "▁▂▃▄▅▆▇█") == len(result.groups)


def test_latency_has_a_sign_only_where_its_spread_supports_one() -> None:
    assert make_result(latency_before=0.1, latency_after=0.097, latency_spread=0.05).latency_change == "about the same"
    sure = make_result(latency_before=0.1, latency_after=0.08, latency_spread=0.05)
    assert sure.latency_change == "-20.0 % (spread 5.0 %)"
    assert make_result(latency_before=0.1, latency_after=0.08).latency_change == "-20.0 %"
    assert make_result().latency_change == ""
    assert make_result(latency_before=0.0, latency_after=0.001).latency_change == ""  # nobody can say
