"""Readings of what was traced: alternatives that are tried where groups do not work.

These are other dimensions of a reshape; and groups of one width together, which code that gives the output of one the
shape of another couples without a trace (``y.view(x.shape)``). With these may go what takes tensors that were made to
fit (``layer(torch.zeros(len(x), x.shape[-1]))``). Steps of several channels are tried last: they probe most often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_softprune.graph import Grouping, Place, PruningGroup, groups_of_one_width

Read = Callable[[Mapping[str, int], Sequence[tuple[Place, Place]], bool], tuple[list[PruningGroup], Grouping]]
"""From choices of dimensions, by reshape, places that are coupled, and whether to try steps: the groups, probed."""

_MOST_READINGS = 3  # ways to take a reshape that are tried where the first does not work


def best_reading(read: Read) -> list[PruningGroup]:
    """The groups, with alternatives tried where what was taken first does not work.

    Args:
        read: Makes groups of what was traced, and probes them.
    """
    best = _Reading({}, *read({}, (), False))
    hopeful: _Reading | None = None
    for attempt in range(1, _MOST_READINGS):
        splits = best.grouping.splits
        working = {site for g in best.groups if _is_fine(g) for site in splits.get(g.name, ())}
        failing = {
            site: attempt
            for g in best.groups
            if not _is_fine(g)
            for site, alternatives in splits.get(g.name, {}).items()
            if site not in working and attempt < alternatives
        }
        if not failing:
            break
        choices = {**best.choices, **failing}
        found = _Reading(choices, *read(choices, (), False))
        if _reached(found.groups) > _reached(best.groups):
            best, hopeful = found, None
        elif _reached(found.groups) == _reached(best.groups) and _left(found.groups) > _left(best.groups):
            hopeful = hopeful or found
    groups = _with_others(read, best)
    together = _with_others(read, hopeful, steps=False) if hopeful else groups
    return together if _reached(together) > _reached(groups) else groups


@dataclass(frozen=True)
class _Reading:
    """Choices of dimensions, and the groups that they lead to."""

    choices: Mapping[str, int]
    groups: list[PruningGroup]
    grouping: Grouping


def _with_others(read: Read, reading: _Reading, steps: bool = True) -> list[PruningGroup]:
    """The groups of a reading, those that fail in the user's code together with others, or in steps."""
    best = reading.groups
    stuck = [g for g in best if g.crashed]
    together, along = groups_of_one_width(stuck), groups_of_one_width(stuck, reading.grouping.loose)
    coupled = [united for united in (together, along if along != together else ()) if united]
    tries = [(united, False) for united in coupled] + [(united, True) for united in ((), *coupled) if steps]
    for united, in_steps in tries:
        if not any(g.crashed for g in best):
            break
        found, _ = read(reading.choices, united, in_steps)
        if _reached(found) > _reached(best):
            best = found
    return best


def _is_fine(group: PruningGroup) -> bool:
    """Whether single channels of a group can go."""
    return group.prunable and group.step == 1


def _left(groups: Sequence[PruningGroup]) -> int:
    """How many slots of layers are in groups that fail in the user's code: these may go with others, or in steps."""
    return len(set().union(*(group.slots() for group in groups if group.crashed)))


def _reached(groups: Sequence[PruningGroup]) -> tuple[int, int]:
    """How many slots of layers can lose single channels, and how many anything."""
    fine = set().union(*(group.slots() for group in groups if _is_fine(group)))
    return len(fine), len(fine.union(*(group.slots() for group in groups if group.prunable)))
