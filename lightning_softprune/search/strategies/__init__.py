"""The search strategies of the package, one file each."""

from __future__ import annotations
