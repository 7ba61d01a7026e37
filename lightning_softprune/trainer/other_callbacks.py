"""The other callbacks and schedulers of a run: what they remember of the dense model, and how they are told.

After a round, best scores and waiting counters belong to a model that no longer exists, averaged copies have the wrong
shape, and compiled graphs are out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_softprune.utilities.libraries import counterparts
from lightning_softprune.utilities.ownership import is_of_a_framework


def reset_monitors(trainer: pl.Trainer) -> list[str]:
    """Let everything that compares a metric with its best so far start afresh.

    ModelCheckpoint forgets its best models (their files stay on disk), EarlyStopping its best score and its patience,
    ReduceLROnPlateau its best and its cooldown; learning rates stay as they are. A ModelCheckpoint without a monitor
    compares nothing: its "best" is its latest file, which it has to know to replace it.

    Returns:
        The best models' files, one for each ModelCheckpoint that had one.
    """
    stay: list[str] = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, counterparts(ModelCheckpoint)):
            if callback.monitor is None:
                continue
            stay += [callback.best_model_path] if callback.best_model_path else []
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.best_k_models = {}
            callback.best_model_score = None
            callback.current_score = None
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.kth_value = worst
        elif isinstance(callback, counterparts(EarlyStopping)):
            callback.wait_count = 0
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler._reset()
    return stay


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The trainer's callbacks, an attribute that a connector of its own sets."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def users_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks that users have written."""
    return [callback for callback in callbacks_of(trainer) if not is_of_a_framework(type(callback))]


def averaged_copies(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the module that averaging callbacks keep; they have to be pruned by the same plan."""
    copies: list[nn.Module] = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, counterparts(WeightAveraging)) and callback._average_model is not None:
            copies.append(callback._average_model.module)
        elif isinstance(callback, counterparts(StochasticWeightAveraging)) and callback._average_model is not None:
            copies.append(callback._average_model)
    return copies


def ends_with_average(trainer: pl.Trainer) -> bool:
    """Whether validation shows averaged weights, and the fit ends with them."""
    averaging = [c for c in callbacks_of(trainer) if isinstance(c, counterparts(WeightAveraging))]
    return any(callback._average_model is not None for callback in averaging)


def record_new_parameters(trainer: pl.Trainer, created: Sequence[nn.Parameter]) -> None:
    """Let callbacks that write the parameters of each group into checkpoints know of those that joined a group.

    `BaseFinetuning` (and `BackboneFinetuning`) notes names when groups come into being; a fit that resumes builds its
    optimizers' groups of them.

    Args:
        trainer: The trainer, with optimizers that hold the new parameters.
        created: Parameters that are new.
    """
    names = {id(parameter): name for name, parameter in trainer.lightning_module.named_parameters()}
    new = {id(parameter) for parameter in created}
    for callback in callbacks_of(trainer):
        if not isinstance(callback, counterparts(BaseFinetuning)):
            continue
        for number, recorded in callback._internal_optimizer_metadata.items():
            if number >= len(trainer.optimizers):
                continue
            for noted, group in zip(recorded, trainer.optimizers[number].param_groups, strict=False):
                live = [names.get(id(p)) for p in group["params"]]
                old = [name for name, p in zip(live, group["params"], strict=True) if id(p) not in new]
                if old == noted["params"]:  # otherwise somebody has changed the group since; it is theirs
                    noted["params"] = live


def forget_compiled() -> None:
    """Drop compiled graphs of the shapes from before the prune, if anything was compiled."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
