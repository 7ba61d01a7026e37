"""Rankings: which channels of a group go first.

Every criterion gives one score per channel and group; the channels with the smallest scores go first. Scores of a
channel are summed over everything it touches, so that a group is ranked as a whole.

- ``magnitude``: the squared norm of all weights that produce or read the channel (the group norm of DepGraph,
  arXiv 2301.12900, eq. 6).
- ``activation``: the channel's variance at each layer that reads it, times the squared norm of the weights it is read
  with: the variance that disappears from the layers' outputs when the channel is replaced by its mean.
- ``taylor``: the squared first-order change of the loss, ``(sum of weight * gradient)^2`` over the channel's
  producing and reading weights (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).
- ``reconstruction``: greedy selection of the channels from which the readers' outputs are best rebuilt by least
  squares (orthogonal matching pursuit on the covariance of the readers' inputs); the last to be selected goes first.
  A channel is kept with all that an output reads of it (the positions of a kernel, of a flattened map), where
  compensation knows these, and up to :data:`_WIDEST_SELECTION` numbers in all.
- ``random``: a seeded permutation.
- a function of the user's own (:data:`Importance`): given the model and a group, it returns one score per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lightning_softprune.calibration.readers import find_readers, is_reading, reading_weight, weight_geometry
from lightning_softprune.calibration.statistics import InputStatistics
from lightning_softprune.graph import (
    Layout,
    Member,
    PruningGroup,
    WeightGradients,
    computed_of,
    layout_of,
    watch_gradients,
    weight_of,
)
from lightning_softprune.utilities.arrays import FloatArray, IntArray
from lightning_softprune.utilities.checks import one_of

_WIDEST_SELECTION = 1152
"""Numbers that an output reads, 128 channels under a kernel of 3 x 3: a selection takes as their third power."""

_PANEL = 64
"""Columns of products that are held before they are taken off a matrix: one product of many is faster than many."""

_PART = 2**20
"""Numbers of a weight that are looked at in double precision at a time."""

IMPORTANCES = ("magnitude", "activation", "taylor", "reconstruction", "random")

Importance = Callable[[nn.Module, PruningGroup], Any]
"""A criterion of one's own: ``(model, group) -> scores``, one number per channel; the smallest go first."""

Steps = Sequence[Callable[[], Any]]


class ScoresError(ValueError):
    """A criterion of the user's own does not return one number per channel."""


def checked_importance(importance: Any) -> str | Importance:
    """The argument `importance`.

    Raises:
        ValueError: It is neither one of :data:`IMPORTANCES` nor a function.
    """
    if callable(importance):
        return cast(Importance, importance)
    return cast(str, one_of("importance", importance, IMPORTANCES))


def rank(
    importance: str | Importance,
    model: nn.Module,
    groups: Sequence[PruningGroup],
    steps: Steps,
    statistics: Mapping[str, InputStatistics],
    rng: np.random.Generator,
) -> list[IntArray]:
    """Rank the channels of each group, the least important first.

    Args:
        importance: One of :data:`IMPORTANCES`, or a function of the user's own.
        model: The dense model.
        groups: Its prunable groups.
        steps: For ``taylor``: one function per calibration batch that runs the model on it and returns the loss.
        statistics: For ``activation`` and ``reconstruction``: what the groups' readers see.
        rng: For ``random``.

    Returns:
        One permutation of ``range(num_channels)`` per group.

    Raises:
        ValueError: ``taylor``, and a step returns no loss with a gradient; or an unknown criterion.
        ScoresError: A function of the user's own does not return one number per channel.
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
    elif importance == "reconstruction":
        scores = _reconstruction(model, groups, statistics)
    else:
        scores = _taylor(model, groups, steps)
    return [np.argsort(np.nan_to_num(score, nan=0.0), kind="stable").astype(np.int64) for score in scores]


def _own(importance: Importance, model: nn.Module, group: PruningGroup) -> FloatArray:
    """The scores of a function of the user's own, as an array."""
    with torch.no_grad():
        given = importance(model, group)
    try:
        scores = np.asarray(torch.as_tensor(given).detach().cpu(), dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        scores = np.empty(())
    if scores.shape != (group.num_channels,):
        name = getattr(importance, "__qualname__", type(importance).__qualname__)
        what = f"{type(given).__name__} of the shape {tuple(np.shape(given))}" if np.ndim(scores) else repr(given)
        raise ScoresError(
            f"importance: {name} returns {what} for the group {group.name!r}, not one number for each of its "
            f"{group.num_channels} channels"
        )
    return scores


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
    model: nn.Module, groups: Sequence[PruningGroup], statistics: Mapping[str, InputStatistics]
) -> list[FloatArray]:
    """Score a channel by how early greedy selection takes it: the first to be kept has the highest score."""
    modules = dict(model.named_modules())
    strides = {(reader.name, reader.slot): reader.stride for reader in find_readers(model, groups)}
    scores = []
    for group in groups:
        heads = _holds_heads(modules, group)
        problems = [
            _Selection.of(member, modules[member.module], strides[member.module, member.slot], known, heads)
            for member in group.members
            if is_reading(modules, member) and (known := statistics.get(member.module)) is not None
        ]
        if not problems:
            scores.append(_magnitude(model, [group])[0])
            continue
        score = np.zeros(group.num_channels)
        left = np.ones(group.num_channels, dtype=bool)
        for rank_kept in range(group.num_channels, 0, -1):
            gains = np.sum([problem.gains(group.num_channels) for problem in problems], axis=0)
            chosen = int(np.argmax(np.where(left, gains, -np.inf)))
            score[chosen], left[chosen] = rank_kept, False
            for problem in problems:
                problem.keep(chosen)
        scores.append(score)
    return scores


