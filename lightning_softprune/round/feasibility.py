"""What can be met at all, and what is said where it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import Objective, SearchSpace
from lightning_softprune.trainer import MisconfigurationException


def monitored(metrics: Mapping[str, float], objective: Objective) -> float:
    """The score among the metrics.

    Raises:
        MisconfigurationException: The score, or a metric with a constraint, is not among them.
    """
    missing = objective.unlogged(metrics)
    if missing is not None:
        logged = ", ".join(map(repr, sorted(metrics))) or "nothing"
        argument, name = missing
        what = "" if argument.startswith("monitor") else f": {name!r}"
        raise MisconfigurationException(f"{argument}{what} is not logged while validating; logged are: {logged}")
    return metrics[objective.monitor]


def check_reachable(space: SearchSpace, settings: RoundSettings, target: float | None) -> None:
    """Refuse budgets that no plan meets, and say how near plans come."""
    names = [name for name in settings.limits or {} if name != "latency"]
    least = [] if space.shares is None else space.shares(space.realise(space.high[None]))[0].tolist()
    for name, limit, share in zip(names, space.limits, least, strict=True):
        if share > limit:
            raise MisconfigurationException(
                f"limits[{name!r}]={limit:g} is out of reach: a share of {share:.4f} of the {name} remains when every "
                "group is pruned as far as its bounds allow"
            )
    if target is None:
        return
    nearest = space.nearest_point()
    if space.on_target(nearest):
        return
    asked = f"target_sparsity={target:g} with tolerance={space.tolerance:g}"
    if not names:
        raise MisconfigurationException(
            f"{asked} is out of reach: the nearest reachable sparsity is {space.sparsity_of(nearest):.4f}"
        )
    ways = [f"within the limits, the nearest reachable sparsity is {space.sparsity_of(nearest):.4f}"]
    for number, name in enumerate(names):
        share = space.least_share(number)
        others = " and within the other limits" if len(names) > 1 else ""
        ways.append(
            f"at that sparsity{others}, the smallest limit on {name} that was found to work is {share:.4f}"
            if math.isfinite(share)
            else f"a looser limit on {name} alone does not help"
        )
    raise MisconfigurationException(
        f"{asked} (of the {settings.cost}) and limits={settings.limits} cannot be met together: {'; '.join(ways)}"
    )
