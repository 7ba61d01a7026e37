"""The journal: passes of a running round on disk, known by digests of all that a score depends on."""

from lightning_softprune.round.journal.fingerprint import digest
from lightning_softprune.round.journal.journal import Journal, journal_path, open_journal
from lightning_softprune.round.journal.passes import BASELINE, Key

__all__ = ["BASELINE", "Journal", "Key", "digest", "journal_path", "open_journal"]
