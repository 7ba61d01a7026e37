"""Every group of a model, found by running it.

A *group* is a set of coupled slots (see `layers`) together with its *channels*: the smallest sets of indices that can
go at once. Indices that share a slot position are united, and so are the equal parts of grouped layers. A group that
reaches a marker is not prunable, for the marker's reason. Whatever the graph gets wrong (a ``view`` with a constant, a
tensor added to the raw input) is found later by a probe: remove one channel, run, undo.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from lightning_softprune.graph.components import match_modules, self_and_parents
from lightning_softprune.graph.groups import Member, PruningGroup
from lightning_softprune.graph.layers import layer_type
from lightning_softprune.graph.left_out import left_alone, refuse_torn_parameters
from lightning_softprune.graph.trace import Step, trace_model
from lightning_softprune.graph.walk import Walked, Walker
from lightning_softprune.utilities.arrays import IntArray


def trace_groups(
    model: nn.Module, steps: Sequence[Step], ignore: Sequence[str] = (), outside: Mapping[str, str] | None = None
) -> list[PruningGroup]:
    """Find every group of a model by running it.

    Args:
        model: The model; its layers are run by ``steps`` under grad mode, in eval mode, and are not changed.
        steps: Functions that run the model (its ``validation_step`` on a batch, ...). What they return is not used.
        ignore: Patterns of modules that must keep their outputs and inputs.
        outside: Modules that are to be left alone with all that is in them -> why.

    Returns:
        The groups in the order in which the model runs them; after them, one entry per layer or bare parameter that
        is in no group, with the reason. Components are not assigned yet.

    Raises:
        ValueError: A pattern of ``ignore`` matches nothing.
    """
    ignored = {n: p for p, names in match_modules(model, ignore, "ignore").items() for n in names}
    trace = trace_model(model, steps, outside)
    walker = Walker(trace)
    groups: list[PruningGroup] = []
    seen: set[tuple[str, str]] = set()
    for module in trace.order:
        name = trace.names[module]
        layout = trace.layouts[module]
        slot = layout.slot("out")
        if slot not in layout.slots or (name, slot) in seen:
            continue
        if module not in trace.graph.module2node:
            continue  # it ran without gradients, and nothing is known of what it is coupled to
        entry = layer_type(module)
        if entry is None or not (entry.produces or slot != "both"):
            continue  # it only passes on what another layer produces
        walked = walker.walk(module)
        group = _build(name, walked, ignored)
        seen |= group.slots()
        groups.append(group)
    groups = refuse_torn_parameters(model, groups, trace)
    return _unique_names(groups) + list(left_alone(model, groups, trace))


def _build(name: str, walked: Walked, ignored: Mapping[str, str]) -> PruningGroup:
    roots = _Union(walked.num_roots)
    at: dict[tuple[str, str], dict[int, int]] = {}
    for key, pairs in walked.pairs.items():
        place: dict[int, int] = {}
        for index, root in pairs:
            roots.unite(place.setdefault(index, root), root)
        at[key] = place
    reason = walked.reasons[0] if walked.reasons else ""
    for key, place in at.items():
        parts, size = walked.parts[key], walked.sizes[key]
        if parts == 1:
            continue
        if len(place) != size:
            reason = reason or f"{key[0] or 'a chunk'} has {parts} parts, which channels of several groups share"
            continue
        width = size // parts
        for index, root in place.items():
            roots.unite(place[index % width], root)
    channel = roots.numbers()
    members = []
    for key, place in at.items():
        if not key[0]:
            continue  # a chunk
        owner = np.full(walked.sizes[key], -1, dtype=np.int64)
        for index, root in place.items():
            owner[index] = channel[root]
        members.append(Member(*key, owner))
    num_channels = int(channel.max(initial=-1)) + 1
    if not reason and num_channels < 2:
        reason = "it has a single channel" if num_channels else "it has no channels"
    for member in members:
        for hit in self_and_parents(member.module):
            if hit in ignored:
                reason = f"ignored: {member.module} matches {ignored[hit]!r}"
    return PruningGroup(name, "", "intra", num_channels, tuple(members), not reason, reason)


class _Union:
    """Union-find over root indices; a set's number follows its smallest index."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def unite(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self.parent[max(one, other)] = min(one, other)

    def numbers(self) -> IntArray:
        heads = np.array([self.find(item) for item in range(len(self.parent))], dtype=np.int64)
        return np.unique(heads, return_inverse=True)[1].astype(np.int64)


def _unique_names(groups: Sequence[PruningGroup]) -> list[PruningGroup]:
    """One producer may lead two groups (disjoint channels); number them."""
    count: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        count[group.name] += 1
        named.append(replace(group, name=f"{group.name}#{count[group.name]}") if count[group.name] > 1 else group)
    return named
