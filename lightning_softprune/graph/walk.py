"""From one layer's output channels to all that depends on them.

We walk the graph ourselves, because one thing is lost in torch-pruning's own groups: which *other* indices of a group
an index drags along (``chunk`` and add, shared latents, attention heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch_pruning import _helpers, ops

from lightning_softprune.graph.index_maps import signed
from lightning_softprune.graph.trace import Trace

_MOST_VISITS = 100_000
"""A walk that long goes in circles."""


@dataclass
class Walked:
    """One group as pairs of (slot index, root index), slot by slot."""

    pairs: dict[tuple[str, str], set[tuple[int, int]]]
    sizes: dict[tuple[str, str], int]
    parts: dict[tuple[str, str], int]
    reasons: list[str]
    num_roots: int


class Walker:
    """Follows a layer's output channels through the dependency graph."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def walk(self, root: nn.Module) -> Walked:
        """Follow the output channels of a layer."""
        graph = self.trace.graph
        pruner = graph.get_pruner_of_module(root)
        start = graph.module2node[root]
        size = self.trace.layouts[root].slots[self.trace.layouts[root].slot("out")]
        indices = tuple(_helpers._HybridIndex(idx=i, root_idx=i) for i in range(size))
        walked = Walked({}, {}, {}, [], size)
        self._visit(walked, start, pruner.prune_out_channels, indices)
        stack = [(start, pruner.prune_out_channels, indices)]
        seen = {(start, pruner.prune_out_channels, hash(indices))}
        while stack:
            node, triggered, indices = stack.pop()
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(triggered):
                    continue
                mapped = indices
                for mapping in dependency.index_mapping:
                    if mapping is not None:
                        mapped = tuple(mapping(mapped))
                state = (dependency.target, dependency.handler, hash(mapped))
                if not mapped or state in seen:
                    continue
                seen.add(state)
                if not self._visit(walked, dependency.target, dependency.handler, mapped) or len(seen) > _MOST_VISITS:
                    walked.reasons.append("the dependency graph does not match its layers' sizes")
                    return walked
                stack.append((dependency.target, dependency.handler, mapped))
        return walked

    def _visit(self, walked: Walked, node: Any, handler: Any, indices: Sequence[Any]) -> bool:
        """Note the indices at a layer; whether they fit it."""
        trace, module = self.trace, node.module
        if isinstance(module, ops._OutputOp):
            walked.reasons.append(trace.markers.get(node.grad_fn, "is an output of the network"))
            return True
        if isinstance(module, nn.Parameter):
            slot, size, parts = f"dim{node.pruning_dim}", module.shape[node.pruning_dim], 1
            layer = trace.owners.get(module)
            if layer is not None:  # of a layer type that torch-pruning does not know (RMSNorm)
                module, slot = layer, trace.layouts[layer].slot("out")
        elif module in trace.layouts:
            layout = trace.layouts[module]
            slot = layout.slot("out" if trace.graph.is_out_channel_pruning_fn(handler) else "in")
            if slot not in layout.slots:
                return True  # a PReLU with one slope for all channels
            size, parts = layout.slots[slot], layout.parts.get(slot, 1)
        else:
            self._pass_on(walked, node, indices)
            return True  # an operator: it passes indices on and keeps nothing
        if any(pair.idx >= size or pair.root_idx is None for pair in indices):
            return False
        key = (trace.names[module], slot)
        walked.pairs.setdefault(key, set()).update((pair.idx, pair.root_idx) for pair in indices)
        walked.sizes[key], walked.parts[key] = size, parts
        return True

    def _pass_on(self, walked: Walked, node: Any, indices: Sequence[Any]) -> None:
        """Note what an operator asks for that counts channels: with fewer of them it would pick others."""
        made = node.grad_fn
        if node.type not in (ops.OPTYPE.SPLIT, ops.OPTYPE.SLICE) or not hasattr(made, "_saved_dim"):
            return
        shape = tuple(made._saved_self_sym_sizes)
        dim = signed(made._saved_dim) % len(shape)
        if node.type == ops.OPTYPE.SLICE:
            if made._saved_step > 1 and (dim == 1 or (len(shape) == 3 and dim == 2)):
                walked.reasons.append(f"a slice takes its channels in steps of {made._saved_step}")
        elif hasattr(made, "_saved_split_size") and (dim == 1 or (len(shape) == 3 and dim == 2)):
            size, width = shape[dim], made._saved_split_size
            if size % width:
                walked.reasons.append("its channels are chunked into unequal parts")
                return
            key = ("", str(id(node)))  # no layer: its parts lose the same channels, like those of a grouped layer
            walked.pairs.setdefault(key, set()).update((pair.idx, pair.root_idx) for pair in indices)
            walked.sizes[key], walked.parts[key] = size, size // width
