"""The validation batches of a round: kept in memory while they fit, else read again in each pass; and parts of them.

Either way a pass sees the same batches. Each loader is read from a random state of its own, the same each time, which
the module's steps neither move nor see, beside the run (`loaders_beside`). What is kept is brought to the device once,
by the first pass, and stays there while it fits; a pass gets copies. Where Lightning combines the batches of several
loaders into rows, all are kept.

A *part* is a range of the batches of each loader, in proportion; a prefix, where plans are scored on it. Memory is
counted in bytes of tensors and arrays. The budget is what the user says, or a quarter of what is free: of the host for
what is kept there, of the GPU for what is kept on it.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _extract_batch_size
from torch import Tensor

from lightning_softprune.trainer.isolation import OwnRandomness, isolated_rng
from lightning_softprune.trainer.loaders import loaders_beside
from lightning_softprune.trainer.steps import is_moved_once, move
from lightning_softprune.utilities.nested import copy_batch
from lightning_softprune.utilities.snapshot import ATOMS

GIB = 2**30

_FREE_SHARE = 4
"""Without a limit of the user's, one part in so many of the free memory is used."""

_UNKNOWN = 8 * GIB  # the free memory where the system does not tell


@dataclass(frozen=True)
class Part:
    """Which batches of each loader a pass uses.

    Attributes:
        start: From this fraction of a loader's batches on.
        stop: Up to this fraction.
        most: At most so many of a loader; `None`: no limit.
    """

    start: float = 0.0
    stop: float = 1.0
    most: int | None = None

    def of(self, count: int) -> range:
        """The places of its batches in a loader that has so many.

        >>> Part(0.25, 0.5).of(10), Part(most=4).of(10), Part().of(3)
        (range(3, 5), range(0, 4), range(0, 3))
        """
        start, stop = (min(count, math.ceil(end * count - 1e-9)) for end in (self.start, self.stop))
        return range(start, stop if self.most is None else min(stop, start + self.most))

    def __str__(self) -> str:
        """Its name in files, the same in every process."""
        return f"{self.start:.6g} to {self.stop:.6g}" if self.most is None else f"first {self.most}"


ALL = Part()


def bytes_of(value: Any) -> int:
    """The memory of the tensors, arrays and texts in a batch; what two places share counts once.

    >>> bytes_of({"x": torch.zeros(3, 4), "y": [np.zeros(2), "text"]})
    68
    """
    total, seen, stack = 0, set(), [value]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            total += item.nelement() * item.element_size()
        elif isinstance(item, np.ndarray):
            total += item.nbytes
        elif isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            stack.extend(item)
        elif type(item) not in ATOMS and isinstance(getattr(item, "__dict__", None), dict):
            stack.extend(vars(item).values())
    return total


def samples_of(batch: Any) -> int:
    """How many samples a batch has; 1 where that cannot be told."""
    try:
        return next((size for size in _extract_batch_size(batch) if size is not None), 1)
    except Exception:  # whatever a class of the user's says to being iterated
        return 1


