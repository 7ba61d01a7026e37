"""The entries of the table of layer types; importing this folder puts them into the table (`layers.py`)."""

from lightning_softprune.graph.layer_types.attention import ATTENTION_TYPES
from lightning_softprune.graph.layer_types.common import LAYER_TYPES as COMMON_TYPES
from lightning_softprune.graph.layer_types.foreign import FOREIGN_TYPES
from lightning_softprune.graph.layer_types.further import FURTHER_TYPES
from lightning_softprune.graph.layer_types.recurrent import RECURRENT_TYPES
from lightning_softprune.graph.layer_types.registered import (
    check_layers,
    checked_layers,
    register_layer,
    register_layers,
)
from lightning_softprune.graph.layer_types.spec import LayerSpec

LAYER_TYPES = (*COMMON_TYPES, *ATTENTION_TYPES, *RECURRENT_TYPES, *FURTHER_TYPES)
"""All entries for layers of PyTorch."""

__all__ = [
    "FOREIGN_TYPES",
    "LAYER_TYPES",
    "LayerSpec",
    "check_layers",
    "checked_layers",
    "register_layer",
    "register_layers",
]
