"""Several processes: the mean of what each has scored, and the wrapper that keeps them equal."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_softprune.utilities.libraries import counterparts


def mean_over_processes(trainer: pl.Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each metric over the processes, each of which scored its own share of the validation data.

    Metrics that were logged with `sync_dist`, or come from torchmetrics objects, are equal already.
    """
    if trainer.world_size == 1 or not metrics:
        return metrics
    names = sorted(metrics)
    values = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=trainer.strategy.root_device)
    means = trainer.strategy.reduce(values, reduce_op="mean")
    return dict(zip(names, torch.as_tensor(means).tolist(), strict=True))


def wrap_again(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Wrap the pruned module for distributed training anew; the old wrapper would reduce parameters that are gone.

    The new wrapper also copies rank zero's weights to all processes, as it does when a fit starts.
    """
    strategy = trainer.strategy
    if isinstance(strategy, counterparts(DDPStrategy)):
        strategy.model = pl_module
        strategy.configure_ddp()
