"""What the readers do in the dense network, watched while it is still there: the refit's targets.

A *call* is one run of a reader in a calibration step; of each, evenly spread observations are kept. Where there is
room, they are watched while statistics are taken, in the same pass; else before the prune, in one of its own.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_softprune.calibration import (
    ReadPositions,
    in_double,
    outputs_at_rows,
    rows_per_call,
    sampled_rows,
    unfold_inputs,
    watch_calls,
    watch_inputs,
    weight_geometry,
)
from lightning_softprune.compensation.activations import FollowingActivation, find_following_activations
from lightning_softprune.compensation.fold import Compensation
from lightning_softprune.compensation.regression import FeatureRegression
from lightning_softprune.compensation.sums import watch_sums
from lightning_softprune.graph import weight_of
from lightning_softprune.utilities.distributed import in_process_group, sum_numbers_over_processes
from lightning_softprune.utilities.hooks import unwatched

CHECKED_ROWS = 64
"""Observations on which a layer shows that it is linear in what it reads."""

Step = Callable[[], Any]

Steady = Callable[[], AbstractContextManager[Callable[[torch.Tensor], None]]]
"""A block for many steps, each of which leaves the module as it was; yields what is to be told of lasting changes."""


@contextmanager
def nothing_lasting() -> Iterator[Callable[[torch.Tensor], None]]:
    """A block for steps none of which changes anything that lasts."""
    yield lambda _: None


_Source = tuple[weakref.ref[torch.Tensor], int, str]
"""A tensor, its version, and the first layer that reads it."""


class DenseRun:
    """What the readers did in the dense network: outputs, and inputs of those whose unfolded inputs are too wide.

    Evenly spread observations of each calibration batch, in single precision. Of the readers in `summed` the outputs
    are taken together with what the model adds to them. Nothing is known until `watched` steps have been run, each
    once and in their order (whoever starts again, starts afresh), and `finish` was called.

    Args:
        model: The dense model.
        kinds: Readers -> whether each output has a regression of its own, and is watched, or the inputs are.
        steps: One function per calibration batch that runs the model on it.
        positions: Where observations count.

    Attributes:
        rows: Observations of each reader, call by call.
        calls: How often each reader ran in each step.
        reads_as: Reader -> the first one that reads the same tensor.
        most: How many observations one call gives, of readers whose outputs are watched.
        summed: Readers whose outputs the model adds something to.
        activations: What follows readers.
        room: Bytes that what is computed from it may take; `None`: no limit.
        steady: Is entered around steps that are run one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Mapping[str, bool],
        steps: Sequence[Step],
        positions: ReadPositions = ReadPositions(),  # noqa: B008 - nobody writes it
    ) -> None:
        self.model, self.steps, self.positions = model, steps, positions
        self.room: float | None = None
        self.steady: Steady = nothing_lasting
        self.kinds = dict(kinds)
        self.by_feature = [name for name, by_feature in kinds.items() if by_feature]
        self.by_channel = [name for name, by_feature in kinds.items() if not by_feature]
        self.geometries = {name: weight_geometry(model.get_submodule(name)) for name in kinds}
        self.most = {name: rows_per_call(self.geometries[name].features, len(steps)) for name in self.by_feature}
        self.summed: set[str] = set()
        self.activations: dict[str, FollowingActivation] = {}
        self._begin()

    @classmethod
    def that_fits(
        cls,
        model: nn.Module,
        kinds: Mapping[str, bool],
        steps: Sequence[Step],
        positions: ReadPositions,
        budget: float,
    ) -> DenseRun | None:
        """One for these readers, if its observations are no more than so many bytes."""
        fits = sum(observations_bytes(model, kinds, len(steps)).values()) <= budget
        return cls(model, kinds, steps, positions) if fits else None

    def _begin(self) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.calls: list[Counter[str]] = []
        self.reads_as: dict[str, str] = {}
        self._sources: list[_Source] = []
        self._nonlinear = dict.fromkeys(self.by_feature, 0.0)
        self._added: dict[str, list[torch.Tensor | None]] = {name: [] for name in self.by_feature}

    def watched(self) -> list[Step]:
        """The steps, watched while they run."""
        return [partial(self._watch, number, step) for number, step in enumerate(self.steps)]

    def _watch(self, number: int, step: Step) -> Any:
        if number == 0:
            self._begin()
        self.calls.append(Counter())
        with ExitStack() as stack:
            stack.enter_context(watch_calls(self.model, self.by_feature, self._see_call))
            stack.enter_context(watch_inputs(self.model, self.by_channel, self._see_input))
            stack.enter_context(watch_sums(self.model, self.by_feature, self._see_sum))
            return step()

    def finish(self, few_samples: Step | None = None) -> None:
        """What can be said once all steps have been watched.

        Args:
            few_samples: A step that functions which follow readers are looked for on; default: the first.
        """
        device = next(self.model.parameters()).device
        self.summed = self._take_sums(self._added, device)
        self.rows = self._of_all_processes(device)
        few_samples = few_samples or next(iter(self.steps), None)
        if few_samples is not None:
            self.activations = find_following_activations(self.model, self.by_feature, few_samples)
        self._added.clear()
        self._sources.clear()

    def _of_all_processes(self, device: torch.device) -> dict[str, list[torch.Tensor]]:
        """Those of readers that every process has run, and none in a way of its own; in the order of the calls."""
        names, place = [*self.by_feature, *self.by_channel], {name: at for at, name in enumerate(self.rows)}
        missing = [name not in place or self._nonlinear.get(name, 0.0) for name in names]
        left_out = sum_numbers_over_processes(missing, device)
        places = sum_numbers_over_processes([place.get(name, 0) for name in names], device)
        kept = [(at, name) for at, name, flags in zip(places, names, left_out, strict=True) if not flags]
        return {name: self.rows[name] for _, name in sorted(kept)}

    @property
    def bytes_taken(self) -> int:
        """By the observations."""
        return sum(rows.numel() * rows.element_size() for seen in self.rows.values() for rows in seen)

    def fit_into(self, budget: float | None, steady: Steady) -> DenseRun:
        """Make it ready for a refit that may hold so many bytes, these observations among them; returns itself.

        Where there is less room now, those of readers with most numbers are dropped, on all processes the same ones.
        """
        kept = _within(self.model, self.kinds, len(self.steps), budget)
        self.rows = {name: rows for name, rows in self.rows.items() if name in kept}
        self.room = None if budget is None else max(budget - self.bytes_taken, 0.0)
        self.steady = steady
        return self

    def _see_call(self, name: str, source: torch.Tensor, output: torch.Tensor) -> None:
        with unwatched():
            layer = self.model.get_submodule(name)
            if name not in self.rows and not _is_linear_in_what_it_reads(layer, source, output):
                self._nonlinear[name] = 1.0
            self._meet(name, source)
            output = self.positions.of(name, output)
            self._see(name, outputs_at_rows(self.geometries[name], output, self.most[name]))

    def _see_sum(self, name: str, addend: torch.Tensor | None) -> None:
        if addend is not None:
            with unwatched():
                addend = self.positions.of(name, addend)
                addend = outputs_at_rows(self.geometries[name], addend, self.most[name]).float()
        self._added[name].append(addend)

    def _see_input(self, name: str, source: torch.Tensor) -> None:
        with unwatched():
            self._meet(name, source)
            source, geometry = self.positions.of(name, source), self.geometries[name]
            self._see(name, sampled_rows(geometry, source, rows_per_call(geometry.inputs, len(self.steps))))

    def _see(self, name: str, rows: torch.Tensor) -> None:
        self.rows.setdefault(name, []).append(rows.float())
        self.calls[-1][name] += 1

    def _meet(self, name: str, source: torch.Tensor) -> None:
        """Find out who reads the same tensor; a layer that is called again reads several."""
        if len(self.calls) > 1 or source.is_inference() or in_process_group():  # all have the same passes
            return
        if self.calls[-1][name]:
            self.reads_as = {one: other for one, other in self.reads_as.items() if name not in (one, other)}
            return
        self._sources = [known for known in self._sources if known[0]() is not None]
        for seen, version, other in self._sources:
            if seen() is source and version == source._version and self.calls[-1][other] == 1:
                self.reads_as[name] = other
                return
        self._sources.append((weakref.ref(source), source._version, name))

    def _take_sums(self, added: Mapping[str, Sequence[torch.Tensor | None]], device: torch.device) -> set[str]:
        """Add to outputs what the model adds to them; names of the readers, the same ones on all processes."""
        differs = []
        for name, seen in added.items():
            shapes = [rows.shape for rows in seen if rows is not None]
            same = len(shapes) == len(seen) and shapes == [rows.shape for rows in self.rows.get(name, [])]
            differs.append(float(not same))
        refused = sum_numbers_over_processes(differs, device)
        summed = {name for name, flag in zip(added, refused, strict=True) if not flag and name in self.rows}
        for name in summed:
            addends = [other for other in added[name] if other is not None]
            self.rows[name] = [one + other for one, other in zip(self.rows[name], addends, strict=True)]
        return summed