def _holds_heads(modules: Mapping[str, nn.Module], group: PruningGroup) -> bool:
    """Whether the layers that produce a channel do so at several indices; positions behind a flatten have one."""
    made = [member.owner[member.owner >= 0] for member in group.members if not is_reading(modules, member)]
    return any(len(owner) > group.num_channels for owner in made)


class _Selection:
    """What one reader's outputs still lack, given the channels kept so far.

    ``D`` is the covariance of what an output reads given the kept channels, ``M`` the weights that read it, and
    ``G = D M M^T D``. To keep an input j next explains ``G_jj / D_jj`` of the outputs' variance (orthogonal matching
    pursuit on the covariance). A channel has several inputs B, where it is a head, or an output reads it at several
    positions: as a whole it explains ``tr((D_BB)^-1 G_BB)``. Once it is kept, ``D -= A D_B`` with
    ``A = D_:B (D_BB)^-1``, and ``G`` becomes ``(I - A e_B^T) G (I - A e_B^T)^T``.

    Args:
        owner: The channel of each input; -1 for one of another group, which counts as kept.
        covariance: Of the inputs; it is overwritten.
        gram: ``M M^T``.
    """

    def __init__(self, owner: IntArray, covariance: torch.Tensor, gram: torch.Tensor) -> None:
        gram = gram.nan_to_num(0.0, 0.0, 0.0)
        self.ridge = max(1e-6 * float(covariance.diagonal().mean()), 1e-12)
        self.owner = torch.from_numpy(owner).to(covariance.device)
        own = self.owner >= 0
        if not bool(own.all()):
            rest = covariance[~own][:, ~own]
            rest.diagonal().add_(self.ridge)
            across = covariance[own][:, ~own]
            covariance = covariance[own][:, own] - across @ torch.linalg.solve(rest, across.t())
            gram, self.owner = gram[own][:, own], self.owner[own]
        self.blocks = _by_size(self.owner)
        inside = [indices for _, indices in self.blocks]
        self.unexplained = _Remainder(covariance @ gram @ covariance, inside)
        self.left = _Remainder(covariance, inside)

    @classmethod
    def of(cls, member: Member, layer: nn.Module, stride: int, known: InputStatistics, heads: bool) -> _Selection:
        """For one reader: of all that an output reads, where that is known and not too wide, else of its channels.

        Args:
            member: The reader in its group.
            layer: The reader.
            stride: Its consecutive input indices per channel.
            known: What it sees.
            heads: Whether channels are heads.
        """
        geometry, owner = weight_geometry(layer), member.owner[::stride]
        whole = known.unfolded
        if whole is not None and geometry.groups == 1 and (heads or geometry.features <= _WIDEST_SELECTION):
            covariance = whole.covariance
            rows = geometry.to_rows(weight_of(layer, geometry.weight).detach(), stride)[0]
            weight = rows.flatten(1).to(covariance)
            return cls(np.repeat(owner, rows.shape[2]), covariance, weight.t() @ weight)
        covariance = known.covariance
        weight = reading_weight(layer).to(covariance).flatten(1)
        gram = torch.zeros_like(covariance)
        for offset in range(stride):
            gram += weight[offset::stride] @ weight[offset::stride].t()
        if geometry.groups > 1:  # no output of a grouped convolution reads channels of two parts
            part = torch.arange(len(gram), device=gram.device) // (len(gram) // geometry.groups)
            together = part[:, None] == part
            gram, covariance = gram * together, covariance * together
        return cls(owner, covariance, gram)

    def gains(self, num_channels: int) -> FloatArray:
        total = torch.zeros(num_channels, dtype=torch.float64, device=self.owner.device)
        for (channels, _), left, unexplained in zip(
            self.blocks, self.left.diagonal, self.unexplained.diagonal, strict=True
        ):
            inside = left.clone()
            inside.diagonal(dim1=1, dim2=2).clamp_(min=0.0).add_(self.ridge)
            explained = unexplained / inside if inside.shape[1] == 1 else torch.linalg.solve(inside, unexplained)
            total[channels] = explained.diagonal(dim1=1, dim2=2).sum(1)
        return np.asarray(total.cpu().numpy())

    def keep(self, channel: int) -> None:
        indices = torch.nonzero(self.owner == channel)[:, 0]
        columns, unexplained = self.left.columns(indices), self.unexplained.columns(indices)
        inside = columns[indices]
        inside.diagonal().clamp_(min=0.0).add_(self.ridge)
        coefficients = torch.linalg.solve(inside, columns.t()).t()
        self.left.take_off(coefficients, columns)
        # on both sides: what would be taken off twice is given back by half on each
        unexplained -= 0.5 * coefficients @ unexplained[indices]
        self.unexplained.take_off(torch.cat([coefficients, unexplained], 1), torch.cat([unexplained, coefficients], 1))


