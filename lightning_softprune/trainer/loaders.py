"""Loaders read beside the run: their order, iterators, workers and random states stay as they are.

*One-shot* is what can be read only once: reading takes away from whoever else reads it (a generator). A training loader
may hold such a thing, and go on with it from epoch to epoch, as endless streams do: what is read *ahead* of the run is
kept for the run.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, NoReturn

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_softprune.trainer.isolation import attributes_replaced, opaque
from lightning_softprune.trainer.lightning_names import MisconfigurationException
from lightning_softprune.utilities.libraries import counterparts
from lightning_softprune.utilities.nested import copy_batch, rebuild
from lightning_softprune.utilities.snapshot import ATOMS, RNGS, Snapshot

_FEW = 64
"""Longer containers hold samples, and no loaders or generators."""

_DEPTH = 6
"""So far down are DataLoaders and generators looked for: loader -> batch sampler -> sampler -> generator."""


@contextmanager
def loaders_beside(
    trainer: pl.Trainer, loaders: list[Any], argument: str, *, reads_ahead: bool = False
) -> Iterator[list[Any]]:
    """Copies of loaders, to be read inside the block while the loaders themselves go on.

    The workers that the copies start end with the block, also after an exception, whoever holds its traceback. What is
    read depends on torch's random state alone.

    Args:
        trainer: The trainer in charge; within a fit, samplers hear of its epoch.
        loaders: The loaders.
        argument: What the user calls them, for errors.
        reads_ahead: Whether of one-shot things that loaders hold the run may get what is read here, later; else, as for
            what has to be the same each time it is read, these are refused.

    Yields:
        The copies, in order.

    Raises:
        MisconfigurationException: A loader is one-shot, at once, or reads from something that is, when it is read.
    """
    with ExitStack() as kept, loaders_undisturbed(loaders), ExitStack() as replaced:
        copies = _Copies(argument, replaced, kept if reads_ahead else None)
        try:
            beside = [copies.loader(loader) for loader in loaders]
            if trainer.state.fn == TrainerFn.FITTING:
                for loader in beside:
                    _set_sampler_epoch(loader, trainer.current_epoch)
            yield beside
        finally:
            copies.end()


class _Copies:
    """Shallow copies of loaders, down to the DataLoaders inside them.

    A copy of a DataLoader starts workers of its own where the original has some: `worker_init_fn` is honoured, and the
    dataset is changed in their processes and not in this one.

    Args:
        argument: What the user calls the loaders.
        replaced: Ends what lasts as long as the copies do.
        kept: Is closed when all is put back, and then leaves what was read ahead with the loaders; `None` where nothing
            may be read so.
    """

    def __init__(self, argument: str, replaced: ExitStack, kept: ExitStack | None = None) -> None:
        self._argument = argument
        self._replaced, self._kept = replaced, kept
        self._made: dict[int, Any] = {}
        self._shared: dict[int, _ReadAhead] = {}
        self._data_loaders: list[DataLoader[Any]] = []
        self._iterators: list[weakref.ref[_BaseDataLoaderIter]] = []

    def end(self) -> None:
        """End the workers that the copies have started."""
        for loader in self._data_loaders:
            del vars(loader)["_get_iterator"]
        for iterator in [reference() for reference in self._iterators]:
            if iterator is not None and hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()

    def loader(self, loader: Any) -> Any:
        """The copy of one of the run's loaders."""
        if _is_one_shot(loader):
            _refuse(self._argument, loader)
        if isinstance(loader, DataLoader):
            return self._data_loader(loader)
        if not isinstance(getattr(loader, "__dict__", None), dict):
            return loader
        return self._object(loader, {**self._in_place(loader), **self._inside(loader, _DEPTH)})

    def _data_loader(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        if id(loader) in self._made:
            return self._made[id(loader)]  # type: ignore[no-any-return]
        # Neither copy(), which asks a subclass what it would like to be pickled, nor setattr, which DataLoader refuses.
        result = object.__new__(type(loader))
        self._made[id(loader)] = result
        self._data_loaders.append(result)
        own: dict[str, Any] = {"persistent_workers": False, "pin_memory": False, "_iterator": None}
        own["_get_iterator"] = partial(self._start, result)
        vars(result).update({**vars(loader), **self._in_place(loader), **self._inside(loader, _DEPTH), **own})
        for name, value in vars(loader).items():
            if name != "_iterator" and isinstance(value, _BaseDataLoaderIter):  # it goes on and on through one iterator
                vars(result)[name] = DataLoader.__iter__(result)
        if loader.num_workers == 0 and isinstance(loader.dataset, IterableDataset):
            self._replaced.enter_context(attributes_replaced(loader.dataset, **self._in_place(loader.dataset)))
        return result

    def _start(self, loader: DataLoader[Any]) -> _BaseDataLoaderIter:
        iterator = type(loader)._get_iterator(loader)
        self._iterators.append(weakref.ref(iterator))
        return iterator

    def _in_place(self, owner: Any) -> dict[str, Any]:
        """In place of what a loader holds that is one-shot. Most loaders make a new one whenever they are iterated."""
        one_shot = {
            name: value
            for name, value in vars(owner).items()
            if name != "_iterator" and (_is_one_shot(value) or isinstance(value, _ReadAhead))
        }
        ahead = {name: self._ahead(owner, name, value) for name, value in one_shot.items()}
        if not any(ahead.values()):
            return {name: _Refusal(self._argument, value) for name, value in one_shot.items()}
        # what the owner notes of what it has read is the run's
        noted = {name: copy(value) for name, value in vars(owner).items() if type(value) in (list, dict, set, deque)}
        return noted | {name: found or _Refusal(self._argument, one_shot[name]) for name, found in ahead.items()}

    def _ahead(self, owner: Any, name: str, value: Any) -> Iterator[Any] | None:
        """What an attribute is going to yield, from now on kept for the run; `None` where that may not be."""
        if self._kept is None or isinstance(value, _BaseDataLoaderIter):
            return None
        if isinstance(value, _ReadAhead):
            return value.beside()
        ahead = self._shared.setdefault(id(value), _ReadAhead(value))
        vars(owner)[name] = ahead
        self._kept.callback(vars(owner).__setitem__, name, ahead)  # what the owner had is put back before
        return ahead.beside()

    def _inside(self, owner: Any, depth: int) -> dict[str, Any]:
        """The attributes that are DataLoaders or hold some, with copies of these."""
        found = {name: self._with_copies(value, depth - 1) for name, value in vars(owner).items()}
        return {name: value for name, value in found.items() if value is not vars(owner)[name]}

    def _with_copies(self, value: Any, depth: int) -> Any:
        """The value itself; where DataLoaders hang on it, a copy with copies of these."""
        if isinstance(value, DataLoader):
            return self._data_loader(value)
        if depth == 0 or type(value) in ATOMS or isinstance(value, _NOT_COPIED + opaque()):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value  # met again on the way down
            if type(value) in (list, tuple, dict) and len(value) <= _FEW:
                before = list(value.values() if isinstance(value, dict) else value)
                after = [self._with_copies(item, depth - 1) for item in before]
                if any(a is not b for a, b in zip(before, after, strict=True)):
                    self._made[id(value)] = rebuild(value, partial(_next_of, iter(after)))
            elif isinstance(getattr(value, "__dict__", None), dict):
                changes = self._inside(value, depth)
                if isinstance(value, Iterable):
                    changes = {**self._in_place(value), **changes}
                if changes:
                    self._made[id(value)] = self._object(value, changes)
        return self._made[id(value)]

    def _object(self, value: Any, changes: dict[str, Any]) -> Any:
        try:
            result = copy(value)
            vars(result).update(changes)
        except Exception:  # whatever a class of the user's says to being copied: it is read as it is
            return value
        return result


def _next_of(items: Iterator[Any], _: Any) -> Any:
    return next(items)


def _is_one_shot(value: object) -> bool:
    """Whether a value is an iterator of which no copy has a place of its own. Open files and own classes are none."""
    if isinstance(value, _BaseDataLoaderIter):
        return True
    return isinstance(value, Iterator) and not hasattr(value, "__dict__") and not isinstance(value, itertools.count)


def _refuse(argument: str, one_shot: object) -> NoReturn:
    raise MisconfigurationException(
        f"{argument}: a {type(one_shot).__name__} can be read only once, so the search would take batches away "
        "from the run; pass an object that can be iterated again: a DataLoader, a list, a class with `__iter__`"
    )


class _ReadAhead:
    """A one-shot iterator for whom it belongs to, who gets all of it, in order, whatever others read ahead.

    What else is asked of it is asked of the iterator (a generator is closed).
    """

    def __init__(self, one_shot: Iterator[Any]) -> None:
        self._one_shot = one_shot
        (self._own,) = itertools.tee(one_shot, 1)

    def __iter__(self) -> _ReadAhead:
        return self

    def __next__(self) -> Any:
        return next(self._own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # how to copy or pickle this one
            raise AttributeError(name)
        return getattr(vars(self)["_one_shot"], name)

    def beside(self) -> Iterator[Any]:
        """Copies of what its owner is going to get."""
        return map(copy_batch, copy(self._own))


_NOT_COPIED = (_BaseDataLoaderIter, _ReadAhead, Tensor, nn.Module)


class _Refusal:
    """Stands in for an iterator that may not be read."""

    def __init__(self, argument: str, one_shot: object) -> None:
        self._argument, self._one_shot = argument, one_shot

    def __iter__(self) -> _Refusal:
        return self

    def __next__(self) -> NoReturn:
        _refuse(self._argument, self._one_shot)


@contextmanager
def loaders_undisturbed(loaders: Iterable[Any]) -> Iterator[None]:
    """Puts back the samplers, the datasets' attributes and every random generator that reading these loaders moves.

    The generators are seeded from torch's global one, so that what is read depends on the caller's seed alone.
    """
    memory, trainers = Snapshot(opaque()), counterparts(pl.Trainer)
    generators: list[Any] = []
    seen: set[int] = set()
    level = [loader for loader in loaders if not isinstance(loader, Tensor)]
    for _ in range(
        _DEPTH
    ):  # loader -> batch_sampler -> sampler -> generator; loader -> dataset -> transform -> generator
        below: list[Any] = []
        for value in level:
            if type(value) in ATOMS or id(value) in seen or isinstance(value, (Tensor, np.ndarray, nn.Module)):
                continue
            seen.add(id(value))
            if isinstance(value, RNGS):
                generators.append(value)
            elif isinstance(value, (list, tuple)):
                below.extend(value[:_FEW])
            elif isinstance(value, dict):
                below.extend(itertools.islice(value.values(), _FEW))
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
