"""What is left alone, and why: nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from torch import nn

from lightning_softprune.graph.components import self_and_parents
from lightning_softprune.graph.groups import Member, PruningGroup
from lightning_softprune.graph.layers import layer_type
from lightning_softprune.graph.trace import Trace
from lightning_softprune.utilities.names import joined


def left_alone(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    trace: Trace,
    used: Collection[str],
    reason_of: Callable[[str], str],
) -> Iterator[PruningGroup]:
    """Entries for layers and bare parameters that are in no group, so that nothing is left out in silence.

    Args:
        model: The model.
        groups: Its groups.
        trace: Its trace.
        used: Names of the layers and tensors that ran.
        reason_of: Why a layer or tensor that ran is pinned; empty where it is not.
    """
    covered = {member.module for group in groups for member in group.members}
    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        is_layer = name in trace.layouts or name in trace.reasons  # its parameters may be those of what computes them
        if not (own or (is_layer and any(True for _ in module.parameters()))):
            continue
        if name in covered or _is_part(name, model):
            continue
        if any(parent in trace.reasons for parent in self_and_parents(name)[:-1]):
            continue  # said of the layer it belongs to
        if name.rpartition(".parametrizations.")[0] in trace.layouts:
            continue  # what the layer's weight is computed from
        if is_layer:
            if name in trace.reasons:
                reason = trace.reasons[name]
            elif name not in trace.tape.ran:
                reason = f"{name} was run by {_no_step(model)}; if it mirrors a module, name it in twins"
            elif own and all(module.get_parameter(parameter).numel() == 1 for parameter in own):
                reason = f"{name} has no channels: its {own[0]} is a single number"
            else:
                reason = reason_of(name) or f"no sliceable layer produces the channels of {name}"
            yield PruningGroup(name, "", "intra", 0, (Member(name, "out", np.empty(0, np.int64)),), False, reason)
            continue
        for parameter in own:
            full = joined(name, parameter)
            if full not in covered:
                reason = reason_of(full) or _why_left(full, parameter, module, "" if full in used else _no_step(model))
                yield PruningGroup(full, "", "intra", 0, (Member(full, "dim0", np.empty(0, np.int64)),), False, reason)


def _no_step(model: nn.Module) -> str:
    """Which steps were traced, and did not run something."""
    if getattr(model, "automatic_optimization", True):
        return "neither validation_step nor training_step"
    return "no validation_step, and training_step, with manual optimization, is not traced"


def _why_left(name: str, parameter: str, owner: nn.Module, unused: str) -> str:
    if owner.get_parameter(parameter).numel() == 1:
        return f"{name} is a single number: it has no channels"
    if unused:
        return f"{name} is used by {unused}"
    kind = type(owner).__name__
    return f"{name} is a parameter of {kind}, which is no layer that can be sliced; describe it with register_layer"


def _is_part(name: str, model: nn.Module) -> bool:
    """Whether the module is a part of a layer, which speaks for it (the output projection of attention)."""
    parent = name.rpartition(".")[0]
    entry = layer_type(model.get_submodule(parent)) if parent != name else None
    return entry is not None and entry.owns_children
