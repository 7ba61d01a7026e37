"""The commit: what was rehearsed is kept, and whatever else points at parameters follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_softprune.checkpoint import ModelShapes, keep_dense
from lightning_softprune.round.holders import holders_of
from lightning_softprune.surgery import Judgement, References, Surgery, Transaction
from lightning_softprune.trainer import (
    ModuleRunner,
    forget_compiled,
    forget_evaluations,
    record_new_parameters,
    users_callbacks,
    wrap_again,
)


def commit(
    runner: ModuleRunner,
    copies: Sequence[nn.Module],
    transaction: Transaction,
    surgery: Surgery,
    dense: ModelShapes,
    judged: Mapping[int, Judgement],
) -> None:
    """Keep what was rehearsed; whatever else points at parameters follows.

    Args:
        runner: Has the trainer and the module.
        copies: Averaged copies of the module, which were pruned alike.
        transaction: Is committed.
        surgery: What was done to the module.
        dense: The shapes of the module before that.
        judged: What becomes of modules outside of it that look like parts of it, by identity.
    """
    trainer, module = runner.trainer, runner.module
    references = References(module, surgery, dense.shapes, copies)
    listeners = [module, *users_callbacks(trainer)]
    holders = holders_of(trainer, module)
    references.apart, references.judged = {id(holder) for _, holder in holders}, judged
    try:
        references.carry_hooks()
        for name, holder in holders:
            references.carry(name, holder, companions=not hasattr(holder, "on_softprune"))
        _warn_of(references.left)
        if references.doubtful:
            rank_zero_warn(
                f"SoftPruning: {', '.join(references.doubtful[:8])}: outside of the model, with the names and shapes "
                "of a part of it, and pruned like that part, as an average of it has to be. If it is a teacher that "
                "shall stay whole, make it a submodule and name it in `ignore`"
            )
        for listener in listeners:
            if callable(hook := getattr(listener, "on_softprune", None)):
                hook(surgery)
        _warn_of(references.left_by_listeners())
        keep_dense(module, dense, {name: before for name, (before, _) in surgery.counts.items()}, surgery.unsaved)
        forget_evaluations(module)
        forget_compiled()
        wrap_again(trainer, module)  # last: the dense wrapper serves until nothing can fail any more
    except BaseException:
        references.undo()
        raise
    record_new_parameters(trainer, [bias for _, _, bias in surgery.created])
    transaction.commit()


def _warn_of(left: Sequence[str]) -> None:
    """Name what does not follow the parameters."""
    if left:
        rank_zero_warn(
            f"SoftPruning: {', '.join(list(dict.fromkeys(left))[:8])}: of the shape of a pruned parameter, and cannot "
            "follow it by itself; give its owner (the module or a callback) a method `on_softprune(self, surgery)`"
        )
