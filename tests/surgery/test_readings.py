"""Which readings of a trace are tried, in which order, and which of them wins: what is read is given by a script."""

import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.graph import Grouping
from lightning_softprune.surgery import best_reading
from support.attending import group
from support.masked import Net, assert_pruned_is_masked, plans


def pair(first="fine", second="fine"):
    """Two groups of one width: `fine`, `crashed`, `wrong` (refused, no crash), or pruned in steps of a number."""

    def found(name, how):
        one = group(name, range(8), (name, "out"), step=how if isinstance(how, int) else 1)
        return one.refuse("it fails", crashed=how == "crashed") if how in ("crashed", "wrong") else one

    return [found("a", first), found("b", second)]


def tried(answers, *, splits=None, loose=None, given=()):
    """The best of the readings, and which were tried: choices, places that are coupled, whether in steps.

    The answers are states of the two groups by what is read; what is not listed is as the first reading.
    """
    asked = []

    def read(choices, united, in_steps):
        what = (*choices.values(), "coupled" * bool(united) + "+" * max(0, len(united) - 1), in_steps)
        asked.append(what)
        grouping = Grouping(pair(), splits or {}, {}, set(), set(), loose or {}, set(given))
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


def test_where_groups_fail_those_beside_them_are_read_otherwise_as_well():
    answers = {("", False): ("fine", "wrong"), (1, "", False): ("fine", "fine")}
    splits = {"a": {"model.py:3": 2}}
    best, asked = tried(answers, splits=splits)
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == [("", False), (1, "", False)]
    _, asked = tried({("", False): ("fine", "wrong")}, splits=splits, given=["b"])
    assert asked == [("", False)]  # an output is one however it is read


def test_groups_of_another_choice_of_dimensions_are_coupled_too_where_more_fail_then():
    first, other = ("crashed", "wrong"), ("crashed", "crashed")
    answers = {("", False): first, (1, "", False): other, (1, "coupled", False): ("fine", "fine")}
    best, asked = tried(answers, splits={"b": {"model.py:3": 2}})
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == [("", False), (1, "", False), ("", True), (1, "coupled", False)]
    best, asked = tried({**answers, ("", True): (4, "wrong")}, splits={"b": {"model.py:3": 2}})
    assert states(best) == [(True, 4), (False, 1)]  # in steps, the first choice runs
    assert asked == [("", False), (1, "", False), ("", True)]


def test_groups_of_another_choice_of_dimensions_in_which_no_more_fail_in_code_are_not_coupled():
    answers = {("", False): ("crashed", "crashed"), (1, "", False): ("crashed", "wrong")}
    _, asked = tried(answers, splits={"b": {"model.py:3": 3}})  # with the third, as many fail as with the first
    assert asked[:3] == [("", False), (1, "", False), (2, "", False)]
    assert asked[-2:] == [("", True), ("coupled", True)]


def test_groups_that_crash_are_coupled_with_other_dimensions_of_their_reshapes_before_steps():
    answers = {("", False): ("crashed", "crashed"), (1, "coupled", False): ("fine", "fine")}
    best, asked = tried(answers, splits={"a": {"model.py:3": 2}})
    assert states(best) == [(True, 1), (True, 1)]
    assert asked == [("", False), (1, "", False), ("coupled", False), (1, "coupled", False)]


def averaged_heads(net, x):
    heads = net.body(x).view(len(x), net.heads, net.body.out_features // net.heads)
    return net.head(net.norm(heads.tanh().mean(1)))


def test_heads_that_are_averaged_leave_their_dimensions_to_be_pruned():
    """Heads can go by themselves; what reads their mean then keeps its width, so their dimensions are tried."""
    torch.manual_seed(0)
    parts = {"body": nn.Linear(4, 16), "norm": nn.BatchNorm1d(8), "head": nn.Linear(8, 2), "heads": 2}
    model, x = Net(averaged_heads, **parts).eval(), torch.randn(5, 4)
    groups = [group for group in find_groups(model, x) if group.prunable]
    assert [(g.name, g.num_channels, len(g.members)) for g in groups] == [("body", 8, 3)]
    assert_pruned_is_masked(model, x, groups, plans(groups))


class TwoHeads(nn.Module):
    """Attention whose width of a head is what is left of the tensor: with half of it gone, two narrow heads are."""

    def __init__(self):
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_one_of_two_heads_goes_with_their_number():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 12), TwoHeads(), nn.Linear(12, 2)), torch.randn(2, 5, 3)
    groups = [group for group in find_groups(model, x) if group.prunable]
    found = {group.name: (group.num_channels, [count.attribute for count in group.counts]) for group in groups}
    assert found == {"0": (12, []), "1.q": (2, ["heads"]), "1.out": (12, [])}
    assert_pruned_is_masked(model, x, groups, plans(groups))


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


class Modulation(nn.Module):
    """A fused layer gives a query, a context and gates; the code takes the first two for as wide as what it takes."""

    def __init__(self):
        super().__init__()
        self.fused, self.context, self.mixed = nn.Linear(8, 17), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        width = x.shape[-1]
        query, context, gates = self.fused(x).split((width, width, 1), -1)
        return x + self.mixed(query * self.context(context).relu() * gates)


def test_all_parts_of_a_fused_layer_that_the_code_takes_for_one_width_go_together():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8), Modulation(), Modulation(), nn.Linear(8, 2)), torch.randn(5, 3)
    groups = [group for group in find_groups(model, x) if group.prunable]
    assert [(g.name, g.num_channels, len(g.members)) for g in groups] == [("0", 8, 14)]
    assert_pruned_is_masked(model, x, groups, plans(groups))
