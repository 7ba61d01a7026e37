"""The entries of the table of layer types; importing this folder puts them into the table (`layers.py`)."""

from lightning_softprune.graph.layer_types.common import LAYER_TYPES

__all__ = ["LAYER_TYPES"]
