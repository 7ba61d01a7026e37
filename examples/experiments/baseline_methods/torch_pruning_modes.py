"""torch-pruning's own choices of widths (arXiv 2301.12900, 2407.04616): uniform, global, isomorphic.

Channels are ranked by its group norm. Uniform takes the same fraction everywhere, global the smallest norms of the
whole network, isomorphic the smallest among groups of one structure. The fraction is found by bisection on the
parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

MODES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}
BISECTIONS = 12


Network = TypeVar("Network", bound=nn.Module)


def pruned_by_mode(network: Network, mode: str, removed: float, image: Tensor, ignored: Sequence[str]) -> Network:
    """A smaller copy of the network, with as nearly this fraction of its parameters removed as bisection gets.

    Args:
        network: The dense network.
        mode: One of `MODES`.
        removed: The fraction.
        image: One image, as a batch.
        ignored: Names of layers whose outputs stay.
    """
    total = _parameters(network)
    low, high, best = 0.0, 1.0, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        found = _pruned(network, mode, ratio, image, ignored)
        gone = 1 - _parameters(found) / total
        if best is None or abs(gone - removed) < best[0]:
            best = abs(gone - removed), found
        low, high = (ratio, high) if gone < removed else (low, ratio)
    if best is None:
        raise RuntimeError("no bisection was made")
    return best[1]


def _pruned(network: Network, mode: str, ratio: float, image: Tensor, ignored: Sequence[str]) -> Network:
    smaller = copy.deepcopy(network)
    with torch.enable_grad():
        pruner = tp.pruner.BasePruner(
            smaller,
            image,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[smaller.get_submodule(name) for name in ignored],
            **MODES[mode],
        )
        pruner.step()
    return smaller.eval()


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
