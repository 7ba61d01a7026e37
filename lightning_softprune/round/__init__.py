"""One round: from a trained module to a smaller one with its score, or to the module as it was."""

from lightning_softprune.round.prepare import prepare_groups
from lightning_softprune.round.run import run_round
from lightning_softprune.round.settings import RoundSettings, _bounds, _epochs, _limits, _patterns, _targets

__all__ = [
    "RoundSettings",
    "_bounds",
    "_epochs",
    "_limits",
    "_patterns",
    "_targets",
    "prepare_groups",
    "run_round",
]
