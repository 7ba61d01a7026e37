"""What a layer looks like to a pruner: the one table of layer types.

A *slot* is a run of channels at one side of a layer: ``"in"`` and ``"out"`` of a linear or convolution layer, or
``"both"`` where input and output are the same channels (normalisation, depthwise convolution, attention, embedding; of
a LayerNorm over several dimensions ``"both0"``, ``"both1"``, ...). A tensor's dimension may follow a slot: once,
several times over (``in_proj_weight`` of attention holds queries, keys and values), or by one of its equal parts (the
input dimension of a grouped convolution's weight).

This table is the single place that knows layer types. Slicing, the geometry of weights, counting of
multiply-accumulates and the sizes in checkpoints are all derived from it, so a layer type that is added here
(`layer_types/` has the entries) works everywhere.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_softprune.graph.computed import ComputedWeight, computed_weight, why_not_sliced
from lightning_softprune.graph.geometry import Shape, WeightGeometry, check_rank
from lightning_softprune.utilities.names import joined
from lightning_softprune.utilities.nested import attribute_at, tensors_in

Sizes = dict[str, int]


@dataclass(frozen=True)
class TensorAxis:
    """Dimension ``dim`` of the tensor ``tensor`` (a name relative to the layer) follows the slot ``slot``.

    It holds ``repeat`` copies of the slot one after another, each index ``each`` times in a row, or one of ``parts``.
    """

    tensor: str
    dim: int
    slot: str
    repeat: int = 1
    parts: int = 1
    each: int = 1

    def expand(self, kept: torch.Tensor, size: int) -> torch.Tensor:
        """Turn the slot's kept indices into the dimension's kept indices.

        Args:
            kept: Sorted indices of the slot that stay, shape ``(n,)``.
            size: Size of the slot before anything was removed.
        """
        if self.parts > 1:
            return kept[kept < size // self.parts]
        places = (kept[:, None] * self.each + torch.arange(self.each, device=kept.device)).flatten()
        return torch.cat([places + copy * size * self.each for copy in range(self.repeat)])


@dataclass(frozen=True)
class Layout:
    """The slots of one layer with their sizes, and the tensor dimensions that follow them.

    ``parts`` names the slots that consist of equal parts (convolution groups, normalisation groups): every part has to
    lose the same channels. ``runs`` names those whose indices go in runs of so many (heads). ``least`` says how much of
    a slot has to stay, where it is more than one.
    """

    slots: Mapping[str, int]
    axes: tuple[TensorAxis, ...]
    parts: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    runs: Mapping[str, int] = field(default_factory=dict)

    def slot(self, side: str) -> str:
        """Return the slot at a side: ``"both"`` where the layer does not tell its sides apart."""
        return "both" if "both" in self.slots else side


@dataclass(frozen=True)
class Port:
    """Dimension ``dim`` of a tensor that a layer takes or gives holds the channels of a slot.

    Attributes:
        tensor: What the layer was called with, or returned.
        slot: The slot.
        dim: The dimension, not negative.
        repeat: It holds so many copies of the slot one after another (both directions of a recurrent layer).
        each: It holds each index of the slot so many times in a row (a channel multiplier).
    """

    tensor: torch.Tensor
    slot: str
    dim: int
    repeat: int = 1
    each: int = 1


@dataclass
class Applications:
    """How often a layer's weights were applied while the model ran.

    Attributes:
        applied: Rows of a linear layer, output positions times kernel size of a convolution (input positions of a
            transposed one), query positions of attention.
        keys: For attention, key positions.
        pairs: For attention, query-key pairs.
    """

    applied: float = 0.0
    keys: float = 0.0
    pairs: float = 0.0


@dataclass(frozen=True)
class MacTerm:
    """``constant`` times the sizes of ``slots`` (a slot may appear twice) multiply-accumulates."""

    constant: float
    slots: tuple[str, ...]


class LayerType:
    """One entry of the table: all that the package knows of a layer type. Entries hold no state.

    A new type overrides :meth:`describe` and :meth:`resize`; what mixes channels also :meth:`geometry`, and what costs
    multiply-accumulates also :meth:`observe` and :meth:`macs`.

    Attributes:
        types: The classes that the entry is for, with their subclasses. Where that is for :meth:`is_for` to say, none.
        produces: Whether its outputs are channels of its own; otherwise it passes on those of another layer.
        owns_children: Whether modules inside it are parts of it, which are not looked at by themselves.
        mixes_positions: Whether it does more with the dimensions beside the channels than go through them, mostly.
        averages_channels: Whether it misses channels that go, by a mean, a norm or a scale: masking is another thing.
        takes_bias: Whether it computes with an attribute ``bias`` that may be ``None``, and can be given one.
        own_forward: Whether each class has a forward of its own that is not known: what it does is looked into.
        weight: Name of the tensor without which it cannot be sliced.
        slices_computed: Whether it can be sliced too where that tensor is computed from others.
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    produces: bool = True
    owns_children: bool = False
    mixes_positions: bool = True
    averages_channels: bool = False
    takes_bias: bool = False
    own_forward: bool = False
    weight: ClassVar[str] = "weight"
    slices_computed: bool = False

    def is_for(self, kind: type) -> bool:
        """Whether it is the entry for this very class; subclasses without an entry of their own follow."""
        return kind in self.types

    def describe(self, module: Any) -> Layout | str:
        """The layer's layout; or, as a string, why this one cannot be sliced."""
        raise NotImplementedError

    def resize(self, module: Any, sizes: Mapping[str, int]) -> None:
        """Write new slot sizes into the layer's integer attributes; its tensors are not touched."""
        raise NotImplementedError

    def refresh(self, module: Any) -> None:
        """Renew what the layer keeps of its tensors beside them, after they were replaced."""

    def linked(self, module: Any) -> tuple[tuple[str, str, str], ...]:
        """Parts that are layers like any other, and hold its channels: its slot, the part's name in it, its slot."""
        return ()

    def calling_parts(self, module: Any) -> AbstractContextManager[None]:
        """While this lasts, it calls the parts of :meth:`linked` as modules, so that their hooks fire."""
        return nullcontext()

    def goes_through(self, module: Any, dim: int, rank: int) -> bool:
        """Whether it does the same at each index of a dimension of what it takes, beside the channels."""
        return not self.mixes_positions

    def channel_dim(self, module: Any, tensor: torch.Tensor) -> int:
        """Which dimension of what the layer takes and gives holds the channels; not negative."""
        return tensor.ndim - 1

    def taken(self, module: Any, inputs: Mapping[str | int, Any]) -> Iterator[Port]:
        """Where in a call's arguments the channels of a slot are.

        Args:
            module: The layer.
            inputs: The arguments, by position and by name.
        """
        layout = self.layout(module)
        tensors = [tensor for value in inputs.values() for tensor in tensors_in(value)][:1]
        if isinstance(layout, Layout) and layout.slot("in") in layout.slots:
            yield from (Port(t, layout.slot("in"), self.channel_dim(module, t)) for t in tensors if t.ndim)

    def given(self, module: Any, output: Any) -> Iterator[Port]:
        """Where in what a call returned the channels of a slot are."""
        layout = self.layout(module)
        if isinstance(layout, Layout) and layout.slot("out") in layout.slots:
            found = (Port(t, layout.slot("out"), self.channel_dim(module, t)) for t in tensors_in(output) if t.ndim)
            yield from itertools.islice(found, 1)

    def geometry(self, module: Any) -> WeightGeometry | None:
        """How its weight reads its inputs; ``None`` for a layer that does not mix channels."""
        return None

    def mean_buffer(self, module: Any) -> str | None:
        """Name of the buffer that it subtracts from its inputs: what is added to these can be taken from it instead."""
        return None

    def observe(self, module: Any, inputs: Mapping[str | int, Any], output: Any, seen: Applications) -> None:
        """Add one call of the layer to what was seen.

        Args:
            module: The layer.
            inputs: Its arguments, by position and by name.
            output: What it returned.
            seen: All calls so far.
        """

    def macs(self, module: Any, seen: Applications) -> tuple[MacTerm, ...]:
        """Its multiply-accumulates, as products of :meth:`mac_sizes`."""
        return ()

    def mac_sizes(self, module: Any) -> Sizes:
        """Sizes of the slots that :meth:`macs` speaks of, also where the layer cannot be sliced."""
        layout = self.layout(module)
        return dict(layout.slots) if isinstance(layout, Layout) else {}

    def layout(self, module: Any) -> Layout | str:
        """:meth:`describe`; where the weight is computed, its sources are what follows the slots."""
        computed = computed_weight(module, self.weight)
        if computed is None:
            return self.describe(module)
        if isinstance(computed, str) or not self.slices_computed:
            name = type(module).__name__.removeprefix("Parametrized")
            by = computed if isinstance(computed, str) else "weight norm or another parametrization"
            return why_not_sliced(name, module, by)
        layout = self.describe(module)
        if isinstance(layout, str):
            return layout
        direction = tensor_at(module, computed.direction)
        sources = computed.sources(2 if direction is None else direction.ndim)
        axes = [axis for axis in layout.axes if axis.tensor != self.weight]
        for axis in layout.axes:
            if axis.tensor == self.weight:
                axes += [replace(axis, tensor=source) for source, dims in sources.items() if axis.dim in dims]
        return replace(layout, axes=tuple(axes))

    def computed(self, module: Any) -> ComputedWeight | None:
        """How a layer that can be sliced computes its weight; ``None`` where that is a parameter."""
        found = computed_weight(module, self.weight) if self.slices_computed else None
        return found if isinstance(found, ComputedWeight) else None

    # ------------------------------------------------------------------------------------------------ in checkpoints

    def recorded_layout(self, module: Any) -> Layout | str:
        """The layout whose sizes a checkpoint records."""
        return self.layout(module)

    def recorded_sizes(self, module: Any) -> Sizes:
        """The sizes that a checkpoint records; none for a layer that cannot be sliced."""
        layout = self.recorded_layout(module)
        return dict(layout.slots) if isinstance(layout, Layout) else {}

    def completed_sizes(self, module: Any, sizes: Mapping[str, int]) -> Sizes:
        """Recorded sizes, with those that are left out where the layer is as its constructor makes it."""
        return dict(sizes)

    def sizes_from(self, module: Any, shapes: Mapping[str, Shape]) -> Sizes | None:
        """Read the recorded sizes off the shapes of tensors.

        Args:
            module: A layer of the same kind, of any size.
            shapes: Shapes by the tensors' names in the layer.

        Returns:
            The sizes; ``None`` if the shapes do not tell.

        Raises:
            ValueError: A tensor has another number of dimensions than the layer's.
        """
        layout = self.recorded_layout(module)
        if not isinstance(layout, Layout):
            return None
        sizes: Sizes = {}
        for axis in layout.axes:
            shape, tensor = shapes.get(axis.tensor), tensor_at(module, axis.tensor)
            if shape is not None and tensor is not None:
                check_rank(shape, tensor)
                sizes.setdefault(axis.slot, shape[axis.dim] * axis.parts // (axis.repeat * axis.each))
        return sizes if sizes.keys() == layout.slots.keys() else None

    def shapes_at(self, module: Any, sizes: Mapping[str, int]) -> dict[str, Shape]:
        """The shapes that the layer's tensors have at other recorded sizes.

        Raises:
            ValueError: The layer cannot have these sizes.
        """
        layout = self.recorded_layout(module)
        if not isinstance(layout, Layout):
            raise ValueError(layout)
        for slot, parts in layout.parts.items():
            if sizes[slot] % parts:
                raise ValueError(f"{sizes[slot]} channels do not make {parts} equal parts")
        result: dict[str, Shape] = {}
        for axis in layout.axes:
            tensor = tensor_at(module, axis.tensor)
            if tensor is not None:
                shape = list(result.get(axis.tensor, tensor.shape))
                shape[axis.dim] = sizes[axis.slot] * axis.repeat * axis.each // axis.parts
                result[axis.tensor] = tuple(shape)
        return result

    def restore(self, module: Any, sizes: Mapping[str, int]) -> None:
        """Write recorded sizes into the layer's integer attributes."""
        self.resize(module, sizes)


# ------------------------------------------------------------------------------------------------------------ the table

_TABLE: list[LayerType] = []
_FOUND: MutableMapping[type, LayerType | None] = weakref.WeakKeyDictionary()
"""The entry for each class that was asked for; some classes are made on the fly, and are not to be held on to."""


def add_layer_type(entry: LayerType) -> None:
    """Add an entry to the table; among entries for the same class the one that was added last counts."""
    _TABLE.insert(0, entry)
    _FOUND.clear()


def layer_type(module: nn.Module) -> LayerType | None:
    """The entry for a layer; ``None`` where the table has none."""
    return entry_for(type(module))


def entry_for(kind: type) -> LayerType | None:
    """The entry for a class: its own, else that of the nearest class it inherits from; ``None`` without one."""
    if kind not in _FOUND:
        _FOUND[kind] = next((entry for base in kind.__mro__ for entry in _TABLE if entry.is_for(base)), None)
    return _FOUND[kind]


def takes_bias(module: nn.Module) -> bool:
    """Whether a layer computes with a ``bias`` where it has one: a layer without can be given one."""
    entry = layer_type(module)
    return (
        entry is not None and entry.takes_bias and "bias" in module._parameters and entry.computed(module) is None
    )  # no bias joins a weight that is several parameters


def layout_of(module: nn.Module) -> Layout | str | None:
    """Describe a layer.

    Returns:
        Its layout; or, as a string, why a layer of this type cannot be sliced; or ``None`` for a module that is not
        a layer (a container, an activation, a module with bare parameters of its own).
    """
    entry = layer_type(module)
    return None if entry is None else entry.layout(module)


def geometry_of(module: nn.Module) -> WeightGeometry | None:
    """How a layer's weight reads its inputs; ``None`` for a module that does not mix channels by a weight."""
    entry = layer_type(module)
    return None if entry is None else entry.geometry(module)


def computed_of(module: nn.Module) -> ComputedWeight | None:
    """How a layer that can be sliced computes its weight; ``None`` where that is a parameter, and for other modules."""
    entry = layer_type(module)
    return None if entry is None else entry.computed(module)


def weight_of(layer: nn.Module, name: str) -> torch.Tensor:
    """A layer's weight of this name as it is now, computed or not; without its gradient."""
    computed = computed_of(layer)
    if computed is not None and computed.name == name:
        return computed.value(layer)
    return layer.get_parameter(name).detach()


def write_weight(layer: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Give a layer's weight these values, in place, computed or not."""
    computed = computed_of(layer)
    if computed is not None and computed.name == name:
        computed.write(layer, weight)
    else:
        with torch.no_grad():
            layer.get_parameter(name).copy_(weight)


def set_sizes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Write a layer's new slot sizes into its integer attributes; its tensors are not touched.

    Args:
        module: A layer that :func:`layout_of` describes.
        sizes: New size of each slot that changed.
    """
    entry = layer_type(module)
    if entry is None:
        raise TypeError(f"{type(module).__name__} is not a layer that can be sliced")
    entry.resize(module, sizes)


def refresh(module: nn.Module) -> None:
    """Renew what a layer keeps of its tensors beside them, after they were replaced; other modules keep nothing."""
    entry = layer_type(module)
    if entry is not None:
        entry.refresh(module)
        computed = entry.computed(module)
        if computed is not None:
            computed.renew(module)


def parts_of_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are parts of a layer, and no layers of their own (the output projection of attention)."""
    for module in model.modules():
        entry = layer_type(module)
        if entry is not None and is_parametrized(module):
            yield from module.get_submodule("parametrizations").modules()
        if entry is not None and entry.owns_children:
            yield from (child for child in module.modules() if child is not module)


def linked_parts(model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """Parts of layers that are layers like any other: the outer layer, its slot, the part's full name, its slot."""
    for name, module in model.named_modules():
        entry = layer_type(module)
        for slot, part, other in entry.linked(module) if entry is not None else ():
            yield name, slot, joined(name, part), other


@contextmanager
def parts_called(model: nn.Module) -> Iterator[None]:
    """While this lasts, layers call those of their parts that are layers too, so that hooks on these fire."""
    with ExitStack() as stack:
        for module in model.modules():
            entry = layer_type(module)
            if entry is not None:
                stack.enter_context(entry.calling_parts(module))
        yield


def tensor_at(module: nn.Module, path: str) -> torch.Tensor | None:
    """The tensor at a dotted path; ``None`` where there is none."""
    found = attribute_at(module, path)
    return found if isinstance(found, torch.Tensor) else None
