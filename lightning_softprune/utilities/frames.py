"""Where in the user's code something happens: the frames that are neither PyTorch's, nor Lightning's, nor ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

_LIBRARIES = (
    "torch",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "pytorch_lightning",
    "torchmetrics",
    "contextlib",
    __name__.partition(".")[0],
)
"""Packages whose code is not the user's."""


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs code of the user's, or of a library of models."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _LIBRARIES


def line_of(frame: FrameType | None, line: int | None = None) -> str:
    """File and line, as in ``"model.py:12"``; empty without a frame."""
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{line or frame.f_lineno}"


def users_line(frame: FrameType | None) -> str:
    """The line of the user's code that led to a frame; empty where there is none."""
    while frame is not None and not is_users(frame):
        frame = frame.f_back
    return line_of(frame)


def frames_of(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """The frames of an exception with the lines that they had come to, from the outermost to the innermost."""
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def is_raised_by_us(error: BaseException) -> bool:
    """Whether an exception that was caught is a check of ours that has failed, and not the user's own."""
    *_, (raised_in, _) = frames_of(error.__traceback__)
    package = str(raised_in.f_globals.get("__name__", "")).partition(".")[0]
    return isinstance(error, ValueError) and package == __name__.partition(".")[0]
