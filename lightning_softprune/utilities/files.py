"""Files in folders that others may write to.

Replacing: a reader sees the old file or the new one, never half of one. Neither reading nor writing follows a link that
somebody has put in the place of a file of ours, or opens what is no file (a pipe would be waited for, for ever).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "being_replaced",
    "open_to_append",
    "read_file",
    "refuse_link",
    "refuse_other_than_file",
    "remove_leftovers",
    "replace_file",
    "sync_file",
]


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


def read_file(path: Path, *, follow_links: bool = False) -> bytes:
    """What is in a regular file.

    Args:
        path: The file.
        follow_links: Whether it may be a link to one, as where the user has named it.

    Raises:
        OSError: It is a link or anything else that is no regular file, or it cannot be read; it has the path.
    """
    if not follow_links:
        refuse_link(path)
    refuse_other_than_file(path)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= 0 if follow_links else getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # somebody has exchanged it since
            raise _no_file(path)
        return file.read()


def refuse_other_than_file(path: Path) -> None:
    """Let regular files, and links to them, pass; nothing is opened.

    Raises:
        OSError: It is something else, or not there; it has the path.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise _no_file(path)


def refuse_link(path: Path) -> None:
    """Let anything but a link pass.

    Raises:
        OSError: It is a link; it has the path.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link, which is not followed", str(path))


def _no_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


def open_to_append(path: Path) -> BinaryIO:
    """Open a file that is there, to write on at its end.

    Raises:
        OSError: It is not there, or is a link.
    """
    flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    return open(os.open(path, flags), "ab")


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
