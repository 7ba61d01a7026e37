"""The probe finds what only running shows."""

import numpy as np
import pytest
import torch

from lightning_softprune.surgery import Candidates, probe_groups, probe_with_counts
from support import zoo
from support.attending import group
from support.masked import Net
from support.plans import assert_same, snapshot
from support.zoo import BY_NAME

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_probe_finds_what_only_running_shows_and_undoes_its_cuts():
    model, x = BY_NAME["ConstantView"].make()
    groups = zoo.trace_groups(model, [lambda: model(x)])
    before = snapshot(model)
    traced = {group.name: group.prunable for group in groups}
    probed = {group.name: group for group in probe_groups(model, groups, lambda: model(x))}
    assert traced["body"]
    assert not probed["body"].prunable
    assert probed["body"].reason.startswith("the model does not run with fewer channels: RuntimeError")
    assert probed["inner"].prunable
    assert_same(model, before)


def test_two_blocks_of_channels_that_change_places_within_are_found_though_one_is_left_alone():
    """With one block gone, no other can take its place: only masking tells that what is left is in another order."""

    def mixed(net, x):
        x = net.body(x)
        x = net.head(x.reshape(len(x), 2, x.shape[1] // 2).transpose(1, 2).reshape(x.shape))
        return x * 1e-4 + 1  # what is shown hardly differs; what the reader makes does

    torch.manual_seed(0)
    model, x = Net(mixed, body=torch.nn.Linear(5, 8), head=torch.nn.Linear(8, 2)), torch.randn(3, 5)
    halves = group("body", np.arange(8) // 4, ("body", "out"))
    reader = group("body", np.arange(8) % 2, ("head", "in")).members
    pairs = [zoo.PruningGroup("body", "body", "intra", 2, (*halves.members, *reader))]
    before = snapshot(model)
    assert "set to zero" in probe_with_counts(model, pairs, Candidates(), lambda: model(x))[0].reason
    assert_same(model, before)
