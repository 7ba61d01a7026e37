"""Rankings: which channels of a group go first.

Every criterion gives one score per channel and group; the channels with the smallest scores go first. Scores of a
channel are summed over everything it touches, so that a group is ranked as a whole.

- ``magnitude``: the squared norm of all weights that produce or read the channel (the group norm of DepGraph,
  arXiv 2301.12900, eq. 6).
- ``activation``: the channel's variance at each layer that reads it, times the squared norm of the weights it is read
  with: the variance that disappears from the layers' outputs when the channel is replaced by its mean.
- ``taylor``: the squared first-order change of the loss, ``(sum of weight * gradient)^2`` over the channel's
  producing and reading weights (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).
- ``random``: a seeded permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.groups import Member, PruningGroup
from lightning_softprune.layers import Layout, layout_of

__all__ = ["IMPORTANCES", "Moments", "norms", "rank", "record_inputs"]

IMPORTANCES = ("magnitude", "activation", "taylor", "random")

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Steps = Sequence[Callable[[], Any]]


def rank(
    importance: str, model: nn.Module, groups: Sequence[PruningGroup], steps: Steps, rng: np.random.Generator
) -> list[IntArray]:
    """Rank the channels of each group, the least important first.

    Args:
        importance: One of :data:`IMPORTANCES`.
        model: The dense model.
        groups: Its prunable groups.
        steps: One function per calibration batch that runs the model on it; for ``taylor`` it returns the loss.
        rng: Used by ``random``.

    Returns:
        One permutation of ``range(num_channels)`` per group.

    Raises:
        ValueError: ``taylor``, and a step returns no loss with a gradient.
    """
    if importance == "random":
        return [rng.permutation(group.num_channels).astype(np.int64) for group in groups]
    if importance == "magnitude":
        scores = _magnitude(model, groups)
    elif importance == "activation":
        scores = _activation(model, groups, steps)
    elif importance == "taylor":
        scores = _taylor(model, groups, steps)
    else:
        raise ValueError(f"importance: {importance!r} is not one of {IMPORTANCES}")
    return [np.argsort(np.nan_to_num(score, nan=0.0), kind="stable").astype(np.int64) for score in scores]


def norms(model: nn.Module, groups: Sequence[PruningGroup]) -> FloatArray:
    """Mean over each group's channels of the norm of their weights, shape ``(groups,)``."""
    return np.array([float(np.sqrt(score).mean()) for score in _magnitude(model, groups)])


def _magnitude(model: nn.Module, groups: Sequence[PruningGroup]) -> list[FloatArray]:
    return [_sum_members(model, group, lambda weight: weight.detach().double().square()) for group in groups]


def _activation(model: nn.Module, groups: Sequence[PruningGroup], steps: Steps) -> list[FloatArray]:
    modules = dict(model.named_modules())
    readers = {m.module: modules[m.module] for group in groups for m in group.members if _reads(modules, m)}
    with record_inputs(readers) as moments, torch.no_grad():
        for step in steps:
            step()
    scores = []
    for group in groups:
        score = np.zeros(group.num_channels)
        for member in group.members:
            found = moments.get(member.module) if _reads(modules, member) else None
            if found is not None:
                weight = reading_weight(modules[member.module]).double().square().flatten(1).sum(1).cpu().numpy()
                score += _per_channel(member, found.variance * weight, group.num_channels)
        scores.append(score if score.any() else _magnitude(model, [group])[0])  # nothing reads it: rank by weights
    return scores


