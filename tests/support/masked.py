"""Networks written as one function and their parts; and the oracle for groups: the dense network with zeros in it."""

from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from lightning_softprune.surgery.probing import mask_channels
from support.plans import assert_same, outputs, snapshot


class Net(nn.Module):
    """`forward(net, *inputs)` with its parts: modules, parameters and anything else as attributes; `buffers` apart."""

    def __init__(self, forward, buffers=None, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)
        self.function = forward

    def forward(self, *inputs):
        return self.function(self, *inputs)


def run(model, inputs):
    with torch.no_grad():
        return outputs(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def patterns(channels, seed=0):
    """Channels to remove: the first, the last, every second, all but one, any."""
    order = np.random.default_rng(seed).permutation(channels).tolist()
    found = [(0,), (channels - 1,), tuple(range(1, channels, 2)), tuple(sorted(order[1:])), tuple(sorted(order[:2]))]
    return list(dict.fromkeys(pattern for pattern in found if 0 < len(pattern) < channels))


def plans(groups, seed=0):
    """Each group by itself, then all at once."""
    for i, group in enumerate(groups):
        for pattern in patterns(group.num_channels, seed + i):
            yield Plan(tuple(pattern if i == j else () for j in range(len(groups))))
    if len(groups) > 1:
        for k in range(3):
            found = [patterns(group.num_channels, seed + i + k) for i, group in enumerate(groups)]
            yield Plan(tuple(options[(i + k) % len(options)] for i, options in enumerate(found)))


def assert_pruned_is_masked(model, inputs, groups, chosen, masked=True, tolerance=1e-5):
    """The pruned network computes what the masked dense one does; undone, it is the dense one bit by bit."""
    dense, before = run(model, inputs), snapshot(model)
    for plan in chosen:
        expected = None
        if masked:
            with ExitStack() as stack:
                for group, channels in zip(groups, plan.removed, strict=True):
                    stack.enter_context(mask_channels(model, group, channels))
                expected = run(model, inputs)
        surgery = apply_plan(model, groups, plan)
        try:
            result = run(model, inputs)
        finally:
            surgery.undo()
        if masked:
            torch.testing.assert_close(
                result, expected, atol=tolerance, rtol=tolerance, msg=lambda m, plan=plan: f"{plan}: {m}"
            )
        assert_same(model, before)
        assert torch.equal(run(model, inputs), dense)


def check(model, inputs, expected, refused=None, masked=True):
    """Find groups; compare them with what is expected; prune each of them in several ways.

    `expected`: prunable groups and their channels. `refused`: name of a group -> what its reason has to say.
    """
    model.eval()
    groups = find_groups(model, inputs)
    found = [group for group in groups if group.prunable]
    assert {group.name: group.num_channels for group in found} == expected, [(g.name, g.reason) for g in groups]
    reasons = {group.name: group.reason for group in groups}
    for name, text in (refused or {}).items():
        assert text in reasons[name], reasons[name]
    assert_pruned_is_masked(model, inputs, found, plans(found), masked)
    return {group.name: group for group in groups}
