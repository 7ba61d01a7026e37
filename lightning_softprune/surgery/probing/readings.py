"""Readings of what was traced: alternatives that are tried where groups do not work.

These are other dimensions of a reshape, first where groups do not work, then also where those beside them do; and
groups of one width together, which code that gives the output of one the shape of another couples without a trace
(``y.view(x.shape)``), also with other dimensions of theirs. With these may go what takes tensors that were made to fit
(``layer(torch.zeros(len(x), x.shape[-1]))``), and all parts of a fused layer's outputs, where the code takes each for
as wide (``fused(x).split(2 * [x.shape[-1]], -1)``). Then steps of several channels are tried, which probe most often,
and last such groups of one width as an alternative has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    otherwise: list[_Reading] = []  # the alternatives that are no better
    for beside in (False, True):
        for attempt in range(1, _MOST_READINGS):
            others = _other_dimensions(best, grouping, attempt, beside)
            if not others:
                break
            apart = [] if beside or len(others) == 1 else _refused(best, grouping, attempt)[:_MOST_APART]
            for some in (others, *({site: attempt} for site in apart)):  # where results of two meet, one may be right
                tried = {**choices, **some}
                left = _other_dimensions(best, grouping, attempt, beside)
                if not some.keys() <= left.keys() or tried in [choices, *(reading.choices for reading in otherwise)]:
                    continue
                found, other = read(tried, (), False)
                if _reached(found) > _reached(best):
                    best, grouping, choices = found, other, tried
                else:
                    otherwise.append(_Reading(found, other, tried))
    first = _Reading(best, grouping, choices)
    more = [one for one in otherwise if one.crashes() > first.crashes()]  # they have couplings of their own
    stuck = {**choices, **_other_dimensions([g for g in best if g.crashed], grouping, 1, beside=False)}
    couplings = first.couplings()
    tries = [(choices, united, False) for united in couplings]
    tries += [(stuck, united, False) for united in couplings if stuck != choices]
    tries += [(choices, united, True) for united in ([], *couplings)]
    tries += [(reading.choices, united, False) for reading in more[:1] for united in reading.couplings()]
    for tried, united, in_steps in tries:
        if not any(g.crashed for g in best):
            break
        found, _ = read(tried, united, in_steps)
        if _reached(found) > _reached(best):
            best = found
    return best


@dataclass(frozen=True)
class _Reading:
    """The groups of some choices of dimensions."""

    groups: list[PruningGroup]
    grouping: Grouping
    choices: dict[str, int]

    def crashes(self) -> int:
        """How many groups the code does not run without channels of."""
        return sum(group.crashed for group in self.groups)

    def couplings(self) -> list[list[tuple[Place, Place]]]:
        """What such groups may go together with: each other, then what is made to fit too, and all parts of each."""
        stuck = [group for group in self.groups if group.crashed]
        found: list[list[tuple[Place, Place]]] = [[]]
        for united in (
            groups_of_one_width(stuck),
            groups_of_one_width(stuck, self.grouping.loose),
            groups_of_one_width(stuck, in_parts=True),
        ):
            found += [united] if united not in found else []
        return found[1:]


def _other_dimensions(groups: Sequence[PruningGroup], grouping: Grouping, attempt: int, beside: bool) -> dict[str, int]:
    """An alternative for the reshapes that groups which do not work went through, and none that works.

    Args:
        groups: As they were probed.
        grouping: What was probed.
        attempt: Which alternative.
        beside: Whether groups that work are read otherwise too, where they lie in the modules of those that do not and
            are no outputs: heads, where what reads their mean would keep its width.
    """
    failing = [g for g in groups if not _is_fine(g)]
    working = [g for g in groups if _is_fine(g)]
    if beside:
        owners = set().union(*(_owners(group) for group in failing if group.name not in grouping.given))
        failing += [group for group in working if not owners.isdisjoint(_owners(group))]
        working = []
    kept = {site for g in working for site in grouping.splits.get(g.name, ())}
    sites = {site: n for g in failing for site, n in grouping.splits.get(g.name, {}).items() if site not in kept}
    return {site: attempt for site, alternatives in sites.items() if attempt < alternatives}


def _refused(groups: Sequence[PruningGroup], grouping: Grouping, attempt: int) -> list[str]:
    """The reshapes of groups that do not work though the code runs: of the others, one alone does no better."""
    return list(_other_dimensions([g for g in groups if not g.crashed], grouping, attempt, beside=False))


def _owners(group: PruningGroup) -> set[str]:
    """The modules that hold a group's layers and tensors themselves."""
    return {member.module.rpartition(".")[0] for member in group.members}


def _is_fine(group: PruningGroup) -> bool:
    """Whether single channels of a group can go."""
    return group.prunable and group.step == 1


def _reached(groups: Sequence[PruningGroup]) -> tuple[int, int]:
    """How many slots of layers can lose single channels, and how many anything."""
    fine = set().union(*(group.slots() for group in groups if _is_fine(group)))
    return len(fine), len(fine.union(*(group.slots() for group in groups if group.prunable)))
