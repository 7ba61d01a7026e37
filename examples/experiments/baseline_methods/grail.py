"""GRAIL (arXiv 2602.23795): the removed channels are rebuilt from the kept ones by ridge regression.

Channels are kept by their norm. With the Gram matrix ``G = sum h h^T`` of what a layer reads, over the positions of all
calibration images, the map

    B = G[:, K] (G[K, K] + l I)^-1

gives all ``n`` channels from the kept ones ``K`` with the least squared error, and goes into the weights of the layer:
``W <- W B``. There is no bias and no search; one matrix serves all positions of a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from baseline_methods.channels import l1_norms, largest, map_channels, reader_names, selection
from lightning_softprune import PruningGroup

RIDGE = 1e-3
"""``l``, as a fraction of the mean of the diagonal of ``G[K, K]``."""


@torch.no_grad()
def gram_matrices(network: nn.Module, groups: Sequence[PruningGroup], images: Tensor) -> dict[str, Tensor]:
    """The Gram matrix of what each group's readers read, by the group's name.

    Args:
        network: The dense network, in eval mode.
        groups: Each with one reader, or with several that read the same.
        images: Calibration images.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for group in groups:

        def see(_: nn.Module, inputs: tuple[Tensor, ...], name: str = group.name) -> None:
            channels = inputs[0].double().movedim(1, 0).flatten(1)
            found[name] = found.get(name, torch.zeros(())) + channels @ channels.t()

        handles.append(network.get_submodule(reader_names(group)[0]).register_forward_pre_hook(see))
    for part in torch.split(images, 128):
        network(part)
    for handle in handles:
        handle.remove()
    return found


def reconstruction(gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """``B``, shape ``(n, k)``.

    Args:
        gram: ``G``, shape ``(n, n)``.
        kept: Indices of the kept channels, ``K``.
        ridge: ``l`` as a fraction of the mean of the diagonal.
    """
    inside = gram[kept][:, kept]
    inside = inside + ridge * inside.diagonal().mean() * torch.eye(len(kept), dtype=gram.dtype)
    solved: Tensor = torch.linalg.solve(inside, gram[kept])
    return solved.t()


def prune_and_rebuild(
    network: nn.Module,
    groups: Sequence[PruningGroup],
    widths: Sequence[int],
    grams: Mapping[str, Tensor],
    ridge: float = RIDGE,
) -> None:
    """Keep the channels with the largest L1 norms and rebuild the others from them, in place."""
    for group, width in zip(groups, widths, strict=True):
        kept = largest(l1_norms(network, group), width)
        read = reconstruction(grams[group.name], kept, ridge).float()
        map_channels(network, group, selection(kept, group.num_channels), read)
