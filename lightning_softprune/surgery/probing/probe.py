"""The groups that the graph takes for prunable and the code does not, found by trying.

A *probe* lets groups lose some of their channels and runs the model twice: once with the kept channels in their order,
and once with them in another one, everywhere alike. Both are the same network. So whatever the model computes, returns
and logs has to be the same; where it is not, something reads channels by their position (a feature with a meaning of
its own, a flip, a shuffle, a slice), and what would be removed from a reader is not what its producer loses. Where
masking the dense network is defined, this asks for the same as a comparison with it; and it is also right where removed
channels are missed rightly, by a mean or a norm over the channels.

Groups are probed together, each with a pattern of its own, and apart where something fails.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.graph import (
    BY_NUMBER,
    Layout,
    Member,
    PruningGroup,
    computed_of,
    layer_type,
    layout_of,
    tensor_at,
)
from lightning_softprune.search import Plan
from lightning_softprune.surgery.apply import Surgery, apply_plan, counts_after, select_channels
from lightning_softprune.surgery.probing.fingerprints import Dense, Seen, is_alike, look_at, look_at_dense
from lightning_softprune.utilities.arrays import IntArray
from lightning_softprune.utilities.ownership import frames_of, is_users_frame, line_of

_AS_MASKED = 2e-5
"""Zeros in a sum change no more than rounding."""

_LONGEST = 80
"""Of an exception's message, in a reason."""

_HINT = "if a size is written down: write -1, take the tensor's shape, or an integer attribute"

_EMPTY = re.compile(r"\(0\)|\b0x\d|\dx0\b")
"""A size of zero in an exception's message: a slice by numbers lies beyond the channels that are left."""

_NARROW = 3
"""Patterns of a group that remove as little as can be: the first channels, the last, those between."""


def probe_groups(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    run: Callable[[], Any],
    run_otherwise: Callable[[], Any] | None = None,
    round_to: int = 1,
    dense: Dense | None = None,
) -> list[PruningGroup]:
    """Find the groups that the graph takes for prunable and the code does not.

    Each prunable group loses its first, its last and a middle channel, then about a quarter and half of them. A
    constant in a ``view``, an addition to the raw input or an assumption about the width shows now, not in the middle
    of a search. A group that runs with single channels gone, but at some larger widths not, stays prunable: its trials
    will tell.

    Args:
        model: The model; unchanged afterwards.
        groups: Traced groups.
        run: Runs the steps of the model once, always with the same random numbers; they are known to run on the dense
            model. What it returns (nested data, the parts of a dictionary with their names) is compared too.
        run_otherwise: The same with other random numbers: what depends on them is not compared.
        round_to: Kept channels are a multiple of it.
        dense: What these runs compute on the model as it is, where that is known already.

    Returns:
        The groups; those that fail are not prunable and carry the error's first line, or what changed, as their reason.
    """
    if not any(group.prunable for group in groups):
        return list(groups)
    probe = _Probe(model, groups, run, dense or look_at_dense(model, run, run_otherwise))
    numbers = [i for i, group in enumerate(groups) if group.prunable]
    earlier: Counter[int] = Counter()  # groups of the same width
    patterns = {}
    for i in numbers:
        width = groups[i].num_channels
        patterns[i] = _patterns(width, math.lcm(round_to, groups[i].step), groups[i].least, more=earlier[width])
        earlier[width] += 1
    problems: dict[int, _Problem] = {}
    crashes: dict[int, list[_Problem]] = {i: [] for i in numbers}
    most = max((len(found) for found in patterns.values()), default=0)
    for turn in range(most + 1):  # in the last one nothing goes, and all change places
        cuts = {}
        for position, i in enumerate(numbers):
            if i in problems or not patterns[i]:
                continue
            # of groups of one width, each loses others at a time, and then so many: a coupling of channels that the
            # graph missed, or one of widths, does not fit then
            narrow = min(_NARROW, len(patterns[i]))
            place = (turn + position) % narrow if turn < narrow else turn
            cuts[i] = () if turn == most else patterns[i][min(place, len(patterns[i]) - 1)]
        for i, problem in probe.problems(cuts).items():
            if problem.crashed and turn >= _NARROW:
                crashes[i].append(problem)
            else:
                problems[i] = problem
    for i, found in crashes.items():
        if found and len(found) == most - _NARROW:
            problems.setdefault(i, found[0])
    return [problems[i].refuse(group) if i in problems else group for i, group in enumerate(groups)]


