"""Compensation: what the readers of removed channels do to make up for them, in closed form.

A reader computes ``W x + b``. With the channels R of its input removed and K kept, the removed ones are predicted from
the kept ones by linear regression on calibration activations (mean ``m``, covariance ``S``, ridge ``r``),

    x_R = m_R + B (x_K - m_K),    B = S_RK (S_KK + r I)^-1,

and the prediction is folded into the reader:

    W_K + W_R B,    b + W_R (m_R - B m_K).

``"bias"`` does the same with B = 0. Nothing is trained. A convolution uses one regression for all positions of its
kernel; a grouped convolution one per group. Where taps of the kernel fall beside the input (on zero padding; between
the inputs of a transposed convolution with steps), what the bias has to make up for differs from output to output. The
bias gets the mean: its term times the share of the taps that fall on the input, ``E n / taps``. The rest is an error of
variance ``var n (m_R - B m_K)^2``, so the regression minimises it too: ``S`` becomes ``S + (var n / E n) m m^T``.

Plans of one ranking are nested. So ``S + r I`` is factorised once per reader and round, with the most important
channels first: for a plan that keeps the first k of them, ``B = L_RK L_KK^-1`` by blocks of that one Cholesky factor.
Readers of several groups (behind a concatenation) are factorised per plan.

:func:`refine` is the sequential variant (He et al. 2017, arXiv 1707.06168, eq. 5): layer by layer, each reader is
fitted to the dense network's outputs on the inputs that the already pruned network feeds it. Where a pointwise function
follows a reader, outputs are then compared after it (``response.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.calibration import (
    InputStatistics,
    Reader,
    Taps,
    as_rows,
    find_readers,
    in_double,
    sum_over_processes,
    watch_inputs,
)
from lightning_softprune.groups import PruningGroup
from lightning_softprune.response import Response, find_responses, fit_response
from lightning_softprune.surgery import Surgery

__all__ = ["COMPENSATIONS", "RIDGE", "Compensation", "refine"]

COMPENSATIONS = ("none", "bias", "least_squares")

RIDGE = 1e-4
"""Ridge of the regressions, as a fraction of the mean variance of a reader's input channels."""

IntArray = NDArray[np.int64]


