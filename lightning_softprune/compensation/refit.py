"""The sequential refit: layer by layer, what a reader computed in the dense network, from what the pruned one feeds it.

Compensation of one layer knows nothing of the errors that the layers before it leave. Once a plan is chosen, each
reader is therefore fitted again, in the order in which they run (He et al. 2017, arXiv 1707.06168, eq. 5), those that
read the same tensor in one pass (neighbours in a chain must not: each would miss what the refit before it changes, and
in deep chains that adds up to more than the one-shot error). Each pass ends at its reader, and what ran before the last
one is not computed again (`replay`). With the dense network's outputs ``y``, what its outputs read now ``z``, and the
compensated weights ``W0``,

    W = (S_yz + r W0) (S_zz + r I)^-1,    b = m_y - W m_z;

few samples change ``W0`` little. Where the model adds the outputs to something else (``sums.py``), ``y`` is what the
dense network's sum lacks of the other addend as it is now, so that a reader makes up for what those before it lost.
Where a pointwise function follows the reader, outputs are then compared after it (``activation_fit.py``). Layers whose
unfolded inputs are too wide keep one regression for all positions: the dense inputs ``x`` are predicted from ``z``,
around the one-shot prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_softprune.calibration import (
    Scratch,
    centred,
    cross_products,
    mean_of,
    observations,
    outputs_at_rows,
    rows_of_inputs,
    rows_per_call,
    sampled_rows,
    watch_inputs,
)
from lightning_softprune.compensation.activation_fit import Start, fit_after_activation
from lightning_softprune.compensation.activations import FollowingActivation
from lightning_softprune.compensation.dense_run import DenseRun
from lightning_softprune.compensation.fold import Compensation
from lightning_softprune.compensation.regression import ChannelRegression, FeatureRegression, cholesky, ridge_of
from lightning_softprune.compensation.replay import Replay
from lightning_softprune.compensation.sums import watch_sums
from lightning_softprune.compensation.weights import PrunedWeight
from lightning_softprune.graph import WeightGeometry, weight_of, write_weight
from lightning_softprune.surgery import Surgery
from lightning_softprune.utilities.distributed import sum_number_over_processes, sum_over_processes

REFIT_RIDGE = 1e-2
"""How firmly the refit holds on to the one-shot prediction, as a fraction of the mean variance."""

MAX_ACTIVATION_ROWS = 2**14
"""Observations per process and reader on which outputs are compared after the function that follows."""

ACTIVATION_PRIOR = 100.0
"""As many observations the one-shot prediction counts for there. Only those in the function's sloping part tell
anything, so that few calibration batches tell less of it than of the linear fit."""


def refit_readers(model: nn.Module, surgery: Surgery, compensation: Compensation, dense: DenseRun) -> None:
    """Fit each reader of the pruned model, in the order in which they run, to what it computed in the dense model.

    Args:
        model: The pruned, compensated model.
        surgery: What was removed from it.
        compensation: How it was compensated.
        dense: What the readers did before.
    """
    queries = compensation.logits.fitted(model, surgery)  # they are not to compute what they did
    lossy: dict[str, _Reader] = {}
    compensated = set(compensation.readers)
    for name in dense.rows:
        if name in queries or name not in compensated:
            continue
        layer, regression = model.get_submodule(name), compensation.regression(name)
        pruned = PrunedWeight.of(layer, name, compensation.stride(name), surgery)
        if pruned is None or not bool(pruned.kept_inputs().any()):
            continue  # in the latter case, groups have taken all that it read: its bias has made up for them
        if pruned.geometry.groups == 1 or isinstance(regression, FeatureRegression):
            lossy[name] = _Reader(name, layer, pruned, regression)
    replay = Replay(model, dense.room)
    with dense.steady() as accept:
        for names in _passes(list(lossy), dense):
            given, added = _given(model, {name: lossy[name].pruned.geometry for name in names}, dense, replay)
            for name in names:
                _refit(lossy[name], surgery, dense, given.pop(name), added.pop(name, None))
                for buffer in lossy[name].layer.buffers():
                    accept(buffer)
                if name in surgery.shifted:
                    accept(surgery.shifted[name][0])


@dataclass(frozen=True)
class _Reader:
    """A reader to be refitted: the layer, what the plan left of its weight, and its compensation."""

    name: str
    layer: nn.Module
    pruned: PrunedWeight
    regression: FeatureRegression | ChannelRegression


class _Seen:
    """Observations of several calls, one below the other in one tensor, and how many each call gave.

    Args:
        number: Of all of them.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.lengths: list[int] = []
        self._rows = torch.empty(0)

    def add(self, rows: torch.Tensor) -> None:
        """Those of one call, shape ``(rows, ...)``; what is not finite counts as zero."""
        before = sum(self.lengths)
        self.lengths.append(len(rows))
        if before + len(rows) > self.number:
            return  # the layer is called differently now, and nobody will ask for them
        if before == 0:
            precision = torch.promote_types(rows.dtype, torch.float32)
            self._rows = rows.new_empty(self.number, math.prod(rows.shape[1:]), dtype=precision)
        place = self._rows[before : before + len(rows)]
        place.view(rows.shape).copy_(rows)
        finite = observations(place)
        if finite.data_ptr() != place.data_ptr():
            place.copy_(finite)

    def rows(self) -> torch.Tensor:
        """All of them, if there are as many as were said."""
        return self._rows


