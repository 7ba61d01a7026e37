"""What the readers do in the dense network, watched while it is still there: the refit's targets.

A *call* is one run of a reader in a calibration step; of each, evenly spread observations are kept.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_softprune.calibration import (
    in_double,
    outputs_at_rows,
    rows_per_call,
    sampled_rows,
    unfold_inputs,
    watch_calls,
    watch_inputs,
    weight_geometry,
)
from lightning_softprune.compensation.activations import find_following_activations
from lightning_softprune.compensation.fold import Compensation
from lightning_softprune.compensation.regression import FeatureRegression
from lightning_softprune.compensation.sums import watch_sums
from lightning_softprune.graph import weight_of
from lightning_softprune.utilities.distributed import in_process_group, sum_over_processes

CHECKED_ROWS = 64
"""Observations on which a layer shows that it is linear in what it reads."""


_Source = tuple[weakref.ref[torch.Tensor], int, str]
"""A tensor, its version, and the first layer that reads it."""


class DenseRun:
    """What the readers did in the dense network: outputs, and inputs of those whose unfolded inputs are too wide.

    Evenly spread observations of each calibration batch, in single precision. Of the readers in `summed` the outputs
    are taken together with what the model adds to them.

    Args:
        model: The dense model.
        compensation: What will be done to its readers.
        steps: One function per calibration batch that runs the model on it.
        budget: Bytes that the observations may take; readers for which there is no room keep their one-shot
            predictions, those with most numbers first. `None`: no limit.
        steady: Is entered around steps that are run one after the other, with what watches them in place.
    """

    def __init__(
        self,
        model: nn.Module,
        compensation: Compensation,
        steps: Sequence[Callable[[], Any]],
        budget: float | None = None,
        steady: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.steps, self.steady = steps, steady
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.calls: list[Counter[str]] = []
        self.reads_as: dict[str, str] = {}
        sources: list[_Source] = []
        readers = _within(model, compensation, len(steps), budget)
        by_feature = [name for name in readers if isinstance(compensation.regression(name), FeatureRegression)]
        by_channel = [name for name in readers if name not in by_feature]
        geometries = {name: weight_geometry(model.get_submodule(name)) for name in readers}
        self.most = {name: rows_per_call(geometries[name].features, len(steps)) for name in by_feature}
        own_ways = dict.fromkeys(by_feature, 0.0)
        added: dict[str, list[torch.Tensor | None]] = {name: [] for name in by_feature}
        self.positions = compensation.positions

        def see_call(name: str, source: torch.Tensor, output: torch.Tensor) -> None:
            if name not in self.rows and not _is_linear_in_what_it_reads(model.get_submodule(name), source, output):
                own_ways[name] = 1.0
            self._meet(name, source, sources)
            see(name, outputs_at_rows(geometries[name], self.positions.of(name, output), self.most[name]))

        def see_sum(name: str, addend: torch.Tensor | None) -> None:
            if addend is not None:
                addend = outputs_at_rows(geometries[name], self.positions.of(name, addend), self.most[name]).float()
            added[name].append(addend)

        def see_input(name: str, source: torch.Tensor) -> None:
            self._meet(name, source, sources)
            source = self.positions.of(name, source)
            see(name, sampled_rows(geometries[name], source, rows_per_call(geometries[name].inputs, len(steps))))

        def see(name: str, rows: torch.Tensor) -> None:
            self.rows.setdefault(name, []).append(rows.float())
            self.calls[-1][name] += 1

        with ExitStack() as stack:
            stack.enter_context(watch_calls(model, by_feature, see_call))
            stack.enter_context(watch_inputs(model, by_channel, see_input))
            stack.enter_context(watch_sums(model, by_feature, see_sum))
            stack.enter_context(torch.no_grad())
            stack.enter_context(steady())
            for step in steps:
                self.calls.append(Counter())
                step()
        device = next(model.parameters()).device
        self.summed = self._take_sums(added, device)
        found = sum_over_processes(torch.tensor(list(own_ways.values()), device=device)).tolist()
        for name, flags in zip(by_feature, found, strict=True):  # all processes leave out the same ones
            if flags:
                self.rows.pop(name, None)
        self.activations = find_following_activations(model, by_feature, steps[0]) if steps else {}
        taken = sum(rows.numel() * rows.element_size() for seen in self.rows.values() for rows in seen)
        self.room = None if budget is None else max(budget - taken, 0.0)

    def _meet(self, name: str, source: torch.Tensor, sources: list[_Source]) -> None:
        """Find out who reads the same tensor; a layer that is called again reads several."""
        if len(self.calls) > 1 or source.is_inference() or in_process_group():  # all have the same passes
            return
        if self.calls[-1][name]:
            self.reads_as = {one: other for one, other in self.reads_as.items() if name not in (one, other)}
            return
        sources[:] = [known for known in sources if known[0]() is not None]
        for seen, version, other in sources:
            if seen() is source and version == source._version and self.calls[-1][other] == 1:
                self.reads_as[name] = other
                return
        sources.append((weakref.ref(source), source._version, name))

    def _take_sums(self, added: Mapping[str, Sequence[torch.Tensor | None]], device: torch.device) -> set[str]:
        """Add to outputs what the model adds to them; names of the readers, the same ones on all processes."""
        differs = []
        for name, seen in added.items():
            shapes = [rows.shape for rows in seen if rows is not None]
            same = len(shapes) == len(seen) and shapes == [rows.shape for rows in self.rows.get(name, [])]
            differs.append(float(not same))
        refused = sum_over_processes(torch.tensor(differs, device=device)).tolist()
        summed = {name for name, flag in zip(added, refused, strict=True) if not flag and name in self.rows}
        for name in summed:
            addends = [other for other in added[name] if other is not None]
            self.rows[name] = [one + other for one, other in zip(self.rows[name], addends, strict=True)]
        return summed


def _within(model: nn.Module, compensation: Compensation, calls: int, budget: float | None) -> list[str]:
    """The readers whose observations fit, the small ones first; in the order in which they were given."""
    readers = compensation.readers
    if budget is None:
        return readers
    size = {}
    for name in readers:
        geometry = weight_geometry(model.get_submodule(name))
        by_feature = isinstance(compensation.regression(name), FeatureRegression)
        width, kept = (geometry.features, geometry.outputs) if by_feature else (geometry.inputs, geometry.inputs)
        size[name] = 4 * kept * calls * rows_per_call(width, calls)
    chosen: set[str] = set()
    for name in sorted(readers, key=lambda name: size[name]):
        budget -= size[name]
        if budget < 0:
            break
        chosen.add(name)
    return [name for name in readers if name in chosen]


def _is_linear_in_what_it_reads(layer: nn.Module, source: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether outputs are the weights times what they read: not so for some classes with a `forward` of their own."""
    geometry = weight_geometry(layer)
    rows = in_double(unfold_inputs(geometry, source, CHECKED_ROWS))
    wanted = in_double(outputs_at_rows(geometry, output, CHECKED_ROWS))
    weight = geometry.to_rows(weight_of(layer, geometry.weight)).to(rows).flatten(2)
    parts = zip(rows.chunk(len(weight), 1), weight, strict=True)
    outputs = torch.cat([part @ matrix.t() for part, matrix in parts], 1)
    bias = layer._parameters.get(geometry.bias)
    if bias is not None:
        outputs = outputs + bias.detach().to(rows)
    return len(outputs) == len(wanted) and bool((outputs - wanted).norm() <= 0.05 * wanted.norm() + 1e-6)
