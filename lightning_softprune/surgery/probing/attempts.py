"""Attributes that count channels (``num_heads``), found by trying.

A model may write its widths down: as attributes of its modules, or as numbers in these (``sizes["heads"]``), which its
forward puts into a ``view``. A group that fails a probe is probed again with such numbers changed along with its
channels: first one name at a time, in the innermost modules first, then two, then all that could count it. Then those
that no later group may claim are changed apart from those that one does (a layer's ``out_channels`` have the value that
those of the layer behind it have, which counts its own), and those of one kind of module. The first choice with which
the model computes the same as the masked dense network is kept; groups alike (the heads of all blocks) share it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_softprune.graph import Count, PruningGroup
from lightning_softprune.surgery.probing.fingerprints import look_at_dense
from lightning_softprune.surgery.probing.probe import probe_groups, unlike_masked
from lightning_softprune.utilities.names import without_digits

_UNLIKE = (
    "without some of its channels the model computes something else than with them set to zero: their number is used "
    "for more than shapes, as in the scale of attention; keep such a number in an attribute of its own"
)

_MANY = 3
"""From so many blocks alike, one is tried before the others."""

_MOST_NAMES, _MOST_APART = 6, 24
"""More names than that would make more than twenty choices; of attributes of one name apart, as many again."""


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
    counts, chosen_dims = _claimed(groups, candidates.counts), candidates.chosen_dims

    def probed(chosen: Sequence[PruningGroup]) -> list[PruningGroup]:
        return probe_groups(model, chosen, run, run_otherwise, round_to, dense)

    def unlike(chosen: Sequence[PruningGroup]) -> list[PruningGroup]:
        compared = [g for g in chosen if g.name not in candidates.averaged]
        return unlike_masked(model, compared, run, run_otherwise, dense)

    tests = _Tests(probed, unlike)

    def as_masked(found: Sequence[PruningGroup]) -> list[PruningGroup]:
        """The groups; those that run, and not as the masked network does, are refused."""
        sized = [g for g in found if g.prunable and (g.name in chosen_dims or _is_a_pair_of_blocks(g))]
        wrong = {group.name for group in unlike(sized)}
        if not wrong:
            return list(found)
        # others may have run only because these lost channels beside them
        return probed([group.refuse(_UNLIKE) if group.name in wrong else group for group in found])

    groups, found, apart = _probed_by_kind(groups, counts, tests)
    found = as_masked(found)
    counted = _counted(groups, found, counts, tests)
    if apart or any(group.counts != before.counts for group, before in zip(counted, groups, strict=True)):
        found = as_masked(
            probed([g if g.counts or one.prunable else one for g, one in zip(counted, found, strict=True)])
        )
    if any(group.crashed for group in found):
        run()  # where the whole model does not run any more either, that is not the groups' fault
    return _in_steps(counted, found, counts, round_to, tests) if candidates.in_steps else found


def _in_steps(
    groups: Sequence[PruningGroup],
    found: Sequence[PruningGroup],
    counts: _Claims,
    round_to: int,
    tests: _Tests,
) -> list[PruningGroup]:
    """What was found; groups that run with fewer channels by two, four, ... at a time take the smallest such step."""
    failed = [i for i, g in enumerate(groups) if g.prunable and found[i].crashed]
    largest: dict[int, PruningGroup] = {}
    for i in failed:
        steps = [step for step in _STEPS if 2 * math.lcm(step, round_to) <= groups[i].num_channels]
        if steps:
            largest[i] = replace(groups[i], step=steps[-1])

    def running(tried: Mapping[int, PruningGroup]) -> dict[int, PruningGroup]:
        after = dict(zip(tried, tests.probed(list(tried.values())), strict=True)) if tried else {}
        return {i: group for i, group in after.items() if group.prunable and not tests.unlike([group])}

    if largest:  # what fails with these fails with smaller ones
        stepped = list(largest.values())
        stepped = _counted(stepped, tests.probed(stepped), counts, tests)
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


@dataclass(frozen=True)
class _Tests:
    """How groups are tried.

    Attributes:
        probed: The groups as a probe finds them.
        unlike: Those of the groups that do not compute what the masked network does.
    """

    probed: Callable[[Sequence[PruningGroup]], list[PruningGroup]]
    unlike: Callable[[Sequence[PruningGroup]], list[PruningGroup]]

    def are_passed_by(self, group: PruningGroup) -> bool:
        """Whether a group runs, and computes that; which is the cheaper test comes first."""
        return not self.unlike([group]) and self.probed([group])[0].prunable


def _counted(
    groups: Sequence[PruningGroup],
    found: Sequence[PruningGroup],
    counts: _Claims,
    tests: _Tests,
) -> list[PruningGroup]:
    """The groups, those that fail with the attributes they run with, where there are such.

    An attribute counts one group: those that some are found to need are no choice for others that still fail then.
    """
    counted = _counted_at_once(groups, found, counts, tests)
    taken = {(count.module, count.attribute) for group in counted for count in group.counts}
    left = {
        group.name: [one for one in own if (one.count.module, one.count.attribute) not in taken]
        for group, own in ((group, counts.get(group.name, ())) for group in counted if not group.counts)
    }
    left = {name: own for name, own in left.items() if len(own) < len(counts.get(name, ()))}
    return _counted_at_once(counted, found, left, tests) if left else counted


def _counted_at_once(
    groups: Sequence[PruningGroup],
    found: Sequence[PruningGroup],
    counts: _Claims,
    tests: _Tests,
) -> list[PruningGroup]:
    """The same, as far as they do not depend on each other."""
    alike: dict[_Choices, list[int]] = defaultdict(list)
    for i, (group, one) in enumerate(zip(groups, found, strict=True)):
        choices = _choices(counts.get(group.name, ()))
        if group.prunable and not one.prunable and choices:
            alike[choices].append(i)
    counted = list(groups)
    for choices, members in alike.items():
        left = list(members)
        for chosen in choices:
            for i in (left[0], *left[1:2]):  # where the first has a reason of its own, another may not
                trial = _with_counts(groups[i], counts[groups[i].name], chosen)
                if tests.are_passed_by(trial):
                    for other in left:
                        counted[other] = _with_counts(groups[other], counts[groups[other].name], chosen)
                    after = tests.probed([counted[other] for other in left])  # together: they are many blocks alike
                    left = [other for other, tried in zip(left, after, strict=True) if not tried.prunable]
                    break
            if not left:
                break
        for i in left:
            counted[i] = groups[i]
    return counted


def _probed_by_kind(
    groups: Sequence[PruningGroup], counts: _Claims, tests: _Tests
) -> tuple[list[PruningGroup], list[PruningGroup], bool]:
    """The groups with what their kind needs, how they do, and whether some were probed without it, apart."""
    counted = _as_the_first_of_their_kind(groups, counts, tests)
    found = tests.probed(counted)
    failed = [i for i, one in enumerate(found) if counted[i].counts and not one.prunable]
    for i, one in zip(failed, tests.probed([groups[i] for i in failed]) if failed else (), strict=True):
        counted[i], found[i] = groups[i], one
    return counted, found, bool(failed)


def _as_the_first_of_their_kind(groups: Sequence[PruningGroup], counts: _Claims, tests: _Tests) -> list[PruningGroup]:
    """The groups, with those attributes that the first of many blocks alike needs: else each would fail alone first."""
    kinds: dict[object, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        if group.prunable and counts.get(group.name):
            kinds[_kind(group, counts[group.name])].append(i)
    many = [members for members in kinds.values() if len(members) >= _MANY]
    result = list(groups)
    for members, first in zip(many, tests.probed([groups[one] for one, *_ in many]) if many else (), strict=True):
        if first.prunable:
            continue
        lead = groups[members[0]]
        for chosen in _choices(counts[lead.name]):
            trial = _with_counts(lead, counts[lead.name], chosen)
            if tests.are_passed_by(trial):
                for i in members:
                    result[i] = _with_counts(groups[i], counts[groups[i].name], chosen)
                break
    return result


def _kind(group: PruningGroup, claims: Sequence[_Claim]) -> object:
    """What groups of blocks alike have in common: all but the numbers in their names."""
    members = tuple((without_digits(member.module), member.slot, len(member.owner)) for member in group.members)
    found = tuple((without_digits(c.count.module), c.count.attribute, c.count.per_channel, c.is_own) for c in claims)
    return group.num_channels, members, found


@dataclass(frozen=True)
class _Claim:
    """An attribute that could count a group's channels, and whether no later group could be counted by it.

    Attributes:
        count: The attribute.
        is_own: Whether it is this group's, if it is anyone's.
    """

    count: Count
    is_own: bool

    @property
    def name(self) -> str:
        """The attribute's name; a private copy goes with what it is a copy of."""
        return self.count.attribute.lstrip("_")

    @property
    def in_kind(self) -> str:
        """The name, with the kind of module that has it: all but the numbers in its name."""
        return f"{without_digits(self.count.module)}.{self.name}"

    @property
    def on_its_side(self) -> str:
        """The name, and which of the attributes of this name are meant."""
        return f"{self.name}: {'own' if self.is_own else 'shared'}"


