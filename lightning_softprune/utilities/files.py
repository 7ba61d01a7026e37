"""Replacing files: a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["being_replaced", "remove_leftovers", "replace_file", "sync_file"]


def replace_file(path: Path, content: bytes) -> Path:
    """Put a file with this content in the place of another, or where there was none.

    Args:
        path: The file; its folder is there.
        content: All of it.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written; the old file, if there was one, is as it was.
    """
    with being_replaced(path) as file:
        file.write(content)
    return path


@contextmanager
def being_replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file to write into, which takes the other's place at the end of the block if no exception ends it.

    It is made under a name that nobody can foresee and that is nobody's yet, so that no link is followed; opened the
    ordinary way, so that it gets the permissions that the user's umask gives.

    Args:
        path: The file; its folder is there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    file = temporary.open("xb")  # outside: a file that is there already is not ours to remove
    try:
        with file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while it replaced this file has left beside it.

    Raises:
        OSError: Something cannot be removed.
    """
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink()


def sync_file(file: BinaryIO) -> None:
    """Have all that was written into a file on the disk.

    Raises:
        OSError: The disk is full, or gone.
    """
    file.flush()
    os.fsync(file.fileno())
