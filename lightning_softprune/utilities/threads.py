"""How many threads PyTorch computes with: small tensors cost more in handing over than in work.

Threads wait for each other at the end of every operator, and they wait busily: on a machine with other work to do, each
of the many small operators of a deep and narrow network then costs a turn of the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod

import torch

TINY = 2**15
"""Elements of a tensor below which PyTorch shares no work element by element (its grain size)."""


def are_tiny(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes have so few elements on average that one thread is enough.

    >>> are_tiny([(2, 8, 32, 32), (8, 8, 3, 3)]), are_tiny([(32, 64, 32, 32), (64,)])
    (True, False)
    """
    sizes = [prod(size for size in shape if isinstance(size, int)) for shape in shapes]  # a ragged size is no number
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
