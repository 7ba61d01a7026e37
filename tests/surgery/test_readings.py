"""Which readings of a trace are tried, in which order, and which of them wins: what is read is given by a script."""

import pytest

from lightning_softprune.graph import Grouping
from lightning_softprune.surgery import best_reading
from support.attending import group


def pair(first="fine", second="fine"):
    """Two groups of one width: `fine`, `crashed`, `wrong` (refused, no crash), or pruned in steps of a number."""

    def found(name, how):
        one = group(name, range(8), (name, "out"), step=how if isinstance(how, int) else 1)
        return one.refuse("it fails", crashed=how == "crashed") if how in ("crashed", "wrong") else one

    return [found("a", first), found("b", second)]


def tried(answers, *, splits=None, loose=None):
    """The best of the readings, and which were tried: choices, places that are coupled, whether in steps.

    The answers are states of the two groups by what is read; what is not listed is as the first reading.
    """
    asked = []

    def read(choices, united, in_steps):
        what = (*choices.values(), "coupled" * bool(united) + "+" * max(0, len(united) - 1), in_steps)
        asked.append(what)
        grouping = Grouping(pair(), splits or {}, {}, set(), set(), loose or {})
        return pair(*answers.get(what, answers[("", False)])), grouping

    return best_reading(read), asked


def states(groups):
    return [(g.prunable, g.step) for g in groups]


def test_what_works_at_once_is_read_once():
    best, asked = tried({("", False): ("fine", "fine")})
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == [("", False)]


def test_what_is_refused_without_a_crash_is_neither_coupled_nor_tried_in_steps():
    _, asked = tried({("", False): ("fine", "wrong")})
    assert asked == [("", False)]


def test_coupling_is_tried_before_steps_and_ends_it_where_it_works():
    crashed = ("crashed", "crashed")
    best, asked = tried({("", False): crashed, ("coupled", False): ("fine", "fine")})
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == [("", False), ("coupled", False)]


def test_steps_alone_are_tried_before_steps_of_what_is_coupled():
    crashed = ("crashed", "crashed")
    best, asked = tried({("", False): crashed, ("", True): ("crashed", 4), ("coupled", True): (4, 4)})
    assert states(best) == [(True, 4), (True, 4)]
    assert asked == [("", False), ("coupled", False), ("", True), ("coupled", True)]


def test_what_is_made_to_fit_is_coupled_along_where_that_makes_a_difference():
    crashed = ("crashed", "crashed")
    _, asked = tried({("", False): crashed}, loose={("c", "in"): 8})
    coupled = [("coupled", False), ("coupled+", False)]
    steps = [("", True), ("coupled", True), ("coupled+", True)]
    assert asked == [("", False), *coupled, *steps]


@pytest.mark.parametrize(
    ("first", "then", "wins"),
    [
        (("fine", "crashed"), ("crashed", "fine"), False),  # not more, so what was read first
        (("fine", "crashed"), (4, 4), False),  # single channels count more than how many can go at all
        (("fine", "crashed"), ("fine", 8), True),
        (("crashed", "crashed"), ("crashed", 8), True),
    ],
)
def test_more_slots_that_lose_single_channels_win_then_more_that_lose_any(first, then, wins):
    best, _ = tried({("", False): first, ("", True): then})
    assert states(best) == states(pair(*(then if wins else first)))


def test_another_dimension_of_a_reshape_is_tried_first_and_kept_by_what_follows():
    answers = {("", False): ("fine", "crashed"), (1, "", False): ("fine", "crashed"), (2, "", False): ("fine", "fine")}
    best, asked = tried(answers, splits={"b": {"model.py:3": 3}})
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == [("", False), (1, "", False), (2, "", False)]


def test_reshapes_that_are_refused_without_a_crash_are_also_taken_otherwise_one_at_a_time():
    wrong = ("wrong", "wrong")
    splits = {"a": {"model.py:3": 2}, "b": {"model.py:8": 2}}
    asked_before = [("", False), (1, 1, "", False), (1, "", False)]
    best, asked = tried({("", False): wrong, (1, "", False): ("fine", "fine")}, splits=splits)
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == asked_before
    _, asked = tried({("", False): wrong}, splits=splits)
    assert asked == [*asked_before, (1, "", False)]
    _, asked = tried({("", False): ("crashed", "crashed")}, splits=splits)
    assert (1, "", False) not in asked


def test_what_is_coupled_is_also_read_with_the_other_dimensions_of_reshapes():
    crashed, splits = ("crashed", "crashed"), {"b": {"model.py:3": 2}}
    best, asked = tried({("", False): crashed, (1, "coupled", False): ("fine", "fine")}, splits=splits)
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == [("", False), (1, "", False), ("coupled", False), (1, "coupled", False)]
