"""Compensation of queries for dimensions that every head of queries and keys has lost.

What such dimensions are for is the logit ``q k^T``. With the kept dimensions S, for each head,

    M = argmin E |q k^T - q_S M k_S^T|^2,    M = (A_SS)^-1 A_S: B_:S (B_SS)^-1,

with ``A = E q q^T`` and ``B = E k k^T`` of the dense network, over all pairs of a query and a key in the calibration
data (CORP, arXiv 2602.05243, does the like). ``q_S M`` is what the query projection then
computes: ``M`` goes into its weights and bias. The scale of the logits does not depend on the
number of dimensions: groups where it does are refused when they are probed.

Only where the product is taken of the outputs as they are, and nothing else reads the queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.compensation.products import Meetings, watch_products
from lightning_softprune.compensation.regression import cholesky, ridge_of
from lightning_softprune.graph import PruningGroup, WeightGeometry, computed_of, geometry_of
from lightning_softprune.surgery import Surgery
from lightning_softprune.utilities.arrays import IntArray
from lightning_softprune.utilities.distributed import same_over_processes, sum_over_processes

LOGIT_RIDGE = 1e-6
"""Ridge of the predictions of lost dimensions, as a fraction of the mean square of a head's dimensions."""

Rows = tuple[int, ...]
Steps = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Head:
    """Outputs of two layers that meet in a product.

    Attributes:
        query, key: Names of the layers.
        query_rows, key_rows: Their outputs, dimension by dimension.
    """

    query: str
    key: str
    query_rows: Rows
    key_rows: Rows


class LogitFits:
    """Folds into query projections what keeps the logits.

    Args:
        heads: Head -> its ``A`` and ``B`` in the dense network, up to factors, shape ``(2, dimensions, dimensions)``.
    """

    def __init__(self, heads: Mapping[Head, torch.Tensor] | None = None) -> None:
        self.heads = dict(heads or {})

    def fitted(self, model: nn.Module, surgery: Surgery) -> set[str]:
        """Names of the query projections that a plan gives other weights here."""
        return {head.query for head, *_ in self._losing(model, surgery)}

    def apply(self, model: nn.Module, surgery: Surgery) -> None:
        """Fit the queries of a pruned model, in place.

        Args:
            model: The model after ``surgery``.
            surgery: What was removed.
        """
        for head, stays, rows in self._losing(model, surgery):
            queries, keys = self.heads[head]
            matrix = logit_map(queries, keys, stays.to(queries.device))
            layer = model.get_submodule(head.query)
            geometry = _linear(layer)
            if geometry is None:
                continue
            with torch.no_grad():
                weight = layer.get_parameter(geometry.weight)
                _mix_rows(weight if geometry.output_dim == 0 else weight.t(), rows, matrix)
                bias = layer._parameters.get(geometry.bias)
                if bias is not None:
                    _mix_rows(bias, rows, matrix)

    def _losing(self, model: nn.Module, surgery: Surgery) -> Iterator[tuple[Head, torch.Tensor, torch.Tensor]]:
        """Heads that lose some of their dimensions: mask of those that stay, and where their outputs are now."""
        for head in self.heads:
            kept = [_kept_outputs(model, name, surgery) for name in (head.query, head.key)]
            if kept[0] is None or kept[1] is None:
                continue
            both = (torch.tensor(head.query_rows), torch.tensor(head.key_rows))
            stays, there = (torch.isin(rows, of) for rows, of in zip(both, kept, strict=True) if of is not None)
            if torch.equal(stays, there) and 0 < int(stays.sum()) < len(stays):
                yield head, stays, torch.searchsorted(kept[0], both[0][stays])


