"""Transactions: the module before, down to the containers and tensors its modules hold, to be put back.

The same objects with the same values. A committed plan is one that nobody rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

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
    """

    def __init__(self, *models: nn.Module) -> None:
        self._done = False
        self._memory = Snapshot(values=True)
        self._memory.contents(*models)

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
        self._memory.restore()


class OptimizerTransaction:
    """Parameter lists, settings and state of optimizers, to be put back when a round fails.

    State tensors are not copied: a round replaces them and never writes them.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._saved = [
            (
                optimizer,
                [(group, dict(group), list(group["params"])) for group in optimizer.param_groups],
                {key: dict(value) if isinstance(value, dict) else value for key, value in optimizer.state.items()},
                getattr(optimizer, "_numel_cache", None),
            )
            for optimizer in optimizers
        ]

    def rollback(self) -> None:
        """Put everything back into the same objects."""
        for optimizer, groups, state, numel in self._saved:
            for group, settings, parameters in groups:
                group.clear()
                group.update(settings)
                group["params"][:] = parameters
            optimizer.state.clear()
            optimizer.state.update(state)
            if isinstance(optimizer, LBFGS):
                optimizer._numel_cache = numel
