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

    Attributes:
        created: Names of the parameters that it did not have.
    """

    def __init__(self, module: nn.Module, surgery: Surgery) -> None:
        self._surgery = surgery
        self.created = {name for name, _, _ in surgery.created}
        with surgery.undone():
            before = {id(tensor) for tensor in changeable(module)}
        self._shared = [(tensor, tensor.detach().clone()) for tensor in changeable(module) if id(tensor) in before]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module is the dense network for as long as the block lasts."""
        with self._surgery.undone():
            now = [(tensor, tensor.data) for tensor, _ in self._shared]
            try:
                for tensor, value in self._shared:
                    tensor.data = value
                yield
            finally:
                for tensor, value in now:
                    tensor.data = value


def changeable(module: nn.Module) -> list[torch.Tensor]:
    """What healing may change: parameters that are not frozen, and buffers."""
    return [*(parameter for parameter in module.parameters() if parameter.requires_grad), *module.buffers()]
