"""A model traced by running its own steps, so that no example input is asked for; and the couplings that follow.

The steps run once. What follows from them is worked out as often as there are alternatives to try: which of the
dimensions behind a reshape carries the channels (whole heads, or one dimension of every head).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.graph.flow import (
    Couplings,
    Flow,
    Recorder,
    Tape,
    TooLongError,
    frozen_networks,
    is_atoms,
    named_tensors,
    yardsticks_in,
)
from lightning_softprune.graph.layers import Layout, layer_type, layout_of, linked_parts, parts_of_layers
from lightning_softprune.utilities.arrays import IntArray
from lightning_softprune.utilities.hooks import is_about_gradients
from lightning_softprune.utilities.names import is_inside
from lightning_softprune.utilities.nested import tensors_in

Step = Callable[[], Any]

_MUCH_MORE = 8
"""So many times the operations of the traced steps."""


@dataclass
class Trace:
    """One run of a model.

    Attributes:
        model: The model.
        tape: What it computed.
        layouts: Its sliceable layers by name.
        reasons: Names of the modules that cannot be looked into -> why.
        whole: Those of the layers that are taken as a whole.
    """

    model: nn.Module
    tape: Tape
    layouts: dict[str, Layout]
    reasons: dict[str, str]
    whole: dict[str, Layout]

    def couplings(self, choices: Mapping[str, int] | None = None) -> Couplings:
        """What follows, with other choices than the first where given."""
        return Flow(self.model, self.tape, self.layouts, self.reasons, choices or {}).run()

    def given_by(self, step: Step) -> list[tuple[tuple[str, str], IntArray, int]]:
        """Dimensions of what another step returns that hold channels: slots, their indices, and the width.

        Args:
            step: Runs the model once more. Where it fails, or computes much more than the steps did that were traced
                (a sampler's loop), nothing is known.
        """
        recorder = Recorder(self.model, self.whole, self.reasons, _MUCH_MORE * len(self.tape.operations))
        try:
            with _modes_kept(self.model), recorder.recording():
                returned = [recorder.value(tensor) for tensor in tensors_in(_as_it_runs(step))]
        except (Exception, TooLongError):  # it was written for other batches than there are
            return []
        flow = Flow(self.model, recorder.tape, self.layouts, self.reasons)
        couplings, found = flow.run(), []
        for label in (label for value in returned for label in flow.labels(value) if is_atoms(label)):
            atoms = np.unique(couplings.crossed.factors(label) or [label])
            for place, (first, size) in couplings.slots.items():
                indices = atoms[(atoms >= first) & (atoms < first + size)] - first
                if len(indices):
                    found.append((place, indices, len(label)))
        return found


def trace_model(model: nn.Module, steps: Sequence[Step], outside: Mapping[str, str] | None = None) -> Trace:
    """Run the model and note what it computes.

    Args:
        model: The model.
        steps: Functions that run it.
        outside: Modules that are to be left alone with all that is in them -> why.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        for step in steps:  # layers get their sizes
            step()
    layouts: dict[str, Layout] = {}
    whole: dict[str, Layout] = {}
    reasons: dict[str, str] = {}
    linked = {part for _, _, part, _ in linked_parts(model)}
    inside = set(parts_of_layers(model)) - {model.get_submodule(part) for part in linked}
    for name, module in model.named_modules():
        if module in inside:
            continue
        found = _left_alone(name, module, outside or {}) or layout_of(module)
        if isinstance(module, torch.jit.ScriptModule):  # its children are run by no one who calls hooks
            inside.update(child for child in module.modules() if child is not module)
        if isinstance(found, Layout):
            layouts[name] = found
            if _is_forward_known(module):
                whole[name] = found
        elif found is not None:
            reasons[name] = found
    tape = _recorded(model, steps, whole, reasons)
    if any(name not in tape.names for name, _ in named_tensors(model)):
        tape = _recorded(model, steps, whole, reasons)  # it makes some of its tensors when it first runs
    return Trace(model, tape, layouts, reasons, whole)


def find_yardsticks(
    model: nn.Module, step: Step, outside: Mapping[str, str], trained: Collection[str]
) -> dict[str, str]:
    """Frozen networks of losses, and teachers -> why they are left alone, like what is outside of the model.

    Args:
        model: The model.
        step: Runs what validation runs; only where something is frozen.
        outside: Modules that are left alone with all that is in them -> why.
        trained: Names of the parameters that are trained.
    """
    frozen = [n for n in frozen_networks(model, trained) if not any(is_inside(n, other) for other in outside)]
    return yardsticks_in(model, trace_model(model, [step], outside).tape, frozen, trained) if frozen else {}


def _recorded(model: nn.Module, steps: Sequence[Step], whole: Mapping[str, Layout], reasons: Mapping[str, str]) -> Tape:
    recorder = Recorder(model, whole, reasons)
    with _modes_kept(model), recorder.recording():
        for step in steps:
            recorder.show(_as_it_runs(step))
    return recorder.tape


def _as_it_runs(step: Step) -> Any:
    """Run a step with gradients, which show functions of the user's own; or without, where it does not run with them.

    Code for validation may hand what a layer gave to NumPy.
    """
    try:
        return step()
    except RuntimeError as error:
        if is_about_gradients(error):
            with torch.no_grad(), suppress(Exception):
                return step()
        raise


def _is_forward_known(module: nn.Module) -> bool:
    """Whether a layer computes what its entry in the table says: subclasses may do something else."""
    entry = layer_type(module)
    if entry is None or entry.own_forward or "forward" in vars(module):
        return False
    for kind in type(module).__mro__:
        if entry.is_for(kind):
            return True
        if "forward" in vars(kind):
            return kind.__module__.partition(".")[0] == "torch"
    return False


def _left_alone(name: str, module: nn.Module, outside: Mapping[str, str]) -> str | None:
    """Why a module with parameters is cut out of the graph, whatever its type."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript modules cannot be sliced"
    found = next((reason for other, reason in outside.items() if is_inside(name, other)), None)
    return found if any(True for _ in module.parameters(recurse=False)) else None


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module is in the mode, training or not, in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
