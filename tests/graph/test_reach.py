"""How much of a model prunable groups reach."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_softprune import find_groups

pytestmark = pytest.mark.usefixtures("one_thread")


class Partly(nn.Module):
    """A part that can be pruned, one that cannot (its width is written down), one that is never run."""

    def __init__(self):
        super().__init__()
        self.body, self.between = nn.Linear(5, 8), nn.Linear(8, 6)
        self.fixed, self.head = nn.Linear(6, 20), nn.Linear(20, 2)
        self.spare = nn.Linear(3, 7)

    def forward(self, x):
        return self.head(self.fixed(self.between(self.body(x))).view(-1, 20))


def found():
    return find_groups(Partly(), torch.randn(3, 5))


def test_the_share_is_of_the_tensors_that_something_can_go_from():
    sizes = {"body": 5 * 8 + 8, "between": 8 * 6 + 6, "fixed.weight": 6 * 20, "rest": 20 + 20 * 2 + 2 + 3 * 7 + 7}
    reached = sizes["body"] + sizes["between"] + sizes["fixed.weight"]
    groups = found()
    assert [group.name for group in groups if group.prunable] == ["body", "between"]
    assert groups.coverage.share == pytest.approx(reached / sum(sizes.values()))
    assert groups.coverage.largest == "fixed"
    line = str(groups.coverage)
    assert line.startswith(f"{100 * reached / sum(sizes.values()):.0f} % of the parameters are in prunable groups; ")
    assert "largest left out: fixed (the model does not run with fewer channels" in line


def test_a_model_that_can_be_pruned_whole_has_nothing_left_out_but_its_outputs():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 2, bias=False))
    coverage = find_groups(model, torch.randn(3, 5)).coverage
    assert (coverage.share, coverage.largest) == (1.0, "")
    assert str(coverage) == "100 % of the parameters are in prunable groups"


def test_groups_are_a_list_that_prints_as_a_table():
    groups = found()
    assert isinstance(groups, list)
    assert groups == list(groups)
    assert list(groups) == groups
    lines = str(groups).splitlines()
    assert lines == repr(groups).splitlines()
    assert lines[0].split() == ["group", "channels", "members", "prunable?"]
    assert lines[1].split() == ["body", "8", "body,", "between", "prunable"]
    assert len(lines) == 1 + len(groups) + 2
    start = lines[0].index("prunable?")
    for line, group in zip(lines[1:], groups, strict=False):
        assert line[start:] == (group.reason or "prunable")
        assert line.startswith(f"{group.name} ")
    assert lines[-1] == str(groups.coverage)


def test_a_group_of_many_members_names_the_first():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]

    class Residual(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = x + layer(x) if x.shape[-1] == layer[0].out_features else layer(x)
            return x

    model = nn.Sequential(nn.Linear(5, 8), Residual(*layers), nn.Linear(8, 2))
    head, line, *_ = str(find_groups(model, torch.randn(3, 5))).splitlines()
    members = line[head.index("members") : head.index("prunable?")]
    assert members.strip() == "0, 1.0.0, 1.1.0 and 2 more"


def test_groups_are_copied_and_pickled_with_their_coverage():
    groups = found()
    for other in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert other == groups
        assert other.coverage == groups.coverage


def test_of_no_groups_only_the_coverage_is_said():
    groups = find_groups(nn.Linear(3, 2), torch.randn(4, 3))
    assert groups.coverage.share == 0
    assert str(groups).splitlines()[-1].startswith("0 % of the parameters are in prunable groups; largest left out: ")