def _refit(reader: _Reader, surgery: Surgery, dense: DenseRun, seen: _Seen, added: _Seen | None) -> None:
    """Fit one reader's weight and bias to what it is given now, and what is added to its outputs, call by call."""
    name, layer, pruned, regression = reader.name, reader.layer, reader.pruned, reader.regression
    targets = dense.rows[name]
    before = weight_of(layer, pruned.geometry.weight)
    device = regression.mean.device
    lengths = [len(rows) for rows in targets]
    differs = any(part is not None and part.lengths != lengths for part in (seen, added))
    if sum_number_over_processes(differs, device) > 0:
        return  # the pruned model calls the layer differently; the one-shot prediction stays
    given = seen.rows().to(device)
    wanted = observations(torch.cat(targets)).to(given)
    if isinstance(regression, FeatureRegression):
        kept = pruned.kept_outputs()
        wanted = wanted if kept is None else wanted[:, kept.to(device)]
        activation = dense.activations.get(name)
        if activation is not None and activation.is_summed != (added is not None):
            activation = None
        activation = activation if activation is None or kept is None else activation.of(kept)
        if added is not None:
            beside = added.rows().to(wanted)
            wanted = wanted - beside
            activation = activation and replace(activation, added=beside)
        now = pruned.geometry.to_rows(before).to(device, torch.float64)
        weight, bias = _fit_features(now, wanted, given, activation, centre=regression.centred)
    else:
        rows = pruned.rows().to(device, torch.float64)
        weight, shift = _fit_channels(regression, rows, pruned.kept_inputs().to(device), wanted, given)
        bias = _bias_before(layer, name, pruned.geometry, surgery).to(device, torch.float64) + shift
    with torch.no_grad():
        write_weight(layer, pruned.geometry.weight, pruned.geometry.from_rows(weight).to(before))
        _set_bias(layer, name, pruned.geometry, bias, surgery)


def _passes(names: Sequence[str], dense: DenseRun) -> list[list[str]]:
    """Readers in the order in which they run, with those that read the same tensor.

    One whose outputs are added to something is alone: what is added may change with the others.
    """
    passes: dict[str, list[str]] = {}
    for name in names:
        first = dense.reads_as.get(name, name)
        alone = name in dense.summed or first in dense.summed
        passes.setdefault(name if alone else first, []).append(name)
    return list(passes.values())


class _StopForward(BaseException):
    """Ends a step: all that was wanted of it has been seen."""


