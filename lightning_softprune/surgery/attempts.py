"""Attributes that count channels (``num_heads``), found by trying.

A model may write its widths down: as attributes of its modules, which its forward puts into a ``view``. A group that
fails a probe is probed again with such attributes changed along with its channels, first one name at a time, then two,
then all that could count it. The first choice with which the model computes the same as the masked dense network is
kept; groups alike (the heads of all blocks) share it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_softprune.graph import Count, PruningGroup
from lightning_softprune.surgery.probe import differs_from_masked, probe_groups

_MOST_NAMES = 6
"""More attributes than that would make more than twenty choices."""


def probe_with_counts(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    candidates: Mapping[str, Sequence[Count]],
    run: Callable[[], Any],
    run_otherwise: Callable[[], Any] | None = None,
    round_to: int = 1,
) -> list[PruningGroup]:
    """Probe groups; where one fails, look for attributes that count its channels.

    Args:
        model: The model; unchanged afterwards.
        groups: Traced groups.
        candidates: Attributes that could count a group's channels, by the group's name.
        run: Runs the steps of the model once; see `probe_groups`.
        run_otherwise: The same with other random numbers.
        round_to: Kept channels are a multiple of it.

    Returns:
        The groups, with the attributes that were found; those that fail whatever is tried are not prunable.
    """

    def probed(chosen: Sequence[PruningGroup]) -> list[PruningGroup]:
        return probe_groups(model, chosen, run, run_otherwise, round_to)

    found = probed(groups)
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, (group, after) in enumerate(zip(groups, found, strict=True)):
        names = tuple(sorted({count.attribute for count in candidates.get(group.name, ())}))
        if group.prunable and not after.prunable and names:
            alike[names].append(i)
    counted = list(groups)
    for names, members in alike.items():
        left = list(members)
        for chosen in _choices(names):
            for i in (left[0], *left[1:2]):  # where the first has a reason of its own, another may not
                trial = _with_counts(groups[i], candidates[groups[i].name], chosen)
                if probed([trial])[0].prunable and not differs_from_masked(model, trial, run, run_otherwise):
                    for other in left:
                        counted[other] = _with_counts(groups[other], candidates[groups[other].name], chosen)
                    left = [other for other in left if not probed([counted[other]])[0].prunable]
                    break
            if not left:
                break
        for i in left:
            counted[i] = groups[i]
    if not any(group.counts for group in counted):
        return found
    return probed(
        [group if group.counts or after.prunable else after for group, after in zip(counted, found, strict=True)]
    )


def _choices(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    names = names[:_MOST_NAMES]
    for size in (1, 2):
        yield from itertools.combinations(names, size)
    if len(names) > 2:
        yield tuple(names)


def _with_counts(group: PruningGroup, candidates: Sequence[Count], names: Sequence[str]) -> PruningGroup:
    return replace(group, counts=tuple(count for count in candidates if count.attribute in names))
