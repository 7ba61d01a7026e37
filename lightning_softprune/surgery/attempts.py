"""Attributes that count channels (``num_heads``), found by trying.

A model may write its widths down: as attributes of its modules, which its forward puts into a ``view``. A group that
fails a probe is probed again with such attributes changed along with its channels, first one name at a time, then two,
then all that could count it. The first choice with which the model computes the same as the masked dense network is
kept; groups alike (the heads of all blocks) share it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_softprune.graph import Count, PruningGroup
from lightning_softprune.surgery.fingerprints import look_at_dense
from lightning_softprune.surgery.probe import probe_groups, unlike_masked
from lightning_softprune.utilities.names import without_digits

_UNLIKE = (
    "without some of its channels the model computes something else than with them set to zero: their number is used "
    "for more than shapes, as in the scale of attention; keep such a number in an attribute of its own"
)

_MANY = 3
"""From so many blocks alike, one is tried before the others."""

_MOST_NAMES = 6
"""More attributes than that would make more than twenty choices."""


@dataclass(frozen=True)
class Candidates:
    """What tracing could not be sure of, and a probe has to tell, by the groups' names.

    Attributes:
        counts: Attributes that could count a group's channels.
        averaged: Groups that cannot be compared with a masked network: something averages over their channels.
        chosen_dims: Groups whose channels are one of several dimensions that a reshape has made of them.
        in_steps: Whether groups that do not run with single channels gone are tried with two, four, ... at a time.
    """

    counts: Mapping[str, Sequence[Count]] = field(default_factory=dict)
    chosen_dims: Collection[str] = ()
    averaged: Collection[str] = ()
    in_steps: bool = True


def probe_with_counts(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    candidates: Candidates,
    run: Callable[[], Any],
    run_otherwise: Callable[[], Any] | None = None,
    round_to: int = 1,
) -> list[PruningGroup]:
    """Probe groups; where one fails, look for attributes that count its channels.

    Args:
        model: The model; unchanged afterwards.
        groups: Traced groups.
        candidates: What could be chosen otherwise.
        run: Runs the steps of the model once; see `probe_groups`.
        run_otherwise: The same with other random numbers.
        round_to: Kept channels are a multiple of it.

    Returns:
        The groups, with the attributes that were found; those that fail whatever is tried are not prunable.

    Raises:
        Exception: The user's own, where the whole model fails as well now.
    """
    if not any(group.prunable for group in groups):
        return list(groups)
    dense = look_at_dense(model, run, run_otherwise)
    counts, chosen_dims = candidates.counts, candidates.chosen_dims

    def probed(chosen: Sequence[PruningGroup]) -> list[PruningGroup]:
        return probe_groups(model, chosen, run, run_otherwise, round_to, dense)

    def unlike(chosen: Sequence[PruningGroup]) -> list[PruningGroup]:
        compared = [g for g in chosen if g.name not in candidates.averaged]
        return unlike_masked(model, compared, run, run_otherwise, dense)

    def compared(found: list[PruningGroup]) -> list[PruningGroup]:
        """What was found, without groups that run but are unlike the masked network."""
        sized = [g for g in found if g.prunable and (g.name in chosen_dims or _is_a_pair_of_blocks(g))]
        wrong = {group.name for group in unlike(sized)}
        left = [group.refuse(_UNLIKE) if group.name in wrong else group for group in found]
        return probed(left) if wrong else left  # others may have run only because these lost channels beside them

    groups, found, apart = _probed_by_kind(groups, counts, probed, unlike)
    found = compared(found)
    counted = _counted(groups, found, counts, probed, unlike)
    if apart or any(group.counts != before.counts for group, before in zip(counted, groups, strict=True)):
        chosen = [g if g.counts or one.prunable else one for g, one in zip(counted, found, strict=True)]
        found = compared(probed(chosen))
    if any(group.crashed for group in found):
        run()  # where the whole model does not run any more either, that is not the groups' fault
    return _in_steps(counted, found, counts, round_to, probed, unlike) if candidates.in_steps else found


def _in_steps(
    groups: Sequence[PruningGroup],
    found: Sequence[PruningGroup],
    counts: Mapping[str, Sequence[Count]],
    round_to: int,
    probed: _Probing,
    unlike: _Probing,
) -> list[PruningGroup]:
    """What was found; groups that run with fewer channels by two, four, ... at a time take the smallest such step."""
    failed = [i for i, g in enumerate(groups) if g.prunable and found[i].crashed]
    largest: dict[int, PruningGroup] = {}
    for i in failed:
        steps = [step for step in _STEPS if 2 * math.lcm(step, round_to) <= groups[i].num_channels]
        if steps:
            largest[i] = replace(groups[i], step=steps[-1])

    def running(tried: Mapping[int, PruningGroup]) -> dict[int, PruningGroup]:
        after = dict(zip(tried, probed(list(tried.values())), strict=True)) if tried else {}
        return {i: group for i, group in after.items() if group.prunable and not unlike([group])}

    if largest:  # what fails with these fails with smaller ones
        stepped = list(largest.values())
        stepped = _counted(stepped, probed(stepped), counts, probed, unlike)
        largest = running(dict(zip(largest, stepped, strict=True)))
    result, left = list(found), largest
    for step in _STEPS:
        fits = running({i: replace(group, step=step) for i, group in left.items() if step <= group.step})
        result = [fits.get(i, group) for i, group in enumerate(result)]
        left = {i: group for i, group in left.items() if i not in fits}
    return result


_STEPS = (2, 4, 8, 16)
"""Channels of 16 bytes, in numbers of eight bytes to one."""


def _is_a_pair_of_blocks(group: PruningGroup) -> bool:
    """Whether one channel is left when one goes, and holds several indices, whose order no reordering tests."""
    return group.num_channels == 2 and any((member.owner == 0).sum() > 1 for member in group.members)


_Probing = Callable[[Sequence[PruningGroup]], list[PruningGroup]]


def _counted(
    groups: Sequence[PruningGroup],
    found: Sequence[PruningGroup],
    counts: Mapping[str, Sequence[Count]],
    probed: _Probing,
    unlike: _Probing,
) -> list[PruningGroup]:
    """The groups, those that fail with the attributes they run with, where there are such.

    An attribute counts one group: those that some are found to need are no choice for others that still fail then.
    """
    counted = _counted_at_once(groups, found, counts, probed, unlike)
    taken = {(count.module, count.attribute) for group in counted for count in group.counts}
    left = {
        group.name: tuple(count for count in own if (count.module, count.attribute) not in taken)
        for group, own in ((group, counts.get(group.name, ())) for group in counted if not group.counts)
    }
    left = {name: own for name, own in left.items() if len(own) < len(counts.get(name, ()))}
    return _counted_at_once(counted, found, left, probed, unlike) if left else counted


def _counted_at_once(
    groups: Sequence[PruningGroup],
    found: Sequence[PruningGroup],
    counts: Mapping[str, Sequence[Count]],
    probed: _Probing,
    unlike: _Probing,
) -> list[PruningGroup]:
    """The same, as far as they do not depend on each other."""
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, (group, one) in enumerate(zip(groups, found, strict=True)):
        names = _names(counts.get(group.name, ()))
        if group.prunable and not one.prunable and names:
            alike[names].append(i)
    counted = list(groups)
    for names, members in alike.items():
        left = list(members)
        for chosen in _choices(names):
            for i in (left[0], *left[1:2]):  # where the first has a reason of its own, another may not
                trial = _with_counts(groups[i], counts[groups[i].name], chosen)
                if not unlike([trial]) and probed([trial])[0].prunable:  # the cheaper first
                    for other in left:
                        counted[other] = _with_counts(groups[other], counts[groups[other].name], chosen)
                    after = probed([counted[other] for other in left])  # together: they are many blocks alike
                    left = [other for other, tried in zip(left, after, strict=True) if not tried.prunable]
                    break
            if not left:
                break
        for i in left:
            counted[i] = groups[i]
    return counted


def _probed_by_kind(
    groups: Sequence[PruningGroup], counts: Mapping[str, Sequence[Count]], probed: _Probing, unlike: _Probing
) -> tuple[list[PruningGroup], list[PruningGroup], bool]:
    """The groups with what their kind needs, how they do, and whether some were probed without it, apart."""
    counted = _as_the_first_of_their_kind(groups, counts, probed, unlike)
    found = probed(counted)
    failed = [i for i, one in enumerate(found) if counted[i].counts and not one.prunable]
    for i, one in zip(failed, probed([groups[i] for i in failed]) if failed else (), strict=True):
        counted[i], found[i] = groups[i], one
    return counted, found, bool(failed)


def _as_the_first_of_their_kind(
    groups: Sequence[PruningGroup], counts: Mapping[str, Sequence[Count]], probed: _Probing, unlike: _Probing
) -> list[PruningGroup]:
    """The groups, with those attributes that the first of many blocks alike needs: else each would fail alone first."""
    kinds: dict[object, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        if group.prunable and counts.get(group.name):
            kinds[_kind(group, counts[group.name])].append(i)
    many = [members for members in kinds.values() if len(members) >= _MANY]
    result = list(groups)
    for members, first in zip(many, probed([groups[one] for one, *_ in many]) if many else (), strict=True):
        if first.prunable:
            continue
        lead = groups[members[0]]
        for chosen in _choices(_names(counts[lead.name])):
            trial = _with_counts(lead, counts[lead.name], chosen)
            if not unlike([trial]) and probed([trial])[0].prunable:  # the cheaper first
                for i in members:
                    result[i] = _with_counts(groups[i], counts[groups[i].name], chosen)
                break
    return result


def _kind(group: PruningGroup, counts: Sequence[Count]) -> object:
    """What groups of blocks alike have in common: all but the numbers in their names."""
    members = tuple((without_digits(member.module), member.slot, len(member.owner)) for member in group.members)
    found = tuple((without_digits(count.module), count.attribute, count.per_channel) for count in counts)
    return group.num_channels, members, found


def _names(counts: Sequence[Count]) -> tuple[str, ...]:
    return tuple(sorted({count.attribute for count in counts}))


def _choices(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    names = names[:_MOST_NAMES]
    for size in (1, 2):
        yield from itertools.combinations(names, size)
    if len(names) > 2:
        yield tuple(names)


def _with_counts(group: PruningGroup, candidates: Sequence[Count], names: Sequence[str]) -> PruningGroup:
    return replace(group, counts=tuple(count for count in candidates if count.attribute in names))