def one_can_go(model: nn.Module, groups: Sequence[PruningGroup], number: int, run: Callable[[], Any]) -> bool:
    """Whether the model runs with so many channels of some prunable group gone.

    Args:
        model: The model; unchanged afterwards.
        groups: Traced groups.
        number: How many channels.
        run: Runs the steps of the model once.
    """
    for group in groups:
        if not group.prunable or group.num_channels - number < max(group.least, 1):
            continue
        surgery = apply_plan(model, [group], Plan((tuple(range(number)),)))
        try:
            run()
            return True
        except Exception:  # the user's code, which does not take this width
            continue
        finally:
            surgery.undo()
    return False


def unlike_masked(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    run: Callable[[], Any],
    run_otherwise: Callable[[], Any] | None = None,
    dense: Dense | None = None,
) -> list[PruningGroup]:
    """The groups without half of whose channels the model computes something else than with them set to zero.

    That is so where a number that counts channels is used for more than shapes (the scale of attention). Groups that a
    layer averages over (LayerNorm) cannot be compared, and are not among them.
    """
    modules = dict(model.named_modules())

    def is_comparable(group: PruningGroup) -> bool:
        entries = [layer_type(modules[member.module]) for member in group.members if member.module in modules]
        return not any(entry is not None and entry.averages_channels for entry in entries)

    compared = [group for group in groups if is_comparable(group)]
    if not compared:
        return []
    probe = _Probe(model, compared, run, dense or look_at_dense(model, run, run_otherwise))
    cuts = {i: _every_second(group) for i, group in enumerate(compared)}
    return [compared[i] for i in _unlike_masked(model, probe, cuts)]


def _every_second(group: PruningGroup) -> tuple[int, ...]:
    """Half of a group's channels, or so many less that what stays is a multiple of its step."""
    half = tuple(range(0, group.num_channels, 2))[: group.num_channels - 1]
    return half[: len(half) - (len(half) - group.num_channels) % group.step]


def _unlike_masked(model: nn.Module, probe: _Probe, cuts: Mapping[int, tuple[int, ...]]) -> list[int]:
    """Numbers of the groups that differ: looked for together, then apart."""
    if probe.is_as_masked(cuts):
        return []
    if len(cuts) == 1:
        return list(cuts)
    items = list(cuts.items())
    half = len(items) // 2
    return [*_unlike_masked(model, probe, dict(items[:half])), *_unlike_masked(model, probe, dict(items[half:]))]


@contextmanager
def mask_channels(
    model: nn.Module, group: PruningGroup, channels: Sequence[int], *, buffers: bool = True
) -> Iterator[None]:
    """While this lasts, everything that produces or reads these channels of a group is zero.

    Args:
        model: The model.
        group: A group of it.
        channels: Its channels.
        buffers: Whether that goes for tensors that are no parameters as well: a table of distances is divided by.
    """
    modules = dict(model.named_modules())
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for member in group.members:
            gone = torch.from_numpy(np.flatnonzero(np.isin(member.owner, list(channels))))
            for tensor, dim, indices in _held(modules, member, gone):
                if not buffers and not isinstance(tensor, nn.Parameter):
                    continue
                saved.append((tensor, tensor.detach().clone()))
                with torch.no_grad():
                    tensor.index_fill_(dim, indices.to(tensor.device), 0)
            _mask_computed(modules.get(member.module), member, gone, saved)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in reversed(saved):
                tensor.copy_(values)


