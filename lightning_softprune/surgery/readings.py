"""Readings of what was traced: alternatives that are tried where groups do not work.

These are other dimensions of a reshape; and groups of one width together, which code that gives the output of one the
shape of another couples without a trace (``y.view(x.shape)``). With these may go what takes tensors that were made to
fit (``layer(torch.zeros(len(x), x.shape[-1]))``). Steps of several channels are tried last: they probe most often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_softprune.graph import Grouping, Place, PruningGroup, groups_of_one_width

Read = Callable[[Mapping[str, int], Sequence[tuple[Place, Place]], bool], tuple[list[PruningGroup], Grouping]]
"""From choices of dimensions, by reshape, places that are coupled, and whether to try steps: the groups, probed."""

_MOST_READINGS = 3  # ways to take a reshape that are tried where the first does not work
_MOST_APART = 4  # reshapes that are taken otherwise one at a time, after all of them together


def best_reading(read: Read) -> list[PruningGroup]:
    """The groups, with alternatives tried where what was taken first does not work.

    Args:
        read: Makes groups of what was traced, and probes them.
    """
    best, grouping = read({}, (), False)
    choices: dict[str, int] = {}
    for attempt in range(1, _MOST_READINGS):
        failing = _failing(best, grouping, attempt)
        if not failing:
            break
        refused = list(_failing([g for g in best if not g.crashed], grouping, attempt))
        apart = [{site: attempt} for site in refused[:_MOST_APART]] if len(failing) > 1 else []
        for tried in (failing, *apart):  # of two reshapes whose results meet, one may be right
            if not tried.keys() <= _failing(best, grouping, attempt).keys():
                continue
            found, other = read({**choices, **tried}, (), False)
            if _reached(found) > _reached(best):
                best, grouping, choices = found, other, {**choices, **tried}
    stuck = [g for g in best if g.crashed]
    together, along = groups_of_one_width(stuck), groups_of_one_width(stuck, grouping.loose)
    coupled = [united for united in (together, along if along != together else ()) if united]
    otherwise = {**choices, **_failing(stuck, grouping, 1)}
    tries = (
        *((choices, united, False) for united in coupled),
        *((otherwise, united, False) for united in coupled if otherwise != choices),
        *((choices, united, True) for united in ((), *coupled)),
    )
    for chosen, united, in_steps in tries:
        if not any(g.crashed for g in best):
            break
        found, _ = read(chosen, united, in_steps)
        if _reached(found) > _reached(best):
            best = found
    return best


def _failing(groups: Sequence[PruningGroup], grouping: Grouping, attempt: int) -> dict[str, int]:
    """The reshapes that no working group goes through and some other does, each with the alternative to try next."""
    working = {site for g in groups if _is_fine(g) for site in grouping.splits.get(g.name, ())}
    return {
        site: attempt
        for g in groups
        if not _is_fine(g)
        for site, alternatives in grouping.splits.get(g.name, {}).items()
        if site not in working and attempt < alternatives
    }


def _is_fine(group: PruningGroup) -> bool:
    """Whether single channels of a group can go."""
    return group.prunable and group.step == 1


def _reached(groups: Sequence[PruningGroup]) -> tuple[int, int]:
    """How many slots of layers can lose single channels, and how many anything."""
    fine = set().union(*(group.slots() for group in groups if _is_fine(group)))
    return len(fine), len(fine.union(*(group.slots() for group in groups if group.prunable)))
