"""Optimizers of a pruned model: the new parameters in the places of the old ones, with their state sliced."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_softprune.surgery.apply import KeptByDim, Surgery, slice_tensor


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
                    optimizer.state[new] = _slice_state(optimizer, state, old, by_dim)
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


def _slice_state(optimizer: Optimizer, state: Any, old: nn.Parameter, by_dim: KeptByDim) -> dict[str, Any]:
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