class _Remainder:
    """A matrix of which products are taken off; :data:`_PANEL` columns of factors at a time, since it may be large.

    Args:
        matrix: The matrix; it is overwritten.
        blocks: Indices, shape ``(blocks, size)``, of blocks on its diagonal.

    Attributes:
        diagonal: What these blocks are now, shape ``(blocks, size, size)``.
    """

    def __init__(self, matrix: torch.Tensor, blocks: Sequence[torch.Tensor]) -> None:
        self.matrix, self.blocks = matrix, blocks
        self.diagonal = [matrix[at[:, :, None], at[:, None, :]] for at in blocks]
        self.pending = 0
        self.lefts, self.rights = (matrix.new_empty(len(matrix), 0) for _ in range(2))

    def columns(self, indices: torch.Tensor) -> torch.Tensor:
        """Some of the columns, a new tensor."""
        lefts, rights = self.lefts[:, : self.pending], self.rights[indices, : self.pending]
        return self.matrix[:, indices].addmm_(lefts, rights.t(), alpha=-1.0)

    def take_off(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Take off ``left @ right.T``."""
        for at, block in zip(self.blocks, self.diagonal, strict=True):
            block.baddbmm_(left[at], right[at].mT, alpha=-1.0)
        if self.pending + left.shape[1] > self.lefts.shape[1]:
            lefts, rights = self.lefts[:, : self.pending], self.rights[:, : self.pending]
            self.matrix.addmm_(lefts, rights.t(), alpha=-1.0)
            self.pending, width = 0, max(_PANEL, left.shape[1])
            self.lefts, self.rights = (self.matrix.new_empty(len(self.matrix), width) for _ in range(2))
        end = self.pending + left.shape[1]
        self.lefts[:, self.pending : end], self.rights[:, self.pending : end] = left, right
        self.pending = end


def _by_size(owner: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Channels that have equally many indices, and these, shape ``(channels, indices)``."""
    channels, counts = torch.unique(owner, return_counts=True)
    starts, order = counts.cumsum(0) - counts, owner.argsort(stable=True)
    found = []
    for size in torch.unique(counts).tolist():
        own = counts == size
        found.append((channels[own], order[starts[own][:, None] + torch.arange(size, device=owner.device)]))
    return found


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
            weight, grad = tensor.detach(), tensor.grad
            if module is not None and computed is not None and axis.tensor in sources:
                if axis.tensor != computed.direction:
                    continue
                weight, grad = computed.value(module), gradients.of(module)
            along = _sums(weight, axis.dim, value, grad)
            indices = along.reshape(axis.repeat, -1).sum(0).cpu().numpy()
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
