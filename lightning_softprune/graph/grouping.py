"""Every group of a model, found by running it.

A *group* is a set of coupled slots (see `layers`) together with its *channels*: the smallest sets of indices that can
go at once. It starts at a slot that produces channels, and takes in all that they are united with (`flow`). A group one
of whose channels is pinned is not prunable, for the pin's reason. Whatever is not seen here (a ``view`` with a
constant, a width that is written down) is found later by a probe: remove some channels, run, undo.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from lightning_softprune.graph.components import match_modules, self_and_parents
from lightning_softprune.graph.flow import CROSSED, Couplings, Pin
from lightning_softprune.graph.groups import Count, Member, PruningGroup, crossed_parts, is_even
from lightning_softprune.graph.layers import layer_type, linked_parts
from lightning_softprune.graph.left_out import left_alone
from lightning_softprune.graph.trace import Step, Trace, trace_model
from lightning_softprune.utilities.arrays import IntArray
from lightning_softprune.utilities.names import is_inside
from lightning_softprune.utilities.nested import integers_in

Place = tuple[str, str]
"""Layer or tensor, and slot."""

_BEHIND = "put a layer behind it, which keeps its width, to prune what shares its channels:"

_OF_EVERY_MODULE = vars(nn.Module()).keys()

_MOST_NAMES = 3
"""So many layers are named in a reason."""

_LONELY = "meet places whose size is fixed, as those of a padding or an input; put a layer between them to prune it"


_WHOLE = "let it read all of it, or put a layer behind the product, to prune what it is made of"


_TOGETHER = "have to go together, as what they are laid out with meets another width; put a layer between to prune them"


@dataclass(frozen=True)
class Grouping:
    """The groups of one way to read a trace.

    Attributes:
        groups: In the order in which the model runs them; then what is in no group.
        splits: Name of a group -> places in the code at which its channels were laid out over several dimensions, and
            how many alternatives each has.
        chosen: Names of the groups of which such a choice may have been wrong.
        averaged: Names of the groups over whose channels something is computed that misses those that go.
        counts: Name of a group -> integer attributes of modules that may count its channels.
        loose: Slots of layers that read nothing of a known width (`torch.zeros`), and their sizes.
        given: Names of the groups that are outputs of the network.
    """

    groups: list[PruningGroup]
    splits: dict[str, dict[str, int]]
    counts: dict[str, tuple[Count, ...]]
    averaged: set[str]
    chosen: set[str]
    loose: dict[Place, int]
    given: set[str] = field(default_factory=set)


def trace_groups(
    model: nn.Module, steps: Sequence[Step], ignore: Sequence[str] = (), outside: Mapping[str, str] | None = None
) -> list[PruningGroup]:
    """Find every group of a model by running it.

    Args:
        model: The model; its layers are run by ``steps`` under grad mode, and are not changed.
        steps: Functions that run the model (its ``validation_step`` on a batch, ...). What they return counts as read.
        ignore: Patterns of modules that must keep their outputs and inputs.
        outside: Modules that are to be left alone with all that is in them -> why.

    Returns:
        The groups in the order in which the model runs them; after them, one entry per layer or bare parameter that
        is in no group, with the reason. Components are not assigned yet.

    Raises:
        ValueError: A pattern of ``ignore`` matches nothing.
    """
    match_modules(model, ignore, "ignore")
    return groups_of(trace_model(model, steps, outside), ignore).groups


def groups_of(
    trace: Trace,
    ignore: Sequence[str] = (),
    choices: Mapping[str, int] | None = None,
    united: Sequence[tuple[Place, Place]] = (),
    twins: Collection[str] = (),
) -> Grouping:
    """Sort what a trace tells into groups.

    Args:
        trace: The trace.
        ignore: Patterns of modules that must keep their outputs and inputs.
        choices: Place in the code -> which alternative is tried there.
        united: Pairs of slots of one size that are to lose the same of it.
        twins: Modules that only follow others: no group is named after what is in them that another layer leads too.

    Raises:
        ValueError: A pattern of ``ignore`` matches nothing.
    """
    ignored = {n: p for p, names in match_modules(trace.model, ignore, "ignore").items() for n in names}
    couplings = trace.couplings(choices)
    for one, other in united:
        couplings.unite(couplings.slot(*one, 0), couplings.slot(*other, 0))
    table = _Table(trace, couplings)
    groups: list[PruningGroup] = []
    classes: list[IntArray] = []
    seen: set[tuple[str, str]] = set()
    for name, slot, label in _roots(trace, table, twins):
        if (name, slot) in seen:
            continue
        found = table.classes_of(name, slot)
        if slot.startswith("dim") and (found == -1).all():
            continue
        if (found == -1).all() and len(found) and table.is_crossed(name, slot):
            continue
        members = table.members(found)
        if slot.startswith("dim") and len(members) < 2:
            continue
        members = members or (Member(name, slot, found),)
        built = replace(_build(label, table, found, members, ignored), outputs=table.outputs(np.unique(found)))
        seen |= built.slots()
        if not built.prunable and {member.module.rpartition(".")[0] for member in members} <= trace.reasons.keys():
            continue  # tensors of layers that cannot be looked into: it is said of these
        groups.append(built)
        classes.append(np.unique(found[found >= 0]))
    named = _unique_names(_even(groups))
    splits = {g.name: table.splits(own) for g, own in zip(named, classes, strict=True)}
    counts = {g.name: table.counts(g, own) for g, own in zip(named, classes, strict=True)}
    alone = left_alone(trace.model, named, trace, {name for name, _ in table.keys}, table.reason_of)
    averaged = {g.name for g, own in zip(named, classes, strict=True) if table.is_averaged(own)}
    chosen = {g.name for g, own in zip(named, classes, strict=True) if table.is_chosen(own)}
    given = {g.name for g, own in zip(named, classes, strict=True) if table.is_given(own)}
    return Grouping([*named, *alone], splits, counts, averaged, chosen, table.loose(), given)


def with_outputs_of(step: Step | None, name: str, groups: Sequence[PruningGroup], trace: Trace) -> list[PruningGroup]:
    """The groups, with what another step than those that were traced gives of their channels.

    Args:
        step: Runs the model; `None`: there is none.
        name: The step's name.
        groups: The groups of the trace.
        trace: The trace.
    """
    given, result = [] if step is None else trace.given_by(step), []
    for group in groups:
        owners = {(member.module, member.slot): member.owner for member in group.members if group.num_channels}
        widths = {w: None for place, held, w in given if place in owners and (owners[place][held] >= 0).any()}
        result.append(replace(group, outputs=(*group.outputs, *((name, width) for width in widths))))
    return result


def groups_of_one_width(
    failing: Sequence[PruningGroup], loose: Mapping[Place, int] | None = None, *, in_parts: bool = False
) -> list[tuple[Place, Place]]:
    """Slots of groups that do not run alone, and that have one size: each with that of the group with most members.

    Args:
        failing: The groups.
        loose: Slots that are in no group, and their sizes: they go along with groups of their size.
        in_parts: Whether all parts of a group that have this size go together, as those of a fused layer's outputs.
    """
    united: list[tuple[Place, Place]] = []
    done: set[str] = set()
    for lead in sorted(failing, key=lambda g: -len(g.members)):
        if lead.name in done:
            continue
        widths = {
            len(member.owner): (member.module, member.slot) for member in lead.members if (member.owner >= 0).all()
        }
        for other in failing:
            places = [m for m in other.members if len(m.owner) in widths and (m.owner >= 0).all()]
            if other.name != lead.name and other.name not in done and places:
                chosen = _apart(places) if in_parts else places[:1]
                united += [(widths[len(place.owner)], (place.module, place.slot)) for place in chosen]
                done.add(other.name)
        united += [(widths[size], place) for place, size in (loose or {}).items() if size in widths and size > 1]
        loose = {place: size for place, size in (loose or {}).items() if size not in widths}
        done.add(lead.name)
    return united


def _apart(members: Sequence[Member]) -> list[Member]:
    """Members of a group, one for each part of its channels."""
    found: list[Member] = []
    for member in members:
        if not any(np.isin(member.owner, other.owner).any() for other in found):
            found.append(member)
    return found


def _roots(trace: Trace, table: _Table, twins: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Slots that produce channels, and the name of the group that starts there: layers first, in order, twins last."""
    slots: dict[str, list[tuple[str, str, str]]] = defaultdict(list)  # by layer, or by the module that holds them
    parameters = dict(trace.model.named_parameters())
    parts = {part for _, _, part, _ in linked_parts(trace.model)}  # groups are named after the layer
    for name, slot in table.couplings.slots:
        if name in trace.layouts:
            entry = layer_type(trace.model.get_submodule(name))
            made = not slot.startswith("both") or (entry is not None and entry.produces)
            if made and not slot.startswith("in") and name not in parts:
                slots[name].append((name, slot, name if slot in ("out", "both") else f"{name}.{slot}"))
        elif name in parameters:
            owner = name.rpartition(".")[0]
            slots[owner].append((name, slot, owner or name))
    owners = dict.fromkeys([*trace.tape.order, *slots])
    for owner in sorted(owners, key=lambda owner: any(is_inside(owner, twin) for twin in twins)):
        yield from slots[owner]