def _mask_computed(
    layer: nn.Module | None, member: Member, gone: torch.Tensor, saved: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Let a layer compute a weight with zeros in the place of what is gone; what it was computed from is saved."""
    computed = None if layer is None else computed_of(layer)
    layout = None if layer is None else layout_of(layer)
    if layer is None or computed is None or not isinstance(layout, Layout):
        return
    weight = computed.value(layer).clone()
    for source in computed.sources(weight.ndim):
        tensor = tensor_at(layer, source)
        if tensor is not None:
            saved.append((tensor, tensor.detach().clone()))
    for axis in layout.axes:
        if axis.slot == member.slot and axis.tensor == computed.direction:
            weight.index_fill_(axis.dim, axis.expand(gone, len(member.owner)).to(weight.device), 0)
    computed.write(layer, weight)


def _held(
    modules: Mapping[str, nn.Module], member: Member, gone: torch.Tensor
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """The tensors that follow a member's slot, with the dimension and the indices of what is gone."""
    module = modules.get(member.module)
    layout = None if module is None else layout_of(module)
    if module is None or not isinstance(layout, Layout):
        owner, _, attribute = member.module.rpartition(".")
        found = getattr(modules[owner], attribute, None)
        if isinstance(found, torch.Tensor) and (found.is_floating_point() or found.is_complex()):
            yield found, int(member.slot.removeprefix("dim")), gone
        return
    computed = computed_of(module)
    sources = () if computed is None else computed.sources(0)
    for axis in layout.axes:
        tensor = None if axis.tensor in sources else tensor_at(module, axis.tensor)
        if axis.slot == member.slot and tensor is not None and axis.tensor not in ("running_var",):
            yield tensor, axis.dim, axis.expand(gone, len(member.owner))


def _patterns(channels: int, round_to: int, stay: int = 1, more: int = 0) -> list[tuple[int, ...]]:
    """Which channels go, pattern by pattern: first the narrow ones, then wide ones, in which so many steps more go."""
    least = channels % round_to or round_to
    if channels - least < round_to:
        return []  # left whole whatever happens
    middle = (channels - least) // 2
    found = [tuple(range(start, start + least)) for start in (0, channels - least, middle)]
    more = more % max(channels // 4 // round_to, 2) * round_to
    for share in (4, 2):
        count = channels - (channels - channels // share - more) // round_to * round_to
        if least < count <= channels - max(round_to, stay):
            found.append(tuple(int(n) for n in np.linspace(0, channels - 1, count).round()))
    return found


@dataclass(frozen=True)
class _Problem:
    """Why a group cannot be pruned, and whether the model raised an exception."""

    reason: str
    crashed: bool

    def refuse(self, group: PruningGroup) -> PruningGroup:
        """The group as not prunable."""
        return group.refuse(self.reason, crashed=self.crashed)


class _Probe:
    """Runs a model with channels gone and out of order, and compares."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[PruningGroup],
        run: Callable[[], Any],
        dense: Dense,
    ) -> None:
        self.model, self.groups, self.run = model, groups, run
        self.rng = np.random.default_rng(0)
        self.looked, self.dense, self.steady = dense, dense.seen, dense.steady

    def problems(self, cuts: Mapping[int, tuple[int, ...]]) -> dict[int, _Problem]:
        """What is wrong with groups that lose these channels: looked for together, then apart."""
        if not cuts:
            return {}
        problem = self._problem(cuts)
        if problem is None:
            return {}
        if len(cuts) == 1:
            return dict.fromkeys(cuts, problem)
        items = list(cuts.items())
        half = len(items) // 2
        return self.problems(dict(items[:half])) | self.problems(dict(items[half:]))

    def _problem(self, cuts: Mapping[int, tuple[int, ...]]) -> _Problem | None:
        """What is wrong with this cut of some groups; ``None`` if nothing is."""
        try:
            ordered = self._look_at(cuts, shuffled=False) if any(cuts.values()) else self.dense
            shuffled = self._look_at(cuts, shuffled=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's code says to fewer channels is the reason
            return _Problem(self._reason_of(error), True)
        own = {member.module for i in cuts for member in self.groups[i].members if not member.slot.startswith("in")}
        words = (
            "its channels are reordered, or told apart by their number, on the way to {}",
            "its channels are told apart by their number: {} depends on their order",
            "its channels are told apart by their number: what {} returns depends on their order",
        )
        for steady, word, (one, tolerance), (two, _) in zip(
            self.steady, words, ordered.parts(), shuffled.parts(), strict=True
        ):
            for name in one:
                same = is_alike(one[name], two.get(name, []), tolerance)
                if word is words[0] and not same:  # channels beside the positions change places with these
                    same = name in own or is_alike(ordered.sums[name], shuffled.sums.get(name, []), tolerance)
                if name in steady and not same and not (word is not words[1] and self._wavers(name)):
                    return _Problem(f"{word.format(name or 'the module')}; {BY_NUMBER}", False)
        return None

    def _wavers(self, name: str) -> bool:
        """Whether rounding alone changes what a module computes; what the run shows may be the same."""
        return name in self.looked.wavering(self.model, self.run)

    def _reason_of(self, error: Exception) -> str:
        """What the model said to fewer channels, where, and what would help."""
        line = (str(error).splitlines() or [""])[0]
        shown = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."
        names = {id(module): name for name, module in self.model.named_modules()}
        module = place = ""
        for frame, number in frames_of(error.__traceback__):
            module = names.get(id(frame.f_locals.get("self")), module)
            place = line_of(frame, number) if is_users_frame(frame) else place
        where = " in ".join(filter(None, (place, module)))
        found = f"the model does not run with fewer channels: {type(error).__name__}: {shown}"
        beyond = isinstance(error, IndexError) or _EMPTY.search(line) is not None
        hint = BY_NUMBER if beyond else _HINT
        return f"{found} ({where}); {hint}" if where else f"{found}; {hint}"

    def is_as_masked(self, cuts: Mapping[int, tuple[int, ...]]) -> bool:
        """Whether the model without these channels computes what it does with them set to zero."""
        try:
            pruned = self._look_at(cuts, shuffled=False)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever the user's code says to fewer channels
            return False
        own = {member.module for i in cuts for member in self.groups[i].members if not member.slot.startswith("in")}
        if self._is_alike(pruned, self._masked(cuts, buffers=True), own):
            return True
        return self._have_tables(cuts) and self._is_alike(pruned, self._masked(cuts, buffers=False), own)

    def _have_tables(self, cuts: Mapping[int, tuple[int, ...]]) -> bool:
        """Whether some groups have tensors that are no layer's and no parameters."""
        names = {member.module for i in cuts for member in self.groups[i].members if member.slot.startswith("dim")}
        return not names <= {name for name, _ in self.model.named_parameters()}

    def _masked(self, cuts: Mapping[int, tuple[int, ...]], buffers: bool) -> Seen | None:
        """What the model computes with these channels set to zero; `None` where its code does not take that."""
        with ExitStack() as stack:
            for i, channels in cuts.items():
                stack.enter_context(mask_channels(self.model, self.groups[i], channels, buffers=buffers))
            try:
                return look_at(self.model, self.run)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the user's code, which may say so where a loss is not a number
                return None

    def _is_alike(self, pruned: Seen, masked: Seen | None, own: Set[str]) -> bool:
        """Whether layers that mix channels compute the same, but for those that lose some, and what is shown is too."""
        if masked is None:
            return False
        for steady, (one, _), (two, _) in zip(self.steady[:2], pruned.parts(), masked.parts(), strict=False):
            for name in one:
                same = name in own or is_alike(one[name], two.get(name, []), _AS_MASKED)
                if name in steady and not same:
                    return False
        return True

    def _look_at(self, cuts: Mapping[int, tuple[int, ...]], *, shuffled: bool) -> Seen:
        surgery = _rearrange(self.model, {i: self.groups[i] for i in cuts}, cuts, self.rng if shuffled else None)
        try:
            return look_at(self.model, self.run)
        finally:
            surgery.undo()


def _rearrange(
    model: nn.Module,
    groups: Mapping[int, PruningGroup],
    cuts: Mapping[int, tuple[int, ...]],
    rng: np.random.Generator | None,
) -> Surgery:
    """Remove channels of some groups, and let the others change places in all members, if there is a generator.

    Only channels that hold the same number of indices in every member can take each other's place.
    """
    content: dict[tuple[str, str], IntArray] = {}
    gone: dict[tuple[str, str], IntArray] = {}
    for i, group in groups.items():
        kept = np.setdiff1d(np.arange(group.num_channels), cuts[i])
        place = np.arange(group.num_channels)
        if rng is not None:
            shape = np.stack([np.bincount(m.owner[m.owner >= 0], minlength=group.num_channels) for m in group.members])
            for kind in np.unique(shape[:, kept], axis=1).T:
                alike = kept[(shape[:, kept] == kind[:, None]).all(axis=0)]
                place[alike] = _deranged(alike, rng)
        going = np.zeros(group.num_channels, dtype=bool)
        going[list(cuts[i])] = True
        for member in group.members:
            slot = (member.module, member.slot)
            moved = content.setdefault(slot, np.arange(len(member.owner)))
            lost = gone.setdefault(slot, np.zeros(len(member.owner), dtype=bool))
            held = np.flatnonzero(member.owner >= 0)
            order = held[np.argsort(member.owner[held], kind="stable")]
            channels = member.owner[order]
            starts = np.searchsorted(channels, np.arange(group.num_channels))
            step = np.arange(len(moved))
            step[order] = order[starts[place[channels]] + np.arange(len(order)) - starts[channels]]
            content[slot] = moved[step]  # one after another: groups may cross in a slot
            lost[held] |= going[member.owner[held]]
    selected: dict[str, dict[str, torch.Tensor]] = {}
    for (module, side), moved in content.items():
        selected.setdefault(module, {})[side] = torch.from_numpy(moved[~gone[module, side]])
    counts = counts_after(model, list(groups.values()), [len(cuts[i]) for i in groups])
    return select_channels(model, selected, {place: len(moved) for place, moved in content.items()}, counts)


def _deranged(items: IntArray, rng: np.random.Generator) -> IntArray:
    """The items in another order, none in its place: one random cycle through all of them."""
    cycle = rng.permutation(len(items))
    result: IntArray = items.copy()
    result[cycle] = items[np.roll(cycle, -1)]
    return result
