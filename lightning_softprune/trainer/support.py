"""Strategies and optimizers that can be served; the others are refused before anything runs."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lightning_softprune.trainer.lightning_names import MisconfigurationException
from lightning_softprune.utilities.libraries import counterparts


def refuse_sharding(trainer: pl.Trainer) -> None:
    """Refuse strategies whose processes do not each hold the whole model, or that fork.

    Allowed are one device, and DistributedDataParallel with one script per process (``strategy="ddp"``).

    Raises:
        MisconfigurationException: Names the strategy and says what to do instead.
    """
    strategy = trainer.strategy
    if isinstance(strategy, counterparts(SingleDeviceStrategy)):
        return
    if isinstance(strategy, counterparts(DDPStrategy)) and not isinstance(strategy, counterparts(DeepSpeedStrategy)):
        if strategy._start_method == "popen":
            return
        how = f"{type(strategy).__name__} started by {strategy._start_method!r}"
    else:
        how = type(strategy).__name__
    raise MisconfigurationException(
        f"strategy: {how} is not supported: SoftPruning needs the whole model in every process, and processes that run "
        'the script (`strategy="ddp"`). Train as you do, then prune on one device from a consolidated checkpoint'
    )


def refuse_sharded_optimizers(trainer: pl.Trainer) -> None:
    """Refuse optimizers that spread their state over the processes.

    Raises:
        MisconfigurationException: Names the optimizer and says what to do instead.
    """
    for optimizer in trainer.optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise MisconfigurationException(
                f"optimizer: {type(optimizer).__name__} spreads its state over the processes, which SoftPruning cannot "
                "slice. Use a plain optimizer, or prune on one device from a consolidated checkpoint"
            )
