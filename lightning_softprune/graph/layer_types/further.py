"""``nn.Bilinear`` and ``nn.EmbeddingBag``: entries of the table of layer types, see `layers.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_softprune.graph.layer_types.common import PassingOn
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


class BilinearType(LayerType):
    """``nn.Bilinear``: two inputs, each with a slot of its own."""

    types = (nn.Bilinear,)

    def describe(self, module: nn.Bilinear) -> Layout:
        """See `LayerType`."""
        axes = [TensorAxis("weight", dim, slot) for dim, slot in enumerate(("out", "in1", "in2"))]
        return Layout(self.mac_sizes(module), (*axes, TensorAxis("bias", 0, "out")))

    def resize(self, module: nn.Bilinear, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        module.in1_features = sizes.get("in1", module.in1_features)
        module.in2_features = sizes.get("in2", module.in2_features)
        module.out_features = sizes.get("out", module.out_features)

    def taken(self, module: nn.Bilinear, inputs: Mapping[str | int, Any]) -> Iterator[Port]:
        """Both inputs; they may be one tensor."""
        if isinstance(self.layout(module), Layout):
            for place, slot in enumerate(("in1", "in2")):
                tensor = inputs[place] if place in inputs else inputs[f"input{place + 1}"]
                yield Port(tensor, slot, tensor.ndim - 1)

    def observe(self, module: nn.Bilinear, inputs: Mapping[str | int, Any], output: Any, seen: Applications) -> None:
        """Count rows."""
        seen.applied += output.numel() / max(module.out_features, 1)

    def macs(self, module: nn.Bilinear, seen: Applications) -> tuple[MacTerm, ...]:
        """Every output weighs every pair of inputs."""
        return (MacTerm(seen.applied, ("in1", "in2", "out")),)

    def mac_sizes(self, module: nn.Bilinear) -> Sizes:
        """See `LayerType`."""
        return {"in1": module.in1_features, "in2": module.in2_features, "out": module.out_features}


class EmbeddingBagType(PassingOn):
    """``nn.EmbeddingBag``: the width can go, tokens cannot."""

    types = (nn.EmbeddingBag,)
    produces = True
    attribute = "embedding_dim"

    def describe(self, module: nn.EmbeddingBag) -> Layout:
        """See `LayerType`."""
        return Layout({"both": module.embedding_dim}, (TensorAxis("weight", 1, "both"),))

    def taken(self, module: nn.EmbeddingBag, inputs: Mapping[str | int, Any]) -> Iterator[Port]:
        """Tokens, offsets and weights of tokens are no channels."""
        yield from ()


FURTHER_TYPES: tuple[LayerType, ...] = (BilinearType(), EmbeddingBagType())
"""The entries of this file; importing it puts them into the table."""

for _entry in FURTHER_TYPES:
    add_layer_type(_entry)
