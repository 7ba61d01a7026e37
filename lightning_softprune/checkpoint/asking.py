"""Who asked for modules to be resized while they load, and the methods that then do so.

Some libraries build a module and load its weights in one call. To step in between, their methods are replaced while any
block asks for it, in whatever thread; each looks up what its own thread has asked for. So no block waits for another,
and none changes what other threads load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Asked:
    """What the blocks ask for that a thread is in.

    Attributes:
        classes: LightningModules of these classes take the shape of checkpoints.
        records: Modules take the shape of all weights that they are given; the record of each block that says so, or
            ``None``.
        loading: Modules that have taken the shape of a checkpoint, and whose own hook runs, with the checkpoint.
    """

    classes: tuple[type, ...] = ()
    records: tuple[Mapping[str, Any] | None, ...] = ()
    loading: tuple[tuple[object, object], ...] = ()

    def is_loading(self, module: object, checkpoint: object) -> bool:
        """Whether a hook is called by another one: that of a base class, or of a part, for the same checkpoint."""
        return any(module is known or checkpoint is given for known, given in self.loading)


_ASKED: ContextVar[Asked] = ContextVar("asked", default=Asked())  # noqa: B039 - it is frozen, of tuples


def asked() -> Asked:
    """What this thread has asked for."""
    return _ASKED.get()


@contextmanager
def asking(**further: Any) -> Iterator[None]:
    """A block that asks for something more; arguments are attributes of :class:`Asked`, one item each."""
    now = _ASKED.get()
    token = _ASKED.set(replace(now, **{name: (*getattr(now, name), item) for name, item in further.items()}))
    try:
        yield
    finally:
        _ASKED.reset(token)


@dataclass
class _Patch:
    own: Any
    blocks: int = 0


_LOCK = threading.Lock()

_PATCHES: dict[tuple[type, str], _Patch] = {}


@contextmanager
def patched(owners: Iterable[type], name: str, around: Callable[[Any], Any]) -> Iterator[None]:
    """While this block lasts, or any other of the same, what classes have by a name is made from what they had.

    Args:
        owners: The classes; those that have nothing of that name of their own are passed over.
        name: Of the method.
        around: From what a class has to what it has meanwhile. Always the same for one name.
    """
    places = [(owner, name) for owner in owners if name in vars(owner)]
    with _LOCK:
        for place in places:
            if place not in _PATCHES:
                _PATCHES[place] = _Patch(vars(place[0])[name])
                setattr(*place, around(_PATCHES[place].own))
            _PATCHES[place].blocks += 1
    try:
        yield
    finally:
        with _LOCK:
            for place in places:
                _PATCHES[place].blocks -= 1
                if not _PATCHES[place].blocks:
                    setattr(*place, _PATCHES.pop(place).own)
