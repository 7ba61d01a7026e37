"""The groups that the graph takes for prunable and the code does not, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune.graph import Layout, PruningGroup, layout_of
from lightning_softprune.search import Plan
from lightning_softprune.surgery.apply import Surgery, apply_plan, select_channels
from lightning_softprune.utilities.hooks import registered


def probe_groups(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    run: Callable[[], Any],
    run_otherwise: Callable[[], Any] | None = None,
) -> list[PruningGroup]:
    """Find the groups that the graph takes for prunable and the code does not.

    From each prunable group a few channels (the first, the last and one between, if there are that many) are removed,
    the model is run, and the channels are put back. A constant in a ``view``, an addition to the raw input or an
    assumption about the width shows now, not in the middle of a search.

    Then the group's channels change places, everywhere alike. No layer's outputs may notice. If they do, something
    between the layers reorders channels or tells them apart by their number (``flip``, a channel shuffle, a slice), and
    what would be removed from a reader is not what its producer loses.

    Args:
        model: The model; unchanged afterwards.
        groups: Traced groups.
        run: Runs the steps of the model once, always with the same random numbers; they are known to run on the dense
            model.
        run_otherwise: The same with other random numbers: outputs that depend on them are not compared.

    Returns:
        The groups; those that fail are not prunable and carry the error's first line as their reason.
    """
    probed = []
    dense = _outputs(model, run)
    other = dense if run_otherwise is None else _outputs(model, run_otherwise)
    dense = {name: seen for name, seen in dense.items() if name in other and _alike(seen, other[name])}
    for group in groups:
        if not group.prunable:
            probed.append(group)
            continue
        last = group.num_channels - 1
        surgery = apply_plan(model, [group], Plan((tuple(sorted({0, last // 2, last})) if last > 3 else (0,),)))
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's code says to fewer channels is the reason
            line = (str(error).splitlines() or [""])[0]
            probed.append(group.refuse(f"the model does not run with fewer channels: {type(error).__name__}: {line}"))
        else:
            own = {member.module for member in group.members if member.slot == "out"}
            surgery = _swap_channels(model, group, surgery)
            seen = _outputs(model, run)
            torn = [name for name in dense if name not in own and not _alike(dense[name], seen.get(name, []))]
            reason = (
                f"its channels are reordered, or told apart by their number, on the way to {torn[0]}" if torn else ""
            )
            probed.append(group.refuse(reason) if reason else group)
        finally:
            surgery.undo()
    return probed


def _swap_channels(model: nn.Module, group: PruningGroup, removed: Surgery) -> Surgery:
    """Let the channels of a group change places in all its members, after undoing what was removed from them.

    Only channels that hold the same number of indices in every member can take each other's place.
    """
    removed.undo()
    shape = np.stack([np.bincount(m.owner[m.owner >= 0], minlength=group.num_channels) for m in group.members])
    place = np.arange(group.num_channels)
    for kind in np.unique(shape, axis=1).T:
        alike = np.flatnonzero((shape == kind[:, None]).all(axis=0))
        place[alike] = np.roll(alike[::-1], 1)
    selected: dict[str, dict[str, torch.Tensor]] = {}
    for member in group.members:
        order = np.arange(len(member.owner))
        for channel in range(group.num_channels):
            order[member.owner == channel] = np.flatnonzero(member.owner == place[channel])
        slots = selected.setdefault(member.module, {})
        before = slots.get(member.slot)
        moved = torch.from_numpy(order)
        slots[member.slot] = moved if before is None else before[moved]
    sizes = {(member.module, member.slot): len(member.owner) for member in group.members}
    return select_channels(model, selected, sizes)


def _outputs(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    """Run the model; a fingerprint and the norm of the output of every layer that mixes channels, call by call."""
    seen: dict[str, list[tuple[float, float]]] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                values = first.detach().flatten().float()
                scale = max(torch.finfo(first.dtype).eps / torch.finfo(torch.float32).eps, 1.0)  # coarser in half
                norm = float(values.norm()) * min(scale, 64.0)
                seen.setdefault(name, []).append((_fingerprint(values), norm))

        return hook

    with registered(
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if isinstance(layout := layout_of(module), Layout) and "out" in layout.slots
    ):
        run()
    return seen


def _fingerprint(values: torch.Tensor) -> float:
    """A sum with weights between -1 and 1 that hardly any reordering leaves as it is."""
    width = min(len(values), 65537)  # a prime, so that rows do not fall in step with channels

    def weights(size: int, pace: float) -> torch.Tensor:
        return torch.cos(torch.arange(size, dtype=torch.float32, device=values.device) * pace)

    if not width:
        return 0.0
    rows = F.pad(values, (0, -len(values) % width)).reshape(-1, width)
    return float(weights(len(rows), 1.1803399) @ (rows @ weights(width, 2.3999632)))


def _alike(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> bool:
    """Whether two layers' fingerprints agree to a thousandth of their norms (64 times as much in half precision)."""
    return len(one) == len(other) and all(
        abs(a - b) <= 1e-3 * max(norm, other_norm) + 1e-6 for (a, norm), (b, other_norm) in zip(one, other, strict=True)
    )
