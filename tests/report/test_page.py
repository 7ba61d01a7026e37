import math
import re
import time
from dataclasses import replace

import pytest

from lightning_softprune.report.page import MAX_ROWS, report_page
from lightning_softprune.results import (
    DRY_RUN,
    LayerShapes,
    Origin,
    Trial,
)
from support.pages import Page
from support.results import EVIL, RESULTS, evil_result, full_result, large_result


@pytest.mark.parametrize("name", RESULTS)
def test_the_page_is_well_formed_and_can_be_written(name: str) -> None:
    text = report_page(RESULTS[name])

    page = Page(text)
    text.encode("utf-8")

    assert page.count("html") == page.count("main") == page.count("h1") == page.count("script") == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", RESULTS)
def test_the_page_asks_the_network_for_nothing(name: str) -> None:
    text = report_page(RESULTS[name])

    assert re.findall(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"^// .*$|\s// .*$", "", text, flags=re.M)) == []
    elements = Page(text).elements
    for tag, attributes in elements:
        assert "src" not in attributes
        assert attributes.get("href") in (None, "data:,", "trials.csv", "result.json"), (tag, attributes)
    (policy,) = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert str(policy).startswith("default-src 'none'; ")


@pytest.mark.parametrize("name", RESULTS)
def test_no_coordinate_is_nan_or_off_the_scale(name: str) -> None:
    for tag, attributes in Page(report_page(RESULTS[name])).elements:
        for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d", "points", "viewbox"):
            value = attributes.get(key) or ""
            assert not re.search(r"nan|inf", value), (tag, key, value)
            if tag != "polyline":  # the small charts cut their curves off
                assert all(abs(float(number)) < 1000 for number in re.findall(r"-?[\d.]+(?:e\S+)?", value)), value


def test_whatever_is_a_name_is_escaped() -> None:
    text = report_page(evil_result())
    page = Page(text)

    assert text.count("<script") == 1
    shown = EVIL.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    # Strategy, stop reason, reason, monitor (in card, charts and columns), cost, groups twice, limits, ...
    assert page.text.count(shown) >= 20
    ordinary = Page(report_page(full_result(applied=False)))
    assert {name for name, _ in page.elements} <= {name for name, _ in ordinary.elements}
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def test_every_number_of_the_result_is_on_the_page() -> None:
    text = Page(report_page(full_result())).text

    for number in (
        *("epoch 4", "0.7016", "0.7 ± 0.0125", "19.9712", "19.7089", "-0.2623 (-1.3 %)"),
        *("1,079,344", "322,102", "-70.2 %", "2,076,224", "720,000", "-65.3 %", "1.23 ms", "0.71 ms", "-42.3 %"),
        *("41 evaluations", "3.2 s", "patience", "GradientSearch", "val_psnr (higher is better)"),
        *("512 → 154", "0.699", "0.05 to 0.85", "4,321 params", "8,642 MACs", "32 → 24", "0.250", "0 to 1"),
        *("decoder.4", "64 channels", "its outputs are the module's outputs", "round_to", "2.13.0"),
        *("154 of 512 channels kept", "coefficient 0.5: score 19.91"),
    ):
        assert number in text, number


def test_the_table_of_trials_has_every_value() -> None:
    header, *rows = Page(report_page(full_result())).table("trial")

    assert header == [
        *("trial", "sparsity", "score", "feasible", "note", "seconds", "val_loss"),
        *("coefficient of encoder.0", "coefficient of encoder.4"),
    ]
    assert rows == [
        ["0", "0.35", "19.9", "no", "front", "0.5", "0.111", "0", "0"],
        ["1", "0.7", "19.7", "yes", "chosen, front", "0.5", "0.123", "0.7", "0.25"],
        ["2", "0.69", "19.5", "yes", "", "0.25", "", "0.1", "0.3333"],
        ["3", "0.8", "nan", "no", "", "0.125", "inf", "0.9", "0"],
    ]


def test_trials_on_a_part_of_the_data_say_so_and_are_on_no_front() -> None:
    trials = [replace(trial, share=0.25) for trial in full_result().trials[:3]]
    trials.append(replace(trials[1], share=1.0, score=19.6))
    page = report_page(replace(full_result(), trials=tuple(trials), chosen=3))
    header, *rows = Page(page).table("trial")

    column = header.index("share of batches")
    assert [row[column] for row in rows] == ["0.25", "0.25", "0.25", "1"]
    assert [row[4] for row in rows] == ["", "", "", "chosen, front, finalist"]
    assert "score 19.9 on 25.0% of the validation batches" in page


