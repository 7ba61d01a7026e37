"""What a reader's outputs become next, and the fit that counts errors only as far as they get through.

Where a pointwise function ``f`` (a ReLU, a sigmoid) follows a reader, least squares on the outputs ``y = W x + b`` also
counts differences that ``f`` wipes out: how far below zero, how far into saturation. The nonlinear, asymmetric
reconstruction (Zhang et al. 2015, arXiv 1505.06798) compares what comes after it instead. With the pruned network's
inputs ``z``, each output has its own problem,

    J(w, b) = sum_n (f(y_n) - f(w z_n + b))^2 + l |w - w0|^2.

A Gauss-Newton step solves ``(Z^T D^2 Z + l I) d = Z^T D e - l (w - w0)``, with ``D`` the slopes of ``f`` at the present
outputs and ``e`` the errors after it (the bias is one more column of ``Z``, without a ridge). All outputs are solved
side by side by a few conjugate gradients, preconditioned by the one factor of ``S_zz + r I`` that the linear fit has
made, so no matrix per output is built. ``l = r n mean(D^2)``: the linear fit's ridge at the scale of the slopes. The
gradients go on while the last one takes a noticeable part of the errors away, and so do the steps
(:data:`LEAST_GAINS`): where there are many observations for each weight, the first ones do it all. A step is halved
until ``J`` falls and dropped where it does not, so no output ends worse than it began.

A BatchNorm in between, which in eval mode is a scale and a shift of each output, is part of ``f``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightning_softprune.compensation.activations import FollowingActivation
from lightning_softprune.utilities.distributed import sum_number_over_processes, sum_over_processes

STEPS, SOLVES, HALVINGS = 2, 6, 5
"""Gauss-Newton steps and conjugate gradients in each, at most, and halvings of a step that goes too far."""

LEAST_GAINS = 0.05, 0.003
"""What a step, and a conjugate gradient in it, have to gain for the next one, as fractions of the squared errors. A
step was seen to gain a seventh of what the one before did, or less."""

BLOCK = 2**21
"""Numbers in each of the arrays (observations x outputs) that are held at a time."""

WEIGHTS = 4
"""So many arrays (inputs x outputs) count as one of them: of these, there are more."""


@dataclass(frozen=True)
class Start:
    """Where a fit begins: the linear fit.

    Attributes:
        weight: Shape ``(outputs, inputs)``.
        bias: Shape ``(outputs,)``.
        prior: What the ridge pulls the weights to, shape ``(outputs, inputs)``.
        factor: Cholesky factor of the inputs' covariance, with the ridge.
        ridge: The ridge of the linear fit.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    prior: torch.Tensor
    factor: torch.Tensor
    ridge: float

    def of(self, outputs: slice) -> Start:
        """The same for some of the outputs."""
        return replace(self, weight=self.weight[outputs], bias=self.bias[outputs], prior=self.prior[outputs])


