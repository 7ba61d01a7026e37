"""A shelf of small tools that know nothing of pruning. Each file is its own door; this one imports nothing."""

from __future__ import annotations
