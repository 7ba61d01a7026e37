"""The entries of the table of layer types, one class each; `layers.py` explains the words.

Multiply-accumulates are those of linear, convolution and attention layers; normalisation, activations and biases are
not counted, as is the field's habit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_softprune.graph.geometry import Kernel, Shape, WeightGeometry, check_rank
from lightning_softprune.graph.layers import (
    Applications,
    LayerType,
    Layout,
    MacTerm,
    Port,
    Sizes,
    TensorAxis,
    add_layer_type,
)


def _argument(inputs: Mapping[str | int, Any], place: int, name: str) -> torch.Tensor:
    found: torch.Tensor = inputs[place] if place in inputs else inputs[name]
    return found


class LinearType(LayerType):
    """``nn.Linear``."""

    types = (nn.Linear,)
    mixes_positions = False
    takes_bias = True
    slices_computed = True

    def describe(self, module: nn.Linear) -> Layout:
        """See `LayerType`."""
        axes = (TensorAxis("weight", 0, "out"), TensorAxis("weight", 1, "in"), TensorAxis("bias", 0, "out"))
        return Layout({"in": module.in_features, "out": module.out_features}, axes)

    def resize(self, module: nn.Linear, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        module.in_features = sizes.get("in", module.in_features)
        module.out_features = sizes.get("out", module.out_features)

    def geometry(self, module: nn.Linear) -> WeightGeometry:
        """See `LayerType`."""
        return WeightGeometry(module.in_features, module.out_features)

    def observe(self, module: nn.Linear, inputs: Mapping[str | int, Any], output: Any, seen: Applications) -> None:
        """Count rows."""
        seen.applied += output.numel() / max(module.out_features, 1)

    def macs(self, module: nn.Linear, seen: Applications) -> tuple[MacTerm, ...]:
        """See `LayerType`."""
        return (MacTerm(seen.applied, ("in", "out")),)

    def mac_sizes(self, module: nn.Linear) -> Sizes:
        """See `LayerType`."""
        return {"in": module.in_features, "out": module.out_features}


class ConvolutionType(LayerType):
    """Convolutions of one to three dimensions, also grouped, depthwise and transposed.

    A depthwise convolution has the same channels at both sides, or gives several of each (a channel multiplier). Its
    number of groups goes with its channels, and what was grouped before a prune may look depthwise after it:
    checkpoints record all three numbers.
    """

    types = (_ConvNd,)
    takes_bias = True
    slices_computed = True

    def describe(self, module: _ConvNd) -> Layout | str:
        """See `LayerType`."""
        groups = module.groups
        first, second = self._sides(module)
        if groups > 1 and self._is_depthwise(self._numbers(module)):
            each = self._given_of_each(module)
            along = each if first == "out" else 1
            both = TensorAxis("weight", 0, "both", each=along), TensorAxis("bias", 0, "both", each=each)
            return Layout({"both": groups}, both)
        axes = (
            TensorAxis("weight", 0, first),
            TensorAxis("weight", 1, second, parts=groups),
            TensorAxis("bias", 0, "out"),
        )
        parts = {"in": groups, "out": groups} if groups > 1 else {}
        return Layout({"in": module.in_channels, "out": module.out_channels}, axes, parts)

    def resize(self, module: _ConvNd, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        if "both" in sizes:
            each, module.in_channels = self._given_of_each(module), sizes["both"]
            module.groups, module.out_channels = sizes["both"], each * sizes["both"]
        module.in_channels = sizes.get("in", module.in_channels)
        module.out_channels = sizes.get("out", module.out_channels)

    def channel_dim(self, module: _ConvNd, tensor: torch.Tensor) -> int:
        """In front of the positions."""
        return tensor.ndim - len(module.kernel_size) - 1

    def given(self, module: _ConvNd, output: Any) -> Iterator[Port]:
        """Of a depthwise one, so many of each channel."""
        for port in super().given(module, output):
            yield replace(port, each=self._given_of_each(module)) if port.slot == "both" else port

    def goes_through(self, module: _ConvNd, dim: int, rank: int) -> bool:
        """The batch, and positions along which the kernel is a single one and moves by one."""
        place = dim - (rank - len(module.kernel_size))
        if place < 0:
            return True
        around: Any = module._reversed_padding_repeated_twice
        padded = any((*around[::-1][2 * place : 2 * place + 2], module.output_padding[place]))
        return module.kernel_size[place] == module.stride[place] == 1 and not padded

    def geometry(self, module: _ConvNd) -> WeightGeometry:
        """See `LayerType`."""
        transposed = isinstance(module, _ConvTransposeNd)
        padding: Any = module.padding
        around: Any = module._reversed_padding_repeated_twice
        kernel = Kernel(
            tuple(module.kernel_size),
            tuple(module.stride),
            padding if isinstance(padding, str) else tuple(padding),
            tuple(module.dilation),
            tuple(around),
            module.padding_mode,
            tuple(module.output_padding),
            transposed,
        )
        input_dim = 0 if transposed else 1
        return WeightGeometry(module.in_channels, module.out_channels, module.groups, input_dim, kernel)

    def observe(self, module: _ConvNd, inputs: Mapping[str | int, Any], output: Any, seen: Applications) -> None:
        """Count positions of the map times those of the kernel."""
        positions = float(math.prod(module.kernel_size))
        if isinstance(module, _ConvTransposeNd):
            seen.applied += _argument(inputs, 0, "input").numel() / max(module.in_channels, 1) * positions
        else:
            seen.applied += output.numel() / max(module.out_channels, 1) * positions

    def macs(self, module: _ConvNd, seen: Applications) -> tuple[MacTerm, ...]:
        """See `LayerType`."""
        if "both" in self.mac_sizes(module):
            return (MacTerm(seen.applied * self._given_of_each(module), ("both",)),)
        return (MacTerm(seen.applied / module.groups, ("in", "out")),)

    def mac_sizes(self, module: _ConvNd) -> Sizes:
        """See `LayerType`."""
        layout = self.layout(module)
        if isinstance(layout, Layout):
            return dict(layout.slots)
        return {"in": module.in_channels, "out": module.out_channels}

    def recorded_sizes(self, module: _ConvNd) -> Sizes:
        """See `LayerType`."""
        if module._parameters.get("weight") is None and self.computed(module) is None:
            return {}
        return self._numbers(module)

    def sizes_from(self, module: _ConvNd, shapes: Mapping[str, Shape]) -> Sizes | None:
        """See `LayerType`."""
        computed = self.computed(module)
        weight = shapes.get("weight" if computed is None else computed.direction)
        if weight is None:
            return None
        check_rank(weight, module.weight)
        now = self.recorded_sizes(module)
        first, second = self._sides(module)
        if self._is_depthwise(now) and now["groups"] > 1:
            each = self._given_of_each(module)
            channels = weight[0] // each if first == "out" else weight[0]
            return {**dict.fromkeys(now, channels), "out": each * channels}
        return {**now, first: weight[0], second: weight[1] * module.groups}

    def shapes_at(self, module: _ConvNd, sizes: Mapping[str, int]) -> dict[str, Shape]:
        """See `LayerType`."""
        now, groups = self.recorded_sizes(module), sizes["groups"]
        if groups != now["groups"] and not (self._is_depthwise(now) or self._is_depthwise(sizes)):
            raise ValueError(f"it has {now['groups']} groups, in the checkpoint {groups}")
        if groups == 0 or sizes["in"] % groups or sizes["out"] % groups:
            raise ValueError(f"{sizes['in']} -> {sizes['out']} channels do not make {groups} equal groups")
        first, second = self._sides(module)
        weight: Shape = (sizes[first], sizes[second] // groups, *module.weight.shape[2:])
        computed = self.computed(module)
        shapes: dict[str, Shape] = {"weight": weight} if computed is None else computed.shapes(weight)
        return shapes | ({} if module.bias is None else {"bias": (sizes["out"],)})

    def restore(self, module: _ConvNd, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        module.in_channels, module.out_channels, module.groups = sizes["in"], sizes["out"], sizes["groups"]

    @staticmethod
    def _sides(module: _ConvNd) -> tuple[str, str]:
        """The slots that the first two dimensions of the weight follow."""
        return ("in", "out") if isinstance(module, _ConvTransposeNd) else ("out", "in")

    @staticmethod
    def _numbers(module: _ConvNd) -> Sizes:
        return {"in": module.in_channels, "out": module.out_channels, "groups": module.groups}

    @staticmethod
    def _is_depthwise(sizes: Mapping[str, int]) -> bool:
        """Whether each channel is read by itself."""
        return sizes["in"] == sizes["groups"]

    @staticmethod
    def _given_of_each(module: _ConvNd) -> int:
        """How many channels it gives of each that it reads, where it is depthwise."""
        return module.out_channels // max(module.groups, 1)


class PassingOn(LayerType):
    """Layers whose outputs are the channels of their input: one slot, one attribute that counts it.

    Attributes:
        tensors: Names of the tensors whose first dimension follows the slot.
        attribute: Name of the attribute that holds the number of channels.
    """

    produces = False
    mixes_positions = False
    tensors: tuple[str, ...] = ("weight", "bias")
    attribute: str

    def describe(self, module: Any) -> Layout | str:
        """See `LayerType`."""
        return Layout(
            {"both": getattr(module, self.attribute)}, tuple(TensorAxis(name, 0, "both") for name in self.tensors)
        )

    def resize(self, module: Any, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        if "both" in sizes:
            setattr(module, self.attribute, sizes["both"])


_INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class NormalisationType(PassingOn):
    """BatchNorm and InstanceNorm of any dimension."""

    types = (_BatchNorm, _InstanceNorm)
    tensors = ("weight", "bias", "running_mean", "running_var")
    attribute = "num_features"

    def channel_dim(self, module: _BatchNorm | _InstanceNorm, tensor: torch.Tensor) -> int:
        """The first, where there is no batch (InstanceNorm takes that); else the second."""
        dims = next((n for n, kind in _INSTANCE_NORMS.items() if isinstance(module, kind)), None)
        return 1 if dims is None else tensor.ndim - dims - 1

    def mean_buffer(self, module: _BatchNorm | _InstanceNorm) -> str | None:
        """The running mean of a BatchNorm; in training it subtracts the batch's, which follows whatever is added."""
        tracks = isinstance(module, _BatchNorm) and module.running_mean is not None
        return "running_mean" if tracks else None