def _given(
    model: nn.Module, geometries: Mapping[str, WeightGeometry], dense: DenseRun, replay: Replay
) -> tuple[dict[str, _Seen], dict[str, _Seen]]:
    """What readers are given now, call by call, and what is added to the outputs of those in `dense.summed`.

    Each step is run as far as the last call of them, or the sum behind it.
    """
    seen = {name: _Seen(sum(map(len, dense.rows[name]))) for name in geometries}
    summed = [name for name in geometries if name in dense.summed]
    added = {name: _Seen(seen[name].number) for name in summed}
    left, scratch = 0, Scratch()

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _StopForward

    def see(name: str, source: torch.Tensor) -> None:
        if name in summed and left == 2:  # after this, nothing is wanted but what is added to the output
            replay.spare(model.get_submodule(name))
        else:
            replay.stop()
        source = dense.positions.of(name, source)
        if name in dense.most:
            rows = rows_of_inputs(geometries[name], source, dense.most[name], scratch)
        else:
            rows = sampled_rows(geometries[name], source, rows_per_call(geometries[name].inputs, len(dense.steps)))
        seen[name].add(rows)
        count()

    def see_sum(name: str, addend: torch.Tensor | None) -> None:
        replay.stop()
        if addend is not None:
            addend = dense.positions.of(name, addend)
            added[name].add(outputs_at_rows(geometries[name], addend, dense.most[name]))
            count()

    for number, (step, calls) in enumerate(zip(dense.steps, dense.calls, strict=True)):
        left = sum(calls[name] for name in (*geometries, *summed))
        if left:
            with ExitStack() as stack:  # watched anew for each step, which puts back what it finds changed
                stack.enter_context(suppress(_StopForward))
                stack.enter_context(torch.no_grad())
                stack.enter_context(watch_inputs(model, list(geometries), see))
                stack.enter_context(replay.step(number))
                stack.enter_context(watch_sums(model, summed, see_sum))
                step()
    return seen, added


