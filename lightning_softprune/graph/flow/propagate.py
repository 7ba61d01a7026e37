"""From a tape to couplings: labels are carried through all operations.

A tensor that a step computes and drops pins nothing, though its layers shrink with what they read. What leaves the
steps pins its atoms, and so do layers that no later layer reads: they produce the network's outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from lightning_softprune.graph.flow import (
    rules_of_numbers,
    rules_of_products,
    rules_of_shape,
    rules_of_windows,  # noqa: F401 - it enters its rules
)
from lightning_softprune.graph.flow.contracted import Outputs
from lightning_softprune.graph.flow.labels import FIXED, FREE, Couplings, Label, Labels, is_atoms
from lightning_softprune.graph.flow.rules import FIXED_WIDTH, IN_FRONT, OWN_CODE, RULES, dim_of, unknown
from lightning_softprune.graph.flow.tape import Operation, Tape, Value, named_tensors
from lightning_softprune.graph.layers import Layout, TensorAxis, layer_type, layout_of, tensor_at
from lightning_softprune.utilities.arrays import IntArray
from lightning_softprune.utilities.names import joined

_PRODUCTS = rules_of_products.__name__
_RESHAPED = {"view", "_unsafe_view", "detach", "alias", "permute", "transpose", "t", "expand", "unsqueeze", "clone"}
_HEADS = ("head", "group", "expert")
_VIEWS = {"select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk", "diagonal", "unfold"}
"""Operators that look at a part of a tensor, and compute nothing."""

_ALLOCATE = ("empty", "new_", "zeros", "ones", "full")
"""How the names of operators begin that make tensors for others to fill."""

_PARTS = {"slice", "narrow", "select"}
"""Those of them through which tensors are filled."""


@dataclass
class Flow:
    """Labels of all values of a tape, and what couples their atoms.

    Attributes:
        model: The model.
        tape: What it computed.
        layouts: Its layers, by name.
        reasons: Modules that cannot be looked into -> why.
        choices: Split -> which alternative is tried.
        couplings: What has been found.
    """

    model: nn.Module
    tape: Tape
    layouts: Mapping[str, Layout]
    reasons: Mapping[str, str]
    choices: Mapping[str, int] = field(default_factory=dict)
    couplings: Couplings = field(default_factory=Couplings)

    def __post_init__(self) -> None:
        self._labels: dict[int, Labels] = {}
        self._needed: set[int] | None = None  # aliases that something shown depends on; None: of all, or not known yet
        self._makers = {v.number: o for o in self.tape.operations for v in o.outputs if v is not None}
        self._readers: dict[int, list[Operation]] = defaultdict(list)  # of what they take first
        for operation in self.tape.operations:
            for value in operation.inputs[:1]:
                self._readers[value.number].append(operation)
        self._modules = dict(self.model.named_modules())
        self._slots: dict[tuple[str, str], IntArray] = {}
        self._parts: dict[int, tuple[Value, int, bool]] = {}  # of what, along which dimension, and whether that is gone
        self._filled: set[int] = set()  # tensors into parts of which something was written
        self._owned: dict[int, list[tuple[str, TensorAxis]]] = defaultdict(list)
        for name, layout in self.layouts.items():
            for axis in layout.axes:
                tensor = tensor_at(self._modules[name], axis.tensor)
                if tensor is not None:
                    self._owned[id(tensor)].append((name, axis))
        self._tensors = dict(named_tensors(self.model))
        self._weights = self._made_of_sources()
        for owners in self._owned.values():
            self._tie(owners)
        for name in self._tensors:
            for label in self._labels_of_source(name) if (refused := self._refused(name)) else ():
                self.couplings.pin(label, self.reasons[refused])
        for layer in (name for name in self.layouts if name in self.tape.apart):
            for slot in self.layouts[layer].slots:
                self.couplings.pin(self.atoms(layer, slot), f"{layer} {self.tape.apart[layer]} to prune it")

    # ------------------------------------------------------------------------------------------------------- labels

    def shape(self, value: Value) -> tuple[int, ...]:
        """A value's shape."""
        return self.tape.shapes[value.number]

    def is_read(self, value: Value) -> bool:
        """Whether something shown depends on a value, as far as is known; not on others that were made with it."""
        return self._needed is None or self.tape.aliases[value.number] in self._needed

    def describe(self, value: Value) -> str:
        """A tensor in words: its name or what made it, and its shape."""
        shape = self.shape(value)
        value = self._origin(value)
        maker = self._makers.get(value.number)
        name = self.tape.sources.get(value.number, "an input" if maker is None else "")
        if maker is not None:
            made = f"the output of {maker.layer}" if maker.layer else f"what {maker.name} gives"
            name = f"{made} {maker.site}" if not maker.layer else made
        return f"{name} of shape {shape}"

    def labels(self, value: Value) -> Labels:
        """The labels of a value's dimensions."""
        known = self._labels.get(value.number)
        if known is None:
            source = self.tape.sources.get(value.number)
            if source is not None:
                known = self._labels_of_source(source)
            else:
                known = [FREE if value.number in self.tape.fresh or n == 1 else FIXED for n in self.shape(value)]
            self._labels[value.number] = known
        custom = self.tape.custom.get(value.number)
        if custom is not None and not self._is_seen(value):
            said = f"goes through {custom}, an autograd function of the model's own that fills it unseen; {OWN_CODE}"
            for label in known:
                self.couplings.pin(label, said)
        return known

    def _is_seen(self, value: Value) -> bool:
        """Whether a tensor is what operators have computed or written, and no memory that other code has filled."""
        maker = self._makers.get(value.number)
        computed = maker is not None and bool(maker.inputs) and not maker.name.startswith(_ALLOCATE)
        return computed or value.number in self._filled

    def is_parameter(self, value: Value) -> bool:
        """Whether it is a parameter, or looks at one."""
        name = self.tape.sources.get(self._origin(value).number, "")
        return isinstance(self._tensors.get(name), nn.Parameter)

    def _origin(self, value: Value) -> Value:
        """What a tensor was before it was laid out otherwise."""
        maker = self._makers.get(value.number)
        while maker is not None and maker.name in _RESHAPED:
            value = maker.inputs[0]
            maker = self._makers.get(value.number)
        return value

    def atoms(self, layer: str, slot: str) -> IntArray:
        """The atoms of a layer's slot; equal parts of it lose the same channels."""
        if (layer, slot) not in self._slots:
            layout = self.layouts[layer]
            size, parts = layout.slots[slot], layout.parts.get(slot, 1)
            found = self._slots[layer, slot] = self.couplings.slot(layer, slot, size)
            run = layout.runs.get(slot, 1)
            if parts > 1:
                rules_of_shape.alike(self, found, size // parts)
            if run > 1:
                self.couplings.unite(found, np.repeat(found[::run], run))
                self.couplings.extents.append((found[::run], layer))
        return self._slots[layer, slot]

    def _labels_of_source(self, name: str) -> Labels:
        tensor = self._tensors[name]
        owners = self._owned.get(id(tensor))
        if not owners:
            return [
                FREE if size == 1 else self.couplings.slot(name, f"dim{dim}", size)
                for dim, size in enumerate(tensor.shape)
            ]
        labels: Labels = [FREE if size == 1 else FIXED for size in tensor.shape]
        for layer, axis in owners:
            labels[axis.dim] = self._along(layer, axis)
        return labels

    def _refused(self, name: str) -> str:
        """The layer that a tensor is of, if that is a layer which cannot be sliced; else nothing."""
        owners = [name[:place] for place, sign in enumerate(name) if sign == "."]
        return next(
            (one for one in owners if one in self.reasons and isinstance(layout_of(self._modules[one]), str)), ""
        )

    def _along(self, layer: str, axis: TensorAxis) -> IntArray:
        atoms = self.atoms(layer, axis.slot)
        if axis.parts > 1:
            return atoms[: len(atoms) // axis.parts]
        return _copied(atoms, axis.repeat, axis.each)

    def _tie(self, owners: Sequence[tuple[str, TensorAxis]]) -> None:
        """Layers that share a tensor lose the same of it."""
        by_dim: dict[int, tuple[str, TensorAxis]] = {}
        if len({layer for layer, _ in owners}) < 2:
            return
        for layer, axis in owners:
            first = by_dim.setdefault(axis.dim, (layer, axis))
            if first != (layer, axis):
                self.couplings.unite(self._along(*first), self._along(layer, axis))
        sided = defaultdict(set)
        for layer, axis in owners:
            sided[layer].add(axis.dim)
        for dim, (layer, axis) in by_dim.items():
            others = [other for other, dims in sided.items() if dim not in dims]
            if others:
                along = self._along(layer, axis)
                said = f"{layer} shares its {axis.tensor} with {others[0]}, which needs all {len(along)} of it"
                self.couplings.pin(along, f"{said}; give each a tensor of its own to prune them apart")

    def of_the_layer(self, operation: Operation, size: int) -> Label:
        """The channels of the layer whose code runs an operation, if it has one slot of this size; else free."""
        layout = self.layouts.get(operation.site.module)
        return self.atoms(operation.site.module, "both") if layout and layout.slots == {"both": size} else FREE

    def hint(self, operation: Operation, sizes: Sequence[int]) -> int | None:
        """Which of some dimensions the modules around count as heads."""
        name = operation.site.module
        for module in (name, name.rpartition(".")[0]):
            found = vars(self._modules[module]) if module in self._modules else {}
            counts = {v for k, v in found.items() if type(v) is int and any(word in k for word in _HEADS)}
            counts -= {v for k, v in found.items() if type(v) is int and ("dim" in k or "size" in k)}
            places = [place for place, size in enumerate(sizes) if size in counts]
            if places:
                return places[-1] if len(sizes) > 2 and len(places) > 1 else places[0]
        return None

    def taken_apart(self, value: Value) -> set[int]:
        """The dimensions whose indices are taken one by one further on, as those of queries, keys and values are."""
        rank = len(self.shape(value))
        found: set[int] = set()
        for operation in self._readers[value.number]:
            if operation.name in ("unbind", "select"):
                found.add(dim_of(operation, rank))
            elif operation.name in ("permute", "transpose"):
                dims = list(range(rank))
                if operation.name == "permute":
                    dims = [int(dim) for dim in operation.arguments["dims"]]
                else:
                    one, other = (int(operation.arguments[name]) for name in ("dim0", "dim1"))
                    dims[one], dims[other] = dims[other], dims[one]
                found |= {dims[dim] % rank for dim in self.taken_apart(operation.result)}
        return found

    # -------------------------------------------------------------------------------------------------- propagation

    def run(self) -> Couplings:
        """Carry the labels through all operations; those that nothing shown depends on couple, and pin nothing."""
        live, feeding, storing = self._live()
        ends = Outputs(self)
        for number, operation in enumerate(self.tape.operations):
            alive, feeds, stores = live[number], feeding[number], storing[number]
            contracted = len(self.couplings.contracted)
            # of what a backward pass makes inside of torch.func nobody sees what it depends on
            self.couplings.pinning = alive or operation.layer in self.tape.apart
            if operation.name == "layer":
                results = self._through_layer(operation)
            elif operation.name == "cut":
                results = self._into_cut(operation)
            elif operation.name in RULES:
                results = RULES[operation.name](self, operation)
            elif operation.pointwise:
                results = rules_of_numbers.pointwise(self, operation)
            elif operation.inputs:
                results = unknown(self, operation)
            else:
                results = [[FREE] * len(self.shape(value)) for value in operation.outputs if value is not None]
            outputs = [value for value in operation.outputs if value is not None]
            if len(results) == len(operation.outputs):
                results = [r for r, value in zip(results, operation.outputs, strict=True) if value is not None]
            for value, labels in zip(outputs, results, strict=True):
                if len(labels) != len(self.shape(value)):  # an operator in a form that its rule does not know
                    labels = unknown(self, operation)[0]
                    labels = [FIXED] * len(self.shape(value))
                self._labels[value.number] = labels
            self._write_through(operation)
            if alive:
                ends.follow(number, operation, self.couplings.contracted[contracted:])
            if alive and not feeds and (self._mixes(operation) or (_is_product(operation) and not stores)):
                ends.add(number, operation, self._made_labels(operation))
        self.couplings.pinning = True
        ends.pin(live)
        for module, value in self.tape.returned:
            self.couplings.returned += [(module, label) for label in self.labels(value) if is_atoms(label)]
        for number in sorted(self.tape.shown):
            value = Value(number)
            for label in self.labels(value):
                if is_atoms(label):
                    said = f"{self.describe(value)} is what a step returns, logs, keeps or hands to Python"
                    said = f"{said}; put a layer behind it, which keeps its width, to prune it"
                    self.couplings.pin(label, said)
                    self.couplings.shown.append(label)
        return self.couplings

    def _write_through(self, operation: Operation) -> None:
        """What is written into a part of a tensor is in the tensor: zeros that are filled have the labels of it."""
        if not operation.inputs or not operation.outputs or operation.outputs[0] is None or operation.layer:
            return
        part, made = operation.inputs[0], operation.outputs[0]
        if operation.name in _PARTS:
            dim = dim_of(operation, len(self.shape(part)))
            self._parts[made.number] = (part, dim, operation.name == "select")
            return
        if part.number not in self._parts or operation.name in _VIEWS | _RESHAPED - {"clone"}:
            return
        if self.tape.aliases[part.number] != self.tape.aliases[made.number]:
            return
        self._parts[made.number] = self._parts[part.number]
        labels = self._labels[made.number]
        while part.number in self._parts:
            whole, dim, selected = self._parts[part.number]
            known, shape = list(self.labels(whole)), self.shape(whole)
            labels = [*labels[:dim], FREE, *labels[dim:]] if selected else labels
            cut = selected or self.shape(part)[dim] != shape[dim]
            said = f"{operation.name} {operation.site} writes into a tensor whose width is fixed; {FIXED_WIDTH}"
            for other, label in enumerate(labels):
                if shape[other] > 1 and not (cut and other == dim):
                    known[other] = self.couplings.merge(known[other], label, said)
            self._labels[whole.number] = labels = known
            self._filled.add(whole.number)
            part = whole

    def _mixes(self, operation: Operation) -> bool:
        if operation.name == "layer":
            return any(True for _ in operation.given)
        return _is_product(operation) and self._has_parameters(operation)

    def _has_parameters(self, operation: Operation) -> bool:
        return any(value.number in self._weights for value in operation.inputs)

    def _made_of_sources(self) -> set[int]:
        """Values that are parameters, buffers or tensor attributes, or computed from such alone (a weight's view)."""
        found = set(self.tape.sources)
        for operation in self.tape.operations:
            inputs = [value.number for value in operation.inputs if value.number not in self.tape.fresh]
            if inputs and found.issuperset(inputs):
                found.update(value.number for value in operation.outputs if value is not None)
        return found

    def _made_labels(self, operation: Operation) -> list[Label]:
        """The labels of what is read of an operation's outputs."""
        if operation.layer:
            return [self.labels(value)[dim] for value, _, dim, *_ in operation.given if self.is_read(value)]
        made = [value for value in operation.outputs if value is not None and self.is_read(value)]
        return [label for value in made for label in self.labels(value)]

    def _live(self) -> tuple[list[bool], list[bool], list[bool]]:
        """For each operation: whether anything shown depends on it, whether a later layer does, whether it is stored.

        That is, nothing but tensors of the model's own do, which are written, and go with it (a codebook).
        """
        tape = self.tape
        given = {tape.aliases[number] for number in tape.sources}
        made: set[int] = set()
        for operation in tape.operations:
            given |= {tape.aliases[value.number] for value in operation.inputs} - made
            made |= {tape.aliases[value.number] for value in operation.outputs if value is not None} - given
        needed = {tape.aliases[number] for number in tape.shown}
        everything = not needed
        read: set[int] = set()
        used = set(tape.shown)
        seen = set(needed)
        live, feeding, storing = [], [], []
        for operation in reversed(tape.operations):
            outputs = {tape.aliases[value.number] for value in operation.outputs if value is not None}
            inputs = {tape.aliases[value.number] for value in operation.inputs}
            shows = everything or not outputs
            alive = shows or bool(outputs & (needed | given))
            if alive and not everything and operation.name in _VIEWS:  # the memory is read, but maybe not through it
                alive = any(value.number in used for value in operation.outputs if value is not None)
            feeds = bool(outputs & read)
            if alive:
                needed |= inputs
                used.update(value.number for value in operation.inputs)
                if self._mixes(operation) or operation.name == "cut" or feeds:
                    read |= inputs
            is_seen = shows or bool(outputs & seen)
            if is_seen:
                seen |= inputs
            live.append(alive)
            feeding.append(feeds)
            storing.append(not is_seen)
        self._needed = None if everything else needed
        return live[::-1], feeding[::-1], storing[::-1]

    def _through_layer(self, operation: Operation) -> list[Labels]:
        name = operation.layer
        entry = layer_type(self._modules[name])
        passes = entry is not None and not entry.mixes_positions
        if passes and not operation.taken and not operation.given and operation.inputs:
            return [list(self.labels(operation.inputs[0])) for _ in operation.outputs]  # one slope for all channels
        for slot, part, other in entry.linked(self._modules[name]) if entry is not None else ():
            self.couplings.unite(self.atoms(name, slot), self.atoms(joined(name, part), other))
        ports = {(value.number, dim) for value, _, dim, *_ in operation.taken}
        leading: dict[int, Label] = {}
        first = operation.taken[0] if operation.taken else None
        for value, slot, dim, repeat, each in operation.taken:
            atoms = _copied(self.atoms(name, slot), repeat, each)
            label = self.labels(value)[dim]
            if is_atoms(label):
                self.couplings.unite(atoms, label)
            elif label == FIXED:
                said = f"{name} reads a tensor whose width is fixed: {self.describe(value)}; {FIXED_WIDTH}"
                self.couplings.pin(atoms, said)
        for value in operation.inputs:
            for dim, label in enumerate(self.labels(value)):
                if (value.number, dim) in ports:
                    continue
                if self._goes_through(operation, value, dim):
                    leading[dim] = label
                elif is_atoms(label):
                    said = f"{name} takes {self.describe(value)} where it expects no channels (dimension {dim})"
                    said = f"{said}; {IN_FRONT}"
                    self.couplings.pin(label, said)
        labels: dict[int, Labels] = {}
        rank = len(self.shape(first[0])) if first is not None else -1
        for output in operation.outputs:
            if output is not None:
                dims = range(len(self.shape(output)))
                labels[output.number] = [leading.get(d, FIXED) if len(dims) == rank else FIXED for d in dims]
        for value, slot, dim, repeat, each in operation.given:
            labels[value.number][dim] = _copied(self.atoms(name, slot), repeat, each)
        return [labels[value.number] for value in operation.outputs if value is not None]

    def _goes_through(self, operation: Operation, value: Value, dim: int) -> bool:
        """Whether a layer does the same at each index of a dimension of the first tensor that it takes."""
        module = self._modules[operation.layer]
        entry, first = layer_type(module), next(iter(operation.taken), None)
        if entry is None or first is None or first[0].number != value.number:
            return False
        return entry.goes_through(module, dim, len(self.shape(value)))

    def _into_cut(self, operation: Operation) -> list[Labels]:
        apart = self.tape.apart.get(operation.layer)
        reason = f"it {apart} to prune it" if apart else "it cannot be looked into"
        reason = self.reasons.get(operation.layer, reason)
        reason = reason if "; " in reason else f"{reason}; {IN_FRONT}"
        for value in operation.inputs:
            for label in self.labels(value):
                self.couplings.pin(label, f"feeds {operation.layer}: {reason}")
        return [[FIXED] * len(self.shape(value)) for value in operation.outputs if value is not None]


def _copied(atoms: IntArray, repeat: int, each: int) -> IntArray:
    """Each of the indices so many times in a row, and all of that so many times one after another."""
    return np.tile(np.repeat(atoms, each), repeat) if repeat > 1 or each > 1 else atoms


def _is_product(operation: Operation) -> bool:
    rule = RULES.get(operation.name)
    return rule is not None and rule.__module__ == _PRODUCTS
