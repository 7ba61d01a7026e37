"""Who may point at parameters: the module, the user's callbacks, and optimizers, also those inside of others."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_softprune.surgery import Sightings, inner_optimizers
from lightning_softprune.trainer import averaged_copies, users_callbacks


def look_outside(trainer: pl.Trainer, module: pl.LightningModule, sightings: Sightings) -> None:
    """Note how the modules outside of the model are that look like parts of it."""
    sightings.look(module, holders_of(trainer, module), averaged_copies(trainer), trainer.global_step)


def holders_of(trainer: pl.Trainer, module: pl.LightningModule) -> list[tuple[str, object]]:
    """All that may point at parameters, by the names that people give it."""
    others = (*users_callbacks(trainer), *all_optimizers(trainer, module))
    return [("self", module), *((type(holder).__name__, holder) for holder in others)]


def all_optimizers(trainer: pl.Trainer, module: nn.Module) -> list[Optimizer]:
    """The trainer's optimizers, those inside of them, and those that the module and callbacks keep."""
    return [*trainer.optimizers, *inner_optimizers(trainer.optimizers, [module, *users_callbacks(trainer)])]