def free_memory(device: torch.device) -> int:
    """Bytes that are free, on a CUDA device or on the host (within the limit of its container)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _UNKNOWN
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = free if most == "max" else min(free, max(0, int(most) - int(used)))
    except (AttributeError, KeyError, OSError, ValueError):  # another system, which has not all of these
        pass
    return free


class _Budget:
    """Bytes that may be held, and are: at most half of them by batches, the rest is for statistics of inputs."""

    def __init__(self, limit: float) -> None:
        self.limit, self.used = limit, 0

    def take(self, size: int) -> bool:
        """Count something in if it fits."""
        fits = self.used + size <= self.limit / 2
        self.used += size if fits else 0
        return fits

    @property
    def left(self) -> int:
        return max(0, int(self.limit) - self.used)


@dataclass
class _Kept:
    """A batch in memory, how much that is, and whether it is on the device already."""

    batch: Any
    size: int
    moved: bool = False


class BatchesReadAgain(Sequence[Any]):
    """The batches of a loader of which not all are kept: they are read whenever this is iterated."""

    def __init__(self, data: ValidationData, number: int) -> None:
        self._data, self._number = data, number

    def __len__(self) -> int:
        return self._data.counts[self._number]

    def __iter__(self) -> Iterator[Any]:
        return self._data.raw_batches(self._number)

    def __getitem__(self, index: Any) -> Any:
        return next(itertools.islice(self, range(len(self))[index], None))


class ValidationData:
    """The validation batches of a round.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        limit: Bytes that may be held; `None`: a quarter of the free memory.
        seed: Of the random state from which every loader is read.

    Attributes:
        counts: Batches of each loader.
        samples: Samples of each batch of each loader.
        in_turn: Whether Lightning goes through one loader after the other, and not through rows of several.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, limit: float | None, seed: int) -> None:
        self._trainer, self._module, self._seed = trainer, pl_module, seed
        self.counts: list[int] = []
        self.samples: list[list[int]] = []
        self._kept: list[list[_Kept]] = []
        self._readers: list[_Reader] = []
        self._sources: list[Any] = []
        self._limits: list[int | float] = []
        self.in_turn = True
        self.moves = False
        """Whether passes get their batches on the device, see `is_moved_once`."""
        device = trainer.strategy.root_device
        host = _Budget(free_memory(torch.device("cpu")) / _FREE_SHARE if limit is None else limit)
        apart = limit is None and device.type == "cuda"
        self._host = host
        self._device = _Budget(free_memory(device) / _FREE_SHARE) if apart else host

    @property
    def memory_left(self) -> int:
        """Bytes that the round may still hold where the module is."""
        return self._device.left

    def read(self, combined: CombinedLoader, limits: Sequence[int | float]) -> None:
        """Read all batches once, and keep what fits; at least the first of each loader."""
        self._sources, self._limits = list(combined.flattened), list(limits)
        self.in_turn = combined._mode == "sequential"
        self.moves = self.in_turn and is_moved_once(self._trainer, self._module)
        if combined._mode == "min_size":
            return self._read_rows()
        for number in range(len(self._sources)):
            self._begin()
            for batch in self._read_again(number):
                self._add(number, batch)
        return None

    def _begin(self) -> None:
        self.counts.append(0)
        self.samples.append([])
        self._kept.append([])

    def _read_rows(self) -> None:
        """Row by row: what goes on beyond the end of the shortest may have no end itself."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            isolated_rng(self._seed),
            loaders_beside(self._trainer, self._sources, "val_dataloaders") as loaders,
        ):
            heads = [
                itertools.islice(loader, _whole(limit)) for loader, limit in zip(loaders, self._limits, strict=True)
            ]
            for _ in heads:
                self._begin()
            for row in zip(*heads, strict=False):
                for number, batch in enumerate(row):
                    self._add(number, batch)

    def _add(self, number: int, batch: Any) -> None:
        kept, size = self._kept[number], bytes_of(batch)
        if len(kept) == self.counts[number] and (self._host.take(size) or not kept or not self.in_turn):
            kept.append(_Kept(copy_batch(batch), size))
        self.counts[number] += 1
        self.samples[number].append(samples_of(batch))

    # ---------------------------------------------------------------------------------------------------- the batches

    def raw(self) -> list[Sequence[Any]]:
        """The batches of each loader as it yields them; lists, as long as all of them are in memory so."""
        found: list[Sequence[Any]] = []
        for number, kept in enumerate(self._kept):
            whole = len(kept) == self.counts[number] and not any(one.moved for one in kept)
            found.append([one.batch for one in kept] if whole else BatchesReadAgain(self, number))
        return found

    def raw_batches(self, number: int) -> Iterator[Any]:
        """One loader's batches as it yields them, with what is in memory so not read again."""
        kept = self._kept[number]
        stop = next((index for index, one in enumerate(kept) if one.moved), len(kept))
        for one in kept[:stop]:
            yield copy_batch(one.batch)
        if stop < self.counts[number]:
            yield from itertools.islice(self._read_again(number), stop, None)

    def ranges(self, part: Part) -> list[range]:
        """Which batches of each loader a part has on this process."""
        if self.in_turn:
            return [part.of(count) for count in self.counts]
        rows = part.of(max(self.counts))
        return [range(min(rows.start, count), min(rows.stop, count)) for count in self.counts]

    def batch(self, number: int, index: int) -> Any:
        """A fresh copy of a kept batch, on the device where that is asked of `moves`."""
        kept = self._kept[number][index]
        if not self.moves or kept.moved:
            return copy_batch(kept.batch)
        batch = self._moved(kept.batch, number, index)
        size = bytes_of(batch)
        self._host.used -= kept.size
        if self._device.take(size) or self._device is self._host:
            kept.batch, kept.size, kept.moved = batch, size, True
            return copy_batch(batch)
        self._host.used += kept.size
        return batch

    def batches(self, number: int, which: range) -> Iterator[Any]:
        """Fresh copies of some of a loader's batches, in order, as `batch` gives them."""
        kept = len(self._kept[number])
        for index in which[: max(0, kept - which.start)]:
            yield self.batch(number, index)
        if which.stop > max(kept, which.start):
            start = max(kept, which.start)
            rest = itertools.islice(self._read_again(number), start, which.stop)
            for index, batch in enumerate(rest, start):
                yield self._moved(batch, number, index) if self.moves else batch

    def _moved(self, batch: Any, number: int, index: int) -> Any:
        with isolated_rng(self._seed + index):  # whenever it is moved, and whatever else is random then
            return move(self._trainer, self._module, batch, number)

    # -------------------------------------------------------------------------------------------------------- reading

    def _read_again(self, number: int) -> Iterator[Any]:
        """A loader's batches from the beginning; the same each time."""
        reader = _Reader(self, number)
        self._readers.append(reader)
        return reader

    def open(self, number: int) -> tuple[ExitStack, Iterator[Any]]:
        """Begin to read a loader, with what ends that."""
        stack = ExitStack()
        [beside] = stack.enter_context(loaders_beside(self._trainer, [self._sources[number]], "val_dataloaders"))
        return stack, itertools.islice(beside, _whole(self._limits[number]))

    @property
    def seed(self) -> int:
        """Of the random state from which every loader is read."""
        return self._seed

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A block at whose end what was begun to be read ends too, with its workers."""
        try:
            yield
        finally:
            readers, self._readers = self._readers, []
            for reader in readers:
                reader.close()

    def drop(self) -> None:
        """Forget all batches."""
        self.counts, self.samples, self._kept, self._sources = [], [], [], []


class _Reader(Iterator[Any]):
    """Reads one loader from the beginning, a batch at a time, from a random state of its own."""

    def __init__(self, data: ValidationData, number: int) -> None:
        self._data, self._number, self._random = data, number, OwnRandomness(data.seed)
        self._stack: ExitStack | None = None
        self._batches: Iterator[Any] | None = None
        self._ended = False

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        try:
            with torch.inference_mode(False), torch.no_grad(), self._random():
                if self._batches is None:
                    self._stack, self._batches = self._data.open(self._number)
                return next(self._batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put back the loader's samplers and generators; end its workers."""
        self._ended, self._batches = True, None
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()


def _whole(limit: int | float) -> int | None:
    return None if limit == math.inf else int(limit)