_OF_GROUPS = "_softprune_has_groups"
"""Name of an attribute of a GroupNorm that had several channels to a group: it is not taken for one by channel."""


class GroupNormType(PassingOn):
    """``nn.GroupNorm``: every group loses the same channels; where each channel is a group, any may go."""

    types = (nn.GroupNorm,)
    averages_channels = True
    attribute = "num_channels"

    def channel_dim(self, module: nn.GroupNorm, tensor: torch.Tensor) -> int:
        """The second."""
        return 1

    def describe(self, module: nn.GroupNorm) -> Layout:
        """See `LayerType`."""
        axes = (TensorAxis("weight", 0, "both"), TensorAxis("bias", 0, "both"))
        parts = {} if self._is_by_channel(module) else {"both": module.num_groups}
        return Layout({"both": module.num_channels}, axes, parts)

    def resize(self, module: nn.GroupNorm, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        if "both" not in sizes:
            return
        if self._is_by_channel(module):
            module.num_groups = sizes["both"]
        elif sizes["both"] == module.num_groups:
            setattr(module, _OF_GROUPS, True)
        super().resize(module, sizes)

    @staticmethod
    def _is_by_channel(module: nn.GroupNorm) -> bool:
        """Whether each channel is a group by design, and not because one is left of each."""
        return module.num_groups == module.num_channels and not hasattr(module, _OF_GROUPS)


class LayerNormType(PassingOn):
    """``nn.LayerNorm`` over the last dimension, or several: each is a slot, and loses channels where it has some."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm,)
    averages_channels = True

    def describe(self, module: nn.LayerNorm | nn.RMSNorm) -> Layout:
        """See `LayerType`."""
        slots = dict(zip(self._slots(module), module.normalized_shape, strict=True))
        return Layout(
            slots, tuple(TensorAxis(name, dim, slot) for name in self.tensors for dim, slot in enumerate(slots))
        )

    def resize(self, module: Any, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        pairs = zip(self._slots(module), module.normalized_shape, strict=True)
        module.normalized_shape = tuple(sizes.get(slot, size) for slot, size in pairs)

    def taken(self, module: Any, inputs: Mapping[str | int, Any]) -> Iterator[Port]:
        """The last dimensions."""
        yield from self._ports(module, _argument(inputs, 0, "input"))

    def given(self, module: Any, output: Any) -> Iterator[Port]:
        """The last dimensions."""
        yield from self._ports(module, output)

    def _ports(self, module: Any, tensor: torch.Tensor) -> Iterator[Port]:
        slots = self._slots(module)
        yield from (Port(tensor, slot, dim) for dim, slot in enumerate(slots, tensor.ndim - len(slots)))

    @staticmethod
    def _slots(module: Any) -> list[str]:
        number = len(module.normalized_shape)
        return ["both"] if number == 1 else [f"both{dim}" for dim in range(number)]


class RMSNormType(LayerNormType):
    """``nn.RMSNorm`` over the last dimension."""

    types = (nn.RMSNorm,)
    tensors = ("weight",)


class PReLUType(PassingOn):
    """``nn.PReLU``; with one slope for all channels it has no slot."""

    types = (nn.PReLU,)
    tensors = ("weight",)
    attribute = "num_parameters"

    def channel_dim(self, module: nn.PReLU, tensor: torch.Tensor) -> int:
        """The second."""
        return min(1, tensor.ndim - 1)

    def describe(self, module: nn.PReLU) -> Layout | str:
        """See `LayerType`."""
        return super().describe(module) if module.num_parameters > 1 else Layout({}, ())

    def recorded_layout(self, module: nn.PReLU) -> Layout | str:
        """It has its slot also when one channel is left."""
        layout = self.layout(module)
        return super().describe(module) if isinstance(layout, Layout) else layout


class EmbeddingType(PassingOn):
    """``nn.Embedding``: the width can go, tokens cannot."""

    types = (nn.Embedding,)
    produces = True
    attribute = "embedding_dim"

    def taken(self, module: nn.Embedding, inputs: Mapping[str | int, Any]) -> Iterator[Port]:
        """Nothing: it is given numbers."""
        return iter(())

    def describe(self, module: nn.Embedding) -> Layout:
        """See `LayerType`."""
        return Layout({"both": module.embedding_dim}, (TensorAxis("weight", 1, "both"),))


LAYER_TYPES: tuple[LayerType, ...] = (
    LinearType(),
    ConvolutionType(),
    NormalisationType(),
    GroupNormType(),
    LayerNormType(),
    RMSNormType(),
    PReLUType(),
    EmbeddingType(),
)
"""All entries; importing this file puts them into the table."""

for _entry in LAYER_TYPES:
    add_layer_type(_entry)