def test_limits_and_constraints_say_what_was_reached() -> None:
    assert Page(report_page(full_result())).table("budget")[1:] == [
        ["macs <= 0.5 of dense", "0.3214 of dense: met"],
        ["latency <= 0.75 of dense", "0.8 of dense: not met"],
        ["val_psnr >= 19.5", "19.7089: met"],
        ["val_loss < 0.001", "0.0107: not met"],
    ]
    assert "Limits" not in Page(report_page(full_result(limits={}, constraints=()))).text
    odd = full_result(constraints=("val_psnr >= high", "unknown < 3", "nonsense"), limits={"macs": 0.5})
    assert [row[1] for row in Page(report_page(odd)).table("budget")[2:]] == ["", "", ""]


def test_metrics_are_compared() -> None:
    result = full_result(metrics_before={"a": 1.0, "b": -2.0}, metrics_after={"a": 1.5, "b": math.nan, "c": 3.0})

    assert Page(report_page(result)).table("metric")[1:] == [
        ["a", "1", "1.5", "+0.5 (+50.0 %)"],
        ["b", "-2", "nan", "no finite change"],
        ["c", "", "3", ""],
    ]


def test_a_lower_score_is_better_in_mode_min() -> None:
    text = Page(report_page(full_result(mode="min"))).text

    assert "better" in text
    assert "worse" not in text
    assert "Lower is better." in text


def test_a_banner_says_when_nothing_was_applied_and_why() -> None:
    assert Page(report_page(full_result())).count("div", "banner") == 0
    skipped = Page(report_page(full_result(applied=False, reason="no trial meets val_psnr >= 30", chosen=None)))
    assert "The model was not changed: no trial meets val_psnr >= 30." in skipped.text
    assert "would have been applied" not in skipped.text
    dry = Page(report_page(full_result(applied=False, reason=DRY_RUN)))
    assert "The model was not changed: this was a dry run." in dry.text
    assert "would have been applied" in dry.text
    assert dry.count("div", "dry") == 1


def test_the_charts_show_each_kind_of_trial() -> None:
    page = Page(report_page(full_result()))

    # Two charts, each with a legend; the trial without a score has no mark.
    assert page.count("circle", "feasible") == 2 * (2 + 1)
    assert page.count("circle", "infeasible") == 2 * (1 + 1)
    assert page.count("path", "chosen") == 2 * (1 + 1)
    assert page.count("rect", "band") == 1 + 1
    assert page.count("polyline", "front") == 1
    assert page.count("polyline", "best") == 1
    assert page.count("polyline", "curve") == 2
    assert page.text.count("1 trial without a finite score, not drawn.") == 2
    assert "trial 1: score 19.7, sparsity 0.7, feasible, chosen" in page.text


def test_without_a_target_there_is_no_band_and_without_a_choice_no_mark() -> None:
    page = Page(report_page(full_result(target_sparsity=None, chosen=None)))

    assert page.count("rect", "band") == 0
    assert page.count("path", "chosen") == 0
    assert page.count("tr", "chosen") == 0


def test_a_trial_that_diverged_does_not_flatten_the_others() -> None:
    ordinary = [Trial((0.5, 0.5), 0.7, 0.5 + k / 100, {}, True, 0.1) for k in range(20)]
    diverged = Trial((0.5, 0.5), 0.7, 1e9, {}, True, 0.1)
    page = Page(report_page(full_result(mode="min", score_before=0.45, score_after=0.5, trials=(*ordinary, diverged))))

    assert page.text.count("1 trial beyond the axis, drawn as a triangle.") == 2
    heights = {attributes["cy"] for tag, attributes in page.elements if tag == "circle" and "r" in attributes}
    assert len(heights) > 15


def test_inter_groups_and_components_are_told_apart() -> None:
    page = Page(report_page(full_result()))
    striped = [attributes for tag, attributes in page.elements if attributes.get("fill") == "url(#inter)"]

    assert len(striped) == 1 + 1  # the bar, and the legend
    assert page.count("li", "c0") == page.count("li", "c1") == 1


