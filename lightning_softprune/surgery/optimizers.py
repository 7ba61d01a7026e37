"""Optimizers of a pruned model: the new parameters in the places of the old ones, with their state sliced.

A parameter group *takes vectors* if its optimizer can train a bias in it. Some cannot: Muon and its kind orthogonalise
matrices, and refuse anything else.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_softprune.surgery.apply import KeptByDim, Surgery, slice_tensor
from lightning_softprune.utilities.nested import map_tensors, tensors_in
from lightning_softprune.utilities.ownership import package_of

_NO_SETTINGS = frozenset({"params", "param_names", "initial_lr"})
"""What else is in a parameter group: its parameters, and what schedulers note there."""


def repair_optimizers(optimizers: Iterable[Optimizer], surgery: Surgery) -> None:
    """Give every optimizer the new parameters in the places of the old ones, with their state sliced.

    The optimizer objects, their parameter groups and the lists in them stay the same objects, so schedulers, gradient
    scalers and wrappers go on. A bias that compensation created joins its weight's parameter group, behind the weight:
    where `module.parameters()` has it, and so an optimizer that is built for the pruned module. Where that group takes
    matrices only, the bias goes to the first group with other parameters (see :func:`weights_without_bias`), to where
    the model's order has it.

    State tensors of the parameter's shape (or with dimensions of size one in its place), or of that shape without one
    of its dimensions, as means over rows and columns have, are sliced by the kept indices; scalars are kept; LBFGS
    starts its history afresh. Where a tensor cannot be sliced, or an optimizer keeps other things of a parameter of the
    new shape (means over rows and columns of large ones alone), a warning says so, and all that the optimizer keeps of
    this parameter is as in a new optimizer: what it makes in its first step, it makes together.

    Args:
        optimizers: Optimizers over the model's parameters.
        surgery: What was done to them.
    """
    order = {id(parameter): number for number, parameter in enumerate(surgery.order)}
    replaced = {id(old): (old, new, by_dim) for old, new, by_dim in surgery.parameters}
    optimizers = list(optimizers)
    groups, before = _ParameterGroups(optimizers), {id(new): old for old, new, _ in surgery.parameters}
    homes = [groups.for_bias_of(before.get(id(weight), weight)) for _, weight, _ in surgery.created]
    for optimizer in optimizers:
        touched, forms = False, _StateForms(optimizer)
        for group in optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                if id(parameter) not in replaced:
                    continue
                touched = True
                _, new, _ = replaced[id(parameter)]
                group["params"][position] = new
        for old in [key for key in optimizer.state if id(key) in replaced]:  # a wrapper may share its groups' lists
            touched = True
            if not isinstance(optimizer, LBFGS):
                _, new, by_dim = replaced[id(old)]
                if state := _state_of_pruned(optimizer, forms, old, new, by_dim):
                    optimizer.state[new] = state
        if touched and isinstance(optimizer, LBFGS):
            optimizer.state.clear()
            optimizer._numel_cache = None
    for home, (name, weight, bias) in zip(homes, surgery.created, strict=True):
        for group in home:
            ids = [id(parameter) for parameter in group["params"]]
            if id(bias) in ids:  # of a wrapper that shares its groups
                continue
            if id(weight) in ids:
                place = ids.index(id(weight)) + 1
                name = group.get("param_names", [name] * place)[place - 1].removesuffix("weight") + "bias"
            else:
                own = order.get(id(bias), len(order))
                place = next((at for at, key in enumerate(ids) if order.get(key, -1) > own), len(ids))
            _insert(group, place, bias, name)


def _insert(group: dict[str, Any], place: int, parameter: nn.Parameter, name: str) -> None:
    group["params"].insert(place, parameter)
    if "param_names" in group:  # of an optimizer that was given names
        names = list(group["param_names"])
        names.insert(place, name)
        group["param_names"] = names


def weights_without_bias(optimizers: Sequence[Optimizer], weights: Mapping[str, nn.Parameter]) -> set[str]:
    """The weights beside which no bias may be created: no optimizer could train it.

    A new bias joins its weight's parameter group, if that takes vectors: it holds some, or a small optimizer of the
    same class and settings trains one. Otherwise it joins a group that holds vectors, of whichever optimizer. Where
    there is none, there is no place for it. A frozen weight that is in no optimizer may come to any of them later.

    Args:
        optimizers: The model's optimizers.
        weights: The weights of layers without a bias, by any name.

    Returns:
        Names among these.
    """
    groups = _ParameterGroups(optimizers)
    return {name for name, weight in weights.items() if not groups.have_place_beside(weight)}


class _ParameterGroups:
    """The parameter groups of several optimizers, and what they can train."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
        self.holders: dict[int, list[int]] = {}
        for number, (_, group) in enumerate(self.groups):
            for parameter in group["params"]:
                self.holders.setdefault(id(parameter), []).append(number)
        self.with_vectors = [i for i, (_, group) in enumerate(self.groups) if any(p.ndim < 2 for p in group["params"])]
        self._tried: dict[int, bool] = {}

    def take_vectors(self, number: int) -> bool:
        if number not in self._tried:
            optimizer, group = self.groups[number]
            known = number in self.with_vectors or not group["params"]
            self._tried[number] = known or _trains_vectors(optimizer, group)
        return self._tried[number]

    def have_place_beside(self, weight: nn.Parameter) -> bool:
        holders = self.holders.get(id(weight), [])
        if not self.groups or any(self.take_vectors(number) for number in holders or range(len(self.groups))):
            return True
        return bool(holders and self.with_vectors)

    def for_bias_of(self, weight: nn.Parameter) -> list[dict[str, Any]]:
        """The groups that get a weight's new bias: its own, or the first with vectors, of its own optimizer if any."""
        holders = self.holders.get(id(weight), [])
        found = [number for number in holders if self.take_vectors(number)]
        if holders and not found and self.with_vectors:
            own = {id(self.groups[number][0]) for number in holders}
            found = [min(self.with_vectors, key=lambda number: (id(self.groups[number][0]) not in own, number))]
        return [self.groups[number][1] for number in found]


