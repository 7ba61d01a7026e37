"""Attention layers of PyTorch: entries of the table of layer types, see `layers.py`.

Heads and channels are two things. The slot ``"heads"`` has all heads side by side, behind the first projection, and
loses whole heads; its other end is the input of ``out_proj``, a linear layer like any other. ``"both"`` are the
channels of queries and outputs, and of keys and values where these have no width of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_softprune.graph.geometry import Shape, WeightGeometry, check_rank
from lightning_softprune.graph.layer_types.pruned_attention import (
    PrunedMultiheadAttention,
    dense_class,
    pruned_class,
)
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

_NAMES = ("query", "key", "value")
_OWN = ("both", "in_key", "in_value")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Attention(LayerType):
    """What both kinds of attention have in common."""

    produces = False
    owns_children = True
    weight = "in_proj_weight"

    def taken(self, module: nn.MultiheadAttention, inputs: Mapping[str | int, Any]) -> Iterator[Port]:
        """Queries, keys and values."""
        for place, (name, slot) in enumerate(zip(_NAMES, _slots(module), strict=True)):
            tensor = _argument(inputs, place, name)
            yield Port(tensor, slot, tensor.ndim - 1)

    def observe(
        self, module: nn.MultiheadAttention, inputs: Mapping[str | int, Any], output: Any, seen: Applications
    ) -> None:
        """Count queries, keys, and pairs of them."""
        query, key = _argument(inputs, 0, "query"), _argument(inputs, 1, "key")
        rows, length = query.numel() / query.shape[-1], key.numel() / key.shape[-1]
        batch = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
        seen.applied += rows
        seen.keys += length
        seen.pairs += rows * length / batch

    def geometry(self, module: nn.MultiheadAttention) -> WeightGeometry:
        """See `LayerType`."""
        weight = "q_proj_weight" if module.in_proj_weight is None else "in_proj_weight"
        outputs = (1 if module.in_proj_weight is None else 3) * _width(module)
        return WeightGeometry(module.embed_dim, outputs, weight=weight, slot="both", is_whole=False)


class AttentionType(_Attention):
    """``nn.MultiheadAttention``; what has lost anything is a `PrunedMultiheadAttention`."""

    types = (nn.MultiheadAttention, PrunedMultiheadAttention)

    def layout(self, module: nn.MultiheadAttention) -> Layout | str:
        """See `LayerType`; the output projection is part of it."""
        if parametrize.is_parametrized(module.out_proj):
            return "the weights of its output projection are computed (weight norm or another parametrization)"
        return super().layout(module)

    def describe(self, module: nn.MultiheadAttention) -> Layout:
        """See `LayerType`."""
        slots = {"both": module.embed_dim, "heads": _width(module)}
        if module.in_proj_weight is None:
            slots |= {"in_key": module.kdim, "in_value": module.vdim}
            projections = [
                axis
                for weight, slot in zip(_SEPARATE, _OWN, strict=True)
                for axis in (TensorAxis(weight, 0, "heads"), TensorAxis(weight, 1, slot))
            ]
        else:
            projections = [
                TensorAxis("in_proj_weight", 0, "heads", repeat=3),
                TensorAxis("in_proj_weight", 1, "both"),
            ]
        axes = (
            *projections,
            TensorAxis("in_proj_bias", 0, "heads", repeat=3),
            TensorAxis("bias_k", 2, "heads"),
            TensorAxis("bias_v", 2, "heads"),
        )
        return Layout(slots, axes, runs={"heads": module.head_dim})

    def linked(self, module: nn.MultiheadAttention) -> tuple[tuple[str, str, str], ...]:
        """The output projection reads the heads."""
        return (("heads", "out_proj", "in"), ("both", "out_proj", "out"))

    @contextmanager
    def calling_parts(self, module: nn.MultiheadAttention) -> Iterator[None]:
        """As a pruned layer it computes the same, and calls its output projection."""
        kind = type(module)
        module.__class__ = pruned_class(kind)
        try:
            yield
        finally:
            module.__class__ = kind

    def resize(self, module: nn.MultiheadAttention, sizes: Mapping[str, int]) -> None:
        """See `LayerType`; heads keep their width."""
        now = self.describe(module).slots
        after = {**now, **sizes}
        if after != now:
            _become_pruned(module)
            _set_widths(module, after)
            module.num_heads = after["heads"] // max(module.head_dim, 1)

    def macs(self, module: nn.MultiheadAttention, seen: Applications) -> tuple[MacTerm, ...]:
        """Queries and output, keys, values; then scores, and the weighted sum of the values."""
        _, key, value = _slots(module)
        return (
            MacTerm(2 * seen.applied, ("both", "heads")),
            MacTerm(seen.keys, (key, "heads")),
            MacTerm(seen.keys, (value, "heads")),
            MacTerm(2 * seen.pairs, ("heads",)),
        )

    def mac_sizes(self, module: nn.MultiheadAttention) -> Sizes:
        """See `LayerType`."""
        return dict(self.describe(module).slots)

    # ------------------------------------------------------------------------------------------------ in checkpoints

    def recorded_sizes(self, module: nn.MultiheadAttention) -> Sizes:
        """What its constructor does not say: of a layer that lost nothing, what 0.1.0 has recorded too."""
        layout = self.layout(module)
        if not isinstance(layout, Layout):
            return {}
        sizes = dict(layout.slots)
        if isinstance(module, PrunedMultiheadAttention):
            return {**sizes, "num_heads": module.num_heads}
        del sizes["heads"]
        return sizes

    def completed_sizes(self, module: nn.MultiheadAttention, sizes: Mapping[str, int]) -> Sizes:
        """See `LayerType`."""
        if "both" not in sizes:
            return dict(sizes)
        heads = getattr(module, "unpruned_heads", module.num_heads)
        return {"heads": sizes["both"], "num_heads": heads, **sizes}

    def sizes_from(self, module: nn.MultiheadAttention, shapes: Mapping[str, Shape]) -> Sizes | None:
        """See `LayerType`; the number of heads follows from their width, which no plan changes.

        Raises:
            ValueError: It does not follow: 0.1.0 narrowed all heads instead.
        """
        layout = self.layout(module)
        if not isinstance(layout, Layout):
            return None
        sizes: Sizes = {}
        for axis in layout.axes:
            shape, tensor = shapes.get(axis.tensor), getattr(module, axis.tensor)
            if shape is not None and tensor is not None:
                check_rank(shape, tensor)
                sizes.setdefault(axis.slot, shape[axis.dim] // axis.repeat)
        if sizes.keys() != layout.slots.keys():
            return None
        heads, count = sizes["heads"], getattr(module, "unpruned_heads", module.num_heads)
        whole, narrowed = heads % module.head_dim == 0, heads == sizes["both"] and heads % count == 0
        if whole and narrowed and heads // module.head_dim != count:
            raise ValueError(
                f"the tensors' shapes do not tell how many heads it has ({count} narrower ones, or "
                f"{heads // module.head_dim}); pass the whole checkpoint, or its 'softprune' record"
            )
        return {**sizes, "num_heads": heads // module.head_dim if whole else count}

    def shapes_at(self, module: nn.MultiheadAttention, sizes: Mapping[str, int]) -> dict[str, Shape]:
        """See `LayerType`."""
        count = sizes["num_heads"]
        if count < 1 or sizes["heads"] % count:
            raise ValueError(f"{sizes['heads']} channels do not make {count} equal heads")
        return super().shapes_at(module, sizes)

    def restore(self, module: nn.MultiheadAttention, sizes: Mapping[str, int]) -> None:
        """See `LayerType`; with the number of heads that its constructor gave it, it is PyTorch's again."""
        heads = getattr(module, "unpruned_heads", module.num_heads)
        if sizes["heads"] == sizes["both"] and sizes["num_heads"] == heads:
            module.__class__ = dense_class(type(module))
            module.__dict__.pop("unpruned_heads", None)
        else:
            _become_pruned(module)
        _set_widths(module, sizes)
        module.num_heads = sizes["num_heads"]
        module.head_dim = sizes["heads"] // sizes["num_heads"]


