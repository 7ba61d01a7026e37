"""Index mappings: which indices behind a reshape, a concatenation, a split or a slice are which before it.

torch-pruning guesses which input of a node is which from the order in which it met them. The edges of the autograd
graph say it: an edge knows the number of the output it comes from. Shapes are those that were seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch_pruning import _helpers, ops
from torch_pruning.dependency import index_mapping, shape_infer

from lightning_softprune.graph.recorder import Recorder


def map_indices(graph: Any, recorder: Recorder) -> None:
    """Map indices across all reshapes, concatenations, splits and slices of a dependency graph."""
    for node in list(graph.module2node.values()):
        made = node.grad_fn
        if node.type == ops.OPTYPE.CONCAT and made in recorder.joins:
            dim, sizes, joined = recorder.joins[made]
            offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
            along = _along_channels(graph, node, dim, joined)
            inputs = [parent for parent, _ in made.next_functions]
            for other in set(node.inputs):
                places = [j for j, parent in enumerate(inputs) if parent in recorder.makers(other)]
                spans = [offsets[j : j + 2] for j in places] if along else []
                _set(node, other, 1, [index_mapping._ConcatIndexMapping(offset=x, reverse=True) for x in spans])
                _set(other, node, 1, [index_mapping._ConcatIndexMapping(offset=x, reverse=False) for x in spans])
        elif node.type == ops.OPTYPE.SPLIT and hasattr(made, "_saved_dim"):
            shape = tuple(made._saved_self_sym_sizes)
            dim = signed(made._saved_dim) % len(shape)
            widths = getattr(made, "_saved_split_sizes", None) or _even(shape[dim], made._saved_split_size)
            offsets = np.concatenate([[0], np.cumsum(widths)]).tolist()
            along = dim == 1 or (len(shape) == 3 and dim == 2)
            for other in set(node.outputs):
                edges = [edge for maker in recorder.makers(other) for edge in maker.next_functions]
                spans = [offsets[j : j + 2] for parent, j in edges if parent is made] if along else []
                _set(node, other, 0, [index_mapping._SplitIndexMapping(offset=x, reverse=False) for x in spans])
                _set(other, node, 0, [index_mapping._SplitIndexMapping(offset=x, reverse=True) for x in spans])
        elif node.type == ops.OPTYPE.SLICE and hasattr(made, "_saved_dim"):
            shape = tuple(made._saved_self_sym_sizes)
            dim = signed(made._saved_dim) % len(shape)
            if (dim == 1 and len(shape) != 3) or (len(shape) == 3 and dim == 2):
                index_mapping.update_slice_index_mapping(graph, node)
        elif node.type == ops.OPTYPE.RESHAPE and made in recorder.reshapes:
            mapping, back = _reshape_mappings(graph, node, *recorder.reshapes[made])
            for other in set(node.inputs):
                _set(other, node, 0, [mapping] if mapping else [])
                _set(node, other, 0, [back] if back else [])


def _reshape_mappings(graph: Any, node: Any, before: torch.Size, after: torch.Size) -> tuple[Any, Any]:
    """The index mapping through a reshape and the one back; a pair of ``None`` where channels stay channels."""
    rows = len(before) > 1 and len(after) > 1 and before[0] == after[0]
    if rows and len(after) == 2 and len(before) > 2:  # flatten
        size, wide = before, after[1]
        channels = shape_infer.infer_out_channels_recursively(graph, node.inputs[0], [0]) if node.inputs else None
        if len(size) == 3 and channels == size[2] and channels != size[1]:  # tokens: the channels repeat
            return _Tiles(size[2], wide // size[2]), _Tiles(size[2], wide // size[2], back=True)
        return _Blocks(wide // size[1]), _Blocks(wide // size[1], back=True)
    if rows and len(before) == 2 and len(after) > 2:  # unflatten
        return _Blocks(before[1] // after[1], back=True), _Blocks(before[1] // after[1])
    return None, None


class _Blocks:
    """Channel c becomes the ``size`` consecutive indices ``c * size, ...``; or the way back."""

    def __init__(self, size: int, back: bool = False) -> None:
        self.size, self.back = size, back

    def __call__(self, indices: Sequence[Any]) -> list[Any]:
        if self.back:
            return list(dict.fromkeys(_helpers._HybridIndex(i.idx // self.size, i.root_idx) for i in indices))
        spread = range(self.size)
        return [_helpers._HybridIndex(i.idx * self.size + offset, i.root_idx) for i in indices for offset in spread]


class _Tiles:
    """Channel c becomes the indices ``c, c + width, c + 2 * width, ...``; or the way back."""

    def __init__(self, width: int, copies: int, back: bool = False) -> None:
        self.width, self.copies, self.back = width, copies, back

    def __call__(self, indices: Sequence[Any]) -> list[Any]:
        if self.back:
            return list(dict.fromkeys(_helpers._HybridIndex(i.idx % self.width, i.root_idx) for i in indices))
        copies = range(self.copies)
        return [_helpers._HybridIndex(i.idx + copy * self.width, i.root_idx) for i in indices for copy in copies]


def _along_channels(graph: Any, node: Any, dim: int, shape: torch.Size) -> bool:
    """Whether a concatenation along a dimension, with a result of this shape, joins channels, not samples or tokens."""
    wanted = shape_infer.infer_in_channels_recursively(graph, node, recursive_depth=[0])
    if dim == 0:
        return False
    if wanted != shape[dim] and wanted in shape[1:]:
        return False  # the channels are another dimension
    if dim == 1 and len(shape) != 3:
        return True  # also where what follows reads only a part
    return wanted is None or bool(wanted % shape[dim] == 0)


def _set(source: Any, target: Any, place: int, mappings: Sequence[Any]) -> None:
    """Give the dependencies from one node to another these mappings, in order; without mappings, none."""
    found = [dependency for dependency in source.dependencies if dependency.target is target]
    for number, dependency in enumerate(found):
        dependency.index_mapping[place] = mappings[number % len(mappings)] if mappings else None


def _even(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def signed(value: int) -> int:
    """Autograd hands out negative dimensions as unsigned 64-bit numbers."""
    return value - 2**64 if value >= 2**63 else value
