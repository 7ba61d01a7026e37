"""The passes of a running round, on disk as they finish: a search that was killed goes on where it stopped.

A journal is a file of JSON lines. The first one is a header with the *fingerprint* of all that a plan's score depends
on; each of the others is one finished validation pass. The same round, started again, runs the same search: wherever it
comes to a pass that the journal holds, it takes the metrics from there. Plan, trials and budget are those of a run that
nobody killed. A round that ends well removes its journal.

A fingerprint cannot see everything (a function that a step calls), so what is taken over is *confirmed* by passes that
no budget counts: the module as it is is scored once more before the search, and a plan that comes from the journal once
more before it is committed. Where the metrics are not the same, the journal is *set aside*: renamed, with a warning
that names both paths, and the search starts from the beginning.

A journal helps and never harms: a line that cannot be read is as good as absent, and so is one whose digest is not its
own (it was edited, or is of another search), or whose score is missing or not a finite number; that pass is run again.
A journal with another fingerprint is replaced, and where none can be written the round goes on without. Lines of
release 0.1.0 have no digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_softprune.round.journal.fingerprint import digest, fingerprint
from lightning_softprune.round.journal.passes import BASELINE, Key, Pass, lines_of, near, parse_pass, read_json, told
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import AUTO, mode_of_name
from lightning_softprune.utilities.files import being_replaced, open_to_append, remove_leftovers, sync_file

FORMAT = 1
"""Version of the format; other versions are not read."""

SAME, NEARLY_SAME = 1e-6, 1e-3
"""How far a metric may be off, relative to its value, when the same weights are scored once more: on a CPU; and where
sums run in any order, as on other devices. A sample of a thousand may fall to the other side there."""

_WITHOUT_INFLUENCE = frozenset({"verbose", "latency_batch", "healing", "teacher"})  # settings that no score depends on

_ADDED = (("memory_limit", None),)  # settings that release 0.1.0 had not, with which a round is as it was


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
        required: Metrics that a trial is of no use without, the score first.
        folders: How many of the folders above the file are for journals only: they go with it if they are empty.
        share: What one process read -> what all use (a broadcast, where several processes score together).
        verbose: Whether to say that an earlier search is continued, or cannot be.

    Attributes:
        tolerance: How far metrics may be off when a pass is confirmed, relative to their values.
    """

    tolerance = SAME

    def __init__(
        self,
        path: Path | None,
        expected: Mapping[str, str],
        *,
        required: Sequence[str] = (),
        folders: int = 0,
        share: Callable[[list[str]], list[str]] = lambda lines: lines,
        verbose: bool = True,
    ) -> None:
        self._path = path
        self._expected = dict(expected)
        self._required, self._verbose = tuple(required), verbose
        self._file: BinaryIO | None = None
        self._began = self._gave_up = False
        self._identity: tuple[int, int] | None = None  # of the file that is ours to remove
        self._folders = folders  # above the file, to be removed with it; also those that had to be made for it
        self._seal = ""  # the baseline's digest, which the others hold too
        self._foreign = 0  # lines whose digest is not their own
        self._orphaned = False  # whether there are trials without a baseline
        self._lines = share(self._read())
        self._passes: dict[Key, Pass] = {}
        for line in self._lines:
            if entry := parse_pass(line):
                self._passes.setdefault(*entry)
        self._unconfirmed = set(self._passes)  # what is from an earlier run
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
        written = self._file is not None
        self._close()
        useful = any(key.kind == "trial" for key in self._passes)
        if written and useful and exception_type is not None and issubclass(exception_type, KeyboardInterrupt):
            rank_zero_info(
                f"SoftPruning: the search was interrupted, and can go on: its {len(self._passes)} evaluations are in "
                f"{self._path}. Start the same run again, from the same weights (`ckpt_path` with a checkpoint of this "
                "epoch, the same seed, or `prune` with the same model): they are taken over from there"
            )
        if exception_type is None or not useful:
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
            self._keep(key, Pass(metrics, time.monotonic() - started), details)
        return self._passes[key]

    def confirm(self, key: Key, score: Callable[[], dict[str, float]], **details: object) -> bool:
        """Run a pass that was taken over once more; where it finds something else, set the journal aside.

        Args:
            key: What is scored; the baseline first.
            score: Runs the pass.
            details: As for `scored`.

        Returns:
            Whether the journal still holds. If not, all trials so far are to be forgotten.
        """
        continued = any(other.kind == "trial" for other in self._unconfirmed)
        if key == BASELINE and (self._orphaned or (continued and key not in self._unconfirmed)):
            self._set_aside("it has trials, and no score of the model as it was that can be read")
            return False
        if not continued:
            self._forget()  # a baseline alone saves nothing
        if key not in self._unconfirmed:
            return True
        then, started = self._passes[key], time.monotonic()
        now = Pass(score(), time.monotonic() - started)
        differing = self._differing(then.metrics, now.metrics, score)
        if not differing:
            self._unconfirmed.discard(key)
            return True
        what = "the model as it is" if key == BASELINE else "the chosen plan"
        name = next((name for name in self._required if name in differing), differing[0])
        self._set_aside(
            f"scored once more, {what} has {told(name, now.metrics)} and not {told(name, then.metrics)}, so "
            "something has changed since it was written"
        )
        self._keep(key, now, details)
        return False

    def _differing(
        self, then: Mapping[str, float], now: Mapping[str, float], score: Callable[[], dict[str, float]]
    ) -> list[str]:
        """Metrics that are not the same; those that are never the same (a duration) tell nothing."""
        names = sorted({*then, *now})
        differing = [name for name in names if not near(name, then, now, self.tolerance)]
        if not differing:
            return []
        again = score()
        return [
            name
            for name in differing
            if near(name, now, again, self.tolerance)
            or (name in self._required and not near(name, then, now, NEARLY_SAME))
        ]

    def _keep(self, key: Key, found: Pass, details: Mapping[str, object]) -> None:
        self._passes[key] = found
        self._append(self._line(key, found, details))

    def _line(self, key: Key, found: Pass, details: Mapping[str, object]) -> str:
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in found.metrics.items()}
        score = metrics.get(self._required[0]) if self._required else None
        record = {**key._asdict(), **details, "score": score, "metrics": metrics, "seconds": found.seconds}
        return self._sealed(record)

    def _forget(self) -> None:
        """Drop what is not confirmed; where something is, the next line begins a new file."""
        if not self._unconfirmed and not self._orphaned:
            return
        self._close()
        baseline = None if BASELINE in self._unconfirmed else self._passes.get(BASELINE)
        self._passes = {} if baseline is None else {BASELINE: baseline}
        self._lines = [self._line(key, found, {}) for key, found in self._passes.items()]
        self._unconfirmed, self._orphaned = set(), False

    def _set_aside(self, reason: str) -> None:
        moved = "is not used any more"
        if self._path is not None:
            self._close()
            aside = self._path.with_name(f"{self._path.name}.set-aside-{secrets.token_hex(4)}")
            with contextlib.suppress(OSError):
                if self._identity is not None and _identity(self._path) == self._identity:
                    self._path.rename(aside)
                    moved = f"is now {aside}"
                    self._identity = None
        rank_zero_warn(
            f"SoftPruning: the journal {self._path} {moved}, and the search starts from the beginning: {reason}"
        )
        self._forget()

    # -------------------------------------------------------------------------------------------------------- digests

    def _sealed(self, record: Mapping[str, object]) -> str:
        """A line: the record with a digest of it, of the fingerprint and of the baseline."""
        content = {name: value for name, value in record.items() if name != "digest"}
        first = record.get("kind") == BASELINE.kind
        text = json.dumps(content, allow_nan=False, sort_keys=True)
        seal = digest(sorted(self._expected.items()), "" if first else self._seal, text)
        self._seal = seal if first else self._seal
        return json.dumps({**content, "digest": seal}, allow_nan=False)

    # ---------------------------------------------------------------------------------------------------------- files

    def _read(self) -> list[str]:
        """The lines of an earlier run of this round that can be used."""
        lines = lines_of(self._path)
        header = read_json(next(lines, b""))
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
        usable = [text for line in lines if (text := self._usable(line, bool(header.get("digests"))))]
        if self._foreign and self._verbose:
            rank_zero_info(
                f"SoftPruning: {self._foreign} lines of {self._path} are not as they were written, or of another "
                "search; their passes are run again"
            )
        return usable

    def _usable(self, line: bytes, sealed: bool) -> str | None:
        """A line as it is written now, if it can be used.

        Args:
            line: What was read.
            sealed: Whether it must have its digest.
        """
        entry, seal = parse_pass(line), self._seal
        if entry is None:
            return None
        key, found = entry
        if key.kind == "trial":
            self._orphaned = self._orphaned or not self._seal
            if not all(math.isfinite(found.metrics.get(name, math.nan)) for name in self._required):
                return None
        elif key != BASELINE:  # what was made of the chosen plan is scored when it is made
            return None
        record = read_json(line)
        text = self._sealed(record)
        if sealed and record.get("digest") != read_json(text)["digest"]:
            self._seal = seal
            self._foreign += 1
            return None
        return text

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
            _warn(f"{self._path}: {type(error).__name__}: {error}")

    def _begin(self, path: Path) -> BinaryIO:
        """Put a new file in the place of the old one, with what is still good of it.

        Always a new one: a run that still writes the old one, in the same folder, cannot mix its lines into it.
        """
        self._began = True
        self._folders = max(self._folders, sum(not folder.exists() for folder in path.parents))
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"softprune_journal": FORMAT, "fingerprint": self._expected, "folders": self._folders, "digests": True}
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
        file = open_to_append(path)
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
    settings: RoundSettings,
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
        settings: The round's settings.
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
            if field.name not in _WITHOUT_INFLUENCE and (field.name, getattr(settings, field.name)) not in _ADDED
        }
        configuration["importance"] = settings.ranking
        # the batches themselves are part of what trials are of; 8 was the default of release 0.1.0
        configuration["calibration_batches"] = settings.least_calibration_batches
        if settings.mode == AUTO:  # what a name says was the default of release 0.1.0
            configuration["mode"] = mode_of_name(settings.monitor) or AUTO
        configuration.update(epoch=epoch, target=target, precision=trainer.precision, world_size=trainer.world_size)
        expected = fingerprint(module, configuration, data)
        if "://" in str(root):
            _warn(f"default_root_dir={root!r} is not a local folder")
        else:
            path = journal_path(Path(root).absolute(), epoch)

    def share(lines: list[str]) -> list[str]:
        return trainer.strategy.broadcast(lines)

    journal = Journal(
        path, expected, required=settings.objective.metrics, folders=2, share=share, verbose=settings.verbose
    )
    journal.tolerance = SAME if trainer.strategy.root_device.type == "cpu" else NEARLY_SAME
    return journal


def _warn(reason: str) -> None:
    rank_zero_warn(f"SoftPruning keeps no journal, so a search that is killed starts from the beginning: {reason}")


def _identity(path: Path | None) -> tuple[int, int] | None:
    try:
        status = None if path is None else path.stat()
    except OSError:
        return None
    return None if status is None else (status.st_dev, status.st_ino)
