"""Batches read beside the running epoch, whose order, workers and random state stay as they are."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lightning_softprune.trainer.isolation import isolated_rng, opaque
from lightning_softprune.trainer.lightning_names import MisconfigurationException
from lightning_softprune.utilities.libraries import counterpart, counterparts
from lightning_softprune.utilities.snapshot import ATOMS, RNGS, Snapshot


def copy_batch(batch: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a batch: what a step does in place (`x.sub_(mean)`, `batch.pop("y")`) does not reach the original.

    `copy.deepcopy` would copy the whole storage behind a view, so only objects of unknown type are left to it.
    """
    memo = {} if memo is None else memo
    if type(batch) in ATOMS:
        return batch
    if id(batch) in memo:  # an input that is also the target stays one tensor
        return memo[id(batch)]
    result: Any
    if isinstance(batch, Tensor):
        result = batch.detach().clone().requires_grad_(batch.requires_grad)
    elif isinstance(batch, np.ndarray):
        result = batch.copy()
    elif type(batch) in (list, tuple):
        result = type(batch)([copy_batch(item, memo) for item in batch])
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        result = type(batch)(*(copy_batch(item, memo) for item in batch))
    elif isinstance(batch, dict):
        result = copy(batch)  # keeps the type and its extras (a default factory)
        for key, value in batch.items():
            result[key] = copy_batch(value, memo)
    elif is_dataclass(batch) and not isinstance(batch, type):
        result = copy(batch)
        for field in fields(batch):
            if hasattr(batch, field.name):  # past a frozen dataclass's guard
                object.__setattr__(result, field.name, copy_batch(getattr(batch, field.name), memo))
    else:
        try:
            result = deepcopy(batch)
        except Exception:  # a handle or another thing that cannot be copied: as it is
            result = batch
    memo[id(batch)] = result
    return result


class MemoryLoader:
    """Serves batches from memory, a fresh copy each time; otherwise looks like the user's loader."""

    # Lightning announces each epoch to `sampler`; the user's sampler must not hear of it.
    sampler = None
    batch_sampler = None

    def __init__(self, batches: list[Any], loader: object) -> None:
        self._batches = batches
        self._loader = loader

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return (copy_batch(batch) for batch in self._batches)

    def __getattr__(self, name: str) -> Any:
        # `_iterator` belongs to the user's own workers
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def readable_copy(loader: Any, argument: str, depth: int = 2) -> Any:
    """A shallow copy of a loader that can be read while the loader itself, its iterator and its workers go on.

    The copy starts workers of its own where the loader has some: `worker_init_fn` is honoured, and the dataset is
    changed in their processes and not in this one.
    """
    if isinstance(loader, DataLoader):
        result = copy(loader)
        # not setattr, which DataLoader refuses once it is made
        vars(result).update(persistent_workers=False, pin_memory=False, _iterator=None)
        return result
    mapping = getattr(loader, "__dict__", None)
    if mapping is None or not isinstance(mapping, dict):
        if isinstance(loader, Iterator):
            raise MisconfigurationException(
                f"{argument}: a {type(loader).__name__} can be read only once, so the search would take batches away "
                "from the run; pass an object that can be iterated again: a DataLoader, a list, a class with `__iter__`"
            )
        return loader
    try:
        result = copy(loader)
    except Exception:  # whatever a class of the user's says to being copied: it is read as it is
        return loader
    for name, value in mapping.items():
        if depth and isinstance(value, DataLoader):
            vars(result)[name] = readable_copy(value, argument, depth - 1)
    return result


@contextmanager
def loaders_undisturbed(loaders: Iterable[Any]) -> Iterator[None]:
    """Puts back the samplers, the datasets' attributes and every random generator that reading these loaders moves.

    The generators are seeded from torch's global one, so that what is read depends on the caller's seed alone.
    """
    memory, trainers = Snapshot(opaque()), counterparts(pl.Trainer)
    generators: list[Any] = []
    seen: set[int] = set()
    level = [loader for loader in loaders if not isinstance(loader, Tensor)]
    for _ in range(6):  # loader -> batch_sampler -> sampler -> generator; loader -> dataset -> transform -> generator
        below: list[Any] = []
        for value in level:
            if type(value) in ATOMS or id(value) in seen or isinstance(value, (Tensor, np.ndarray, nn.Module)):
                continue
            seen.add(id(value))
            if isinstance(value, RNGS):
                generators.append(value)
            elif isinstance(value, (list, tuple)):
                below.extend(value[:64])
            elif isinstance(value, dict):
                below.extend(itertools.islice(value.values(), 64))
            elif isinstance(mapping := getattr(value, "__dict__", None), dict) and not isinstance(value, trainers):
                if isinstance(value, DataLoader):
                    memory.ignore(value.dataset)  # a plain list of samples would be copied as a sampler's contents
                elif isinstance(value, Sampler):
                    memory.contents(mapping)
                else:
                    memory.attributes(value)
                below.extend(item for name, item in mapping.items() if name != "_iterator")  # the user's workers
        level = below
    memory.contents(*generators)
    seed = int(torch.empty((), dtype=torch.int64).random_(2**31))
    try:
        for generator in generators:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = type(generator.bit_generator)(seed).state
            else:
                generator.seed(seed)
        yield
    finally:
        memory.restore()


def training_batches(trainer: pl.Trainer, n: int) -> list[Any]:
    """Reads training batches beside the running epoch, whose order, workers and random state stay as they are.

    Args:
        trainer: The trainer in charge.
        n: How many batches; there are fewer when the loaders (or `limit_train_batches`) give fewer.

    Returns:
        Batches as the fit loop hands them out, before any transfer: with several loaders, combined in their mode. Which
        ones depends on torch's random state, so seed it (`isolated_rng`) for reproducible batches. Empty where there is
        no training data, as in `Trainer.validate` with loaders only.

    Raises:
        MisconfigurationException: A loader can be read only once.
    """
    with torch.inference_mode(False), torch.no_grad(), isolated_rng():
        combined = _training_loader(trainer)
        if combined is None:
            return []
        loaders = list(combined.flattened)
        beside = copy(combined)
        beside._iterator = None
        beside.flattened = [readable_copy(loader, "train_dataloaders") for loader in loaders]
        with loaders_undisturbed(loaders):
            if trainer.state.fn == TrainerFn.FITTING:
                for loader in beside.flattened:
                    _set_sampler_epoch(loader, trainer.current_epoch)
            iterator = iter(beside)
            try:
                limit = min(n, _length(beside))
                return [copy_batch(batch) for batch, _, _ in itertools.islice(iterator, limit)]
            finally:
                beside._iterator = None  # lets go of the workers it started


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


def _length(combined: CombinedLoader) -> int:
    length = len(combined)  # may be infinite, whatever the annotation says
    return length if length < sys.maxsize else sys.maxsize