def run_dense(
    model: nn.Module,
    compensation: Compensation,
    steps: Sequence[Step],
    budget: float | None = None,
    steady: Steady = nothing_lasting,
) -> DenseRun:
    """Run the dense model, and watch the readers that are compensated for.

    Args:
        model: The dense model.
        compensation: What will be done to its readers.
        steps: One function per calibration batch that runs the model on it.
        budget: Bytes that the observations may take; readers for which there is no room keep their one-shot
            predictions, those with most numbers first. `None`: no limit.
        steady: Is entered around steps that are run one after the other.
    """
    kinds = {name: isinstance(compensation.regression(name), FeatureRegression) for name in compensation.readers}
    kinds = _within(model, kinds, len(steps), budget)
    run = DenseRun(model, kinds, steps, compensation.positions)
    with steady(), torch.no_grad():
        for step in run.watched():
            step()
    run.finish()
    return run.fit_into(budget, steady)


def observations_bytes(model: nn.Module, kinds: Mapping[str, bool], calls: int) -> dict[str, int]:
    """What the observations of each reader take at most; see `DenseRun`."""
    size = {}
    for name, by_feature in kinds.items():
        geometry = weight_geometry(model.get_submodule(name))
        width, kept = (geometry.features, geometry.outputs) if by_feature else (geometry.inputs, geometry.inputs)
        size[name] = 4 * kept * calls * rows_per_call(width, calls)
    return size


def _within(model: nn.Module, kinds: Mapping[str, bool], calls: int, budget: float | None) -> dict[str, bool]:
    """The readers whose observations fit, the small ones first; in the order in which they were given."""
    if budget is None:
        return dict(kinds)
    size = observations_bytes(model, kinds, calls)
    chosen: set[str] = set()
    for name in sorted(kinds, key=lambda name: size[name]):
        budget -= size[name]
        if budget < 0:
            break
        chosen.add(name)
    return {name: by_feature for name, by_feature in kinds.items() if name in chosen}


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