def fit_after_activation(
    activation: FollowingActivation, wanted: torch.Tensor, inputs: torch.Tensor, start: Start
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move a layer's weights to where its outputs agree with the wanted ones after the function that follows.

    Args:
        activation: What becomes of the outputs.
        wanted: The layer's outputs in the dense model, before the function, shape ``(observations, outputs)``.
        inputs: What the layer is given now, centred, shape ``(observations, inputs)``.
        start: Where to start.

    Returns:
        Weight and bias.
    """
    total = sum_number_over_processes(len(inputs), inputs.device)
    width = max(int(BLOCK / max(total, WEIGHTS * inputs.shape[1], 1.0)), 1)
    fitted = []
    for first in range(0, len(start.weight), width):
        part = slice(first, first + width)
        problem = _Problem(activation.of(part), wanted[:, part], inputs, start.of(part), total)
        fitted.append(problem.solved())
    weights, biases = zip(*fitted, strict=True)
    return torch.cat(weights), torch.cat(biases)


class _Problem:
    """``J`` of some outputs, and its Gauss-Newton steps; weights and bias are one matrix, the bias its last column."""

    def __init__(
        self,
        activation: FollowingActivation,
        wanted: torch.Tensor,
        inputs: torch.Tensor,
        start: Start,
        total: float,
    ) -> None:
        self.activation, self.inputs, self.start, self.total = activation.settled(wanted), inputs, start, total
        self.factor, self.ridge = start.factor, start.ridge
        self.target = self.activation(wanted)
        # arrays as large as these are got from the system each time, which takes longer than most of what fills them
        self.along, self.weighted = torch.empty_like(self.target), torch.empty_like(self.target)
        self.prior = torch.cat([start.prior, torch.zeros_like(start.prior[:, :1])], 1)

    def solved(self) -> tuple[torch.Tensor, torch.Tensor]:
        w = torch.cat([self.start.weight, self.start.bias[:, None]], 1)
        outputs = self.forth(w)
        for _ in range(STEPS):
            w, outputs, gained = self.stepped(w, outputs)
            if gained <= LEAST_GAINS[0]:
                break
        return w[:, :-1], w[:, -1]

    def stepped(self, w: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weights after a step, outputs, which move along a line with them, and what part of the errors it takes."""
        error, slope = self.error_and_slope(outputs)
        gradient = self.back(torch.mul(slope, error, out=self.weighted))
        squares = sum_over_processes(error.square_().sum(0))
        square = slope.square_()
        scale = sum_over_processes(square.sum(0)) / self.total  # mean squared slope of each output
        pull = self.ridge * self.total * scale
        gradient -= self.pulled(pull, w - self.prior)
        errors = float(squares.sum())
        step, moved = self.conjugate_gradients(gradient, square, scale, pull, LEAST_GAINS[1] * errors)
        before, length = squares + self.penalty(w, pull), (scale > 0).to(w.dtype)
        for halving in range(HALVINGS + 1):
            ahead = torch.addcmul(outputs, moved, length, out=self.along)
            after = self.objective(w + length[:, None] * step, ahead, pull)
            worse = ~(after <= before)
            if not worse.any():
                break
            length = torch.where(worse, 0.0 if halving == HALVINGS else length / 2, length)
        stays = length == 0
        w = torch.where(stays[:, None], w, w + length[:, None] * step)
        gained = float(torch.where(stays, 0.0, before - after).sum()) / max(errors, torch.finfo(w.dtype).tiny)
        return w, outputs.addcmul_(moved.masked_fill_(stays, 0.0), length), gained

    def conjugate_gradients(
        self, residual: torch.Tensor, square: torch.Tensor, scale: torch.Tensor, pull: torch.Tensor, least: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A step, and what it adds to the outputs; ended by a gradient that takes less than this off the errors."""
        tiny = torch.finfo(residual.dtype).tiny
        step, moved = torch.zeros_like(residual), torch.zeros_like(square)
        direction = ahead = self.preconditioned(residual, scale)
        energy = (residual * ahead).sum(1)
        for _ in range(SOLVES):
            along = self.forth(direction, out=self.along)
            product = self.back(torch.mul(square, along, out=self.weighted)) + self.pulled(pull, direction)
            length = energy / (direction * product).sum(1).clamp(min=tiny)
            step = step + length[:, None] * direction
            moved = moved.addcmul_(along, length)
            if float((length * energy).sum()) <= least:
                break
            residual = residual - length[:, None] * product
            ahead = self.preconditioned(residual, scale)
            last, energy = energy, (residual * ahead).sum(1)
            direction = ahead + (energy / last.clamp(min=tiny))[:, None] * direction
        return step, moved

    def error_and_slope(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            after = self.activation(outputs)
            (slope,) = torch.autograd.grad(after.sum(), outputs)
        return after.detach().neg_().add_(self.target), slope

    def objective(self, w: torch.Tensor, outputs: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        error = torch.sub(self.target, self.activation(outputs), out=self.weighted)
        return sum_over_processes(error.square_().sum(0)) + self.penalty(w, pull)

    def penalty(self, w: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        return pull * (w - self.prior)[:, :-1].square().sum(1)

    def forth(self, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return torch.addmm(w[:, -1], self.inputs, w[:, :-1].t(), out=out)

    def back(self, outputs: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(torch.cat([outputs.t() @ self.inputs, outputs.sum(0)[:, None]], 1))

    def pulled(self, pull: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.cat([pull[:, None] * w[:, :-1], torch.zeros_like(w[:, :1])], 1)

    def preconditioned(self, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        solved = torch.cholesky_solve(w[:, :-1].t(), self.factor).t()
        whole = (self.total * scale).clamp(min=torch.finfo(w.dtype).tiny)
        return torch.cat([solved, w[:, -1:]], 1) / whole[:, None]
