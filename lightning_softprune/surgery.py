"""Surgery: make a plan true on the live model, undo it without a trace, or commit it with its optimizers.

Applying a plan replaces the tensors of the layers it touches by smaller ones; everything else stays as it is, and no
graph is needed. :class:`Transaction` remembers the module before, down to the containers and tensors its modules hold,
and puts all of it back: the same objects with the same values. A committed plan is one that nobody rolled back; its
:class:`Surgery` record says which elements of every tensor survived, and slices optimizer state by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import LBFGS, Optimizer

from lightning_softprune.graph import Layout, PruningGroup, layout_of, set_sizes
from lightning_softprune.search import Plan
from lightning_softprune.utilities.snapshot import Memory

__all__ = ["OptimizerTransaction", "Surgery", "Transaction", "apply_plan", "probe", "repair_optimizers"]

KeptByDim = dict[int, torch.Tensor]


@dataclass
class Surgery:
    """What a plan did to the tensors of a model.

    Attributes:
        parameters: Pairs of (old, new) parameter with the kept indices of every sliced dimension.
        kept: Name of every sliced parameter and buffer -> kept indices by dimension, in the numbering before.
        created: Biases that compensation had to create: name, the weight beside it, the bias.
    """

    parameters: list[tuple[nn.Parameter, nn.Parameter, KeptByDim]] = field(default_factory=list)
    kept: dict[str, KeptByDim] = field(default_factory=dict)
    created: list[tuple[str, nn.Parameter, nn.Parameter]] = field(default_factory=list)
    _before: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def undo(self) -> None:
        """Put the layers back: the same tensor objects, the same attributes. Values are nobody's business here."""
        for mapping, items in self._before:
            mapping.clear()
            mapping.update(items)

    def replace(self, module: nn.Module, attribute: str, name: str, new: nn.Parameter) -> None:
        """Put a parameter of the same shape in the place of one that was not sliced: the old one has to survive."""
        old = module.get_parameter(attribute)
        module._parameters[attribute] = new
        self.parameters.append((old, new, {}))
        self.kept[name] = {}

    def _remember(self, module: nn.Module) -> None:
        for mapping in (module._parameters, module._buffers, module.__dict__):
            self._before.append((mapping, dict(mapping)))


def apply_plan(model: nn.Module, groups: Sequence[PruningGroup], plan: Plan) -> Surgery:
    """Remove a plan's channels from the model, in place.

    Each tensor is sliced once, from the indices that all groups remove together, in the numbering before the plan.
    New parameters keep ``requires_grad``, dtype, memory format, attributes and the slice of a pending gradient;
    tied parameters stay one tensor.

    Args:
        model: The model whose modules the groups name.
        groups: The groups the plan speaks of, in its order.
        plan: Removed channels by group.

    Returns:
        The record of what was sliced.

    Raises:
        ValueError: Groups do not fit the model, or the plan the groups.
    """
    removed = _removed_by_slot(groups, plan)
    return _select(
        model,
        {name: {slot: _kept(m) for slot, m in slots.items()} for name, slots in removed.items()},
        {(name, slot): len(mask) for name, slots in removed.items() for slot, mask in slots.items()},
    )


