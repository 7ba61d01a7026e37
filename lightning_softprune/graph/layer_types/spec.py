"""What a user says of a layer type of their own, in plain words that a configuration file can hold: `LayerSpec`.

What is wrong whatever the layer is (a class that is none, one dimension at both sides) is refused here; what only a
layer shows, in `registered.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Union

from torch import nn

from lightning_softprune.graph.layers import TensorAxis
from lightning_softprune.utilities import checks

ModuleClass = type[nn.Module]
LayerClass = Union[ModuleClass, str]  # noqa: UP007 - the command line parser reads these annotations
Dimensions = Union[int, list[int]]  # noqa: UP007
Names = Union[str, list[str]]  # noqa: UP007

_SLOTS = {"inputs": "in", "outputs": "out", "channels": "both"}
ARGUMENTS = {slot: argument for argument, slot in _SLOTS.items()}
"""Slot -> the field that speaks of it."""


@dataclass(frozen=True)
class LayerSpec:
    """How layers of a type of your own hold their channels, for `register_layer` and ``SoftPruning(layers=[...])``.

    Tensors are parameters or buffers of the layer, by name, dotted where they are in a module inside it (such modules
    are parts of the layer then, and are not looked at by themselves). One that is ``None`` in a layer is passed over.

    Args:
        type: The class, or its dotted path; subclasses follow, unless they are registered themselves.
        inputs: Tensor -> the dimension, or list of dimensions, that follows the channels of what the layer takes.
        outputs: The same for the channels of what it gives. An embedding has outputs alone.
        channels: Instead of these two, for a layer that gives the channels it takes (a norm): what follows them.
        copies: Tensor -> how many copies of its `outputs` or `channels` the first of their dimensions holds, one after
            another: 2 for value and gate in one matrix.
        sizes: "in", "out" or "both" (with `channels`) -> the attribute, or list of attributes, that holds their number:
            an int, or a tuple or list of one. They are written when channels go.
        parts: The attribute that holds a number of equal parts of the channels (heads, groups of a norm); each part
            loses the same channels.
        channel_dim: Which dimension of what the layer takes and gives holds the channels: -1, or 1 for images.
        macs: How multiply-accumulates are counted. "outputs": each number of the weights is applied once at each
            position of the output, as in linear and convolution layers; "inputs": of the input, as in transposed ones;
            "none": nothing is counted. The weights are the tensors with `inputs` and `outputs`, or of two or more
            dimensions with `channels`. ``None``: "outputs", and "none" with `channels`.
        mixes: The matrix, if the layer computes nothing but its input times this matrix, and a bias: channels are then
            ranked by what it reads of them, and it makes up for those that are removed.
        bias: With `mixes`, the bias. Where the layer has none, ``None`` under the name "bias", it may get one.

    Raises:
        ValueError: An argument is out of its range, or contradicts another.
        TypeError: An argument is of the wrong type.
    """

    type: LayerClass
    inputs: dict[str, Dimensions] = field(default_factory=dict)
    outputs: dict[str, Dimensions] = field(default_factory=dict)
    channels: dict[str, Dimensions] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, Names] = field(default_factory=dict)
    parts: Union[str, None] = None  # noqa: UP007
    channel_dim: int = -1
    macs: Union[Literal["outputs", "inputs", "none"], None] = None  # noqa: UP007
    mixes: Union[str, None] = None  # noqa: UP007
    bias: str = "bias"

    def __post_init__(self) -> None:
        """Check what can be checked without a layer."""
        object.__setattr__(self, "type", _class(self.type))
        for argument in _SLOTS:
            object.__setattr__(self, argument, checks.mapping(argument, getattr(self, argument), _dimensions) or {})
        object.__setattr__(self, "copies", checks.mapping("copies", self.copies, checks.whole_number) or {})
        object.__setattr__(self, "sizes", checks.mapping("sizes", self.sizes, _names) or {})
        object.__setattr__(self, "channel_dim", checks.whole_number("channel_dim", self.channel_dim, None))
        if self.macs is not None:
            checks.one_of("macs", self.macs, ("outputs", "inputs", "none"))
        checks.instance_of("bias", self.bias, str)
        for argument in ("parts", "mixes"):
            if getattr(self, argument) is not None:
                checks.instance_of(argument, getattr(self, argument), str)
        self._check_sides()
        self._check_mixes()

    @property
    def kind(self) -> ModuleClass:
        """The class."""
        if isinstance(self.type, str):
            raise TypeError(f"type: {self.type!r} is not a class yet")
        return self.type

    @property
    def slots(self) -> tuple[str, ...]:
        """The sides of the layer that are spoken of."""
        return tuple(slot for argument, slot in _SLOTS.items() if getattr(self, argument) or slot in self.sizes)

    @property
    def axes(self) -> tuple[TensorAxis, ...]:
        """What follows which slot; dimensions are as they were given, and may be negative."""
        return tuple(
            TensorAxis(tensor, dim, slot, self.copies.get(tensor, 1) if place == 0 and slot != "in" else 1)
            for argument, slot in _SLOTS.items()
            for tensor, dims in getattr(self, argument).items()
            for place, dim in enumerate(_as_list(dims))
        )

    @property
    def attributes(self) -> tuple[tuple[str, str], ...]:
        """Pairs of slot and attribute that holds its size."""
        return tuple((slot, name) for slot, names in self.sizes.items() for name in _as_list(names))

    def _check_sides(self) -> None:
        for slot in self.sizes:
            checks.one_of("sizes", slot, tuple(ARGUMENTS))
        given = {argument: slot for argument, slot in _SLOTS.items() if slot in self.slots}
        if not given:
            raise ValueError("inputs: {} says of no tensor which dimension holds channels; nor do outputs and channels")
        if "both" in self.slots and len(given) > 1:
            raise ValueError(
                f"channels: {self.channels!r} are at both sides of the layer, which then has no inputs and outputs of "
                f"its own; here are inputs={self.inputs!r}, outputs={self.outputs!r}, sizes={self.sizes!r}"
            )
        seen: set[tuple[str, int]] = set()
        for axis in self.axes:
            if (axis.tensor, axis.dim) in seen:
                raise ValueError(f"{ARGUMENTS[axis.slot]}[{axis.tensor!r}]: dimension {axis.dim} is given twice")
            seen.add((axis.tensor, axis.dim))
        for tensor in self.copies:
            if tensor not in {**self.outputs, **self.channels}:
                raise ValueError(
                    f"copies: {tensor!r} is not among outputs={self.outputs!r}, channels={self.channels!r}"
                )

    def _check_mixes(self) -> None:
        matrix = self.mixes
        if matrix is None:
            return
        if matrix not in self.inputs or matrix not in self.outputs or matrix in self.copies or "." in matrix:
            raise ValueError(
                f"mixes: {matrix!r} is not a matrix of the layer itself, with a dimension in inputs={self.inputs!r} "
                f"and one in outputs={self.outputs!r}, and without copies"
            )
        if self.channel_dim != -1:
            raise ValueError(f"mixes: {matrix!r} needs channel_dim=-1, here it is {self.channel_dim}")


# --------------------------------------------------------------------------------------------- checks of what was given


def _class(value: Any) -> ModuleClass:
    found = _imported(value) if isinstance(value, str) else value
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise TypeError(f"type: {value!r} is not a subclass of nn.Module")
    if found is nn.Module:
        raise ValueError("type: nn.Module is the class of all modules, not of a layer")
    return found


def _imported(path: str) -> Any:
    """What a dotted path names."""
    parts = path.split(".")
    for place in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:place]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:place]).startswith(str(error.name)):
                raise ValueError(f"type: {path!r} cannot be imported: {error}") from error
            continue
        except ValueError:
            break
        for name in parts[place:]:
            found = getattr(found, name, None)
        if found is not None:
            return found
        break
    raise ValueError(f"type: {path!r} is not the dotted path of a class that can be imported")


def _dimensions(name: str, value: Any) -> Dimensions:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name}: {value!r} is not a dimension or a list of them")
        return [checks.whole_number(f"{name}[{place}]", item, None) for place, item in enumerate(value)]
    return checks.whole_number(name, value, None)


def _names(name: str, value: Any) -> Names:
    return value if isinstance(value, str) else checks.strings(name, value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
