"""Layers of other libraries, which are known by name: none of these libraries is imported for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_softprune.graph.geometry import WeightGeometry
from lightning_softprune.graph.layers import (
    Applications,
    LayerType,
    Layout,
    MacTerm,
    Sizes,
    TensorAxis,
    add_layer_type,
)


class HuggingFaceConv1DType(LayerType):
    """``transformers.pytorch_utils.Conv1D``, all of GPT-2: a linear layer whose weight is the other way round."""

    takes_bias = True

    def is_for(self, kind: type) -> bool:
        """Whether it is that class, or what older releases had in its place."""
        return kind.__name__ == "Conv1D" and kind.__module__ in (
            "transformers.pytorch_utils",
            "transformers.modeling_utils",
        )

    def describe(self, module: Any) -> Layout:
        """See `LayerType`."""
        axes = (TensorAxis("weight", 0, "in"), TensorAxis("weight", 1, "out"), TensorAxis("bias", 0, "out"))
        return Layout(self.mac_sizes(module), axes)

    def resize(self, module: Any, sizes: Mapping[str, int]) -> None:
        """See `LayerType`; older releases do not keep the number of inputs."""
        if hasattr(module, "nx"):
            module.nx = sizes.get("in", module.nx)
        module.nf = sizes.get("out", module.nf)

    def geometry(self, module: Any) -> WeightGeometry:
        """See `LayerType`."""
        return WeightGeometry(module.weight.shape[0], module.weight.shape[1], input_dim=0)

    def observe(self, module: Any, inputs: Mapping[str | int, Any], output: Any, seen: Applications) -> None:
        """Count rows."""
        seen.applied += output.numel() / max(module.weight.shape[1], 1)

    def macs(self, module: nn.Module, seen: Applications) -> tuple[MacTerm, ...]:
        """See `LayerType`."""
        return (MacTerm(seen.applied, ("in", "out")),)

    def mac_sizes(self, module: Any) -> Sizes:
        """See `LayerType`."""
        return {"in": module.weight.shape[0], "out": module.weight.shape[1]}


FOREIGN_TYPES: tuple[LayerType, ...] = (HuggingFaceConv1DType(),)
"""All entries; importing this file puts them into the table."""

for _entry in FOREIGN_TYPES:
    add_layer_type(_entry)