def _select(
    model: nn.Module, selected: Mapping[str, Mapping[str, torch.Tensor]], expected: Mapping[tuple[str, str], int]
) -> Surgery:
    """Make every slot hold the given indices of what it holds now; ``expected`` is how many it should hold now."""
    modules = dict(model.named_modules())
    record = Surgery()
    slices: dict[int, tuple[torch.Tensor, KeptByDim, list[tuple[nn.Module, str, str]]]] = {}
    resized: list[tuple[nn.Module, dict[str, int]]] = []

    def add(owner: nn.Module, full: str, dim: int, kept: torch.Tensor) -> None:
        name = full.rpartition(".")[2]
        tensor = getattr(owner, name)
        _, by_dim, owners = slices.setdefault(id(tensor), (tensor, {}, []))
        if dim in by_dim and not torch.equal(by_dim[dim], kept):
            raise ValueError(f"{full}: two layers share this tensor and would keep different channels of it")
        by_dim[dim] = kept
        if (owner, name, full) not in owners:
            owners.append((owner, name, full))

    for module_name, slots in selected.items():
        sizes = {}
        module = modules.get(module_name)
        if module is None:  # a bare parameter
            parent, _, _ = module_name.rpartition(".")
            for slot, kept in slots.items():
                add(modules[parent], module_name, int(slot.removeprefix("dim")), kept)
            continue
        layout = layout_of(module)
        if not isinstance(layout, Layout):
            raise ValueError(f"{module_name}: {layout or 'this module is not a layer'}")
        for slot, kept in slots.items():
            if layout.slots[slot] != expected[module_name, slot]:
                raise ValueError(
                    f"{module_name}: the group expects {expected[module_name, slot]} channels, "
                    f"there are {layout.slots[slot]}"
                )
            sizes[slot] = len(kept)
            for axis in layout.axes:
                path, _, name = axis.tensor.rpartition(".")
                owner = module.get_submodule(path)
                if axis.slot == slot and getattr(owner, name, None) is not None:
                    add(owner, f"{module_name}.{axis.tensor}", axis.dim, axis.expand(kept, layout.slots[slot]))
        resized.append((module, sizes))

    _complete_tied(model, slices)
    sliced = {
        key: _slice_parameter(tensor, by_dim) if isinstance(tensor, nn.Parameter) else slice_tensor(tensor, by_dim)
        for key, (tensor, by_dim, _) in slices.items()
    }
    # Nothing has been written so far; from here on nothing can fail.
    touched = {id(m): m for m, _ in resized} | {id(o): o for *_, owners in slices.values() for o, *_ in owners}
    for outer in touched.values():
        for inner in outer.modules():
            record._remember(inner)
    for module, sizes in resized:
        set_sizes(module, sizes)
    for key, (tensor, by_dim, owners) in slices.items():
        new = sliced[key]
        for owner, name, full in owners:
            if isinstance(new, nn.Parameter):
                owner._parameters[name] = new
            else:
                owner._buffers[name] = new
            record.kept[full] = by_dim
        if isinstance(new, nn.Parameter):
            record.parameters.append((tensor, new, by_dim))  # type: ignore[arg-type]
    return record