class Compensation:
    """Folds predictions of removed channels into their readers.

    Args:
        mode: One of :data:`COMPENSATIONS`.
        model: The dense model.
        groups: Its prunable groups.
        rankings: The order in which each group's channels go; the first is removed first.
        statistics: What the readers see, by module name.
    """

    def __init__(
        self,
        mode: str,
        model: nn.Module,
        groups: Sequence[PruningGroup],
        rankings: Sequence[IntArray],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        self.mode = mode
        self._readers: dict[str, _Regression] = {}
        if mode == "none":
            return
        shared = _shared_parameters(model)
        for reader in find_readers(model, groups):
            layer = model.get_submodule(reader.name)
            known = statistics.get(reader.name)
            if known is None or not isinstance(layer, (nn.Linear, _ConvNd)) or _ids(layer) & shared:
                continue
            order = _keep_order(reader, groups, rankings, layer)
            self._readers[reader.name] = _Regression(
                reader, known, order, exact=mode == "least_squares", has_bias=layer.bias is not None
            )

    @property
    def readers(self) -> list[str]:
        """Names of the layers that are compensated for."""
        return list(self._readers)

    @property
    def new_biases(self) -> list[str]:
        """Those among them that get a bias with the first channel that their input loses."""
        return [name for name, regression in self._readers.items() if not regression.has_bias]

    def regression(self, name: str) -> _Regression:
        """The regression of one of them."""
        return self._readers[name]

    def apply(self, model: nn.Module, surgery: Surgery) -> None:
        """Fold the predictions into the pruned model's readers, in place.

        Args:
            model: The model after ``surgery``.
            surgery: What was removed. Biases that had to be created are added to its record.
        """
        old = {id(new): before for before, new, _ in surgery.parameters}
        for name, regression in self._readers.items():
            layer = model.get_submodule(name)
            weight = layer.get_parameter("weight")
            by_dim = surgery.kept.get(f"{name}.weight", {})
            before = old.get(id(weight))
            input_dim = _input_dim(layer)
            if before is None or input_dim not in by_dim:
                continue
            kept = _input_indices(layer, before, by_dim)
            with torch.no_grad():
                folded, shift = regression.fold(layer, before.detach(), kept, by_dim)
                weight.copy_(folded.to(weight.dtype))
                _add_to_bias(layer, name, shift, surgery)


class _Regression:
    """The regression of one reader's removed input channels on its kept ones."""

    def __init__(
        self, reader: Reader, known: InputStatistics, order: IntArray | None, exact: bool, has_bias: bool
    ) -> None:
        self.reader = reader
        self.has_bias = has_bias
        self.mean = known.mean
        self.taps = known.taps
        self.exact = exact
        if not exact:
            return
        covariance = self.with_borders(known.covariance, self.mean, self.mean)
        self.ridge = ridge_of(covariance)
        self.covariance = covariance
        self.order = None if order is None else torch.from_numpy(order).to(covariance.device)
        self.factor: torch.Tensor | None = None
        if self.order is not None:
            self.factor = _cholesky(covariance[self.order][:, self.order], self.ridge)

    def with_borders(self, covariance: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Add to a covariance what the means contribute where a kernel's taps fall on the input unevenly."""
        if not self.taps.unevenness:
            return covariance
        return covariance + self.taps.unevenness * torch.outer(left, right)

    def coefficients(self, kept: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
        """``B``, shape ``(removed, kept)``; indices are channels."""
        if not self.exact:
            return self.mean.new_zeros(len(removed), len(kept))
        if self.factor is not None and self.order is not None:
            k = len(kept)
            first = self.order[:k]
            if torch.equal(first.sort().values, kept):
                upper = self.factor[k:, :k]
                solved = torch.linalg.solve_triangular(self.factor[:k, :k], upper, upper=False, left=False)
                back = torch.empty_like(solved)
                rows = torch.searchsorted(removed, self.order[k:])
                columns = torch.searchsorted(kept, first)
                back[rows[:, None], columns[None]] = solved
                return back
        factor = _cholesky(self.covariance[kept][:, kept], self.ridge)
        return torch.cholesky_solve(self.covariance[kept][:, removed], factor).t()

    def fold(
        self, layer: nn.Module, weight: torch.Tensor, kept: torch.Tensor, by_dim: Mapping[int, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold the removed inputs into the kept ones.

        Args:
            layer: The reader, already pruned.
            weight: Its weight before the plan.
            kept: Input indices of the slot that stay.
            by_dim: Kept indices of each dimension of the weight.

        Returns:
            The pruned, compensated weight, and what to add to the bias, shape ``(out,)``.
        """
        blocks = _blocks(layer, weight, by_dim)  # (groups, out / groups, in / groups, positions), outputs pruned
        groups = len(blocks)
        device = self.mean.device
        blocks = blocks.to(device, torch.float64)
        stride = self.reader.stride
        size = len(self.mean) // stride // groups  # channels of one group
        gone = torch.ones(groups * size, dtype=torch.bool, device=device)
        gone[kept.to(device)[::stride] // stride] = False
        folded, shifts = [], []
        for group in range(groups):
            members = torch.arange(group * size, (group + 1) * size, device=device)
            stays, goes = members[~gone[members]], members[gone[members]]
            solution = self.coefficients(stays, goes)
            inside = blocks[group].reshape(-1, size, stride, blocks.shape[-1])  # (out, channel, stride, positions)
            k, r = inside[:, stays - group * size], inside[:, goes - group * size]
            folded.append((k + torch.einsum("orsp,rk->oksp", r, solution)).flatten(1, 2))
            mean = self.mean.reshape(-1, stride)
            missing = mean[goes] - solution @ mean[stays]  # (removed, stride)
            shifts.append(torch.einsum("orsp,rs->o", r, missing))
        shift = torch.cat(shifts) * self.taps.share
        return _unblock(layer, torch.stack(folded)).to(weight.device), shift.to(weight.device)


def ridge_of(covariance: torch.Tensor, fraction: float = RIDGE) -> float:
    """The ridge for a covariance matrix; positive even if every channel is constant."""
    return max(fraction * float(covariance.diagonal().mean()), 1e-12)


def _cholesky(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """Factorise ``matrix + ridge I``, with more ridge where rounding has made the matrix indefinite."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if not failed:
            found: torch.Tensor = factor
            return found
        ridge *= 10.0


def _keep_order(
    reader: Reader, groups: Sequence[PruningGroup], rankings: Sequence[IntArray], layer: nn.Module
) -> IntArray | None:
    """The reader's channels, the last to go first, if its plans are nested; ``None`` for readers of several groups."""
    feeding = [
        (member, ranking)
        for group, ranking in zip(groups, rankings, strict=True)
        for member in group.members
        if (member.module, member.slot) == (reader.name, reader.slot)
    ]
    if len(feeding) != 1 or getattr(layer, "groups", 1) > 1:
        return None
    member, ranking = feeding[0]
    owner = member.owner[:: reader.stride]
    place = np.empty(len(ranking) + 1, dtype=np.int64)
    place[ranking] = np.arange(len(ranking))
    place[-1] = len(ranking)  # channels of no group stay
    return np.argsort(-place[owner], kind="stable").astype(np.int64)


# ------------------------------------------------------------------------------------------- the shapes of weights


def _input_dim(layer: nn.Module) -> int:
    return 0 if isinstance(layer, _ConvTransposeNd) else 1


def _input_indices(layer: nn.Module, before: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Kept indices of the layer's input slot; a grouped weight holds those of its first group only."""
    kept = by_dim[_input_dim(layer)]
    groups = getattr(layer, "groups", 1)
    if groups > 1 and not isinstance(layer, _ConvTransposeNd):
        width = before.shape[1]
        return torch.cat([kept + group * width for group in range(groups)])
    return kept


def _blocks(layer: nn.Module, weight: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Bring a weight into ``(groups, out / groups, in / groups, positions)``, with its outputs pruned."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):
        if 1 in by_dim:
            weight = weight.index_select(1, by_dim[1].to(weight.device))
        return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(3)
    if 0 in by_dim:
        weight = weight.index_select(0, by_dim[0].to(weight.device))
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    return blocks.flatten(3) if blocks.ndim > 3 else blocks[..., None]


def _unblock(layer: nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """The way back from :func:`_blocks`."""
    if isinstance(layer, nn.Linear):
        return blocks[0, ..., 0]
    kernel = tuple(layer.kernel_size) if isinstance(layer, _ConvNd) else ()
    if isinstance(layer, _ConvTransposeNd):
        blocks = blocks.transpose(1, 2)
    return blocks.flatten(0, 1).reshape(-1, blocks.shape[2], *kernel)


def _add_to_bias(layer: nn.Module, name: str, shift: torch.Tensor, surgery: Surgery) -> None:
    weight = layer.get_parameter("weight")
    bias = layer._parameters.get("bias")
    if bias is None:
        created = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        layer._parameters["bias"] = created
        surgery.created.append((f"{name}.bias", weight, created))
    else:
        if not any(bias is new for _, new, _ in surgery.parameters):
            old, bias = bias, nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            bias.__dict__.update(old.__dict__)
            bias.grad = None if old.grad is None else old.grad.detach().clone()
            surgery.replace(layer, "bias", f"{name}.bias", bias)
        bias.copy_((bias.double() + shift.to(bias.device)).to(bias.dtype))


def _ids(layer: nn.Module) -> set[int]:
    return {id(parameter) for parameter in layer.parameters(recurse=False)}


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that several modules hold: changing them for one reader would change them for all."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


# ------------------------------------------------------------------------------------------------- sequential refit

REFINE_RIDGE = 1e-2
"""How firmly the sequential variant holds on to the one-shot prediction, as a fraction of the mean variance."""

MAX_ROWS = 4096
"""Observations per calibration batch and reader that the sequential variant keeps."""

MAX_RESPONSE_ROWS = 2**14
"""Observations per process and reader on which outputs are compared after the function that follows."""

RESPONSE_PRIOR = 100.0
"""As many observations the one-shot prediction counts for there. Only those in the function's sloping part tell
anything, so that few calibration batches tell less of it than of the linear fit."""


class DenseInputs:
    """What the readers see in the dense network: the targets of :func:`refine`. Kept in single precision."""

    def __init__(self, model: nn.Module, compensation: Compensation, steps: Sequence[Callable[[], Any]]) -> None:
        self.steps = steps
        self.rows: dict[str, list[torch.Tensor]] = {}

        def see(name: str, source: torch.Tensor) -> None:
            rows = _thinned(as_rows(model.get_submodule(name), source))
            self.rows.setdefault(name, []).append(rows.float())

        with watch_inputs(model, compensation.readers, see), torch.no_grad():
            for step in steps:
                step()
        self.responses = find_responses(model, compensation.readers, steps[0]) if steps else {}


def refine(model: nn.Module, surgery: Surgery, compensation: Compensation, dense: DenseInputs) -> None:
    """Fit each reader of the pruned model, in the order in which they run, to what it computed in the dense model.

    With dense inputs ``x`` and the pruned network's inputs ``z``, all channels are predicted from the kept ones,
    ``P = (S_xz + r P0) (S_zz + r I)^-1``, where ``P0`` is the one-shot prediction: few samples change it little.
    Linear layers (and convolutions of one tap) that a pointwise function follows are then fitted through it.

    Args:
        model: The pruned, compensated model.
        surgery: What was removed from it.
        compensation: How it was compensated.
        dense: The readers' inputs before.
    """
    old = {id(new): before for before, new, _ in surgery.parameters}
    for name, targets in dense.rows.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        by_dim = surgery.kept.get(f"{name}.weight", {})
        regression = compensation.regression(name)
        before = old.get(id(weight))
        if before is None or _input_dim(layer) not in by_dim or getattr(layer, "groups", 1) > 1:
            continue
        seen: list[torch.Tensor] = []

        def see(_: str, source: torch.Tensor, layer: nn.Module = layer, seen: list[torch.Tensor] = seen) -> None:
            seen.append(_thinned(as_rows(layer, source)))

        with watch_inputs(model, [name], see), torch.no_grad():
            for step in dense.steps:
                step()
        device = regression.mean.device
        differs = [len(rows) for rows in seen] != [len(rows) for rows in targets]
        if sum_over_processes(torch.tensor(float(differs), device=device)) > 0:
            continue  # the pruned model calls the layer differently; the one-shot prediction stays
        stride = regression.reader.stride
        x, z = in_double(torch.cat(targets)).to(device), in_double(torch.cat(seen)).to(device)
        total = sum_over_processes(torch.tensor(float(len(x)), dtype=torch.float64, device=device))
        mean_x, mean_z = sum_over_processes(x.sum(0)) / total, sum_over_processes(z.sum(0)) / total
        x, z = _by_channel(x - mean_x, stride), _by_channel(z - mean_z, stride)
        kept = by_dim[_input_dim(layer)].to(device)[::stride] // stride
        s_zz = sum_over_processes(z.t() @ z) / (total * stride)
        s_xz = sum_over_processes(x.t() @ z) / (total * stride)
        if stride == 1:
            s_zz = regression.with_borders(s_zz, mean_z, mean_z)
            s_xz = regression.with_borders(s_xz, mean_x, mean_z)
        gone = torch.ones(x.shape[1], dtype=torch.bool, device=device)
        gone[kept] = False
        prior = torch.zeros_like(s_xz)
        prior[kept, torch.arange(len(kept), device=device)] = 1.0
        prior[gone] = regression.coefficients(kept, gone.nonzero()[:, 0])
        ridge = ridge_of(s_zz, REFINE_RIDGE)
        factor = _cholesky(s_zz, ridge)
        solution = torch.cholesky_solve((s_xz + ridge * prior).t(), factor).t()  # (channels, kept)
        blocks = _blocks(layer, before.detach(), by_dim).to(device, torch.float64)[0]
        blocks = blocks.reshape(len(blocks), -1, stride, blocks.shape[-1])
        folded = torch.einsum("ocsp,ck->oksp", blocks, solution).flatten(1, 2)[None]
        missing = mean_x.reshape(-1, stride) - solution @ mean_z.reshape(-1, stride)
        shift = torch.einsum("ocsp,cs->o", blocks, missing) * regression.taps.share
        bias = layer.get_parameter("bias")
        original = next((b for b, new, _ in surgery.parameters if new is bias), None)
        start = torch.zeros_like(bias) if original is None else original.detach()
        rows = surgery.kept.get(f"{name}.bias", {}).get(0)
        start = (start if rows is None else start[rows.to(start.device)]).to(device, torch.float64)
        new_bias = start + shift
        response = dense.responses.get(name)
        alone = float(response is None or not _has_one_tap(layer, regression))
        if sum_over_processes(torch.tensor(alone, device=device)) == 0 and response is not None:
            matrix = blocks[:, :, 0, 0]
            every = max(-(-len(z) // MAX_RESPONSE_ROWS), 1)
            folded, centred_bias = _through(
                response,
                wanted=x[::every] @ matrix.t() + (start + matrix @ mean_x),
                inputs=z[::every],
                linear=folded,
                bias=start + matrix @ mean_x,
                prior=matrix @ prior,
                covariance=s_zz,
            )
            new_bias = centred_bias - folded[0, :, :, 0] @ mean_z
        with torch.no_grad():
            weight.copy_(_unblock(layer, folded).to(weight.device, weight.dtype))
            bias.copy_(new_bias.to(bias.device, bias.dtype))


def _has_one_tap(layer: nn.Module, regression: _Regression) -> bool:
    """Whether each of the layer's outputs reads one row of its inputs."""
    kernel = tuple(layer.kernel_size) if isinstance(layer, _ConvNd) else ()
    return regression.reader.stride == 1 and all(k == 1 for k in kernel) and regression.taps == Taps()


def _through(
    response: Response,
    wanted: torch.Tensor,
    inputs: torch.Tensor,
    linear: torch.Tensor,
    bias: torch.Tensor,
    prior: torch.Tensor,
    covariance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`fit_response` from the linear fit on: the weight in the blocks' shape, the bias for centred inputs."""
    total = float(sum_over_processes(torch.tensor(float(len(inputs)), device=inputs.device)))
    ridge = ridge_of(covariance, max(REFINE_RIDGE, RESPONSE_PRIOR / total))
    factor = _cholesky(covariance, ridge)
    weight, bias = fit_response(
        response,
        wanted.float(),
        inputs.float(),
        linear[0, :, :, 0].float(),
        bias.float(),
        prior.float(),
        factor.float(),
        ridge,
    )
    return weight.double()[None, ..., None], bias.double()


def _thinned(rows: torch.Tensor) -> torch.Tensor:
    """Every k-th observation, so that at most :data:`MAX_ROWS` remain; the same ones for inputs of equal length."""
    return rows.detach()[:: max(-(-len(rows) // MAX_ROWS), 1)]


def _by_channel(rows: torch.Tensor, stride: int) -> torch.Tensor:
    return rows.reshape(len(rows), -1, stride).transpose(1, 2).flatten(0, 1)
