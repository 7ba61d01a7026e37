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

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from lightning_softprune.graph.components import is_inside
from lightning_softprune.graph.groups import PruningGroup
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
from lightning_softprune.utilities.nested import attribute_at

COSTS = ("params", "macs")
"""What is counted."""

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
    """

    sizes: Mapping[Slot, int]
    tables: Mapping[Slot, tuple[tuple[int, IntArray], ...]]
    parameters: tuple[Term, ...]
    macs: tuple[Term, ...]
    biases: tuple[tuple[Slot, Term], ...] = ()

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
        for slot, tables in self.tables.items():
            lost = sum(int(table[counts[0, group]]) for group, table in tables)
            if self.sizes[slot] and lost >= self.sizes[slot]:
                return slot[0]
        return ""

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
        sizes: dict[Slot, int] = {}
        tables: dict[Slot, list[tuple[int, IntArray]]] = {}
        for number, (group, ranking) in enumerate(zip(groups, rankings, strict=True)):
            place = np.empty(group.num_channels, dtype=np.int64)
            place[ranking] = np.arange(group.num_channels)
            for member in group.members:
                slot = (member.module, member.slot)
                sizes[slot] = len(member.owner)
                owned = member.owner[member.owner >= 0]
                gone = np.bincount(place[owned] + 1, minlength=group.num_channels + 1).cumsum()
                tables.setdefault(slot, []).append((number, gone))
        merged = _merge(list(_parameter_terms(model, sizes, judged)))
        macs = _merge(list(_mac_terms(model, sizes, applications)))
        biases = []
        for name in new_biases:
            layer = model.get_submodule(name)
            layout, geometry = layout_of(layer), geometry_of(layer)
            counts = judged is None or (geometry is not None and f"{name}.{geometry.weight}" in judged)
            if counts and isinstance(layout, Layout) and (name, "in") in sizes:
                out = (name, "out")
                term = Term(1.0, (out,)) if out in sizes else Term(float(layout.slots["out"]), ())
                biases.append(((name, "in"), term))
        return cls(sizes, {slot: tuple(found) for slot, found in tables.items()}, merged, macs, tuple(biases))


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
                follows.setdefault(id(tensor), {})[axis.dim] = ((name, axis.slot), axis.repeat / axis.parts)
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