def _trains_vectors(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether an optimizer of this class and a group's settings trains a vector as it trains a matrix.

    Where not even a matrix can be tried (a constructor of another kind, a step that wants more than gradients), the
    parameters that the group holds are all there is to go by: matrices.
    """
    example = group["params"][0]
    matrix, vector = (_moved(optimizer, group, example.new_empty(shape)) for shape in ((4, 4), (4,)))
    return matrix is not None and (vector is True or (vector is False and not matrix))


def _moved(optimizer: Optimizer, group: Mapping[str, Any], like: torch.Tensor) -> bool | None:
    """Whether one step of a small optimizer moves a parameter of this shape; ``None`` if it fails, or ends in a NaN."""
    return _Stepped.of(optimizer, group, like).moved


@dataclass(frozen=True)
class _Stepped:
    """What one step of a small optimizer of a group's settings does with a parameter of some shape.

    Attributes:
        moved: Whether it moves it; ``None`` if it fails, or ends in a NaN.
        kept: Names of what it keeps of it; ``None`` if it fails.
    """

    moved: bool | None = None
    kept: frozenset[Any] | None = None

    @classmethod
    def of(cls, optimizer: Optimizer, group: Mapping[str, Any], like: torch.Tensor) -> _Stepped:
        """Take the step; of what is given, the shape, type and device matter."""
        before = torch.linspace(-1.0, 1.0, like.numel(), dtype=like.dtype, device=like.device).reshape(like.shape).sin()
        parameter = nn.Parameter(before.clone())
        parameter.grad = before.cos()
        try:
            small = _small_optimizer(optimizer, group, parameter)
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                small.step(closure=lambda: torch.zeros((), device=like.device))  # type: ignore[arg-type,return-value]
        except Exception:  # whatever it says to a vector
            return cls()
        moved = None if not parameter.isfinite().all() else not torch.equal(parameter.detach(), before)
        return cls(moved, frozenset(small.state.get(parameter, {})))


def _small_optimizer(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> Optimizer:
    """A new optimizer of the same class and a group's settings over one parameter.

    Raises:
        Exception: Its constructor is of another kind.
    """
    settings = {key: value for key, value in group.items() if key not in _NO_SETTINGS}
    accepted = inspect.signature(type(optimizer)).parameters
    arguments = {key: value for key, value in {**optimizer.defaults, **settings}.items() if key in accepted}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return type(optimizer)([{**settings, "params": [parameter]}], **arguments)


class _StateForms:
    """How an optimizer's state tensors follow the shapes of their parameters, by name.

    A *form* lists the dimensions of the parameter that a tensor has: all, or all but one. Where several forms fit one
    parameter (a square matrix), those count that fit every parameter of as many dimensions.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._forms: dict[tuple[str, int], set[tuple[int, ...]]] = {}
        for parameter, state in optimizer.state.items():
            if not isinstance(parameter, torch.Tensor) or not isinstance(state, Mapping):
                continue
            for name, value in state.items():
                for tensor in filter(_holds_many, tensors_in(value)):
                    fitting = _fitting_forms(tensor, parameter)
                    self._forms.setdefault((name, parameter.ndim), fitting).intersection_update(fitting)

    def sliced(self, name: str, value: Any, parameter: torch.Tensor, by_dim: KeptByDim) -> Any:
        """What is left of a state.

        Raises:
            _DoesNotFollowError: A tensor in it fits no form, or two that tell different things.
        """

        def follow(tensor: torch.Tensor) -> torch.Tensor:
            if not _holds_many(tensor):
                return tensor
            cuts = [
                {at: by_dim[d] for at, d in enumerate(form) if d in by_dim and tensor.shape[at] == parameter.shape[d]}
                for form in self._forms[name, parameter.ndim]
            ]
            if not cuts or not all(_is_same(cut, cuts[0]) for cut in cuts):
                raise _DoesNotFollowError(name, tuple(tensor.shape))
            return slice_tensor(tensor, cuts[0])

        return map_tensors(value, follow) if tensors_in(value) else value


class _DoesNotFollowError(Exception):
    """A state tensor is not sliced with its parameter; its arguments are its name and its shape."""


def _holds_many(tensor: torch.Tensor) -> bool:
    """Not a number for the whole parameter; a matrix without rows has columns."""
    return tensor.numel() > 1 or (not tensor.numel() and tensor.ndim > 1)


def _fitting_forms(tensor: torch.Tensor, parameter: torch.Tensor) -> set[tuple[int, ...]]:
    every = tuple(range(parameter.ndim))
    if tensor.ndim == parameter.ndim:
        fits = all(t in (1, p) for t, p in zip(tensor.shape, parameter.shape, strict=True))
        return {every} if fits else set()
    forms = {every[:left_out] + every[left_out + 1 :] for left_out in every}
    return {form for form in forms if tensor.shape == torch.Size(parameter.shape[dim] for dim in form)}


def _is_same(cut: KeptByDim, other: KeptByDim) -> bool:
    return cut.keys() == other.keys() and all(torch.equal(kept, other[dim]) for dim, kept in cut.items())


def _state_of_pruned(
    optimizer: Optimizer, forms: _StateForms, old: torch.Tensor, new: nn.Parameter, by_dim: KeptByDim
) -> dict[str, Any]:
    """What an optimizer keeps of a parameter that takes another's place."""
    state = dict(optimizer.state.pop(old))
    holders = [group for group in optimizer.param_groups if any(new is parameter for parameter in group["params"])]
    group = (holders or [{}])[0]
    try:
        sliced = {name: forms.sliced(name, value, old, by_dim) for name, value in state.items()}
        if not _keeps_other_things(optimizer, group, old, new):
            return sliced
        why = (
            f"it keeps other things of a parameter of shape {tuple(new.shape)} than of one of shape {tuple(old.shape)}"
        )
    except _DoesNotFollowError as error:
        name, shape = error.args
        why = f"the state {name!r} of shape {shape} does not follow its parameter's shape {tuple(old.shape)}"
    warnings.warn(
        f"{type(optimizer).__name__}: {why}; all that the optimizer keeps of this parameter starts afresh", stacklevel=3
    )
    try:
        stand_in = nn.Parameter(new.detach().clone())
        return dict(_small_optimizer(optimizer, group, stand_in).state.get(stand_in, {}))
    except Exception:  # a constructor of another kind
        return {}


def _keeps_other_things(optimizer: Optimizer, group: Mapping[str, Any], old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether what an optimizer keeps of a parameter depends on its shape, and is something else now; by trying."""
    if package_of(type(optimizer)) == "torch":
        return False
    then, now = (_Stepped.of(optimizer, group, like).kept for like in (old, new))
    return then is not None and now is not None and then != now


def inner_optimizers(optimizers: Sequence[Optimizer], holders: Sequence[object]) -> list[Optimizer]:
    """Optimizers that others wrap, and those that holders keep as attributes, apart from the given ones."""
    found: list[Optimizer] = []

    def note(value: Any) -> Iterator[Any]:
        mapping = vars(value) if hasattr(value, "__dict__") else {}
        for item in list(mapping.values()):
            yield from item if isinstance(item, (list, tuple)) and len(item) < 64 else (item,)

    stack: list[Any] = [*optimizers, *holders]
    while stack:
        for item in note(stack.pop()):
            known = any(item is other for other in (*found, *optimizers))
            if isinstance(item, Optimizer) and not known:
                found.append(item)
                stack.append(item)
    return found
