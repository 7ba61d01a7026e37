"""What is scored, what a pass finds, and both as a line of a journal."""

from __future__ import annotations

import contextlib
import json
import math
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_LONGEST_LINE = 2**20


class Key(NamedTuple):
    """What a pass scored.

    Attributes:
        kind: ``"baseline"`` (the module as it was), ``"trial"``, ``"refined"`` (the chosen plan, compensated anew), or
            ``"healed on <n> batches"`` (that plan after healing).
        removed: Channels removed from each group.
        network: Digest of what the numbers in `removed` stand for: the groups, and which of their channels go first.
    """

    kind: str
    removed: tuple[int, ...] = ()
    network: str = ""


class Pass(NamedTuple):
    """What a pass found.

    Attributes:
        metrics: Every metric that was logged.
        seconds: What it took.
    """

    metrics: dict[str, float]
    seconds: float


BASELINE = Key("baseline")


def lines_of(path: Path | None) -> Iterator[bytes]:
    """The lines of a file, as far as it can be read; what is longer than any line of ours comes in pieces."""
    with contextlib.suppress(OSError):
        # a link may lead anywhere, a folder cannot be read, and a pipe would be waited for
        if path is not None and not path.is_symlink() and path.is_file():
            with path.open("rb") as file:
                yield from iter(lambda: file.readline(_LONGEST_LINE), b"")


def read_json(line: str | bytes) -> Any:
    """What a line of JSON holds; ``None`` for anything else."""
    try:
        return json.loads(line.decode() if isinstance(line, bytes) else line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8
        return None


def parse_pass(line: str | bytes) -> tuple[Key, Pass] | None:
    """What a line says; ``None`` where it is none of ours."""
    try:
        record = read_json(line)
        key = Key(str(record["kind"]), tuple(operator.index(n) for n in record["removed"]), str(record["network"]))
        metrics = {str(name): float(value) for name, value in record["metrics"].items()}  # also of "nan" and "inf"
        seconds = float(record["seconds"])
        json.dumps(record, allow_nan=False, ensure_ascii=False).encode()  # not half a character, not a bare NaN
        return (key, Pass(metrics, seconds)) if math.isfinite(seconds) else None
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def near(name: str, one: Mapping[str, float], other: Mapping[str, float], tolerance: float) -> bool:
    """Whether a metric is the same in two passes, to a tolerance relative to its value."""
    if name not in one or name not in other:
        return False
    a, b = one[name], other[name]
    return math.isclose(a, b, rel_tol=tolerance) or (math.isnan(a) and math.isnan(b))


def told(name: str, metrics: Mapping[str, float]) -> str:
    """A metric for messages."""
    return f"{name}={metrics[name]:.8g}" if name in metrics else f"no {name}"