def test_drawings_have_a_role_a_title_and_a_description() -> None:
    page = Page(report_page(full_result()))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}

    drawings = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawings) == 2 + 2 + 2  # charts, sensitivity, bars
    for attributes in drawings:
        assert attributes.get("aria-label") or set(str(attributes["aria-labelledby"]).split()) <= ids


def test_columns_can_be_sorted_by_keyboard_and_say_so() -> None:
    page = Page(report_page(full_result()))
    heads = [attributes for tag, attributes in page.elements if tag == "th" and "data-kind" in attributes]

    assert len(heads) == page.count("button") == 9
    assert [head.get("aria-sort") for head in heads] == ["ascending"] + [None] * 8


def test_a_long_table_is_cut_to_the_best_and_says_so() -> None:
    result = large_result(5000, 5)
    page = Page(report_page(replace(result, chosen=4)))
    _, *rows = page.table("trial")

    assert len(rows) == MAX_ROWS
    assert "The 1,000 best of 5,000 trials; all are in trials.csv." in page.text
    feasible = sorted((t.score for t in result.trials if t.feasible and not math.isnan(t.score)), reverse=True)
    shown = [int(row[0]) for row in rows]
    assert shown == sorted(shown)
    assert {f"{score:.6g}" for score in feasible[:990]} <= {row[2] for row in rows}
    assert 4 in shown


def test_too_many_groups_for_columns_are_left_to_the_csv() -> None:
    page = Page(report_page(large_result(300, 200)))

    assert page.table("trial")[0][-1] == "val_loss"
    assert "The coefficients of 200 groups are in trials.csv." in page.text
    assert page.count("figure", "small") == 200
    assert page.count("svg", "bar") == 200


@pytest.mark.parametrize(("trials", "groups"), [(5000, 5), (5000, 40), (300, 200), (20_000, 1)])
def test_a_large_page_stays_small_and_is_made_in_no_time(trials: int, groups: int) -> None:
    result = large_result(trials, groups)
    started = time.perf_counter()

    size = len(report_page(result).encode())

    assert size < 2_000_000
    assert time.perf_counter() - started < 20


def test_the_same_result_gives_the_same_page() -> None:
    assert report_page(full_result()) == report_page(full_result())


@pytest.mark.parametrize("groups", [True, False])
def test_the_coverage_is_said_with_what_is_left_out(groups):
    line = "87 % of the parameters are in prunable groups; largest left out: <b>head</b> (it is the output)"
    result = full_result(coverage=line)
    if not groups:
        result = replace(result, groups=(), trials=(), sensitivity=(), chosen=None)
    assert line in Page(report_page(result)).text
    assert "in prunable groups" not in Page(report_page(replace(result, coverage=""))).text


def test_layers_origin_and_the_score_after_fine_tuning_are_on_the_page():
    shapes = [{"weight": (512, 784), "bias": (512,)}, {"weight": (154, 784), "bias": (154,)}]
    result = full_result(
        layers=(LayerShapes("encoder.0", "Linear", *shapes),),
        origin=Origin("AutoEncoder", "runs/version_3", "2026-11-28 12:30", "1f"),
        device="cpu (2 threads)",
        latency_batch=64,
        score_finetuned=20.5,
    )
    page = Page(report_page(result))
    _, row = page.table("layer")

    assert row == [
        "encoder.0",
        "Linear",
        "weight 512 x 784, bias 512",
        "weight 154 x 784, bias 154",
        "401,920 → 120,890",
    ]
    assert "AutoEncoder, round at epoch 4" in page.text
    for fact in ("runs/version_3", "2026-11-28 12:30", "cpu (2 threads), batch of 64", "19.9712 → 19.7089 → 20.5"):
        assert fact in page.text


@pytest.mark.parametrize(("constraint", "red"), [("val_psnr >= 19.5", 0), ("val_psnr >= 19.9", 1), (None, 0)])
def test_a_drop_is_red_only_where_a_constraint_is_not_met(constraint, red):
    result = full_result(constraints=(constraint,) if constraint else (), limits={})
    page = Page(report_page(result))
    assert page.count("span", "worse") == red
    assert ("within the constraints" in page.text) == (constraint is not None and not red)


def test_every_panel_names_its_axes():
    page = Page(report_page(full_result()))
    labels = [attributes for tag, attributes in page.elements if tag == "text" and attributes["class"] == "label x"]
    assert len(labels) == 2 * (2 + 2)  # charts, sensitivity
    assert page.text.count("coefficient") >= 2
