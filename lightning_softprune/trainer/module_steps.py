"""Steps as functions without arguments, and batches cut short for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_softprune.trainer.isolation import isolated_rng
from lightning_softprune.utilities.hooks import registered
from lightning_softprune.utilities.nested import is_container, rebuild

Step = Callable[[], Any]
Steps = list[Step]


def run_steps(steps: Steps, seed: int = 0) -> None:
    """Run steps one after another, without gradients, always with the same random numbers."""
    with isolated_rng(seed), torch.no_grad():
        for step in steps:
            step()


def same_layer_calls(model: nn.Module, few: Steps, whole: Steps) -> bool:
    """Whether steps on fewer samples run, and call every layer of the model as often as those on whole batches."""

    def calls(steps: Steps) -> Counter[str]:
        seen: Counter[str] = Counter()
        with registered(
            layer.register_forward_hook(lambda *_, name=name: seen.update([name]))
            for name, layer in model.named_modules()
        ):
            run_steps(steps)
        return seen

    wanted = calls(whole)
    try:
        return calls(few) == wanted
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the user's code says to fewer samples: whole batches do
        return False


def head_of_batch(batch: Any, count: int | None) -> Any:
    """The first samples of a batch that is made of tensors of one length; any other batch as it is.

    >>> x, y = head_of_batch((torch.ones(64, 3), torch.ones(64)), 32)
    >>> len(x), len(y), head_of_batch({"x": torch.ones(64), "scale": 1.0}, 32)["x"].shape
    (32, 32, torch.Size([64]))
    """
    lengths: set[int | None] = set()

    def cut(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            lengths.add(len(part) if part.ndim else None)
            return part[:count] if part.ndim else part
        if is_container(part):
            return rebuild(part, cut)
        lengths.add(None)
        return part

    shorter = cut(batch) if count else batch
    return shorter if len(lengths) == 1 and None not in lengths else batch