class _Table:
    """Atoms by class, and the slots that they lie in."""

    def __init__(self, trace: Trace, couplings: Couplings) -> None:
        self.trace, self.couplings = trace, couplings
        self.all = couplings.classes()
        self.crossed = couplings.crossed.by_class(self.all)
        crossings = [
            (factor, number, place) for number, found in self.crossed.items() for place, factor in enumerate(found)
        ]
        self._crossings = np.array(crossings, dtype=np.int64).reshape(-1, 3)
        self.keys = list(couplings.slots)
        self.starts = np.array([first for first, _ in couplings.slots.values()], dtype=np.int64)
        self.order = np.argsort(self.all, kind="stable")
        self.bounds = np.searchsorted(self.all[self.order], np.arange(self.all.max(initial=-1) + 2))
        self._averaged = set(self._apart(np.concatenate([np.zeros(0, np.int64), *couplings.averaged])))
        self._shown = set(self._apart(np.concatenate([np.zeros(0, np.int64), *couplings.shown])))
        self._modules = dict(trace.model.named_modules())
        # looked up by class: there are as many of them as there are reshapes in the model
        self._splits: dict[int, dict[str, int]] = defaultdict(dict)
        self._chosen: set[int] = set()
        for split in couplings.splits:
            for number in self._apart(split.atoms):
                self._splits[number][split.site] = len(split.sizes)
                if split.compared:
                    self._chosen.add(number)
        self._extents: dict[int, list[tuple[IntArray, str]]] = defaultdict(list)
        for atoms, module in {(id(atoms), module): (atoms, module) for atoms, module in couplings.extents}.values():
            if len(atoms) and (atoms >= 0).all():
                found = self.all[atoms]
                self._extents[int(found[0])].append((found, module))
        self._outputs: dict[int, dict[tuple[str, int], None]] = defaultdict(dict)
        for module, atoms in couplings.returned:
            for number in self._apart(atoms):
                self._outputs[number][module, len(atoms)] = None
        self.soft: set[int] = set()
        self.pins: dict[int, Pin] = {}
        for pin in couplings.pins:
            for number in self._apart(pin.atoms):
                if not pin.whole:
                    self.soft.add(number)
                elif pin.output or number not in self.pins:
                    self.pins[number] = pin

    def _apart(self, atoms: IntArray) -> list[int]:
        """The classes of atoms; of crossed ones, those of their factors."""
        numbers = np.unique(self.all[atoms[atoms >= 0]]).tolist()
        found = dict.fromkeys(factor for number in numbers for factor in self.crossed.get(number, (number,)))
        return [number for number in found if number >= 0]

    def classes_of(self, name: str, slot: str) -> IntArray:
        """The class of each index of a slot; -1 for those that have a fixed place, and for crossed ones."""
        first, size = self.couplings.slots[name, slot]
        found: IntArray = self.all[first : first + size].copy()
        numbers = np.unique(found).tolist()
        kept = [n for n in numbers if n in self.crossed or (n in self.soft and n not in self.pins)]
        found[np.isin(found, kept)] = -1
        return found

    def members(self, found: IntArray) -> tuple[Member, ...]:
        """The slots that hold the atoms of some classes; a group's channel number for each class.

        A slot whose indices go with several channels each, one for each factor, is a member as often.
        """
        numbers = list(dict.fromkeys(found[found >= 0].tolist()))
        channel_of = np.full(len(self.bounds), -1, dtype=np.int64)
        channel_of[numbers] = np.arange(len(numbers))
        factors, crossed, factor = self._crossings[channel_of[self._crossings[:, 0]] >= 0].T
        classes = np.concatenate([np.array(numbers, dtype=np.int64), crossed])
        channels = np.concatenate([np.arange(len(numbers)), channel_of[factors]])
        factor = np.concatenate([np.zeros(len(numbers), dtype=np.int64), factor])
        sizes = self.bounds[classes + 1] - self.bounds[classes]
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        atoms = self.order[np.repeat(self.bounds[classes], sizes) + inside]
        channels, factor = np.repeat(channels, sizes), np.repeat(factor, sizes)
        slots = np.searchsorted(self.starts, atoms, side="right") - 1
        members = []
        for slot, place in np.unique(np.stack([slots, factor]), axis=1).T.tolist():
            key, held = self.keys[slot], (slots == slot) & (factor == place)
            if key[1] != CROSSED:
                owner = np.full(self.couplings.slots[key][1], -1, dtype=np.int64)
                owner[atoms[held] - self.starts[slot]] = channels[held]
                members.append(Member(key[0], key[1], owner))
        return tuple(members)

    def reason_of(self, name: str) -> str:
        """Why a layer or tensor has pinned atoms; empty where it has none."""
        for other, slot in self.keys:
            if other == name:
                for number in np.unique(self.classes_of(other, slot)):
                    if int(number) in self.pins:
                        return self.pins[int(number)].reason
        return ""

    def is_crossed(self, name: str, slot: str) -> bool:
        """Whether indices of a slot go with those of other slots alone."""
        first, size = self.couplings.slots[name, slot]
        return any(number in self.crossed for number in self.all[first : first + size].tolist())

    def loose(self) -> dict[Place, int]:
        """Slots of layers, with their sizes, that take what meets no other slot and has no place of its own."""
        found = {}
        for (name, slot), (first, size) in self.couplings.slots.items():
            own = self.all[first : first + size]
            alone = (self.bounds[own + 1] - self.bounds[own] == 1).all()
            if slot.startswith("in") and name in self.trace.layouts and alone and self.pins.keys().isdisjoint(own):
                found[name, slot] = size
        return found

    def splits(self, own: IntArray) -> dict[str, int]:
        """Places in the code at which these classes were laid out over several dimensions -> alternatives."""
        return {site: sizes for number in own.tolist() for site, sizes in self._splits.get(number, {}).items()}

    def outputs(self, own: IntArray) -> tuple[tuple[str, int], ...]:
        """Modules that give these classes, and the width of what they give."""
        return tuple(dict.fromkeys(output for number in own.tolist() for output in self._outputs.get(number, ())))

    def is_averaged(self, own: IntArray) -> bool:
        """Whether something is computed over these classes that misses those that go."""
        return not self._averaged.isdisjoint(own.tolist())

    def is_chosen(self, own: IntArray) -> bool:
        """Whether which dimension carries these classes, or what they are shares of, was a choice."""
        return not self._chosen.isdisjoint(own.tolist())

    def is_given(self, own: IntArray) -> bool:
        """Whether some of these classes are an output of the network, or shown by it."""
        outputs = {number for number in own.tolist() if number in self.pins and self.pins[number].output}
        return bool(outputs) or not self._shown.isdisjoint(own.tolist())

    def counts(self, group: PruningGroup, own: IntArray) -> tuple[Count, ...]:
        """Integer attributes that may count these classes, of modules that lay them out or hold members."""
        sizes = {group.num_channels: 1} if group.num_channels else {}  # also of heads that the batch was multiplied by
        modules = {parent for member in group.members for parent in ["", *self_and_parents(member.module)[:-1]]}
        slots = [self.couplings.slots[key] for key in group.slots()]
        extents = [(self.all[first : first + size], "") for first, size in slots]
        for found, module in (*extents, *(extent for number in own.tolist() for extent in self._extents[number])):
            if not len(found) or not np.isin(found, own).all():
                continue
            modules.add(module)
            if group.num_channels and len(found) % group.num_channels == 0:
                sizes.setdefault(len(found), len(found) // group.num_channels)
        return tuple(
            Count(module, key, sizes[value])
            for module in sorted(modules & self._modules.keys() - self.trace.layouts.keys())
            for key, kept in vars(self._modules[module]).items()
            for key, value in (integers_in(key, kept) if key not in _OF_EVERY_MODULE else ())
            if value in sizes
        )


def _build(
    name: str, table: _Table, found: IntArray, members: tuple[Member, ...], ignored: Mapping[str, str]
) -> PruningGroup:
    numbers = list(dict.fromkeys(found[found >= 0].tolist()))
    pinned = [table.pins[number] for number in numbers if number in table.pins]
    first = min(pinned, key=lambda pin: not pin.output, default=None)
    reason = "" if first is None else first.reason
    if 0 < len(pinned) < len(numbers):
        said, semicolon, hint = reason.partition("; ")
        reason = f"{said} ({len(pinned)} of its {len(numbers)} channels){semicolon}{hint}"
    if not reason and len(numbers) < 2:
        reason = f"all of its {len(found)} channels {_TOGETHER if numbers else _LONELY}"
        reason = "it has a single channel" if len(found) == 1 else reason
    if not len(found):
        reason = "it has no channels"
    producers = {member.module for member in members if member.slot == "out"}
    if first is not None and first.output and len(pinned) == len(numbers) and len(producers) > 1:
        reason = f"{reason}; {_BEHIND} {', '.join(sorted(producers - {first.output})[:_MOST_NAMES])}"
    for member in members:
        for hit in self_and_parents(member.module):
            if hit in ignored:
                reason = f"ignored: {member.module} matches {ignored[hit]!r}"
    least, needy = max(((_least(table.trace, m, len(numbers)), m.module) for m in members), default=(1, name))
    if not reason and least >= len(numbers):
        reason = f"{needy} needs all of its {len(numbers)} channels"
    return PruningGroup(name, "", "intra", len(numbers), members, not reason, reason, least=least)


def _even(groups: Sequence[PruningGroup]) -> list[PruningGroup]:
    """The groups; those that cross in a part of a slot are refused if it is not all of an outer product."""
    held: dict[Place, list[tuple[int, IntArray]]] = defaultdict(list)
    for number, group in enumerate(groups):
        for member in group.members:
            held[member.module, member.slot].append((number, member.owner))
    result = list(groups)
    for (module, _), found in held.items():
        for crossing, indices in crossed_parts([owner for _, owner in found]) if len(found) > 1 else ():
            if len(crossing) > 1 and not is_even([found[place][1][indices] for place in crossing]):
                for number in {found[place][0] for place in crossing if result[found[place][0]].prunable}:
                    result[number] = result[number].refuse(f"{module} reads a part of an outer product; {_WHOLE}")
    return result


def _least(trace: Trace, member: Member, channels: int) -> int:
    """How many channels have to stay so that enough of a slot does, whichever they are."""
    layout = trace.layouts.get(member.module)
    wanted = 1 if layout is None else layout.least.get(member.slot, 1)
    if wanted == 1:
        return 1
    held = np.sort(np.bincount(member.owner[member.owner >= 0], minlength=channels)).cumsum()
    held += int((member.owner < 0).sum())
    return min(int(np.searchsorted(held, wanted)) + 1, channels)


def _unique_names(groups: Sequence[PruningGroup]) -> list[PruningGroup]:
    """One producer may lead two groups (disjoint channels); number them."""
    count: dict[str, int] = defaultdict(int)
    named = []
    for one in groups:
        count[one.name] += 1
        named.append(replace(one, name=f"{one.name}#{count[one.name]}") if count[one.name] > 1 else one)
    return named
