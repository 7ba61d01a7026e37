"""Outputs of a network, and widths that are none though no later layer reads them.

What a layer gives that no later layer reads is an output of the network. But where two such widths are multiplied and
summed over (two towers, a user's and an item's factors, queries and keys of the last attention, a modulated weight),
nothing of them is left in what is shown: they are *contracted*. They stay outputs where the model's own ``forward``
gives them, and where one of them comes from a layer that is frozen while others are trained: that one is a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import nn

from lightning_softprune.graph.flow.labels import Couplings, Label, Labels, is_atoms
from lightning_softprune.graph.flow.rules import argument
from lightning_softprune.graph.flow.tape import Operation, Tape, Value
from lightning_softprune.utilities.arrays import IntArray

_SCALED = {"mul", "div", "neg", "clone", "detach", "_to_copy", "masked_fill", "native_dropout"}
_ADDED = {"add", "sub"}
_SUMS = {"sum", "nansum", "mean"}
"""Operators behind which a product of two is still one; and those that sum it over some of its dimensions."""


class Flow(Protocol):
    """What is asked of the flow."""

    model: nn.Module
    tape: Tape
    couplings: Couplings

    def labels(self, value: Value) -> Labels:
        """Labels of a value's dimensions."""

    def shape(self, value: Value) -> tuple[int, ...]:
        """Its shape."""


@dataclass(frozen=True)
class _Output:
    """What may be an output of the network.

    Attributes:
        operation: Number of the operation that makes it.
        name: Who does.
        label: Its label.
        is_of_layer: Whether a layer makes it, which gives the name where others do too.
        frozen: Whether that is not trained.
    """

    operation: int
    name: str
    label: IntArray
    is_of_layer: bool
    frozen: bool


@dataclass
class Outputs:
    """Collects outputs while labels are carried through a tape, and pins them in the end.

    Attributes:
        flow: What carries the labels.
    """

    flow: Flow
    _found: list[_Output] = field(default_factory=list)
    _ends: dict[int, list[IntArray]] = field(default_factory=dict)  # number of an operation -> what it contracts
    _products: dict[int, set[int]] = field(default_factory=dict)  # value -> dimensions along which it is a product

    def add(self, number: int, operation: Operation, labels: Sequence[Label]) -> None:
        """An operation that no later layer reads makes these."""
        name = operation.layer or operation.site.module or operation.name
        layer = self.flow.model.get_submodule(operation.layer) if operation.layer else None
        frozen = layer is not None and not any(p.requires_grad for p in layer.parameters())
        made = [label for label in labels if is_atoms(label)]
        self._found += [_Output(number, name, label, layer is not None, frozen) for label in made]

    def follow(self, number: int, operation: Operation, contracted: Sequence[IntArray]) -> None:
        """Note what an operation contracts: a product by itself, or a sum over what is a product of two."""
        ends = list(contracted)
        if operation.name in _SUMS:
            source = operation.inputs[0]
            rank = len(self.flow.shape(source))
            dims = argument(operation, "dim", ())
            over = {int(dim) % max(rank, 1) for dim in ((dims,) if isinstance(dims, int) else dims)}
            if len(over) < rank:
                labels = self.flow.labels(source)
                summed = [labels[dim] for dim in over & self._products.get(source.number, set())]
                ends += [label for label in summed if is_atoms(label)]
        elif operation.name in _SCALED | _ADDED:
            for result in operation.outputs[:1]:
                along = set() if result is None else self._product_dims(operation, result)
                if result is not None and along:
                    self._products[result.number] = along
        if ends:
            self._ends[number] = ends

    def _product_dims(self, operation: Operation, result: Value) -> set[int]:
        """Dimensions of a result, that have atoms, along which it is a product of two tensors that have them too."""
        shape = self.flow.shape(result)
        along: list[set[int]] = []
        held: list[set[int]] = []
        for value in {value.number: value for value in operation.inputs}.values():
            own, labels = self.flow.shape(value), self.flow.labels(value)
            first = len(shape) - len(own)
            full = {dim for dim, size in enumerate(own) if size > 1 and size == shape[first + dim]}
            along.append({first + dim for dim in self._products.get(value.number, set()) & full})
            held.append({first + dim for dim in full if is_atoms(labels[dim])})
        if operation.name in _ADDED:
            return set.intersection(*along) if along else set()
        along = along[:1] if operation.name == "div" else along
        both = held[0] & held[1] if operation.name == "mul" and len(held) == 2 else set()
        return both.union(*along)

    def pin(self, live: Sequence[bool]) -> None:
        """Pin the outputs, but for what is contracted.

        Args:
            live: For each operation, whether anything shown depends on it.
        """
        self._found.sort(key=lambda output: output.is_of_layer)
        reaches = self._reaching(live) if self._ends else []
        if not any(reaches[output.operation] for output in self._found if reaches):
            for output in self._found:
                self._pin(output, output.label)
            return
        classes = self.flow.couplings.united()
        contracted = self._classes_of([label for labels in self._ends.values() for label in labels], classes)
        kept = self._classes_of(self._given_by_the_model(), classes)
        targets: dict[int, _Output] = {}
        if any(parameter.requires_grad for parameter in self.flow.model.parameters()):
            for output in self._found:
                targets |= dict.fromkeys(self._classes_of([output.label], classes) if output.frozen else (), output)
        for output in self._found:
            atoms = output.label[output.label >= 0]
            own = classes[atoms]
            free = np.isin(own, list(contracted - kept)) & reaches[output.operation]
            target = next((targets[n] for n in np.unique(own[free]).tolist() if n in targets), None)
            if target is not None:
                said = f"{output.name} is multiplied by what {target.name} gives, which is frozen, as a target is"
                self.flow.couplings.pin(atoms[free], f"{said}; put a layer behind it to prune it")
            self._pin(output, atoms[~free])

    def _pin(self, output: _Output, atoms: IntArray) -> None:
        self.flow.couplings.pin(atoms, f"{output.name} produces an output of the network", output=output.name)

    def _reaching(self, live: Sequence[bool]) -> list[bool]:
        """For each operation, whether what it makes goes on into one that contracts something."""
        aliases = self.flow.tape.aliases
        read: set[int] = set()
        found = []
        for number, operation in reversed(list(enumerate(self.flow.tape.operations))):
            reaches = any(aliases[value.number] in read for value in operation.outputs if value is not None)
            if live[number] and (reaches or number in self._ends):
                read.update(aliases[value.number] for value in operation.inputs)
            found.append(reaches)
        return found[::-1]

    def _classes_of(self, labels: Sequence[IntArray], classes: IntArray) -> set[int]:
        """The classes of some labels' atoms, and those of their factors where these are crossed."""
        factors = [factor for label in labels for factor in self.flow.couplings.crossed.factors(label) or ()]
        return {n for label in (*labels, *factors) for n in np.unique(classes[label[label >= 0]]).tolist()}

    def _given_by_the_model(self) -> list[IntArray]:
        """Labels of what the model's own forward gives, or that of a module that holds all of its parameters."""
        modules = dict(self.flow.model.named_modules())
        everything = {id(parameter) for parameter in self.flow.model.parameters()}
        whole: Mapping[str, bool] = {
            name: everything <= {id(parameter) for parameter in modules[name].parameters()}
            for name in {name for name, _ in self.flow.tape.returned}
        }
        values = [value for name, value in self.flow.tape.returned if whole[name]]
        return [label for value in values for label in self.flow.labels(value) if is_atoms(label)]
