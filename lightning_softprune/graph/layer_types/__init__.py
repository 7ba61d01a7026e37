"""The entries of the table of layer types; importing this folder puts them into the table (`layers.py`)."""

from lightning_softprune.graph.layer_types.common import LAYER_TYPES as COMMON_TYPES
from lightning_softprune.graph.layer_types.further import FURTHER_TYPES
from lightning_softprune.graph.layer_types.recurrent import RECURRENT_TYPES

LAYER_TYPES = (*COMMON_TYPES, *RECURRENT_TYPES, *FURTHER_TYPES)
"""All entries."""

__all__ = ["LAYER_TYPES"]
