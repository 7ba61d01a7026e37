"""What is left alone, and why: nothing is left out in silence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn

from lightning_softprune.graph.components import self_and_parents
from lightning_softprune.graph.groups import Member, PruningGroup
from lightning_softprune.graph.layers import layer_type
from lightning_softprune.graph.trace import Trace
from lightning_softprune.utilities.nested import attribute_at


def refuse_torn_parameters(model: nn.Module, groups: list[PruningGroup], trace: Trace) -> list[PruningGroup]:
    """Refuse groups that would slice a shared parameter (tied weights) on one side only, or in two ways."""
    modules = dict(model.named_modules())
    owners: dict[int, list[tuple[str, str, int]]] = defaultdict(list)  # parameter -> (layer, slot, dim)
    for module, layout in trace.layouts.items():
        for axis in layout.axes:
            tensor = attribute_at(module, axis.tensor)
            if isinstance(tensor, nn.Parameter):
                owners[id(tensor)].append((trace.names[module], axis.slot, axis.dim))
    kept = []
    for group in groups:
        reason = ""
        places = {(member.module, member.slot): member.owner for member in group.members}
        for name, slot in places:
            found = trace.layouts.get(modules[name]) if name in modules else None
            for axis in found.axes if found and group.prunable else ():
                tensor = attribute_at(modules[name], axis.tensor)
                if axis.slot != slot or not isinstance(tensor, nn.Parameter):
                    continue
                for other, other_slot, dim in owners[id(tensor)]:
                    if dim != axis.dim or (other, other_slot) == (name, slot):
                        continue
                    there = places.get((other, other_slot))
                    if there is None or not np.array_equal(there, places[name, slot]):
                        reason = f"{name} shares its {axis.tensor} with {other}, which needs other channels of it"
        kept.append(group.refuse(reason) if reason else group)
    return kept


def left_alone(model: nn.Module, groups: Sequence[PruningGroup], trace: Trace) -> Iterator[PruningGroup]:
    """Entries for layers and bare parameters that are in no group, so that nothing is left out in silence."""
    covered = {member.module for group in groups for member in group.members}
    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if not own or name in covered or _is_part(name, covered, model):
            continue
        if any(parent in trace.reasons for parent in self_and_parents(name)[:-1]):
            continue  # said of the layer it belongs to
        layout = trace.layouts.get(module)
        if layout is not None or name in trace.reasons:
            if name in trace.reasons:
                reason = trace.reasons[name]
            elif name not in trace.ran:
                reason = f"{name} was run by neither validation_step nor training_step"
            elif module not in trace.graph.module2node:
                reason = f"{name} ran without gradients only, so what it is coupled to is not known"
            else:
                reason = f"no sliceable layer produces the channels of {name}"
            yield PruningGroup(name, "", "intra", 0, (Member(name, "out", np.empty(0, np.int64)),), False, reason)
            continue
        for parameter in own:
            full = f"{name}.{parameter}".lstrip(".")
            if full not in covered:
                reason = f"{full} is a parameter of {type(module).__name__}, which is no layer that can be sliced"
                yield PruningGroup(full, "", "intra", 0, (Member(full, "dim0", np.empty(0, np.int64)),), False, reason)


def _is_part(name: str, covered: set[str], model: nn.Module) -> bool:
    """Whether the module is a part of a layer that is covered (the output projection of attention)."""
    parent = name.rpartition(".")[0]
    entry = layer_type(model.get_submodule(parent)) if parent in covered else None
    return entry is not None and entry.owns_children
