"""The teacher: the dense network of a committed round, which goes on teaching while the pruned one trains.

What it has to say of a batch is the gradient of the mismatch that healing minimizes. It is added to the gradients of
the user's own loss, and so an optimizer steps on both. Everything else is left to the user's own training: nothing
stays of the steps that are run for it, not even what layers keep of statistics.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Set
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_softprune.compensation.healing.dense import DenseNetwork
from lightning_softprune.compensation.healing.lessons import Classroom

if TYPE_CHECKING:
    from lightning_softprune.trainer import LoadedBatch, ModuleRunner


class Teacher:
    """What a pruned module was, held beside it.

    Args:
        dense: The dense network, with values of its own for all tensors.
        judged: Names of the parameters that validation runs: only these learn.
    """

    def __init__(self, dense: DenseNetwork, judged: Set[str]) -> None:
        self._dense, self._judged = dense, judged
        self._warned = False

    def let_go(self) -> None:
        """Drop what only a rollback of the round would need."""
        self._dense.let_go()

    def add_gradients(
        self, runner: ModuleRunner, batch: LoadedBatch, weight: float, trained: Collection[nn.Parameter]
    ) -> None:
        """Add the gradients of the mismatch on one batch to those that are there.

        They are of the scale that the trainer's precision gives to those of losses. A batch on which the mismatch is
        not finite teaches nothing.

        Args:
            runner: Runs the module on a batch as `training_step` gets it.
            batch: The batch.
            weight: What the mismatch is multiplied by.
            trained: The parameters that count: those of the optimizer.

        Raises:
            Exception: The user's own.
        """
        classroom = Classroom.of(runner, self._dense, self._judged)
        wanted = {id(parameter) for parameter in trained}
        parameters = [parameter for parameter in classroom.parameters if id(parameter) in wanted]
        gradients: tuple[torch.Tensor | None, ...] = ()
        with classroom.compared(batch.data, batch.batch_idx) as error:
            if error is None:
                self._warn()
            elif parameters and bool(error.isfinite()):
                gradients = torch.autograd.grad(runner.scaled(weight * error), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=False):  # of no batch, none
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                "SoftPruning: teacher: the dense and the pruned network have no output in common that the module's "
                "steps use; there is nothing to teach",
                stacklevel=2,
            )
        self._warned = True
