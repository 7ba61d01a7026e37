"""What a layer looks like to a pruner: its slots, and the tensors that follow them.

A *slot* is a run of channels at one side of a layer: ``"in"`` and ``"out"`` of a linear or convolution layer, or
``"both"`` where input and output are the same channels (normalisation, depthwise convolution, attention, embedding).
A tensor's dimension may follow a slot: once, several times over (``in_proj_weight`` of attention holds queries, keys
and values), or by one of its equal parts (the input dimension of a grouped convolution's weight).

This table is the single place that knows layer types. Slicing, counting and checkpoints are all derived from it, so a
layer type that is added here works everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class TensorAxis:
    """Dimension ``dim`` of the tensor ``tensor`` (a name relative to the layer) follows the slot ``slot``.

    The dimension holds ``repeat`` copies of the slot one after another, or one of ``parts`` equal parts of it.
    """

    tensor: str
    dim: int
    slot: str
    repeat: int = 1
    parts: int = 1

    def expand(self, kept: torch.Tensor, size: int) -> torch.Tensor:
        """Turn the slot's kept indices into the dimension's kept indices.

        Args:
            kept: Sorted indices of the slot that stay, shape ``(n,)``.
            size: Size of the slot before anything was removed.
        """
        if self.parts > 1:
            return kept[kept < size // self.parts]
        if self.repeat > 1:
            return torch.cat([kept + copy * size for copy in range(self.repeat)])
        return kept


@dataclass(frozen=True)
class Layout:
    """The slots of one layer with their sizes, and the tensor dimensions that follow them.

    ``parts`` names the slots that consist of equal parts (convolution groups, normalisation groups, attention heads):
    every part has to lose the same channels.
    """

    slots: Mapping[str, int]
    axes: tuple[TensorAxis, ...]
    parts: Mapping[str, int] = field(default_factory=dict)

    def slot(self, side: str) -> str:
        """Return the slot at a side: ``"both"`` where the layer does not tell its sides apart."""
        return "both" if "both" in self.slots else side


def _linear(module: nn.Linear) -> Layout:
    axes = [TensorAxis("weight", 0, "out"), TensorAxis("weight", 1, "in"), TensorAxis("bias", 0, "out")]
    return Layout({"in": module.in_features, "out": module.out_features}, tuple(axes))


def _convolution(module: _ConvNd) -> Layout | str:
    groups = module.groups
    if groups > 1 and groups == module.in_channels:
        if module.out_channels != groups:
            return "a depthwise convolution with a channel multiplier"
        return Layout({"both": groups}, (TensorAxis("weight", 0, "both"), TensorAxis("bias", 0, "both")))
    first, second = ("in", "out") if isinstance(module, _ConvTransposeNd) else ("out", "in")
    axes = (
        TensorAxis("weight", 0, first),
        TensorAxis("weight", 1, second, parts=groups),
        TensorAxis("bias", 0, "out"),
    )
    parts = {"in": groups, "out": groups} if groups > 1 else {}
    return Layout({"in": module.in_channels, "out": module.out_channels}, axes, parts)


def _normalisation(module: _BatchNorm | _InstanceNorm) -> Layout:
    names = ("weight", "bias", "running_mean", "running_var")
    return Layout({"both": module.num_features}, tuple(TensorAxis(name, 0, "both") for name in names))


def _group_norm(module: nn.GroupNorm) -> Layout:
    axes = (TensorAxis("weight", 0, "both"), TensorAxis("bias", 0, "both"))
    return Layout({"both": module.num_channels}, axes, {"both": module.num_groups})


def _layer_norm(module: nn.LayerNorm) -> Layout | str:
    if len(module.normalized_shape) != 1:
        return "a LayerNorm over more than one dimension"
    axes = (TensorAxis("weight", 0, "both"), TensorAxis("bias", 0, "both"))
    return Layout({"both": module.normalized_shape[0]}, axes)


def _rms_norm(module: nn.RMSNorm) -> Layout | str:
    if len(module.normalized_shape) != 1:
        return "an RMSNorm over more than one dimension"
    return Layout({"both": module.normalized_shape[0]}, (TensorAxis("weight", 0, "both"),))


def _prelu(module: nn.PReLU) -> Layout:
    axes = (TensorAxis("weight", 0, "both"),) if module.num_parameters > 1 else ()
    return Layout({"both": module.num_parameters} if module.num_parameters > 1 else {}, axes)


def _embedding(module: nn.Embedding) -> Layout:
    return Layout({"both": module.embedding_dim}, (TensorAxis("weight", 1, "both"),))


def _attention(module: nn.MultiheadAttention) -> Layout | str:
    if module.in_proj_weight is None:
        return "attention whose keys or values have a width of their own"
    axes = (
        TensorAxis("in_proj_weight", 0, "both", repeat=3),
        TensorAxis("in_proj_weight", 1, "both"),
        TensorAxis("in_proj_bias", 0, "both", repeat=3),
        TensorAxis("bias_k", 2, "both"),
        TensorAxis("bias_v", 2, "both"),
        TensorAxis("out_proj.weight", 0, "both"),
        TensorAxis("out_proj.weight", 1, "both"),
        TensorAxis("out_proj.bias", 0, "both"),
    )
    return Layout({"both": module.embed_dim}, axes, {"both": module.num_heads})


_LAYOUTS: tuple[tuple[tuple[type[nn.Module], ...], Callable[..., Layout | str]], ...] = (
    ((nn.Linear,), _linear),
    ((_ConvNd,), _convolution),
    ((_BatchNorm, _InstanceNorm), _normalisation),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm,), _layer_norm),
    ((nn.RMSNorm,), _rms_norm),
    ((nn.PReLU,), _prelu),
    ((nn.Embedding,), _embedding),
    ((nn.MultiheadAttention,), _attention),
)

_NEVER = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)
"""Layers whose parameters no slot describes. Other modules with parameters of their own are traced through."""


def layout_of(module: nn.Module) -> Layout | str | None:
    """Describe a layer.

    Returns:
        Its layout; or, as a string, why a layer of this type cannot be sliced; or ``None`` for a module that is not
        a layer (a container, an activation, a module with bare parameters of its own).
    """
    if isinstance(module, _NEVER):
        return f"{type(module).__name__} layers cannot be sliced"
    for types, describe in _LAYOUTS:
        if not isinstance(module, types):
            continue
        if parametrize.is_parametrized(module) or _computed_weight(module):
            return f"the weights of this {_type_name(module)} are computed (weight norm or another parametrization)"
        return describe(module)
    return None


def is_leaf_layer(module: nn.Module) -> bool:
    """Whether the table has a word on this module: layers, sliceable or not."""
    return layout_of(module) is not None


def set_sizes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Write a layer's new slot sizes into its integer attributes; its tensors are not touched.

    Args:
        module: A layer that :func:`layout_of` describes.
        sizes: New size of each slot that changed.
    """
    both = sizes.get("both")
    if isinstance(module, nn.Linear):
        module.in_features = sizes.get("in", module.in_features)
        module.out_features = sizes.get("out", module.out_features)
    elif isinstance(module, _ConvNd):
        if both is not None:
            module.in_channels = module.out_channels = module.groups = both
        module.in_channels = sizes.get("in", module.in_channels)
        module.out_channels = sizes.get("out", module.out_channels)
    elif both is None:
        return
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        module.num_features = both
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = both
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = (both,)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = both
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = both
    elif isinstance(module, nn.MultiheadAttention):
        module.embed_dim = module.kdim = module.vdim = both
        module.head_dim = both // module.num_heads
        module.out_proj.in_features = module.out_proj.out_features = both
    else:
        raise TypeError(f"{type(module).__name__} is not a layer that can be sliced")


def _computed_weight(module: nn.Module) -> bool:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return isinstance(getattr(module, name, None), torch.Tensor) and module._parameters.get(name) is None


def _type_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")