def logit_map(queries: torch.Tensor, keys: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """``M``, shape ``(kept, kept)``.

    Args:
        queries: ``E q q^T`` of a head.
        keys: ``E k k^T``.
        stays: Mask of the dimensions that stay.
    """
    return _predicted(queries, stays) @ _predicted(keys, stays).t()


def _predicted(moments: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Coefficients that give all dimensions from the kept ones, shape ``(kept, dimensions)``."""
    inside = moments[stays][:, stays]
    found = moments.new_zeros(len(inside), len(moments))
    found[:, stays] = torch.eye(len(inside), dtype=moments.dtype, device=moments.device)
    factor = cholesky(inside, ridge_of(moments, LOGIT_RIDGE))
    found[:, ~stays] = torch.cholesky_solve(moments[stays][:, ~stays], factor)
    return found


def _mix_rows(tensor: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor) -> None:
    rows = rows.to(tensor.device)
    tensor[rows] = (matrix.t() @ tensor[rows].to(matrix)).to(tensor)


def _linear(layer: nn.Module) -> WeightGeometry | None:
    """How a layer's weight makes its outputs, if these are nothing but rows of it times the inputs, and a bias."""
    found = geometry_of(layer)
    whole = found is not None and found.is_whole and found.groups == 1 and found.kernel is None
    return found if whole and computed_of(layer) is None else None


def _kept_outputs(model: nn.Module, name: str, surgery: Surgery) -> torch.Tensor | None:
    geometry = _linear(model.get_submodule(name))
    if geometry is None:
        return None
    kept = surgery.kept.get(f"{name}.{geometry.weight}", {}).get(geometry.output_dim)
    return None if kept is None else kept.cpu()


# ------------------------------------------------------------------------------------------------------------- finding


def find_logit_fits(model: nn.Module, groups: Sequence[PruningGroup], steps: Steps) -> LogitFits:
    """Find the heads whose queries and keys lose dimensions together, and take their moments.

    Args:
        model: The dense model.
        groups: Its prunable groups.
        steps: One function per calibration batch that runs the model on it.
    """
    channels = _channels(model, groups)
    if not channels or not steps:
        return LogitFits()
    first = _watched(model, list(channels), steps[0])
    found = {head: torch.zeros_like(moments) for head, moments in _free_heads(model, first, channels).items()}
    if not _is_agreed(model, found) or not found:
        return LogitFits()
    for place, step in enumerate(steps):
        for head, moments in _heads(_watched(model, list(channels), step) if place else first):
            if head in found:
                found[head] += moments
    for moments in found.values():
        sum_over_processes(moments)
    return LogitFits(found)


def _watched(model: nn.Module, names: Sequence[str], step: Callable[[], Any]) -> Meetings:
    with torch.no_grad(), watch_products(model, names) as seen:
        step()
    return seen


def _channels(model: nn.Module, groups: Sequence[PruningGroup]) -> dict[str, IntArray]:
    """Linear layers whose outputs share channels with others -> the channel of each output, over all groups."""
    found: dict[str, IntArray] = {}
    modules, first = dict(model.named_modules()), 0
    for group in groups:
        made = [m for m in group.members if m.slot == "out" and m.module in modules]
        made = [member for member in made if _linear(modules[member.module]) is not None]
        if sum(int((member.owner >= 0).sum()) for member in made) > group.num_channels:
            for member in made:
                own = member.owner >= 0
                channels = found.setdefault(member.module, np.full(len(own), -1, dtype=np.int64))
                channels[own] = member.owner[own] + first
        first += group.num_channels
    return found


def _heads(seen: Meetings) -> Iterator[tuple[Head, torch.Tensor]]:
    for met in seen.products:
        for (query_rows, key_rows), moments in zip(met.rows.tolist(), met.moments, strict=True):
            yield Head(met.query, met.key, tuple(query_rows), tuple(key_rows)), moments


def _free_heads(model: nn.Module, seen: Meetings, channels: Mapping[str, IntArray]) -> dict[Head, torch.Tensor]:
    """Heads whose queries and keys lose the same dimensions, one by one, and whose queries nobody else reads."""
    heads = dict(_heads(seen))
    uses = Counter((head.query, row) for head in heads for row in head.query_rows)
    uses.update((head.key, row) for head in heads for row in head.key_rows)
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    free = {}
    for head, moments in heads.items():
        rows = list(head.query_rows)
        of_queries, of_keys = channels[head.query][rows], channels[head.key][list(head.key_rows)]
        own = [held[id(p)] == 1 for p in model.get_submodule(head.query).parameters(recurse=False)]
        once = all(uses[head.query, row] == 1 for row in rows)
        once = once and not seen.elsewhere.get(head.query, set()) & set(rows)
        together = bool((of_queries >= 0).all()) and bool((of_queries == of_keys).all())
        if all(own) and once and together and len(set(of_queries.tolist())) == len(rows) > 1:
            free[head] = moments
    return free


def _is_agreed(model: nn.Module, heads: Mapping[Head, torch.Tensor]) -> bool:
    """Whether all processes have found as many heads."""
    return same_over_processes([len(heads)], next(model.parameters()).device) == [True]