_Claims = Mapping[str, Sequence[_Claim]]

_Choices = tuple[tuple[str, ...], ...]
"""What attributes are tried by, together: names, names in a kind of module, names on a side."""


def _claimed(groups: Sequence[PruningGroup], counts: Mapping[str, Sequence[Count]]) -> _Claims:
    last = {(c.module, c.attribute): group.name for group in groups for c in counts.get(group.name, ())}
    return {
        name: [_Claim(c, last.get((c.module, c.attribute)) == name) for c in found] for name, found in counts.items()
    }


def _choices(claims: Sequence[_Claim]) -> _Choices:
    """The attributes that are tried together, in this order."""
    depths: dict[str, int] = {}
    kinds: dict[str, set[str]] = defaultdict(set)
    sides: dict[str, set[str]] = defaultdict(set)
    for claim in claims:
        depth = len(f".{claim.count.module}".rstrip(".").split("."))
        depths[claim.name] = max(depths.get(claim.name, 0), depth)
        kinds[claim.name].add(claim.in_kind)
        sides[claim.name].add(claim.on_its_side)
    names = sorted(depths, key=lambda name: (-depths[name], "[" in name, name))[:_MOST_NAMES]  # numbers in lists last
    everywhere = [chosen for size in (1, 2) for chosen in itertools.combinations(names, size)]
    everywhere += [tuple(names)] if len(names) > 2 else []
    own = [(name, f"{name}: own") for name in names if len(sides[name]) == 2]
    apart: list[tuple[str, ...]] = [(one,) for _, one in own]
    apart += [(one, side) for name, one in own for other in names if other != name for side in sorted(sides[other])]
    apart += [(one,) for name in names if len(kinds[name]) > 1 for one in sorted(kinds[name])]
    return (*everywhere, *apart[:_MOST_APART])


def _with_counts(group: PruningGroup, claims: Sequence[_Claim], chosen: Sequence[str]) -> PruningGroup:
    wanted = [one for one in claims if not {one.name, one.in_kind, one.on_its_side}.isdisjoint(chosen)]
    return replace(group, counts=tuple(one.count for one in wanted))
