"""Costs of a plan: exact parameter and MAC counts, without touching the model.

Every count is a sum of products of slot sizes: a linear layer's weight has ``out * in`` elements and costs
``positions * out * in`` multiply-accumulates. How many indices of a slot a group removes depends, for a fixed ranking,
on the number of removed channels alone. So one table per (slot, group) is enough, and thousands of plans are counted
in one NumPy expression. Counts are taken from the table in `layers.py`, and equal what the physically
pruned model has.

Only parameters that validation uses are counted, see `usage`. MACs are those of linear, convolution and attention
layers, per sample of the batch that was traced; normalisation, activations and biases are not counted, as is usual in
the field.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from lightning_softprune.graph.groups import PruningGroup, crossed_parts
from lightning_softprune.graph.layers import (
    Applications,
    LayerType,
    Layout,
    MacTerm,
    geometry_of,
    layer_type,
    layout_of,
    parts_of_layers,
)
from lightning_softprune.search import StoredCosts, StoredSlot, StoredTerm, compressed
from lightning_softprune.utilities.arrays import IntArray
from lightning_softprune.utilities.hooks import registered
from lightning_softprune.utilities.names import is_inside
from lightning_softprune.utilities.nested import attribute_at

Slot = tuple[str, str]


@dataclass(frozen=True)
class Term:
    """``constant`` times the sizes of ``slots`` (a slot may appear twice)."""

    constant: float
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class CostModel:
    """Counts parameters and MACs of plans of fixed rankings.

    Attributes:
        sizes: Dense size of every slot that a group touches.
        tables: For each of these slots and each group that touches it: indices removed from the slot when the group
            loses 0, 1, ... channels; shape ``(channels + 1,)``.
        parameters: Terms of the parameter count.
        macs: Terms of the MAC count.
        biases: Parameters that come into being with the first channel that a slot loses: (slot, term).
        crossed: Slots in which groups cross -> terms whose sum is the slot's size. They have slots of their own, one
            per member and part, with tables of their own.
    """

    sizes: Mapping[Slot, int]
    tables: Mapping[Slot, tuple[tuple[int, IntArray], ...]]
    parameters: tuple[Term, ...]
    macs: tuple[Term, ...]
    biases: tuple[tuple[Slot, Term], ...] = ()
    crossed: Mapping[Slot, tuple[Term, ...]] = field(default_factory=dict)

    def count(self, what: str, counts: IntArray) -> IntArray:
        """Exact counts, shape ``(n,)``; see :meth:`StoredCosts.count`."""
        return self.stored.count(what, counts)

    @cached_property
    def stored(self) -> StoredCosts:
        """The same in plain types, for files."""
        number = {slot: n for n, slot in enumerate(self.tables)}

        def plain(term: Term, once_smaller: int = -1) -> StoredTerm:
            return StoredTerm(term.constant, tuple(number[slot] for slot in term.slots), once_smaller)

        slots = (
            StoredSlot(
                int(self.sizes[slot]),
                tuple(group for group, _ in tables),
                tuple(compressed(table) for _, table in tables),
            )
            for slot, tables in self.tables.items()
        )
        biases = (plain(term, number[slot]) for slot, term in self.biases)
        return StoredCosts(tuple(slots), (*map(plain, self.parameters), *biases), tuple(map(plain, self.macs)))

    def emptied(self, counts: IntArray) -> str:
        """Name of a layer that has no channels left at one side; empty where all have some.

        Args:
            counts: Channels removed from each group, shape ``(1, m)``.
        """
        left = {
            slot: self.sizes[slot] - sum(int(table[counts[0, group]]) for group, table in tables)
            for slot, tables in self.tables.items()
        }
        for slot, terms in self.crossed.items():
            left[slot] = sum(all(left[part] > 0 for part in term.slots) for term in terms)
            left.update({part: 1 for term in terms for part in term.slots})
        return next((slot[0] for slot, size in left.items() if self.sizes[slot] and size <= 0), "")

    @classmethod
    def build(
        cls,
        model: nn.Module,
        groups: Sequence[PruningGroup],
        rankings: Sequence[IntArray],
        applications: Mapping[str, Applications],
        new_biases: Sequence[str] = (),
        judged: Set[str] | None = None,
    ) -> CostModel:
        """Describe a model's counts.

        Args:
            model: The dense model.
            groups: The prunable groups.
            rankings: The order in which each group's channels go.
            applications: What :func:`record_macs` saw while the model ran.
            new_biases: Linear and convolution layers without a bias that get one when their input is pruned.
            judged: Names of the parameters that count; ``None``: all of them.
        """
        slots = _Slots(groups, rankings)
        sizes = slots.sizes
        merged = _merge(slots.apart(_parameter_terms(model, sizes, judged)))
        macs = _merge(slots.apart(_mac_terms(model, sizes, applications)))
        biases = []
        for name in new_biases:
            layer = model.get_submodule(name)
            layout, geometry = layout_of(layer), geometry_of(layer)
            counts = judged is None or (geometry is not None and f"{name}.{geometry.weight}" in judged)
            if counts and isinstance(layout, Layout) and (name, "in") in sizes:
                out = (name, "out")
                term = Term(1.0, (out,)) if out in sizes else Term(float(layout.slots["out"]), ())
                biases.append(((name, "in"), term))
        tables = {slot: tuple(found) for slot, found in slots.tables.items()}
        return cls(sizes, tables, merged, macs, tuple(biases), slots.crossed)


class _Slots:
    """How much groups remove from slots; see :class:`CostModel`."""

    def __init__(self, groups: Sequence[PruningGroup], rankings: Sequence[IntArray]) -> None:
        self.sizes: dict[Slot, int] = {}
        self.tables: dict[Slot, list[tuple[int, IntArray]]] = {}
        self.crossed: dict[Slot, tuple[Term, ...]] = {}
        places, members = [], defaultdict(list)
        for number, (group, ranking) in enumerate(zip(groups, rankings, strict=True)):
            places.append(np.argsort(ranking))
            for member in group.members:
                members[member.module, member.slot].append((number, member.owner))
        for slot, held in members.items():
            self._add(slot, held, places)
            parts = crossed_parts([owner for _, owner in held])
            if parts:
                self.crossed[slot] = tuple(self._part(slot, n, held, part, places) for n, part in enumerate(parts))

    def _add(self, slot: Slot, held: Sequence[tuple[int, IntArray]], places: Sequence[IntArray]) -> None:
        self.sizes[slot] = len(held[0][1])
        self.tables[slot] = [
            (number, np.bincount(places[number][owner[owner >= 0]] + 1, minlength=len(places[number]) + 1).cumsum())
            for number, owner in held
        ]

    def _part(
        self,
        slot: Slot,
        n: int,
        held: Sequence[tuple[int, IntArray]],
        part: tuple[tuple[int, ...], IntArray],
        places: Sequence[IntArray],
    ) -> Term:
        """Size of a part: what members that cross leave of it is the product of what each alone would leave."""
        crossing, indices = part
        slots = tuple((slot[0], f"{slot[1]} {n}.{member}") for member in crossing)
        for own, member in zip(slots, crossing, strict=True):
            number, owner = held[member]
            self._add(own, [(number, owner[indices])], places)
        return Term(float(len(indices)) ** (1 - len(slots)), slots)

    def apart(self, terms: Iterator[Term]) -> list[Term]:
        """Terms with the sizes of crossed slots written out."""
        return [
            Term(term.constant * np.prod([part.constant for part in parts]), sum((part.slots for part in parts), ()))
            for term in terms
            for parts in itertools.product(*(self.crossed.get(slot, (Term(1.0, (slot,)),)) for slot in term.slots))
        ]


def _merge(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Add up the terms over the same slots."""
    total: dict[tuple[Slot, ...], float] = {}
    for term in terms:
        key = tuple(sorted(term.slots))
        total[key] = total.get(key, 0.0) + term.constant
    return tuple(Term(constant, slots) for slots, constant in total.items() if constant)


