"""The passes of a running round, on disk as they finish: a search that was killed goes on where it stopped.

A journal is a file of JSON lines. The first one is a header with the *fingerprint* of all that a plan's score depends
on; each of the others is one finished validation pass. The same round, started again, runs the same search: wherever it
comes to a pass that the journal holds, it takes the metrics from there. Nothing is evaluated twice, and plan, trials
and budget are those of a run that nobody killed. A round that ends well removes its journal.

A journal helps and never harms: a line that cannot be read is as good as absent, a journal with another fingerprint is
replaced, and where none can be written the round goes on without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_softprune.round.fingerprint import fingerprint
from lightning_softprune.utilities.files import being_replaced, remove_leftovers, sync_file

FORMAT = 1
"""Version of the format; other versions are not read."""

_WITHOUT_INFLUENCE = frozenset({"verbose"})  # settings that no score depends on


class Key(NamedTuple):
    """What a pass scored.

    Attributes:
        kind: ``"baseline"`` (the module as it was), ``"trial"``, or ``"refined"`` (the chosen plan, compensated anew).
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


def journal_path(root: str | Path, epoch: int) -> Path:
    """Where the journal of the round at `epoch` lies while the round runs.

    >>> journal_path("runs", 10).as_posix()
    'runs/softprune/journal/epoch=10.jsonl'
    """
    return Path(root) / "softprune" / "journal" / f"epoch={epoch}.jsonl"


class Journal:
    """The passes of one round: those that a killed run had finished, and those that finish now.

    A context manager. Leaving it without an exception removes the file and the folders that are empty then; an
    exception leaves the file for the next try, once a trial is in it.

    Args:
        path: The file; ``None``: nothing is read or written.
        expected: The fingerprint of this round, see `fingerprint`.
        monitor: Which of the metrics is the score.
        folders: How many of the folders above the file are for journals only: they go with it if they are empty.
        share: What one process read -> what all use (a broadcast, where several processes score together).
        verbose: Whether to say that an earlier search is continued, or cannot be.
    """

    def __init__(
        self,
        path: Path | None,
        expected: Mapping[str, str],
        *,
        monitor: str = "",
        folders: int = 0,
        share: Callable[[list[str]], list[str]] = lambda lines: lines,
        verbose: bool = True,
    ) -> None:
        self._path = path
        self._expected = dict(expected)
        self._monitor, self._verbose = monitor, verbose
        self._file: BinaryIO | None = None
        self._began = self._gave_up = False
        self._identity: tuple[int, int] | None = None  # of the file that is ours to remove
        self._folders = folders  # above the file, to be removed with it; also those that had to be made for it
        self._lines = share(self._read())
        self._passes: dict[Key, Pass] = {}
        for line in self._lines:
            if entry := _parse(line):
                self._passes.setdefault(*entry)
        if self._passes and verbose:
            rank_zero_info(f"SoftPruning: {len(self._passes)} evaluations are taken over from {path}")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        if exception_type is None or not any(key.kind == "trial" for key in self._passes):
            self._remove()

    def scored(self, key: Key, score: Callable[[], dict[str, float]], **details: object) -> Pass:
        """Take a pass from the journal; where it holds none, run it and write it down.

        Args:
            key: What is scored.
            score: Runs the pass and returns its metrics. Its exceptions go on, and nothing is written.
            details: Written along, for people who read the file.

        Returns:
            What the pass found, now or then.
        """
        if key not in self._passes:
            started = time.monotonic()
            metrics = score()
            self._passes[key] = Pass(metrics, time.monotonic() - started)
            self._append(_line(key, self._passes[key], self._monitor, details))
        return self._passes[key]

    # ---------------------------------------------------------------------------------------------------------- files

    def _read(self) -> list[str]:
        """The readable lines of an earlier run of this round."""
        try:
            content = b"" if self._path is None else self._path.read_bytes()
        except OSError:
            return []
        first, *others = content.split(b"\n")
        header = _json(first)
        if not isinstance(header, dict):
            return []
        if isinstance(folders := header.get("folders"), int):
            self._folders = max(self._folders, folders)
        found = header.get("fingerprint")
        if header.get("softprune_journal") != FORMAT or found != self._expected:
            if self._verbose:
                found = found if isinstance(found, dict) else {}
                parts = [part for part, value in self._expected.items() if found.get(part) != value] or ["format"]
                rank_zero_info(
                    f"SoftPruning: {self._path} is of another search (not the same: {', '.join(parts)}), so this one "
                    "starts from the beginning"
                )
            return []
        self._identity = _identity(self._path)
        return [line.decode() for line in others if _parse(line)]

    def _append(self, line: str) -> None:
        if self._path is None or self._gave_up:
            return
        try:
            if self._file is None:
                self._file = self._begin(self._path)
            self._file.write(f"{line}\n".encode())
            sync_file(self._file)
        except OSError as error:
            self._close()
            self._gave_up = True
            _warn(f"{type(error).__name__}: {error}")

    def _begin(self, path: Path) -> BinaryIO:
        """Put a new file in the place of the old one, with what is still good of it.

        Always a new one: a run that still writes the old one, in the same folder, cannot mix its lines into it.
        """
        self._began = True
        self._folders = max(self._folders, sum(not folder.exists() for folder in path.parents))
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"softprune_journal": FORMAT, "fingerprint": self._expected, "folders": self._folders}
        with being_replaced(path) as new:
            new.writelines(f"{line}\n".encode() for line in (json.dumps(header), *self._lines))
            sync_file(new)
            self._identity = _identity(Path(new.name))
        if os.name == "posix":  # the name of a new file is on the disk once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        file = path.open("ab")
        if _identity(path) != self._identity:
            file.close()
            raise FileExistsError(f"another run writes {path}")
        return file

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _remove(self) -> None:
        if self._path is None or (self._identity is None and not self._began):
            return
        with contextlib.suppress(OSError):
            if self._identity is not None and _identity(self._path) == self._identity:
                self._path.unlink()
            remove_leftovers(self._path)
            for _, folder in zip(range(self._folders), self._path.parents, strict=False):
                folder.rmdir()  # ends at the first that is not empty


