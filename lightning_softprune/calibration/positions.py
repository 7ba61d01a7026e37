"""Positions that count: those of a sequence or a map at which the loss depends on what a layer computes.

A decoder that names a class behind its last token, a transformer that reads its class token alone: in their last
blocks, what layers compute at all other positions goes nowhere. Observations there would only tell a regression to
spend on them what the others need. The loss says which they are: no gradient comes back to them, in any sample, from
any output. Samples are not told apart, since the gradient of one that is predicted well may vanish too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_softprune.calibration.readers import weight_geometry
from lightning_softprune.utilities.distributed import in_process_group
from lightning_softprune.utilities.hooks import registered

_Shape = tuple[int, ...]


class ReadPositions:
    """Masks of positions, shape ``(positions...)``, by reader and number of positions; all count where there is none.

    Args:
        masks: Name of a reader -> shape of the positions -> which of them count.
    """

    def __init__(self, masks: Mapping[str, Mapping[_Shape, torch.Tensor]] | None = None) -> None:
        self._masks = {
            name: {shape: mask for shape, mask in by_shape.items() if bool(mask.any()) and not bool(mask.all())}
            for name, by_shape in (masks or {}).items()
        }

    def __bool__(self) -> bool:
        return any(self._masks.values())

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a reader is given or gives, shape ``(samples, positions..., channels)``, where it counts."""
        mask = self._masks.get(name, {}).get(tuple(tensor.shape[1:-1]))
        return tensor if mask is None else tensor[:, mask.to(tensor.device)]

    def key(self, name: str) -> tuple[Any, ...]:
        """Tells the masks of one reader from those of another."""
        return tuple((shape, mask.cpu().numpy().tobytes()) for shape, mask in self._masks.get(name, {}).items())


_Step = Callable[[], Any]


def find_read_positions(
    model: nn.Module, names: Sequence[str], steps: Sequence[_Step], few_samples: Callable[[], _Step] | None = None
) -> ReadPositions:
    """Look for positions that count, by a backward pass of one step; where all do, the others are not run.

    Args:
        model: The dense model.
        names: Its readers.
        steps: One function per calibration batch that runs the model on it and returns its loss.
        few_samples: Makes a step on a few samples, which is looked at before the others.

    Returns:
        The positions. All count where steps give no loss with a gradient, and where several processes train together.
    """
    names = [name for name in names if weight_geometry(model.get_submodule(name)).kernel is None]
    found: dict[str, dict[_Shape, torch.Tensor]] = defaultdict(dict)
    if not names or not steps or in_process_group():
        return ReadPositions()
    for number, step in enumerate(steps if few_samples is None else (few_samples(), *steps)):
        seen = _gradients_of(model, names, step)
        if seen is None:
            return ReadPositions()
        for name, shape, counts in seen:
            known = found[name].get(shape)
            found[name][shape] = counts if known is None else known | counts
        if number == 0 and not ReadPositions(found):
            break
    return ReadPositions(found)


def _gradients_of(
    model: nn.Module, names: Sequence[str], step: Callable[[], Any]
) -> list[tuple[str, _Shape, torch.Tensor]] | None:
    """Whether a gradient comes back to each position, for each call of the readers; ``None``: there are none."""
    calls: list[tuple[str, _Shape, list[torch.Tensor]]] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim > 2 and output.requires_grad:
                seen: list[torch.Tensor] = []
                output.register_hook(lambda grad: seen.append((grad != 0).any(-1).any(0)))  # type: ignore[no-untyped-call]
                calls.append((name, tuple(output.shape[1:-1]), seen))

        return hook

    hooks = (model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with registered(hooks), torch.enable_grad():
        loss = step()
        if not calls:
            return []
        loss = loss.get("loss") if isinstance(loss, Mapping) else loss
        if not parameters or not isinstance(loss, torch.Tensor) or loss.grad_fn is None:
            return None
        try:
            torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
        except Exception:  # no derivative, or none in eval mode by its own code, or no memory for it
            return None
    return [
        (name, shape, torch.stack(seen).any(0) if seen else torch.zeros(shape, dtype=torch.bool))
        for name, shape, seen in calls
    ]
