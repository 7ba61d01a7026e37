"""Transactions: a model and its optimizers as they were, to be put back.

The same objects with the same values, down to the containers and tensors that modules hold. A committed plan is one
that nobody rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_softprune.utilities.snapshot import Snapshot


class Transaction:
    """Everything a module tree holds, to be put back: ``with Transaction(model) as t: ...; t.commit()``.

    Leaving the block without :meth:`commit`, normally or by an exception, rolls back: every module has the attributes,
    the containers and the tensors it had, the *same objects*, with the values they had; gradients and
    ``requires_grad`` too. Tensors are copied once on entry; :meth:`rollback` may be called any number of times.

    Args:
        models: The module trees.
        optimizers: Their parameter lists, settings and state are put back too. State tensors are not copied: a round
            replaces them and never writes them.
    """

    def __init__(self, *models: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        self._done = False
        self._models = Snapshot(values=True)
        self._models.contents(*models)
        self._optimizers = [_OptimizerContents(optimizer) for optimizer in optimizers]

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.rollback()

    def commit(self) -> None:
        """Keep what was done since."""
        self._done = True

    def rollback(self) -> None:
        """Put everything back."""
        self._models.restore()
        for optimizer in self._optimizers:
            optimizer.restore()


class _OptimizerContents:
    """What an optimizer holds, by identity."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
        self.state: list[tuple[Any, Any, Any]] = [
            (key, value, dict(value) if isinstance(value, dict) else None) for key, value in optimizer.state.items()
        ]
        self.numel = getattr(optimizer, "_numel_cache", None)

    def restore(self) -> None:
        for group, settings, parameters in self.groups:
            group.clear()
            group.update(settings)
            group["params"][:] = parameters
        self.optimizer.state.clear()
        for key, value, items in self.state:
            if items is not None:
                value.clear()
                value.update(items)
            self.optimizer.state[key] = value
        if isinstance(self.optimizer, LBFGS):
            self.optimizer._numel_cache = self.numel
