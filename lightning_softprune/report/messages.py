"""Sentences about a fit that people have to read: rounds that never ran, files that still hold the dense model."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_softprune.results import PruningResult
from lightning_softprune.utilities.wording import counted


def rounds_never_reached(epochs: Sequence[int], results: Sequence[PruningResult], trained: int, why: str) -> str:
    """Word the warning that training ended before rounds that were asked for.

    Args:
        epochs: The epochs of the rounds that did not run, ascending.
        results: The rounds that did.
        trained: How many epochs there were.
        why: Why training ended.

    >>> rounds_never_reached([10], [], 3, "max_steps=12 was reached")  # doctest: +NORMALIZE_WHITESPACE
    'SoftPruning: the round at epochs=10 did not run: training ended after 3 epochs (max_steps=12 was reached).
    The model is dense, nothing was pruned.
    Let it run at epochs=2 or earlier, or prune the model now: lightning_softprune.prune(model, ...)'
    """
    one = len(epochs) == 1
    after = "before its first epoch" if trained == 0 else f"after {counted(trained, 'epoch')}"
    applied = [result for result in results if result.applied]
    state = "The model is dense, nothing was pruned"
    if applied:
        rounds = f"round{'' if len(applied) == 1 else 's'} at epochs={_listed([result.epoch for result in applied])}"
        state = f"The model is pruned by the {rounds} alone, to a sparsity of {applied[-1].sparsity:.4g}"
    advice = "Prune the model now"
    if 0 < trained <= epochs[0]:
        let = "Let it run" if one else "Let the last of them run"
        advice = f"{let} at epochs={trained - 1} or earlier, or prune the model now"
    return (
        f"SoftPruning: the round{'' if one else 's'} at epochs={_listed(epochs)} did not run: "
        f"training ended {after} ({why}). {state}. {advice}: lightning_softprune.prune(model, ...)"
    )


def dense_checkpoints_stay(paths: Sequence[str]) -> list[str]:
    """Word, for each best checkpoint from before a round, that it holds the model as it was and is kept.

    >>> dense_checkpoints_stay(["runs/best.ckpt"])
    ['The best checkpoint from before this round stays at runs/best.ckpt; ModelCheckpoint starts afresh']
    """
    return [
        f"The best checkpoint from before this round stays at {path}; ModelCheckpoint starts afresh" for path in paths
    ]


def score_path(result: PruningResult, dense: float) -> str:
    """Word what became of the score: of the dense model, pruned (compensated and healed), and after fine-tuning.

    Args:
        result: The last round.
        dense: The score of the first dense model.
    """
    scores = f"{result.monitor}: dense {dense:.4g}, pruned {result.score_after:.4g}"
    if result.healing is not None and result.healing.kept and result.score_compensated is not None:
        healed = f"compensated {result.score_compensated:.4g}, healed {result.healing.score:.4g}"
        scores = f"{result.monitor}: dense {dense:.4g}, {healed}"
    return scores if result.score_finetuned is None else f"{scores}, after fine-tuning {result.score_finetuned:.4g}"


def _listed(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last
