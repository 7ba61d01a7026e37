"""Batches read from the training loaders beside the running epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_softprune.trainer.isolation import OwnRandomness
from lightning_softprune.trainer.loaders import loaders_beside
from lightning_softprune.utilities.libraries import counterpart
from lightning_softprune.utilities.nested import copy_batch

_NONE = object()


class FirstBatches:
    """The first training batches of an epoch, read beside the running one, as many as are asked for at a time.

    The loaders are started once; their workers live until the last batch is read, or :meth:`close` is called. The
    running epoch's order, workers and random state stay as they are.

    Args:
        trainer: The trainer in charge.
        seed: Which batches: what is read depends on it, and not on torch's random state.

    Attributes:
        found: Those that have been read, as the fit loop hands them out, before any transfer: with several loaders,
            combined in their mode. None where there is no training data, as in `Trainer.validate` with loaders only.
        in_epoch: How many an epoch has; `None` where nobody knows, as of a stream.

    Raises:
        MisconfigurationException: A loader can be read only once; here, or when it is read.
    """

    def __init__(self, trainer: pl.Trainer, seed: int) -> None:
        self.found: list[Any] = []
        self._own, self._stack = OwnRandomness(seed), ExitStack()
        with self._own(), torch.inference_mode(False), torch.no_grad():
            self._rest, self.in_epoch = self._stack.enter_context(_one_epoch(trainer))

    def take(self, n: int) -> list[Any]:
        """So many; there are fewer where the loaders (or `limit_train_batches`) give fewer, or once it is closed."""
        try:
            while len(self.found) < n:
                with self._own(), torch.inference_mode(False), torch.no_grad():
                    batch = next(self._rest, _NONE)
                if batch is _NONE:
                    self.close()
                    break
                self.found.append(copy_batch(batch))
        except BaseException:
            self.close()
            raise
        return self.found[:n]

    def close(self) -> None:
        """Read no more."""
        self._rest = iter(())
        self._stack.close()


@contextmanager
def _one_epoch(trainer: pl.Trainer) -> Iterator[tuple[Iterator[Any], int | None]]:
    """The batches of one epoch, beside the running one, and how many they are; `None` for a stream."""
    combined = _training_loader(trainer)
    if combined is None:
        yield iter(()), 0
        return
    with loaders_beside(trainer, list(combined.flattened), "train_dataloaders", reads_ahead=True) as loaders:
        beside = copy(combined)
        beside.flattened = loaders
        if beside.limits is None:  # outside of a fit
            beside.limits = [_limit(loader, trainer.limit_train_batches) for loader in loaders]
        iter(beside)  # and never again, as a `for` would: that starts the workers once more
        length = sized_len(beside)  # None: a stream
        rest: Iterator[Any] = iter(lambda: next(beside, _NONE), _NONE)
        yield (found[0] for found in itertools.islice(rest, length)), length


def read_training_batches(trainer: pl.Trainer, n: int, seed: int) -> Generator[Any]:
    """The same batches one by one, with none kept in memory; those of further epochs where one does not have enough.

    Close it if it is not read to its end.

    Args:
        trainer: The trainer in charge.
        n: How many batches.
        seed: Which ones: the first are those of `FirstBatches` with this seed.

    Yields:
        Fresh copies, as the loaders yield them.

    Raises:
        MisconfigurationException: A loader can be read only once.
    """
    own, count, before = OwnRandomness(seed), 0, -1
    while before < count < n:
        before = count
        with ExitStack() as stack:
            with own():
                batches, _ = stack.enter_context(_one_epoch(trainer))
            while count < n:
                with own(), torch.inference_mode(False), torch.no_grad():
                    batch = next(batches, _NONE)
                if batch is _NONE:
                    break
                count += 1
                yield copy_batch(batch)


def _limit(loader: Any, limit: int | float) -> int | float:
    """How many batches of a loader a fit would train on at most."""
    if isinstance(limit, int):
        return limit
    length = sized_len(loader)
    return math.inf if length is None else int(length * limit)


def _training_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    loop = trainer.fit_loop
    if loop._combined_loader is not None:
        return loop._combined_loader
    source = loop._data_source
    if source.instance is None or not source.is_defined():
        return None
    try:
        loaders = counterpart(_request_dataloader, trainer)(source)
    except Exception as error:  # the user's own loader function: outside of a fit it may lack what it needs
        if trainer.state.fn == TrainerFn.FITTING:
            raise
        rank_zero_warn(f"`train_dataloader` gives no training data outside of `fit` ({type(error).__name__}: {error}).")
        return None
    combined = counterpart(CombinedLoader, trainer)
    return loaders if isinstance(loaders, combined) else combined(loaders, "max_size_cycle")