def slice_tensor(tensor: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Keep the given indices of the given dimensions; memory format is preserved, autograd is not involved."""
    with torch.inference_mode(False), torch.no_grad():
        result = tensor.detach()
        for dim, kept in by_dim.items():
            result = result.index_select(dim, kept.to(tensor.device))
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
        if last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
            result = result.contiguous(memory_format=last)
    return result


def _slice_parameter(parameter: nn.Parameter, by_dim: KeptByDim) -> nn.Parameter:
    new = nn.Parameter(slice_tensor(parameter, by_dim), requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    if parameter.grad is not None:
        new.grad = slice_tensor(parameter.grad, by_dim)
    return new


def _complete_tied(model: nn.Module, slices: Mapping[int, tuple[Any, Any, list[tuple[nn.Module, str, str]]]]) -> None:
    """Every module that holds a sliced tensor gets the new one, also under names that no group knows."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            full = f"{prefix}.{name}".lstrip(".")
            if tensor is not None and id(tensor) in slices:
                owners = slices[id(tensor)][2]
                if not any(known == full for *_, known in owners):
                    owners.append((module, name, full))


def _removed_by_slot(groups: Sequence[PruningGroup], plan: Plan) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    if len(groups) != len(plan.removed):
        raise ValueError(f"plan: {len(plan.removed)} groups planned for {len(groups)} groups")
    removed: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for group, channels in zip(groups, plan.removed, strict=True):
        if not channels:
            continue
        if not all(0 <= channel < group.num_channels for channel in channels):
            raise ValueError(f"plan: {group.name} has {group.num_channels} channels, and should lose {channels}")
        gone = np.zeros(group.num_channels + 1, dtype=bool)  # the last place serves owner == -1
        gone[list(channels)] = True
        for member in group.members:
            masks = removed.setdefault(member.module, {})
            mask = masks.setdefault(member.slot, np.zeros(len(member.owner), dtype=bool))
            mask |= gone[member.owner]
    return removed


def _kept(mask: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(~mask))


# ---------------------------------------------------------------------------------------------------- transaction


class Transaction:
    """Everything a module tree holds, to be put back: ``with Transaction(model) as t: ...; t.commit()``.

    Leaving the block without :meth:`commit`, normally or by an exception, rolls back: every module has the attributes,
    the containers and the tensors it had, the *same objects*, with the values they had; gradients and
    ``requires_grad`` too. Tensors are copied once on entry; :meth:`rollback` may be called any number of times.

    Args:
        models: The module trees.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._done = False
        self._memory = Memory(values=True)
        self._memory.contents(*models)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.rollback()

    def commit(self) -> None:
        """Keep what was done since."""
        self._done = True

    def rollback(self) -> None:
        """Put everything back."""
        self._memory.restore()


def probe(
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
    return _select(model, selected, sizes)


def _outputs(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    """Run the model; a fingerprint and the norm of the output of every layer that mixes channels, call by call."""
    seen: dict[str, list[tuple[float, float]]] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                values = first.detach().flatten().float()
                scale = max(torch.finfo(first.dtype).eps / torch.finfo(torch.float32).eps, 1.0)  # coarser in half
                norm = float(values.norm()) * min(scale, 64.0)
                seen.setdefault(name, []).append((_fingerprint(values), norm))

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if isinstance(layout := layout_of(module), Layout) and "out" in layout.slots
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
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


# ----------------------------------------------------------------------------------------------------- optimizers


def repair_optimizers(optimizers: Iterable[Optimizer], surgery: Surgery) -> None:
    """Give every optimizer the new parameters in the places of the old ones, with their state sliced.

    The optimizer objects, their parameter groups and the lists in them stay the same objects, so schedulers, gradient
    scalers and wrappers go on. A bias that compensation created joins its weight's parameter group, behind the weight:
    where `module.parameters()` has it, and so an optimizer that is built for the pruned module.

    State tensors of the parameter's shape (or with dimensions of size one in its place)
    are sliced by the kept indices; scalars are kept; LBFGS starts its history afresh. What cannot be sliced is dropped
    with a warning.

    Args:
        optimizers: Optimizers over the model's parameters.
        surgery: What was done to them.
    """
    replaced = {id(old): (old, new, by_dim) for old, new, by_dim in surgery.parameters}
    created = {id(weight): bias for _, weight, bias in surgery.created}
    for optimizer in optimizers:
        touched = False
        for group in optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                if id(parameter) not in replaced:
                    continue
                touched = True
                old, new, by_dim = replaced[id(parameter)]
                group["params"][position] = new
                if old in optimizer.state and not isinstance(optimizer, LBFGS):
                    state = optimizer.state.pop(old)
                    optimizer.state[new] = _slice_state(optimizer, state, old, new, by_dim)
            for position, parameter in reversed(list(enumerate(group["params"]))):
                if id(parameter) in created:
                    _insert_after(group, position, created[id(parameter)])
        if touched and isinstance(optimizer, LBFGS):
            optimizer.state.clear()
            optimizer._numel_cache = None


def _insert_after(group: dict[str, Any], position: int, bias: nn.Parameter) -> None:
    group["params"].insert(position + 1, bias)
    if "param_names" in group:  # of an optimizer that was given names
        names = list(group["param_names"])
        names.insert(position + 1, names[position].removesuffix("weight") + "bias")
        group["param_names"] = names


def _slice_state(
    optimizer: Optimizer, state: Any, old: nn.Parameter, new: nn.Parameter, by_dim: KeptByDim
) -> dict[str, Any]:
    sliced: dict[str, Any] = {}
    for name, value in dict(state).items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or (value.numel() == 1 and old.ndim > 0):
            sliced[name] = value
        elif value.ndim == old.ndim and all(v in (1, o) for v, o in zip(value.shape, old.shape, strict=True)):
            follows = {dim: kept for dim, kept in by_dim.items() if value.shape[dim] == old.shape[dim]}
            sliced[name] = slice_tensor(value, follows)
        else:
            warnings.warn(
                f"{type(optimizer).__name__}: the state {name!r} of shape {tuple(value.shape)} does not follow its "
                f"parameter's shape {tuple(old.shape)}; it starts afresh",
                stacklevel=3,
            )
    return sliced


class OptimizerTransaction:
    """Parameter lists, settings and state of optimizers, to be put back when a round fails.

    State tensors are not copied: a round replaces them and never writes them.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._saved = [
            (
                optimizer,
                [(group, dict(group), list(group["params"])) for group in optimizer.param_groups],
                {key: dict(value) if isinstance(value, dict) else value for key, value in optimizer.state.items()},
                getattr(optimizer, "_numel_cache", None),
            )
            for optimizer in optimizers
        ]

    def rollback(self) -> None:
        """Put everything back into the same objects."""
        for optimizer, groups, state, numel in self._saved:
            for group, settings, parameters in groups:
                group.clear()
                group.update(settings)
                group["params"][:] = parameters
            optimizer.state.clear()
            optimizer.state.update(state)
            if isinstance(optimizer, LBFGS):
                optimizer._numel_cache = numel