def _taylor(model: nn.Module, groups: Sequence[PruningGroup], steps: Steps) -> list[FloatArray]:
    saved = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    scores = [np.zeros(group.num_channels) for group in groups]
    try:
        for step in steps:
            for parameter, _, _ in saved:
                parameter.grad = None
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            with torch.enable_grad():
                loss = step()
                loss = loss.get("loss") if isinstance(loss, Mapping) else loss
                if not isinstance(loss, torch.Tensor) or loss.grad_fn is None:
                    raise ValueError(
                        "importance: 'taylor' needs a step that returns a loss with a gradient, "
                        f"but the module returned {type(loss).__name__}; use 'activation' or 'magnitude'"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            for score, group in zip(scores, groups, strict=True):
                score += _sum_members(model, group, _first_order) ** 2
    finally:
        for parameter, grad, flag in saved:
            parameter.grad = grad
            parameter.requires_grad_(flag)
    return scores


def _first_order(parameter: nn.Parameter) -> torch.Tensor:
    weight = parameter.detach().double()
    return torch.zeros_like(weight) if parameter.grad is None else weight * parameter.grad.double()


def _sum_members(model: nn.Module, group: PruningGroup, value: Callable[[nn.Parameter], torch.Tensor]) -> FloatArray:
    """Sum an elementwise value over the matrices and kernels that produce or read a group's channels."""
    modules = dict(model.named_modules())
    score = np.zeros(group.num_channels)
    for member in group.members:
        module = modules.get(member.module)
        layout = layout_of(module) if module is not None else None
        for axis in layout.axes if isinstance(layout, Layout) else ():
            tensor = module.get_parameter(axis.tensor) if module is not None and _has(module, axis.tensor) else None
            if axis.slot != member.slot or tensor is None or tensor.ndim < 2 or axis.repeat > 1:
                continue
            indices = value(tensor).transpose(0, axis.dim).flatten(1).sum(1).cpu().numpy()
            score += _per_channel(member, np.tile(indices, axis.parts), group.num_channels)
    return score


def _has(module: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return isinstance(getattr(module.get_submodule(parent), name, None), nn.Parameter)


def _per_channel(member: Member, values: FloatArray, num_channels: int) -> FloatArray:
    """Add up a slot's per-index values by channel."""
    own = member.owner >= 0
    return np.bincount(member.owner[own], weights=np.nan_to_num(values[own]), minlength=num_channels)


# ------------------------------------------------------------------------------------------------ inputs of readers


class Moments:
    """Streaming mean and variance of each channel at a layer's input (Chan et al. 1979), in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: FloatArray = np.zeros(0)
        self._squares: FloatArray = np.zeros(0)

    def add(self, rows: torch.Tensor) -> None:
        """Add observations.

        Args:
            rows: Shape ``(observations, channels)``.
        """
        rows = rows.detach().double()
        n = len(rows)
        if n == 0:
            return
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0).cpu().numpy()
        means = mean.cpu().numpy()
        if self.count == 0:
            self.count, self.mean, self._squares = n, means, squares
            return
        total, delta = self.count + n, means - self.mean
        self.mean = self.mean + delta * n / total
        self._squares = self._squares + squares + delta**2 * self.count * n / total
        self.count = total

    @property
    def variance(self) -> FloatArray:
        """Population variance, shape ``(channels,)``."""
        return self._squares / max(self.count, 1)


@contextmanager
def record_inputs(readers: Mapping[str, nn.Module]) -> Iterator[dict[str, Moments]]:
    """Record the inputs of layers while the block runs the model.

    Args:
        readers: Linear, convolution and attention layers by name.
    """
    moments: dict[str, Moments] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            source = args[0] if args else next(iter(kwargs.values()))
            moments.setdefault(name, Moments()).add(as_rows(module, source))

        return hook

    handles = [m.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, m in readers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def as_rows(module: nn.Module, source: torch.Tensor) -> torch.Tensor:
    """Lay a layer's input out as ``(observations, channels)``: positions of a convolution are observations."""
    if isinstance(module, _ConvNd):
        channel = source.ndim - len(module.kernel_size) - 1
        return source.movedim(channel, -1).reshape(-1, module.in_channels)
    return source.reshape(-1, source.shape[-1])


def reading_weight(module: nn.Module) -> torch.Tensor:
    """The weights that read each input channel, shape ``(channels, ...)``."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight.detach().t()
    weight = module.weight.detach()
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    if isinstance(module, _ConvTransposeNd):
        return weight
    if isinstance(module, _ConvNd) and module.groups > 1:
        grouped = weight.unflatten(0, (module.groups, -1))  # (groups, out / groups, in / groups, ...)
        return grouped.transpose(1, 2).flatten(0, 1)
    return weight.transpose(0, 1)


def _reads(modules: Mapping[str, nn.Module], member: Member) -> bool:
    """Whether the member is the input of a layer that mixes channels."""
    module = modules.get(member.module)
    return isinstance(module, nn.MultiheadAttention) or (
        isinstance(module, (nn.Linear, _ConvNd)) and member.slot == "in"
    )
