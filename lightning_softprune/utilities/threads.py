"""How many threads PyTorch computes with: small tensors cost more in handing over than in work.

Threads wait for each other at the end of every operator, and they wait busily: on a machine with other work to do, each
of the many small operators of a deep and narrow network then costs a turn of the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.utilities.hooks import forward_hook, registered
from lightning_softprune.utilities.nested import tensors_in

TINY = 2**15
"""Elements of a tensor below which PyTorch shares no work element by element (its grain size)."""


def are_tiny(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes have so few elements on average that one thread is enough.

    >>> are_tiny([(2, 8, 32, 32), (8, 8, 3, 3)]), are_tiny([(32, 64, 32, 32), (64,)])
    (True, False)
    """
    sizes = [prod(shape) for shape in shapes]
    return sum(sizes) < TINY * len(sizes)


@contextmanager
def one_thread(needed: bool = True) -> Iterator[None]:
    """Compute with one thread, if that is needed; afterwards with as many as before."""
    before = torch.get_num_threads()
    resizable: bool = torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]
    if not needed or before == 1 or not resizable:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parameter_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the parameters that have one already."""
    return [tuple(parameter.shape) for parameter in model.parameters() if not is_lazy(parameter)]


@contextmanager
def shapes_noted(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Note the shapes of the parameters, and of all that modules give while this lasts."""
    shapes = parameter_shapes(model)

    def note(_: nn.Module, __: object, output: object) -> None:
        shapes.extend(tuple(tensor.shape) for tensor in tensors_in(output))

    with registered(forward_hook(module, note) for module in model.modules()):
        yield shapes