def _parameter_terms(model: nn.Module, sizes: Mapping[Slot, int], judged: Set[str] | None) -> Iterator[Term]:
    """One term per parameter that counts, tied ones once."""
    follows: dict[int, dict[int, tuple[Slot, float]]] = {}
    for name, module in model.named_modules():
        layout = layout_of(module)
        for axis in layout.axes if isinstance(layout, Layout) else ():
            tensor = attribute_at(module, axis.tensor)
            if isinstance(tensor, nn.Parameter) and (name, axis.slot) in sizes:
                follows.setdefault(id(tensor), {})[axis.dim] = ((name, axis.slot), axis.repeat * axis.each / axis.parts)
    for name, parameter in model.named_parameters():
        if judged is not None and name not in judged:
            continue
        dims = dict(follows.get(id(parameter), {}))
        for dim in range(parameter.ndim):
            if (name, f"dim{dim}") in sizes:
                dims[dim] = ((name, f"dim{dim}"), 1.0)
        constant = float(np.prod([n for dim, n in enumerate(parameter.shape) if dim not in dims], dtype=np.float64))
        for _, factor in dims.values():
            constant *= factor
        yield Term(constant, tuple(slot for slot, _ in dims.values()))


@contextmanager
def record_macs(model: nn.Module, outside: Collection[str] = ()) -> Iterator[dict[str, Applications]]:
    """Record, while the block runs the model, how often each layer's weights are applied.

    Args:
        model: The model.
        outside: Names of modules that do not count, with all that is in them.
    """
    seen: dict[str, Applications] = {}
    parts = set(parts_of_layers(model))  # counted with the layer

    def hook_for(name: str, entry: LayerType) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entry.observe(module, {**dict(enumerate(args)), **kwargs}, output, seen.setdefault(name, Applications()))

        return hook

    with registered(
        module.register_forward_hook(hook_for(name, entry), with_kwargs=True)
        for name, module in model.named_modules()
        if module not in parts
        and not any(is_inside(name, other) for other in outside)
        and (entry := layer_type(module)) is not None
        and entry.macs(module, Applications())
    ):
        yield seen


