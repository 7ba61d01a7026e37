"""What has one tensor per parameter, or one for all: companions, which are sliced as the parameters were."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_softprune.graph import Shape
from lightning_softprune.surgery.apply import Surgery, slice_tensor
from lightning_softprune.surgery.following.weakly import pointed_to
from lightning_softprune.utilities.names import is_inside


class Companions:
    """Slices of tensors that belong to parameters of a pruned model.

    Args:
        model: The pruned model.
        surgery: What was done to it.
        shapes: Shapes of its parameters and buffers before that, by name.
    """

    def __init__(self, model: nn.Module, surgery: Surgery, shapes: Mapping[str, Shape]) -> None:
        self._model, self._surgery, self._shapes = model, surgery, shapes
        created = {name for name, *_ in surgery.created}
        self._names = [name for name, _ in model.named_parameters() if name not in created and name in shapes]
        self._old = {id(old): (old, by_dim) for old, _, by_dim in surgery.parameters}
        self._bias_of = {id(weight): bias for _, weight, bias in surgery.created}
        self._created = {f"{name.removesuffix('bias')}weight": (name, bias) for name, _, bias in surgery.created}

    # ------------------------------------------------------------------------------------------------ of one parameter

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of the companion of a parameter or buffer of this name: itself, if nothing went."""
        by_dim = self._surgery.kept.get(name) or {}
        if not by_dim:
            return tensor
        return slice_tensor(tensor, by_dim).requires_grad_(tensor.requires_grad and tensor.is_leaf)

    def with_new_bias(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Name and companion of the bias that compensation has created beside a weight; `None` if there is none.

        Args:
            name: The weight's.
            tensor: Its companion.
        """
        if name not in self._created:
            return None
        bias, parameter = self._created[name]
        return bias, _like(parameter, tensor)

    def new_bias_under(self, key: Any, tensor: torch.Tensor) -> tuple[object, torch.Tensor] | None:
        """The same, where keys are parameters or their identities."""
        created = self._bias_of.get(id(key) if isinstance(key, nn.Parameter) else key)
        if created is None:
            return None
        return created if isinstance(key, nn.Parameter) else id(created), _like(created, tensor)

    def beside(self, owner: nn.Parameter | None, tensor: object) -> torch.Tensor | None:
        """What is left of a tensor that lies beside one parameter, as it was; `None` if it is no companion of it."""
        if owner is None or type(tensor) is not torch.Tensor or tensor.shape != owner.shape:
            return None
        return slice_tensor(tensor, self._old[id(owner)][1]).requires_grad_(tensor.requires_grad and tensor.is_leaf)

    def under(self, key: object, tensor: object) -> torch.Tensor | None:
        """The same, of what lies under a parameter, or under its identity, in a dictionary."""
        held = pointed_to(key)
        number = id(held) if isinstance(held, nn.Parameter) else key
        known = self._old.get(number) if type(number) is int else None
        return None if known is None else self.beside(known[0], tensor)

    # --------------------------------------------------------------------------------------------------- of all of them

    def prefix(self, tensors: Mapping[Any, torch.Tensor]) -> str | None:
        """The module whose parameters' names a dictionary has as keys, with a dot behind; `None` if there is none.

        Nor is there one where several modules have these and lose different channels.
        """
        if not tensors or not all(isinstance(key, str) for key in tensors):
            return None
        found = []
        for path, _ in self._model.named_modules():
            prefix = f"{path}." if path else ""
            if all(self._shapes.get(f"{prefix}{key}") == tuple(item.shape) for key, item in tensors.items()):
                found.append(prefix)
        alike = self._are_cut_alike([[f"{prefix}{key}" for key in tensors] for prefix in found])
        return found[0] if found and alike else None

    def in_order(self, items: Sequence[Any]) -> list[Any] | None:
        """The list for the pruned model, if this one has one tensor for each parameter; `None` if it has not."""
        if not 0 < len(items) <= len(self._names) or not all(type(item) is torch.Tensor for item in items):
            return None
        shapes = [tuple(item.shape) for item in items]
        found = [names for names in self._orders() if [self._shapes[name] for name in names] == shapes]
        if not found or not self._are_cut_alike(found):
            return None
        after = []
        for name, item in zip(found[0], items, strict=True):
            after.append(self.of(name, item))
            created = self.with_new_bias(name, item)
            if created is not None:
                after.append(created[1])
        return after

    def flat(self, vector: torch.Tensor) -> torch.Tensor | None:
        """The vector for the pruned model, if this one has all of its parameters one behind the other, or the trained.

        As `torch.nn.utils.parameters_to_vector` makes it.
        """
        for names in self._all_and_trained() if type(vector) is torch.Tensor and vector.ndim == 1 else ():
            sizes = [math.prod(self._shapes[name]) for name in names]
            if sum(sizes) == len(vector):
                parts = zip(torch.split(vector, sizes), names, strict=True)
                after = self.in_order([part.detach().reshape(self._shapes[name]) for part, name in parts])
                return None if after is None else torch.cat([part.flatten() for part in after])
        return None

    def _all_and_trained(self) -> tuple[list[str], list[str]]:
        parameters = dict(self._model.named_parameters())
        return self._names, [name for name in self._names if parameters[name].requires_grad]

    def _orders(self) -> Iterator[list[str]]:
        """Names of parameters as lists may have them: of each module, all and the trained ones."""
        both = self._all_and_trained()
        for path, _ in self._model.named_modules():
            yield from ([name for name in names if not path or is_inside(name, path)] for names in both)

    def _are_cut_alike(self, candidates: Sequence[Sequence[str]]) -> bool:
        """Whether lists of parameters' names have lost the same, one by one."""
        if len(candidates) < 2:
            return True

        def cut(name: str) -> object:
            by_dim = self._surgery.kept.get(name) or {}
            return name in self._created, {dim: kept.tolist() for dim, kept in by_dim.items()}

        first = [cut(name) for name in candidates[0]]
        return all([cut(name) for name in names] == first for names in candidates[1:])


def _like(bias: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """What a bias that compensation has created has in a list or dictionary beside a companion."""
    return bias.detach().clone().to(tensor.device, tensor.dtype)
