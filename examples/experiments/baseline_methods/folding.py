"""Model folding (arXiv 2602.18116, after 2502.10216): similar channels are merged, not removed.

The channels' filters are clustered by k-means, and each cluster becomes one channel with its mean filter: as
projections of the weights go, none of that rank is nearer to them. The next layer reads a merged channel with the sum
of the weights that its members were read with. REPAIR follows, since means of filters have smaller outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from baseline_methods.channels import map_channels, producer
from lightning_softprune import PruningGroup

STARTS = 10  # of k-means


def fold(network: nn.Module, groups: Sequence[PruningGroup], widths: Sequence[int], seed: int) -> list[Tensor]:
    """Merge each group's channels into so many clusters, in place.

    Args:
        network: The network.
        groups: Its groups.
        widths: Clusters for each of them.
        seed: Of k-means.

    Returns:
        For each group the matrix ``(k, n)`` of cluster means, which gives the targets of REPAIR.
    """
    found = []
    for group, width in zip(groups, widths, strict=True):
        members = cluster(producer(network, group).weight.detach().flatten(1), width, seed)
        means = members / members.sum(1, keepdim=True)
        map_channels(network, group, means, members.t())
        found.append(means)
    return found


def cluster(filters: Tensor, number: int, seed: int) -> Tensor:
    """K-means of rows.

    Args:
        filters: Shape ``(n, features)``.
        number: Of clusters, ``k``.
        seed: Of the starts.

    Returns:
        Membership, shape ``(k, n)``: one 1 in each column, none of the rows empty.
    """
    from sklearn.cluster import KMeans

    points = filters.double().numpy()
    labels = KMeans(number, n_init=STARTS, random_state=seed).fit(points).labels_
    for empty in sorted(set(range(number)) - set(labels)):  # of fewer distinct points than clusters: split one
        counts = np.bincount(labels, minlength=number)
        labels[np.flatnonzero(labels == counts.argmax())[0]] = empty
    return torch.eye(number)[torch.from_numpy(labels.astype(np.int64))].t().contiguous()
