"""The pupil: parameters that learn from lessons, by an optimizer of their own.

Matrices step along orthogonalized momentum, all else by Adam: steps of one size whatever the outputs' is. The rate of
each tensor is a fraction of what its elements are (their root mean square), so that it fits any network. The fraction
does not depend on how wrong the outputs are: one suits networks that miss 1 % of their outputs' variance and a network
that misses a quarter; with one that goes with the root of that part, the former learn too slowly or the latter is
disturbed. The rate rises over the first tenth of the lessons, in which averages have seen too little to step in good
directions, and falls linearly to nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_softprune.compensation.healing.orthogonal import OrthogonalSteps, is_matrix
from lightning_softprune.utilities.distributed import in_process_group, sum_number_over_processes, sum_over_processes

RATE = 0.015
"""The highest rate, as a fraction of the size of a tensor's elements."""

SMALLEST = 1e-3
"""The size of elements that are smaller still, such as biases that begin at zero."""

RISING = 0.1
"""The fraction of the lessons over which the rate rises."""

_SCALE = 2.0**10  # of what is differentiated in half precision


@dataclass(frozen=True)
class Lesson:
    """What one batch teaches: the error, and its gradients, one for each parameter and scaled by the pupil's factor."""

    error: float
    gradients: list[torch.Tensor]


class Pupil:
    """Parameters that learn.

    Those of half precision are copies in single precision meanwhile, since small steps would be rounded away.

    Args:
        parameters: The parameters.
        lessons: How many there will be.
        halved: Whether gradients are computed in half precision, and need a factor in order not to vanish.
        look_ups: Parameters of which a batch sees some rows only, as of embeddings: these are no matrices here.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lessons: int,
        halved: bool = False,
        look_ups: Collection[nn.Parameter] = (),
    ) -> None:
        self._parameters, self._lessons = list(parameters), lessons
        self._scale = _SCALE if halved else 1.0
        self._copies = [  # of the others, the same numbers in another tensor
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)) for parameter in parameters
        ]
        sizes = [max(float(copy.square().mean().sqrt()), SMALLEST) for copy in self._copies]
        others = {id(parameter) for parameter in look_ups}
        kinds: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for parameter, copy, size in zip(parameters, self._copies, sizes, strict=True):
            kinds[is_matrix(parameter) and id(parameter) not in others].append({"params": [copy], "size": size})
        self._optimizers: list[torch.optim.Optimizer] = []
        if kinds[True]:
            self._optimizers.append(OrthogonalSteps(kinds[True]))
        if kinds[False]:
            self._optimizers.append(torch.optim.Adam(kinds[False]))

    def gradients(self, error: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of an error, of which no parameter's `grad` hears; sparse ones, of embeddings, as others."""
        found = torch.autograd.grad(self._scale * error, self._parameters, allow_unused=True)
        return [
            torch.zeros_like(copy) if gradient is None else gradient.to_dense().to(copy.dtype)
            for gradient, copy in zip(found, self._copies, strict=True)
        ]

    @torch.no_grad()
    def learn(self, lesson: Lesson, number: int) -> float:
        """Take one step, the same on all processes, unless a gradient is not finite.

        Args:
            lesson: What this process's batch teaches.
            number: Its number, from 0.

        Returns:
            The error, the mean over the processes.
        """
        device, processes = self._copies[0].device, 1.0
        if in_process_group():
            processes = sum_number_over_processes(1.0, device)
        gradients = [sum_over_processes(gradient) / (processes * self._scale) for gradient in lesson.gradients]
        error = sum_number_over_processes(lesson.error, device) / processes
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            self._scale = max(self._scale / 2.0, 1.0)
            return error
        risen = min((number + 1) / max(RISING * self._lessons, 1.0), 1.0)
        rate = RATE * min(risen, 1.0 - number / self._lessons)
        for copy, gradient in zip(self._copies, gradients, strict=True):
            copy.grad = gradient
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"]
            optimizer.step()
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            if parameter.dtype != copy.dtype:
                parameter.copy_(copy)
        return error
