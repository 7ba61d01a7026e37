"""Hooks that go when a block ends, however it ends; and modes of PyTorch that look away while one lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

__all__ = ["forward_hook", "forward_pre_hook", "is_about_gradients", "registered", "unwatched"]


def forward_hook(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a forward hook, also on a module that refuses it (TorchScript) and runs it all the same."""
    return nn.Module.register_forward_hook(module, hook)


def forward_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """The same before the forward; the hook gets keyword arguments too."""
    return nn.Module.register_forward_pre_hook(module, hook, with_kwargs=True)


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


def is_about_gradients(error: Exception) -> bool:
    """Whether PyTorch says that code runs only with gradients, or only without; any other exception is another matter.

    >>> try:
    ...     torch.ones(2, requires_grad=True).numpy()
    ... except RuntimeError as error:
    ...     is_about_gradients(error), is_about_gradients(ValueError("gradient"))
    (True, False)
    """
    return isinstance(error, RuntimeError) and "grad" in str(error)


@contextmanager
def unwatched() -> Iterator[None]:
    """No mode of PyTorch sees what is done while this lasts: it is no part of what the model computes."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
