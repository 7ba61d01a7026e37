"""Constraints: how they are read, and what they make of a trial."""

import math
import re
import time

import pytest

from lightning_softprune.search.objective import Objective, mode_of, mode_of_name, parse_constraint


@pytest.mark.parametrize(
    ("text", "metric", "operator", "bound"),
    [
        ("val_psnr >= 19.5", "val_psnr", ">=", 19.5),
        ("val_psnr>=19.5", "val_psnr", ">=", 19.5),
        ("  val/loss  <  1e-3 ", "val/loss", "<", 1e-3),
        ("val_acc/dataloader_idx_0 > .9", "val_acc/dataloader_idx_0", ">", 0.9),
        ("reward <= -2.", "reward", "<=", -2.0),
        ("top 5 accuracy >= +90", "top 5 accuracy", ">=", 90.0),
    ],
)
def test_what_is_read(text, metric, operator, bound):
    found = parse_constraint(text, "constraints[0]")
    assert (found.metric, found.operator, found.bound) == (metric, operator, bound)
    assert found.text == text.strip()


@pytest.mark.parametrize(
    ("text", "expected", "character"),
    [
        ("", "metric", 1),
        (">= 3", "metric", 1),
        ("val_acc", "<=, >=, <, >", 8),
        ("val_acc 3", "<=, >=, <, >", 10),
        ("val_acc == 3", "<=, >=, <, >", 9),
        ("val_acc => 3", "<=, >=, <, >", 9),
        ("val_acc != 3", "<=, >=, <, >", 9),
        ("val_acc >= ", "number", 12),
        ("val_acc >= high", "number", 12),
        ("val_acc >= nan", "number", 12),
        ("val_acc >= inf", "number", 12),
        ("val_acc >== 3", "number", 11),
        ("val_acc >= 1e999", "finite", 12),
        ("val_acc >= 0.9 and val_loss <= 1", "nothing more", 16),
        ("val_acc >= 90 %", "nothing more", 15),
        ("val_acc >= 0,9", "nothing more", 13),
    ],
)
def test_an_error_points_at_the_character(text, expected, character):
    with pytest.raises(ValueError, match="constraints\\[1\\]") as raised:
        parse_constraint(text, "constraints[1]")
    first, shown, caret = str(raised.value).split("\n")
    assert expected in first
    assert f"character {character}" in first
    assert shown.strip() == text.strip()
    assert caret.index("^") - 4 == character - 1


N = 100_000
CRAFTED = {
    "spaces in a name": "a" + " " * N + "b >= 1",
    "spaces after a name": "a" + " " * N,
    "spaces before no name": " " * N + ">= 1",
    "words": "a " * N,
    "digits": "a >= " + "1" * N,
    "digits and more": "a >= " + "1" * N + "x",
    "a long fraction": "a >= 0." + "0" * N + "1 x",
    "points": "a >= " + "." * N,
    "exponents": "a >= 1" + "e1" * N,
    "a long exponent": "a >= 1e" + "9" * N,
    "signs": "a >= " + "+-" * N,
    "operators": "<>=!~" * N,
    "an operator late": "x" * N + "=>1",
    "line breaks": "a\n\r\v" * N + ">= 1",
}


@pytest.mark.parametrize("text", CRAFTED.values(), ids=CRAFTED.keys())
def test_a_crafted_text_is_read_in_linear_time_and_a_mistake_in_it_is_shown_in_short(text):
    started = time.process_time()
    try:
        parse_constraint(text, "constraints[0]")
    except ValueError as error:
        first, shown, caret = str(error).split("\n")
        assert max(map(len, (first, shown, caret))) <= 210
        at = int(re.search(r"character (\d+)", first)[1]) - 1
        under = shown[len(caret) - 1 : len(caret)]
        assert under.strip() == text[at : at + 1].strip()
    assert time.process_time() - started < 1.0  # quadratic time takes minutes


@pytest.mark.parametrize(
    ("text", "met", "missed"),
    [("a >= 2", [2, 3], [1.999]), ("a > 2", [2.1], [2, 1]), ("a <= 2", [2, -5], [2.001]), ("a < 2", [1], [2, 3])],
)
def test_what_meets_it(text, met, missed):
    constraint = parse_constraint(text, "")
    assert all(constraint.violation(value) == 0 for value in met)
    assert all(constraint.violation(value) > 0 for value in missed)
    assert constraint.violation(math.nan) == math.inf


def test_violations_are_relative_and_add_up():
    objective = Objective("a", "max", tuple(parse_constraint(t, "") for t in ("a >= 10", "b <= 0.5", "c >= 0")))
    assert objective.violation({"a": 9, "b": 0.6, "c": 1}) == pytest.approx(0.1 + 0.2)
    assert objective.violation({"a": 9, "b": 0.6}) == math.inf
    assert objective.shortfalls({"a": 9, "b": 0.6, "c": 1}) == ["a >= 10 (it is 9)", "b <= 0.5 (it is 0.6)"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_loss_falls_as_the_score_improves_and_is_penalised_for_other_metrics_only(mode):
    sign = 1 if mode == "min" else -1
    better = "<=" if mode == "min" else ">="
    objective = Objective("a", mode, (parse_constraint(f"a {better} 0", ""), parse_constraint("b >= 1", "")), scale=2.0)
    assert objective.loss({"a": 3.0, "b": 1.0}) == sign * 3.0
    assert objective.loss({"a": 3.0, "b": 0.9}) == pytest.approx(sign * 3.0 + 10 * 2 * 0.1)
    assert math.isnan(objective.loss({"a": 3.0, "b": math.nan}))
    assert math.isnan(objective.loss({"a": math.inf, "b": 1.0}))


def test_a_constraint_against_the_score_is_penalised_too():
    objective = Objective("a", "min", (parse_constraint("a >= 4", ""),))
    assert objective.loss({"a": 5.0}) == 5.0
    assert objective.loss({"a": 3.0}) == pytest.approx(3.0 + 10 * 0.25)


def test_what_is_not_logged_is_named_with_its_argument():
    objective = Objective("a", "min", (parse_constraint("b >= 1", ""),))
    assert objective.unlogged({"a": 1, "b": 1}) is None
    assert objective.unlogged({"b": 1}) == ("monitor='a'", "a")
    assert objective.unlogged({"a": 1}) == ("constraints[0]='b >= 1'", "b")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(
            (name, "min")
            for name in ("val_loss", "val/wer", "valMSE", "rmse.val", "val-nll", "MeanAbsoluteError", "FID")
        ),
        *(
            (name, None)
            for name in ("val_acc", "lossless", "merit", "neg_mean_squared_error", "answer", "val_psnr", "")
        ),
    ],
)
def test_whole_words_of_a_name_say_that_less_is_better(name, mode):
    assert mode_of_name(name) == mode


@pytest.mark.parametrize("higher", [True, False])
def test_what_a_metric_says_of_itself_counts_more_than_its_name(higher):
    said, other = ("max", "min") if higher else ("min", "max")
    assert mode_of("val_error", "auto", higher) == mode_of("val_error", said, higher) == said
    with pytest.raises(ValueError, match=f"mode='{other}'.*higher_is_better is {higher}.*mode=\"{said}\""):
        mode_of("val_error", other, higher)