def open_journal(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    settings: Any,
    data: Sequence[Any],
    *,
    epoch: int,
    target: float | None,
) -> Journal:
    """Open the journal of one round.

    Args:
        trainer: The trainer in charge. The file lies in its `default_root_dir`, which does not change from run to run
            as `log_dir` does; rank zero reads and writes it.
        module: The module before the round.
        settings: The round's settings, a dataclass.
        data: The batches that every plan is scored on.
        epoch: The round's epoch.
        target: The sparsity asked for.
    """
    root = trainer.default_root_dir
    path: Path | None = None
    expected: dict[str, str] = {}
    if trainer.is_global_zero:
        configuration = {
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if field.name not in _WITHOUT_INFLUENCE
        }
        configuration.update(epoch=epoch, target=target, precision=trainer.precision, world_size=trainer.world_size)
        expected = fingerprint(module, configuration, data)
        if "://" in str(root):
            _warn(f"default_root_dir={root!r} is not a local folder")
        else:
            path = journal_path(Path(root).absolute(), epoch)

    def share(lines: list[str]) -> list[str]:
        return trainer.strategy.broadcast(lines)

    return Journal(path, expected, monitor=settings.monitor, folders=2, share=share, verbose=settings.verbose)


def _warn(reason: str) -> None:
    rank_zero_warn(f"SoftPruning keeps no journal, so a search that is killed starts from the beginning: {reason}")


def _identity(path: Path | None) -> tuple[int, int] | None:
    try:
        status = None if path is None else path.stat()
    except OSError:
        return None
    return None if status is None else (status.st_dev, status.st_ino)


def _line(key: Key, found: Pass, monitor: str, details: Mapping[str, object]) -> str:
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in found.metrics.items()}
    record = {**key._asdict(), **details, "score": metrics.get(monitor), "metrics": metrics, "seconds": found.seconds}
    return json.dumps(record, allow_nan=False)


def _json(line: str | bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8
        return None


def _parse(line: str | bytes) -> tuple[Key, Pass] | None:
    """What `_line` wrote; ``None`` for anything else."""
    try:
        record = _json(line)
        key = Key(str(record["kind"]), tuple(int(n) for n in record["removed"]), str(record["network"]))
        metrics = {str(name): float(value) for name, value in record["metrics"].items()}  # also of "nan" and "inf"
        return key, Pass(metrics, float(record["seconds"]))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None
