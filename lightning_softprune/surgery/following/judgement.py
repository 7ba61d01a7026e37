"""What becomes of a module outside of the model that looks like a part of it."""

from __future__ import annotations

from enum import Enum


class Judgement(Enum):
    """It is pruned alike, as an average has to be, or left alone, as a fixed teacher has to be."""

    FOLLOWS = "follows"
    STAYS = "stays as it is"
    IN_DOUBT = "follows, and is named"
