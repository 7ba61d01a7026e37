"""Probing: groups are tried on the live model before a search, against the same channels set to zero."""

from lightning_softprune.surgery.probing.attempts import Candidates, probe_with_counts
from lightning_softprune.surgery.probing.fingerprints import forget_weights
from lightning_softprune.surgery.probing.probe import mask_channels, one_can_go, probe_groups
from lightning_softprune.surgery.probing.readings import best_reading

__all__ = [
    "Candidates",
    "best_reading",
    "forget_weights",
    "mask_channels",
    "one_can_go",
    "probe_groups",
    "probe_with_counts",
]
