"""Steps that are run again and again, each time a little further: what they computed before is kept."""

from lightning_softprune.compensation.replay.layers import Replay

__all__ = ["Replay"]
