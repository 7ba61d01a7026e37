"""Rankings: which channels of a group go first.

Every criterion gives one score per channel and group; the channels with the smallest scores go first. Scores of a
channel are summed over everything it touches, so that a group is ranked as a whole.

- ``magnitude``: the squared norm of all weights that produce or read the channel (the group norm of DepGraph,
  arXiv 2301.12900, eq. 6).
- ``activation``: the channel's variance at each layer that reads it, times the squared norm of the weights it is read
  with: the variance that disappears from the layers' outputs when the channel is replaced by its mean.
- ``taylor``: the squared first-order change of the loss, ``(sum of weight * gradient)^2`` over the channel's
  producing and reading weights (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).
- ``reconstruction``: one by one, the channel goes without which the readers' outputs are still rebuilt best by least
  squares (:mod:`~lightning_softprune.calibration.elimination`).
- ``None``: ``reconstruction`` where a group has few enough inputs and is no stream, else ``activation``.
- ``random``: a seeded permutation.
- a function of the user's own (:data:`Importance`): given the model and a group, it returns one score per channel.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lightning_softprune.calibration.elimination import eliminate, is_eliminated
from lightning_softprune.calibration.readers import find_readers, is_reading, reading_weight
from lightning_softprune.calibration.statistics import InputStatistics
from lightning_softprune.graph import (
    Layout,
    Member,
    PruningGroup,
    WeightGradients,
    computed_of,
    layout_of,
    watch_gradients,
)
from lightning_softprune.utilities.arrays import FloatArray, IntArray
from lightning_softprune.utilities.checks import one_of

_PART = 2**20
"""Numbers of a weight that are looked at in double precision at a time."""

IMPORTANCES = ("magnitude", "activation", "taylor", "reconstruction", "random")

Importance = Callable[[nn.Module, PruningGroup], Any]
"""A criterion of one's own: ``(model, group) -> scores``, one real number per channel; the smallest go first, ``-inf``
before all, ``inf`` after all others. NaN is an error."""

Steps = Sequence[Callable[[], Any]]


def checked_importance(importance: Any) -> str | Importance | None:
    """The argument `importance`.

    Raises:
        ValueError: It is neither `None` nor one of :data:`IMPORTANCES` nor a function.
    """
    if importance is None or callable(importance):
        return cast("Importance | None", importance)
    return one_of("importance", importance, IMPORTANCES)


def rank(
    importance: str | Importance | None,
    model: nn.Module,
    groups: Sequence[PruningGroup],
    steps: Steps,
    statistics: Mapping[str, InputStatistics],
    rng: np.random.Generator,
) -> list[IntArray]:
    """Rank the channels of each group, the least important first.

    Args:
        importance: One of :data:`IMPORTANCES`, a function of the user's own, or `None`.
        model: The dense model.
        groups: Its prunable groups.
        steps: For ``taylor``: one function per calibration batch that runs the model on it and returns the loss.
        statistics: For ``activation``, ``reconstruction`` and `None`: what the groups' readers see.
        rng: For ``random``.

    Returns:
        One permutation of ``range(num_channels)`` per group.

    Raises:
        ValueError: ``taylor``, and a step returns no loss with a gradient; a function of the user's own fails, or does
            not return one number per channel; or an unknown criterion.
    """
    importance = checked_importance(importance)
    if importance == "random":
        return [rng.permutation(group.num_channels).astype(np.int64) for group in groups]
    if callable(importance):
        scores = [_own(importance, model, group) for group in groups]
    elif importance == "magnitude":
        scores = _magnitude(model, groups)
    elif importance == "activation":
        scores = _activation(model, groups, statistics)
    elif importance in ("reconstruction", None):
        scores = _reconstruction(model, groups, statistics, everywhere=importance is not None)
    else:
        scores = _taylor(model, groups, steps)
    return [np.argsort(np.nan_to_num(score, nan=0.0), kind="stable").astype(np.int64) for score in scores]


def _own(importance: Importance, model: nn.Module, group: PruningGroup) -> FloatArray:
    """The scores of a function of the user's own, as an array.

    Raises:
        ValueError: The function fails, or what it returns are no scores.
    """
    name = getattr(importance, "__qualname__", type(importance).__qualname__)
    try:
        with torch.no_grad():
            given = importance(model, group)
    except Exception as error:
        raise ValueError(
            f"importance: {name} fails for the group {group.name!r}: {type(error).__name__}: {error}"
        ) from error
    scores, mistake = _as_scores(given, group.num_channels)
    if mistake:
        raise ValueError(
            f"importance: {name} returns {mistake} for the group {group.name!r}, not one real number for each of its "
            f"{group.num_channels} channels (inf and -inf are allowed, NaN is not)"
        )
    return scores


def _as_scores(given: Any, channels: int) -> tuple[FloatArray, str]:
    """What was returned as scores, and where these are none, what it is instead."""
    try:
        found = torch.as_tensor(given).detach().cpu()
        scores = found.real.double().numpy()
    except (TypeError, ValueError, RuntimeError):
        return np.empty(0), reprlib.repr(given)
    if found.is_complex():
        return scores, "complex numbers"
    if scores.shape != (channels,):
        return scores, f"{type(given).__name__} of the shape {scores.shape}" if scores.ndim else repr(given)
    missing = int(np.isnan(scores).sum())
    return scores, f"{missing} times NaN" if missing else ""


def norms(model: nn.Module, groups: Sequence[PruningGroup]) -> FloatArray:
    """Mean over each group's channels of the norm of their weights, shape ``(groups,)``."""
    return np.array([float(np.sqrt(score).mean()) for score in _magnitude(model, groups)])