class TiedAttentionType(_Attention):
    """A subclass with a forward of its own, which may count on PyTorch's widths: all sides alike."""

    averages_channels = True  # by its scale
    own_forward = True

    def is_for(self, kind: type) -> bool:
        """See `LayerType`."""
        known = (nn.MultiheadAttention.forward, PrunedMultiheadAttention.forward)
        return issubclass(kind, nn.MultiheadAttention) and kind.forward not in known

    def describe(self, module: nn.MultiheadAttention) -> Layout | str:
        """See `LayerType`; one dimension of every head."""
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

    def resize(self, module: nn.MultiheadAttention, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        if "both" in sizes:
            width = sizes["both"]
            _set_widths(module, sizes)
            module.head_dim = width // module.num_heads
            module.out_proj.in_features = module.out_proj.out_features = width

    def macs(self, module: nn.MultiheadAttention, seen: Applications) -> tuple[MacTerm, ...]:
        """Queries and output, keys and values; then scores, and the weighted sum of the values."""
        return (
            MacTerm(2 * seen.applied + 2 * seen.keys, ("both", "both")),
            MacTerm(2 * seen.pairs, ("both",)),
        )

    def mac_sizes(self, module: nn.MultiheadAttention) -> Sizes:
        """See `LayerType`."""
        return {"both": module.embed_dim}


def _argument(inputs: Mapping[str | int, Any], place: int, name: str) -> torch.Tensor:
    found: torch.Tensor = inputs[place] if place in inputs else inputs[name]
    return found


def _slots(module: nn.MultiheadAttention) -> tuple[str, ...]:
    """The slots of queries, keys and values."""
    return _OWN if module.in_proj_weight is None else ("both",) * 3


def _width(module: nn.MultiheadAttention) -> int:
    """Of all heads together."""
    return int(module.num_heads * module.head_dim)


def _become_pruned(module: nn.MultiheadAttention) -> None:
    module.__dict__.setdefault("unpruned_heads", module.num_heads)
    module.__class__ = pruned_class(type(module))


def _set_widths(module: nn.MultiheadAttention, sizes: Mapping[str, int]) -> None:
    module.embed_dim = sizes["both"]
    module.kdim, module.vdim = sizes.get("in_key", sizes["both"]), sizes.get("in_value", sizes["both"])


ATTENTION_TYPES: tuple[LayerType, ...] = (TiedAttentionType(), AttentionType())
"""The entries of this file; importing it puts them into the table."""

for _entry in ATTENTION_TYPES:
    add_layer_type(_entry)
