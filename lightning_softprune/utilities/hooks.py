"""Hooks that go when a block ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle

__all__ = ["registered"]


@contextmanager
def registered(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register hooks for as long as the block lasts.

    Args:
        handles: Registers one hook per item when it is gone through; where one cannot be registered, those before it
            are removed.

    >>> import torch
    >>> layer, seen = torch.nn.ReLU(), []
    >>> with registered([layer.register_forward_hook(lambda module, inputs, output: seen.append(output.item()))]):
    ...     _ = layer(torch.tensor(2.0))
    >>> _ = layer(torch.tensor(3.0))
    >>> seen
    [2.0]
    """
    held: list[RemovableHandle] = []
    try:
        for handle in handles:
            held.append(handle)  # noqa: PERF402 - those that were registered before an exception are to be known
        yield
    finally:
        for handle in held:
            handle.remove()
