"""Layer types of the user's own: what a `LayerSpec` says, as an entry of the table.

What a layer shows to be wrong (a tensor that it has not, a dimension out of range) is refused when `check_layers` first
meets one, before anything changes. Elsewhere such a layer is one that cannot be sliced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_softprune.graph.geometry import WeightGeometry
from lightning_softprune.graph.layer_types.spec import ARGUMENTS, LayerClass, LayerSpec
from lightning_softprune.graph.layers import (
    Applications,
    LayerType,
    Layout,
    MacTerm,
    Sizes,
    TensorAxis,
    add_layer_type,
    entry_for,
    layer_type,
    tensor_at,
)
from lightning_softprune.utilities import checks
from lightning_softprune.utilities.checks import near_miss
from lightning_softprune.utilities.nested import attribute_at, tensors_in


def register_layer(type: LayerClass | LayerSpec, **fields: Any) -> None:
    """Tell how layers of a type of your own hold their channels, so that they are pruned like those of PyTorch.

    It holds for the process, so that checkpoints are read and groups are found with it too. Of two registrations of one
    class the last counts; those of PyTorch's own classes can be replaced.

    Args:
        type: The class, or its dotted path; or a whole :class:`LayerSpec`.
        **fields: Those of :class:`LayerSpec`.

    Raises:
        ValueError: An argument is out of its range, or contradicts another.
        TypeError: An argument is unknown or of the wrong type.

    >>> class Swapped(nn.Module):  # a linear layer whose weight is the other way round
    ...     def __init__(self, width: int, out: int):
    ...         super().__init__()
    ...         self.width, self.out = width, out
    ...         self.kernel = nn.Parameter(torch.randn(width, out))
    ...         self.bias = nn.Parameter(torch.zeros(out))
    ...
    ...     def forward(self, x):
    ...         return x @ self.kernel + self.bias
    >>> register_layer(
    ...     Swapped,
    ...     inputs={"kernel": 0},
    ...     outputs={"kernel": 1, "bias": 0},
    ...     sizes={"in": "width", "out": "out"},
    ...     mixes="kernel",
    ... )
    """
    if isinstance(type, LayerSpec):
        if fields:
            raise TypeError(f"type: {type!r} is a whole LayerSpec, and takes no further {', '.join(fields)}")
        register_layers([type])
        return
    known = [item.name for item in fields_of(LayerSpec) if item.name != "type"]
    for name in fields:
        if name not in known:
            only = f"only {', '.join(known)}{near_miss(name, known)}"
            raise TypeError(f"{name}: register_layer has no such argument, {only}")
    register_layers([LayerSpec(type, **fields)])


def register_layers(specs: Sequence[LayerSpec]) -> None:
    """Put specifications into the table; one that is in force already changes nothing."""
    for spec in specs:
        now = entry_for(spec.kind)
        if not (isinstance(now, RegisteredType) and now.spec == spec):
            add_layer_type(RegisteredType(spec))


def checked_layers(name: str, value: Any) -> tuple[LayerSpec, ...]:
    """`value` as specifications; ``None`` is none.

    Raises:
        TypeError: It is neither ``None`` nor a list of them.
    """
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: {value!r} is not a list of LayerSpec")
    return tuple(checks.instance_of(f"{name}[{place}]", item, LayerSpec) for place, item in enumerate(value))


def check_layers(model: nn.Module) -> None:
    """Refuse registrations that do not fit the layers of a model.

    Raises:
        ValueError: One does not; the message names its argument and the layer.
    """
    for name, module in model.named_modules():
        entry = layer_type(module)
        if isinstance(entry, RegisteredType):
            try:
                entry.described(module)
            except ValueError as error:
                raise ValueError(f"{error} (the layer {name!r})") from None


# ------------------------------------------------------------------------------------------------------------ the entry


class RegisteredType(LayerType):
    """The entry that a specification makes.

    Args:
        spec: The specification.
    """

    owns_children = True

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.produces = "both" not in spec.slots
        self.takes_bias = spec.mixes is not None and spec.bias == "bias" and spec.bias in spec.outputs

    def is_for(self, kind: type) -> bool:
        """See `LayerType`."""
        return kind is self.spec.kind

    def layout(self, module: Any) -> Layout | str:
        """See `LayerType`; any of the tensors may be computed."""
        if any(parametrize.is_parametrized(part) for part in module.modules()):
            return _computed(module)
        return self.describe(module)

    def describe(self, module: Any) -> Layout | str:
        """See `LayerType`; what does not fit is a reason, since a round is no place to find it out."""
        try:
            return self.described(module)
        except ValueError as error:
            return str(error)

    def described(self, module: Any) -> Layout | str:
        """The layer's layout; or, as a string, why this one cannot be sliced.

        Raises:
            ValueError: The specification does not fit the layer.
        """
        slots: Sizes = {}
        axes: list[TensorAxis] = []
        first: dict[str, str] = {}
        for axis in self.spec.axes:
            argument = f"{ARGUMENTS[axis.slot]}[{axis.tensor!r}]"
            tensor = _tensor(module, axis)
            if tensor is None:
                continue
            if isinstance(tensor, str):
                return tensor
            dim = _dimension_of(argument, axis.dim, tensor)
            size, rest = divmod(tensor.shape[dim], axis.repeat)
            if rest:
                raise ValueError(
                    f"copies[{axis.tensor!r}]: {axis.repeat} does not divide the {tensor.shape[dim]} of dimension {dim}"
                )
            if slots.setdefault(axis.slot, size) != size:
                raise ValueError(
                    f"{argument}: dimension {dim} of {axis.tensor!r} has {size} channels, {first[axis.slot]} has "
                    f"{slots[axis.slot]}"
                )
            if any((axis.tensor, dim) == (known.tensor, known.dim) for known in axes):
                raise ValueError(f"{argument}: dimension {dim} of {axis.tensor!r} is given twice")
            first.setdefault(axis.slot, argument)
            axes.append(TensorAxis(axis.tensor, dim, axis.slot, axis.repeat))
        for slot, attribute in self.spec.attributes:
            size = _size_at(module, slot, attribute)
            if slots.setdefault(slot, size) != size:
                raise ValueError(
                    f"sizes[{slot!r}]: {attribute!r} of this {type(module).__name__} is {size}, {first[slot]} has "
                    f"{slots[slot]} channels"
                )
        unknown = [slot for slot in self.spec.slots if slot not in slots]
        if unknown:
            return f"this {type(module).__name__} has none of the tensors that tell its {ARGUMENTS[unknown[0]]}"
        self._check_matrix(module)
        return Layout(slots, tuple(axes), self._parts(module, slots))

    def _check_matrix(self, module: Any) -> None:
        matrix = None if self.spec.mixes is None else tensor_at(module, self.spec.mixes)
        if matrix is not None and matrix.ndim != 2:
            raise ValueError(f"mixes: {self.spec.mixes!r} has the shape {tuple(matrix.shape)}, which is no matrix")

    def _parts(self, module: Any, slots: Sizes) -> dict[str, int]:
        if self.spec.parts is None:
            return {}
        parts = attribute_at(module, self.spec.parts)
        if not checks.is_whole_number(parts) or parts < 1:
            raise ValueError(f"parts: {self.spec.parts!r} of this {type(module).__name__} is {parts!r}, not a number")
        for slot, size in slots.items():
            if size % parts:
                raise ValueError(f"parts: {size} channels of {ARGUMENTS[slot]} do not make {parts} equal parts")
        return dict.fromkeys(slots, int(parts)) if parts > 1 else {}

    def resize(self, module: Any, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        for slot, attribute in self.spec.attributes:
            if slot in sizes:
                path, _, name = attribute.rpartition(".")
                owner = attribute_at(module, path) if path else module
                now, size = getattr(owner, name), sizes[slot]
                setattr(owner, name, type(now)([size]) if isinstance(now, (tuple, list)) else size)

    def channel_dim(self, module: Any, tensor: torch.Tensor) -> int:
        """See `LayerType`.

        Raises:
            ValueError: There is no such dimension.
        """
        dim = self.spec.channel_dim
        if not -tensor.ndim <= dim < tensor.ndim:
            raise ValueError(
                f"channel_dim: {dim} is not a dimension of what {type(module).__name__} takes or gives, which has the "
                f"shape {tuple(tensor.shape)}"
            )
        return dim % tensor.ndim

    def geometry(self, module: Any) -> WeightGeometry | None:
        """See `LayerType`."""
        layout, matrix = self.layout(module), self.spec.mixes
        if matrix is None or not isinstance(layout, Layout):
            return None
        (input_dim,) = (axis.dim for axis in layout.axes if (axis.tensor, axis.slot) == (matrix, "in"))
        bias = self.spec.bias if self.spec.bias in self.spec.outputs else ""
        return WeightGeometry(layout.slots["in"], layout.slots["out"], input_dim=input_dim, weight=matrix, bias=bias)

    def observe(self, module: Any, inputs: Mapping[str | int, Any], output: Any, seen: Applications) -> None:
        """Count positions."""
        found = tensors_in(output if self._counts == "outputs" else list(inputs.values()))
        if found and found[0].ndim:
            seen.applied += found[0].numel() / max(found[0].shape[self.channel_dim(module, found[0])], 1)

    def macs(self, module: Any, seen: Applications) -> tuple[MacTerm, ...]:
        """See `LayerType`."""
        return tuple(self._terms(module, seen)) if self._counts != "none" else ()

    @property
    def _counts(self) -> str:
        return self.spec.macs or ("outputs" if self.produces else "none")

    def _terms(self, module: Any, seen: Applications) -> Iterator[MacTerm]:
        layout = self.layout(module)
        for name in dict.fromkeys(axis.tensor for axis in self.spec.axes):
            tensor = tensor_at(module, name)
            is_weight = name in self.spec.inputs and name in self.spec.outputs
            if tensor is None or not (is_weight or (name in self.spec.channels and tensor.ndim > 1)):
                continue
            own = [axis for axis in layout.axes if axis.tensor == name] if isinstance(layout, Layout) else []
            fixed = math.prod(size for dim, size in enumerate(tensor.shape) if dim not in {axis.dim for axis in own})
            copies = math.prod(axis.repeat for axis in own)
            yield MacTerm(seen.applied * fixed * copies, tuple(axis.slot for axis in own))


def _tensor(module: nn.Module, axis: TensorAxis) -> torch.Tensor | str | None:
    """The tensor that an axis names; ``None`` where the layer does without, or why it cannot be sliced.

    Raises:
        ValueError: The layer knows no such tensor.
    """
    path, _, name = axis.tensor.rpartition(".")
    owner = attribute_at(module, path) if path else module
    found = getattr(owner, name, None)
    held = isinstance(owner, nn.Module) and (name in owner._parameters or name in owner._buffers)
    if isinstance(found, torch.Tensor):
        if is_lazy(found):
            return f"this {type(module).__name__} has no shape before it runs"
        return found if held else _computed(module)
    if held or (isinstance(owner, nn.Module) and hasattr(owner, name) and found is None):
        return None
    known = [known for known, _ in (*module.named_parameters(), *module.named_buffers())]
    raise ValueError(
        f"{ARGUMENTS[axis.slot]}: {axis.tensor!r} is not a parameter or buffer of this {type(module).__name__}, "
        f"which has {', '.join(map(repr, known)) or 'none'}"
    )


def _computed(module: nn.Module) -> str:
    name = type(module).__name__.removeprefix("Parametrized")
    return f"the weights of this {name} are computed (weight norm or another parametrization)"


def _dimension_of(argument: str, dim: int, tensor: torch.Tensor) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"{argument}: {dim} is not a dimension of a tensor of the shape {tuple(tensor.shape)}")
    return dim % tensor.ndim


def _size_at(module: nn.Module, slot: str, attribute: str) -> int:
    """The number of channels that an attribute holds.

    Raises:
        ValueError: There is none, or it cannot be written.
    """
    path, _, name = attribute.rpartition(".")
    owner = attribute_at(module, path) if path else module
    found = getattr(owner, name, None)
    size: Any = found[0] if isinstance(found, (tuple, list)) and len(found) == 1 else found
    what = f"sizes[{slot!r}]: {attribute!r} of this {type(module).__name__}"
    if not checks.is_whole_number(size):
        raise ValueError(f"{what} is {found!r}, not an int, nor a tuple or list of one")
    computed = getattr(type(owner), name, None)
    if isinstance(computed, property) and computed.fset is None:
        raise ValueError(f"{what} is a property that cannot be written, so that it follows by itself; leave it out")
    return int(size)
