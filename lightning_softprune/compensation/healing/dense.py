"""The dense network beside the pruned one: the same module with its former tensors in their places.

A plan leaves the former tensors as they are (`Surgery.undone` puts them back), except those that it did not touch: the
pruned network has them too, and healing changes them. Of these the former values are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_softprune.surgery import Surgery


class DenseNetwork:
    """What a pruned module was.

    Args:
        module: The pruned module, with nothing changed yet in the tensors that the plan has not touched.
        surgery: What was done to it.
        everything: Whether to keep values of frozen parameters too: training that goes on may thaw them.

    Attributes:
        created: Names of the parameters that it did not have.
    """

    def __init__(self, module: nn.Module, surgery: Surgery, everything: bool = False) -> None:
        self._surgery = surgery
        self.created = {name for name, _, _ in surgery.created}
        with surgery.undone():
            before = {id(tensor) for tensor in _tensors_of(module)}
            buffers = list(module.buffers())
        kept = _tensors_of(module) if everything else changeable(module)
        self._shared = [(tensor, tensor.detach().clone()) for tensor in kept if id(tensor) in before]
        now = {id(buffer) for buffer in module.buffers()}
        self._own = [(buffer, buffer.detach().clone()) for buffer in buffers if id(buffer) not in now]

    def let_go(self) -> None:
        """Drop what only a rollback would need: the gradients that were pending in the former tensors."""
        for former, _, _ in self._surgery.parameters:
            former.grad = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module is the dense network for as long as the block lasts, and its buffers stay as they are."""
        with self._surgery.undone():
            now = [(tensor, tensor.data) for tensor, _ in self._shared]
            try:
                for tensor, value in self._shared:
                    tensor.data = value
                yield
            finally:
                for tensor, value in now:
                    tensor.data = value
                for buffer, value in self._own:
                    buffer.data.copy_(value)


def changeable(module: nn.Module) -> list[torch.Tensor]:
    """What healing may change: parameters that are not frozen, and buffers."""
    return [*(parameter for parameter in module.parameters() if parameter.requires_grad), *module.buffers()]


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