def _magnitude(model: nn.Module, groups: Sequence[PruningGroup]) -> list[FloatArray]:
    return [sum_over_channels(model, group, torch.square) for group in groups]


def _activation(
    model: nn.Module, groups: Sequence[PruningGroup], statistics: Mapping[str, InputStatistics]
) -> list[FloatArray]:
    modules = dict(model.named_modules())
    scores = []
    for group in groups:
        score = np.zeros(group.num_channels)
        for member in group.members:
            found = statistics.get(member.module) if is_reading(modules, member) else None
            if found is not None:
                weight = _sums(reading_weight(modules[member.module]), 0, lambda part: part.double().square())
                score += _per_channel(member, (found.variance * weight.to(found.mean.device)).cpu().numpy(), group)
        scores.append(score if score.any() else _magnitude(model, [group])[0])  # nothing reads it: rank by weights
    return scores


def _reconstruction(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    statistics: Mapping[str, InputStatistics],
    everywhere: bool,
) -> list[FloatArray]:
    """Score a channel by how late it goes, everywhere or in groups where that is the default; else by `activation`."""
    modules = dict(model.named_modules())
    strides = {(reader.name, reader.slot): reader.stride for reader in find_readers(model, groups)}
    scores = []
    for group in groups:
        wanted = everywhere or is_eliminated(modules, group)
        order = eliminate(modules, group, strides, statistics) if wanted else ()
        scores += [np.argsort(order).astype(np.float64)] if len(order) else _activation(model, [group], statistics)
    return scores


