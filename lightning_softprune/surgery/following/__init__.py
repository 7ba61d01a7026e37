"""Following: what points at parameters from anywhere, in the model or around it, gets those that a surgery has made."""

from lightning_softprune.surgery.following.judgement import Judgement
from lightning_softprune.surgery.following.references import References
from lightning_softprune.surgery.following.sightings import Sightings

__all__ = ["Judgement", "References", "Sightings"]