def _fit_features(
    weight: torch.Tensor,
    wanted: torch.Tensor,
    given: torch.Tensor,
    activation: FollowingActivation | None,
    *,
    centre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a layer whose outputs are to be ``wanted`` where they read ``given``; weights in rows.

    Without `centre`, the bias is zero, and what follows the layer is left out of account.
    """
    groups = len(weight)
    total = sum_number_over_processes(len(given), given.device)
    lacking = sum_number_over_processes(activation is None or not centre, given.device)
    weights, biases = [], []
    width = weight.shape[1]
    for first, (part, y, z) in enumerate(zip(weight, wanted.chunk(groups, 1), given.chunk(groups, 1), strict=True)):
        prior = part.flatten(1)
        mean_y, mean_z = _mean(y, total, centre), _mean(z, total, centre)
        z = centred(z, mean_z, out=z)
        s_zz = sum_over_processes(cross_products(z)).div_(total)
        ridge = ridge_of(s_zz, REFIT_RIDGE)
        s_yz = sum_over_processes(cross_products(centred(y, mean_y), z)).div_(total).add_(ridge * prior)
        factor = cholesky(s_zz, ridge)
        solution = torch.cholesky_solve(s_yz.t(), factor).t()
        del s_yz  # as large as the weight, in double precision
        bias = mean_y
        if activation is not None and not lacking:  # on every process
            part_of = activation.of(slice(first * width, (first + 1) * width))
            linear = _LinearFit(solution, bias, prior, s_zz, factor)
            solution, bias = _fit_after_activation(part_of, y, z, linear)
        weights.append(solution.reshape(part.shape))
        biases.append(bias - solution @ mean_z)
    return torch.stack(weights), torch.cat(biases)


def _fit_channels(
    regression: ChannelRegression, rows: torch.Tensor, stays: torch.Tensor, wanted: torch.Tensor, given: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (in rows), and what to add to the bias, of a layer whose inputs were ``wanted`` and are ``given``."""
    stride = regression.mean.shape[1]
    total = sum_number_over_processes(len(given), given.device)
    mean_x, mean_z = (_mean(rows_of, total, regression.centred) for rows_of in (wanted, given))
    x, z = _by_channel(centred(wanted, mean_x), stride), _by_channel(centred(given, mean_z), stride)
    s_zz = sum_over_processes(cross_products(z)).div_(total * stride)
    s_xz = sum_over_processes(cross_products(x, z)).div_(total * stride)
    if stride == 1:
        s_zz = regression.with_borders(s_zz, mean_z, mean_z)
        s_xz = regression.with_borders(s_xz, mean_x, mean_z)
    prior = torch.zeros_like(s_xz)
    prior[stays] = torch.eye(len(s_zz), dtype=prior.dtype, device=prior.device)
    kept, removed = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    prior[~stays] = regression.coefficients(kept, removed)
    ridge = ridge_of(s_zz, REFIT_RIDGE)
    solution = torch.cholesky_solve((s_xz + ridge * prior).t(), cholesky(s_zz, ridge)).t()  # (channels, kept)
    missing = mean_x.reshape(-1, stride) - solution @ mean_z.reshape(-1, stride)
    shift = (rows[0] * missing).sum((1, 2)) * regression.coverage.share
    return torch.einsum("oct,ck->okt", rows[0], solution)[None], shift


def _mean(rows: torch.Tensor, total: float, centre: bool) -> torch.Tensor:
    mean = mean_of(rows)
    return sum_over_processes(mean * len(rows)) / total if centre else torch.zeros_like(mean)


@dataclass(frozen=True)
class _LinearFit:
    """The least squares fit of a layer's outputs: weight, bias for centred inputs, prior, covariance of the inputs.

    And the factor of the covariance with the fit's ridge.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    prior: torch.Tensor
    covariance: torch.Tensor
    factor: torch.Tensor


def _fit_after_activation(
    activation: FollowingActivation, wanted: torch.Tensor, inputs: torch.Tensor, linear: _LinearFit
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`fit_after_activation` from the linear fit on: the weight, and the bias for centred inputs."""
    every = max(-(-len(inputs) // MAX_ACTIVATION_ROWS), 1)
    activation, wanted, inputs = activation.at(slice(None, None, every)), wanted[::every], inputs[::every]
    observations = sum_number_over_processes(len(inputs), inputs.device)
    ridge = ridge_of(linear.covariance, max(REFIT_RIDGE, ACTIVATION_PRIOR / observations))
    prior = linear.weight if activation.is_summed else linear.prior  # the one-shot weight knows nothing of sums
    start = Start(linear.weight.float(), linear.bias.float(), prior.float(), linear.factor.float(), ridge)
    weight, shift = fit_after_activation(activation, wanted.float(), inputs.float(), start)
    return weight.double(), shift.double()


def _bias_before(layer: nn.Module, name: str, geometry: WeightGeometry, surgery: Surgery) -> torch.Tensor:
    """The bias from before the plan, for the outputs that stay; zero for a layer that had none."""
    bias = layer._parameters.get(geometry.bias)
    before = None if bias is None else surgery.before(bias)
    if before is None:
        return torch.zeros(1)
    rows = surgery.kept.get(f"{name}.{geometry.bias}", {}).get(0)
    return before.detach() if rows is None else before.detach()[rows.to(before.device)]


def _set_bias(layer: nn.Module, name: str, geometry: WeightGeometry, bias: torch.Tensor, surgery: Surgery) -> None:
    """Make this the constant in a layer's outputs, wherever compensation put it; some have no place for one."""
    parameter = layer._parameters.get(geometry.bias)
    if parameter is not None:
        parameter.copy_(bias.to(parameter.device, parameter.dtype))
    elif name in surgery.shifted:
        mean, before = surgery.shifted[name]
        mean.copy_((before.double() - bias.to(before.device)).to(mean.dtype))


def _by_channel(rows: torch.Tensor, stride: int) -> torch.Tensor:
    return rows.reshape(len(rows), -1, stride).transpose(1, 2).flatten(0, 1)