def _taylor(model: nn.Module, groups: Sequence[PruningGroup], steps: Steps) -> list[FloatArray]:
    saved = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    scores = [np.zeros(group.num_channels) for group in groups]
    computed = {module: found for module in model.modules() if (found := computed_of(module))}
    try:
        for step in steps:
            for parameter, _, _ in saved:
                parameter.grad = None
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            with watch_gradients(computed) as gradients, torch.enable_grad():
                loss = step()
                loss = loss.get("loss") if isinstance(loss, Mapping) else loss
                if not isinstance(loss, torch.Tensor) or loss.grad_fn is None:
                    raise ValueError(
                        "importance: 'taylor' needs a step that returns a loss with a gradient, "
                        f"but the module returned {type(loss).__name__}; use 'activation' or 'magnitude'"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            for score, group in zip(scores, groups, strict=True):
                score += _sum_members(model, group, _first_order, gradients) ** 2
    finally:
        for parameter, grad, flag in saved:
            parameter.grad = grad
            parameter.requires_grad_(flag)
    return scores


def sum_over_channels(
    model: nn.Module, group: PruningGroup, value: Callable[[torch.Tensor], torch.Tensor]
) -> FloatArray:
    """Sum something of every weight that produces or reads a channel: what most criteria of one's own are made of.

    Matrices and kernels count, biases and norms do not.

    Args:
        model: The model.
        group: One of its groups.
        value: An elementwise function of a weight (in double precision), such as ``torch.abs``.

    Returns:
        One number per channel, shape ``(num_channels,)``.
    """
    return _sum_members(model, group, lambda weight, _: value(weight.double()))


def _first_order(weight: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros_like(weight, dtype=torch.float64) if grad is None else weight.double() * grad.double()


def _sum_members(
    model: nn.Module,
    group: PruningGroup,
    value: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    gradients: WeightGradients = WeightGradients(),  # noqa: B008 - nobody writes it
) -> FloatArray:
    """Sum an elementwise value of the matrices and kernels that produce or read a group's channels.

    Args:
        model: The model.
        group: The group.
        value: Of a weight and its gradient.
        gradients: Of weights that are computed.
    """
    modules = dict(model.named_modules())
    score = np.zeros(group.num_channels)
    for member in group.members:
        module = modules.get(member.module)
        layout = layout_of(module) if module is not None else None
        computed = computed_of(module) if module is not None else None
        sources = {} if computed is None else computed.sources(0)
        for axis in layout.axes if isinstance(layout, Layout) else ():
            tensor = module.get_parameter(axis.tensor) if module is not None and _has(module, axis.tensor) else None
            if axis.slot != member.slot or tensor is None or tensor.ndim < 2:
                continue
            weight, grad = tensor.detach(), None if tensor.grad is None else tensor.grad.to_dense()
            if module is not None and computed is not None and axis.tensor in sources:
                if axis.tensor != computed.direction:
                    continue
                weight, grad = computed.value(module), gradients.of(module)
            along = _sums(weight, axis.dim, value, grad)
            indices = along.reshape(axis.repeat, -1, axis.each).sum((0, 2)).cpu().numpy()
            shares = np.tile(indices / axis.parts, axis.parts)  # the parts of a grouped layer lose the same channels
            score += _per_channel(member, shares, group)
    return score


def _sums(
    weight: torch.Tensor, dim: int, value: Callable[..., torch.Tensor], *others: torch.Tensor | None
) -> torch.Tensor:
    """Sums over all dimensions but one of an elementwise value of tensors of one shape, a part of them at a time."""
    # one tensor for all: small ones would lie between the parts, whose memory could not be used again
    sums = weight.new_zeros(weight.shape[dim], dtype=torch.float64)
    length = max(_PART * weight.shape[dim] // max(weight.numel(), 1), 1)
    for first in range(0, weight.shape[dim], length):
        size = min(length, weight.shape[dim] - first)
        given = (None if one is None else one.narrow(dim, first, size) for one in (weight, *others))
        sums[first : first + size] = value(*given).transpose(0, dim).flatten(1).sum(1)
    return sums


def _has(module: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return isinstance(getattr(module.get_submodule(parent), name, None), nn.Parameter)


def _per_channel(member: Member, values: FloatArray, group: PruningGroup) -> FloatArray:
    """Add up a slot's per-index values by channel."""
    own = member.owner >= 0
    weights = np.nan_to_num(values[own])
    return np.bincount(member.owner[own], weights=weights, minlength=group.num_channels).astype(np.float64)
