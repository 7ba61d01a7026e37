"""Networks as numbers: multilayer perceptrons whose parameters are products of widths, and losses with known shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_softprune.search import FloatArray, SearchSpace
from lightning_softprune.testing import coupled, mlp_space, plan_loss, steep

__all__ = [
    "AUTOENCODER",
    "CASES",
    "LIMITED_WIDTHS",
    "LOSSES",
    "POSITIONS",
    "coupled",
    "limited",
    "mlp_space",
    "plan_loss",
    "quadratic",
    "steep",
    "valley",
]


def quadratic(weights: list[float]) -> Callable[[FloatArray], float]:
    return lambda r: 0.1 + float(np.dot(weights, r**2))


def valley(weights: list[float]) -> Callable[[FloatArray], float]:
    """A strongly correlated quadratic around a point that is not on the target."""
    k = len(weights)
    A = 0.6 * np.ones((k, k)) + np.diag(weights)
    return lambda r: 0.2 + float((r - 0.3) @ A @ (r - 0.3))


LOSSES = {"quadratic": quadratic, "steep": steep, "coupled": coupled, "valley": valley}
AUTOENCODER = [784, 512, 256, 32, 256, 512, 784]
CASES = {
    "3 groups": ([64, 128, 64, 32, 10], [1.0, 0.5, 2.0]),
    "4 groups": ([784, 512, 256, 128, 64, 10], [1.0, 0.4, 2.0, 0.7]),
    "5 groups": (AUTOENCODER, [1.0, 0.5, 3.0, 0.6, 1.5]),
}

LIMITED_WIDTHS = [16, 24, 32, 24, 10]
POSITIONS = np.array([64.0, 16.0, 4.0, 1.0])  # early layers are applied often, as convolutions are: MACs are elsewhere


def limited(limit: float, target: float = 0.5, widths: list[int] | None = None, **more) -> SearchSpace:
    """An MLP whose layers are applied unequally often, with a limit on the share of MACs."""
    widths = widths or LIMITED_WIDTHS
    hidden = np.array(widths[1:-1])
    positions = np.resize(POSITIONS, len(widths) - 1)

    def macs(removed):
        kept = hidden - removed
        n = len(kept)
        full = np.column_stack([np.full(n, widths[0]), kept, np.full(n, widths[-1])]).astype(float)
        return (positions * full[:, :-1] * full[:, 1:]).sum(axis=1)

    dense = macs(np.zeros((1, len(hidden)), dtype=int))
    return replace(
        mlp_space(widths, target, **more), limits=(limit,), shares=lambda removed: (macs(removed) / dense)[:, None]
    )
