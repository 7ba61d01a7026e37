"""Costs of a plan: exact parameter and MAC counts, without touching the model.

Every count is a sum of products of slot sizes: a linear layer's weight has ``out * in`` elements and costs
``positions * out * in`` multiply-accumulates. How many indices of a slot a group removes depends, for a fixed ranking,
on the number of removed channels alone. So one table per (slot, group) is enough, and thousands of plans are counted
in one NumPy expression. Counts are taken from :mod:`~lightning_softprune.layers`, and equal what the physically
pruned model has.

MACs are those of linear, convolution and attention layers, per sample of the batch that was traced; normalisation,
activations and biases are not counted, as is the field's habit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.graph.groups import PruningGroup
from lightning_softprune.graph.layers import Layout, layout_of
from lightning_softprune.utilities.arrays import FloatArray, IntArray

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
        """Count plans.

        Args:
            what: ``"params"`` or ``"macs"``.
            counts: Channels removed from each group, shape ``(n, m)``.

        Returns:
            Exact counts, shape ``(n,)``.
        """
        counts = np.atleast_2d(np.asarray(counts, dtype=np.int64))
        kept: dict[Slot, FloatArray] = {}
        for slot, tables in self.tables.items():
            left = np.full(len(counts), float(self.sizes[slot]))
            for group, table in tables:
                left -= table[counts[:, group]]
            kept[slot] = left

        def value(term: Term) -> FloatArray:
            product = np.full(len(counts), term.constant)
            for slot in term.slots:
                product *= kept[slot]
            return product

        total = np.zeros(len(counts))
        for term in self.parameters if what == "params" else self.macs:
            total += value(term)
        for slot, term in self.biases if what == "params" else ():
            total += np.where(kept[slot] < self.sizes[slot], value(term), 0.0)
        return np.rint(total).astype(np.int64)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        groups: Sequence[PruningGroup],
        rankings: Sequence[IntArray],
        positions: Mapping[str, Positions],
        new_biases: Sequence[str] = (),
    ) -> CostModel:
        """Describe a model's counts.

        Args:
            model: The dense model.
            groups: The prunable groups.
            rankings: The order in which each group's channels go.
            positions: What :func:`record_macs` saw while the model ran.
            new_biases: Linear and convolution layers without a bias that get one when their input is pruned.
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
        merged = _merge(list(_parameter_terms(model, sizes)))
        macs = _merge(list(_mac_terms(model, sizes, positions)))
        biases = []
        for name in new_biases:
            layout = layout_of(model.get_submodule(name))
            if isinstance(layout, Layout) and (name, "in") in sizes:
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


def _parameter_terms(model: nn.Module, sizes: Mapping[Slot, int]) -> Iterator[Term]:
    """One term per parameter, tied ones once."""
    follows: dict[int, dict[int, tuple[Slot, float]]] = {}
    for name, module in model.named_modules():
        layout = layout_of(module)
        for axis in layout.axes if isinstance(layout, Layout) else ():
            tensor = _parameter(module, axis.tensor)
            if tensor is not None and (name, axis.slot) in sizes:
                follows.setdefault(id(tensor), {})[axis.dim] = ((name, axis.slot), axis.repeat / axis.parts)
    for name, parameter in model.named_parameters():
        dims = dict(follows.get(id(parameter), {}))
        for dim in range(parameter.ndim):
            if (name, f"dim{dim}") in sizes:
                dims[dim] = ((name, f"dim{dim}"), 1.0)
        constant = float(np.prod([n for dim, n in enumerate(parameter.shape) if dim not in dims], dtype=np.float64))
        for _, factor in dims.values():
            constant *= factor
        yield Term(constant, tuple(slot for slot, _ in dims.values()))


def _parameter(module: nn.Module, path: str) -> nn.Parameter | None:
    for part in path.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module if isinstance(module, nn.Parameter) else None


def count_parameters(model: nn.Module) -> int:
    """Elements of ``model.parameters()``: tied weights once, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass
class Positions:
    """How often a layer's kernel was applied while the model ran.

    Attributes:
        applied: Rows of a linear layer, output positions times kernel size of a convolution (input positions of a
            transposed one), query positions of attention.
        keys: For attention, key positions.
        pairs: For attention, query-key pairs.
    """

    applied: float = 0.0
    keys: float = 0.0
    pairs: float = 0.0


@contextmanager
def record_macs(model: nn.Module) -> Iterator[dict[str, Positions]]:
    """Record, while the block runs the model, how often each layer's kernel is applied."""
    seen: dict[str, Positions] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            place = seen.setdefault(name, Positions())
            if isinstance(module, nn.MultiheadAttention):
                query = args[0] if args else kwargs["query"]
                key = args[1] if len(args) > 1 else kwargs["key"]
                rows, length = query.numel() / query.shape[-1], key.numel() / key.shape[-1]
                batch = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
                place.applied += rows
                place.keys += length
                place.pairs += rows * length / batch
            elif isinstance(module, _ConvTransposeNd):
                source = args[0] if args else kwargs["input"]
                place.applied += source.numel() / module.in_channels * float(np.prod(module.kernel_size))
            elif isinstance(module, _ConvNd):
                place.applied += output.numel() / module.out_channels * float(np.prod(module.kernel_size))
            elif isinstance(module, nn.Linear):
                place.applied += output.numel() / module.out_features

        return hook

    handles = [
        module.register_forward_hook(hook_for(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def count_macs(model: nn.Module, positions: Mapping[str, Positions], samples: float = 1.0) -> int:
    """MACs of a model whose run was recorded, per sample, from its layers' own attributes."""
    modules = dict(model.named_modules())
    return int(np.rint(sum(_layer_macs(modules[name], seen) for name, seen in positions.items()) / samples))


def _layer_macs(module: nn.Module, seen: Positions) -> float:
    if isinstance(module, nn.MultiheadAttention):
        width: int = module.embed_dim
        return 2 * (seen.applied + seen.keys) * width**2 + 2 * seen.pairs * width
    if isinstance(module, _ConvNd):
        return seen.applied * module.in_channels * module.out_channels / module.groups
    if isinstance(module, nn.Linear):
        return seen.applied * module.in_features * module.out_features
    return 0.0


def _mac_terms(model: nn.Module, sizes: Mapping[Slot, int], positions: Mapping[str, Positions]) -> Iterator[Term]:
    for name, module in model.named_modules():
        seen = positions.get(name)
        if seen is None:
            continue
        layout = layout_of(module)
        if not isinstance(layout, Layout):
            yield Term(_layer_macs(module, seen), ())
            continue

        def term(constant: float, *slots: str, name: str = name, layout: Layout = layout) -> Term:
            live = tuple((name, slot) for slot in slots if (name, slot) in sizes)
            fixed = [layout.slots[slot] for slot in slots if (name, slot) not in sizes]
            return Term(constant * float(np.prod(fixed, dtype=np.float64)), live)

        if isinstance(module, nn.MultiheadAttention):
            yield term(2 * seen.applied + 2 * seen.keys, "both", "both")  # queries and output; keys and values
            yield term(2 * seen.pairs, "both")  # scores, and the weighted sum of the values
        elif "both" in layout.slots:
            if isinstance(module, _ConvNd):
                yield term(seen.applied, "both")
        elif isinstance(module, _ConvNd):
            yield term(seen.applied / module.groups, "in", "out")
        else:
            yield term(seen.applied, "in", "out")