def with_macs_recorded(
    model: nn.Module, step: Callable[[], Any], outside: Collection[str] = ()
) -> tuple[Callable[[], Any], dict[str, Applications]]:
    """A step that also records how often each layer's weights are applied, and where: its last run counts.

    Args:
        model: The model.
        step: Runs it.
        outside: Names of modules that do not count, with all that is in them.
    """
    found: dict[str, Applications] = {}

    def run() -> Any:
        with record_macs(model, outside) as seen:
            returned = step()
        found.clear()
        found.update(seen)
        return returned

    return run, found


def _terms_of(module: nn.Module, seen: Applications) -> Iterator[tuple[MacTerm, Mapping[str, int]]]:
    """The terms of a layer's MACs, and the sizes of the slots they speak of."""
    entry = layer_type(module)
    if entry is not None:
        sizes = entry.mac_sizes(module)
        yield from ((term, sizes) for term in entry.macs(module, seen))


def _mac_terms(model: nn.Module, sizes: Mapping[Slot, int], applications: Mapping[str, Applications]) -> Iterator[Term]:
    for name, module in model.named_modules():
        if name not in applications:
            continue
        sliceable = isinstance(layout_of(module), Layout)
        for term, own in _terms_of(module, applications[name]):
            live = tuple((name, slot) for slot in term.slots if sliceable and (name, slot) in sizes)
            fixed = [own[slot] for slot in term.slots if not (sliceable and (name, slot) in sizes)]
            yield Term(term.constant * float(np.prod(fixed, dtype=np.float64)), live)
