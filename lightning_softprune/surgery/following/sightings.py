"""Modules outside of the model that look like a part of it: averages, which follow it, and fixed teachers, which stay.

Names and shapes do not tell them apart, values over time do. So they are *sighted* before training, at the start of
every epoch until the last round, and *judged* when the model is pruned. What has other values than the model and keeps
them while the model trains is no average; what changes is one, unless it is as far from the model as networks that were
trained apart.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.graph import Form, form_of
from lightning_softprune.surgery.apply import Surgery
from lightning_softprune.surgery.following.judgement import Judgement
from lightning_softprune.surgery.following.references import References

_FAR = 0.25
"""Cosine of the angle between weights: 0 for networks trained apart, near 1 for an average and what it averages."""


class Likeness(Enum):
    """How near a module's values are to those of the part of the model which it looks like."""

    EQUAL = "equal"
    CLOSE = "close"
    FAR = "far"


@dataclass(frozen=True)
class _Sighting:
    module: weakref.ref[nn.Module]
    values: tuple[int, ...]
    likeness: Likeness
    step: int


class Sightings:
    """What is known of the modules outside of one model, from the start of a fit on."""

    def __init__(self) -> None:
        self._first: dict[int, _Sighting] = {}

    def look(
        self, model: nn.Module, holders: Sequence[tuple[str, object]], alone: Sequence[nn.Module], step: int
    ) -> None:
        """Note how the modules are that were not there before.

        Args:
            model: The model.
            holders: What may have such modules, with its name.
            alone: Copies of the model that are known as such.
            step: How many steps have been trained.
        """
        looker = _Looker(model, alone)
        looker.apart = {id(holder) for _, holder in holders}
        for name, holder in holders:
            looker.carry(name, holder, companions=False)
        if not looker.found:
            return
        parts = _parts_by_form(model)
        inner: set[int] = set()  # a copy is judged as a whole
        for module in looker.found:
            alike = () if id(module) in inner else parts.get(form_of(module), ())
            if alike:
                inner.update(map(id, module.modules()))
            if alike and not self._has(module):
                self._first[id(module)] = _Sighting(
                    weakref.ref(module), _values(module), _likeness(module, alike), step
                )

    def judged(self, model: nn.Module, step: int) -> dict[int, Judgement]:
        """What becomes of the modules when the model is pruned, by their identity.

        Args:
            model: The model, before that.
            step: How many steps have been trained.
        """
        parts = _parts_by_form(model) if self._first else {}
        found = ((first, first.module()) for first in self._first.values())
        return {
            id(module): _judgement(first, module, parts.get(form_of(module), ()), step)
            for first, module in found
            if module is not None
        }

    def _has(self, module: nn.Module) -> bool:
        found = self._first.get(id(module))
        return found is not None and found.module() is module


def _judgement(first: _Sighting, module: nn.Module, alike: Sequence[nn.Module], step: int) -> Judgement:
    if _values(module) != first.values:
        still_far = first.likeness is Likeness.FAR and alike and _likeness(module, alike) is Likeness.FAR
        return Judgement.IN_DOUBT if still_far else Judgement.FOLLOWS
    if first.likeness is Likeness.FAR:
        return Judgement.STAYS
    from_the_start = first.step == 0 < step  # else it may be an average that a checkpoint has brought
    return Judgement.STAYS if first.likeness is Likeness.CLOSE and from_the_start else Judgement.IN_DOUBT


class _Looker(References):
    """Goes the ways that references go, and changes nothing."""

    def __init__(self, model: nn.Module, alone: Sequence[nn.Module]) -> None:
        named = (*model.named_parameters(), *model.named_buffers())
        shapes = {name: tuple(tensor.shape) for name, tensor in named if not is_lazy(tensor)}
        super().__init__(model, Surgery(), shapes, alone)
        self.found: list[nn.Module] = []

    def _module(self, place: str, module: nn.Module, depth: int, *, is_copy: bool = True) -> None:  # noqa: ARG002
        for path, part in module.named_modules():
            self.found.append(part)
            if not isinstance(part, torch.jit.ScriptModule):
                self._attributes(f"{place}.{path}".rstrip("."), part, depth - 1)


def _parts_by_form(model: nn.Module) -> dict[Form, list[nn.Module]]:
    parts: dict[Form, list[nn.Module]] = defaultdict(list)
    for part in model.modules():
        if (form := form_of(part)) and not any(is_lazy(parameter) for parameter in part.parameters()):
            parts[form].append(part)
    return parts


def _values(module: nn.Module) -> tuple[int, ...]:
    """A number for each parameter that changes with it: the sum of its bits, read as integers."""
    return tuple(_sum_of_bits(parameter) for parameter in module.parameters())


def _sum_of_bits(tensor: torch.Tensor) -> int:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    bits = tensor.detach().contiguous().flatten().view(kinds.get(tensor.element_size(), torch.int64))
    return int(bits.sum(dtype=torch.int64))


def _likeness(module: nn.Module, parts: Sequence[nn.Module]) -> Likeness:
    """To the part that is nearest."""
    kinds = [_likeness_to(module, part) for part in parts]
    return next((kind for kind in (Likeness.EQUAL, Likeness.CLOSE) if kind in kinds), Likeness.FAR)


def _likeness_to(module: nn.Module, part: nn.Module) -> Likeness:
    pairs = list(zip(module.parameters(), part.parameters(), strict=True))
    if any(tensor.is_meta or tensor.layout is not torch.strided for pair in pairs for tensor in pair):
        return Likeness.CLOSE
    there = [(one.detach().to(other.device), other.detach()) for one, other in pairs]
    if all(one.dtype == other.dtype and torch.equal(one, other) for one, other in there):
        return Likeness.EQUAL
    weights = [pair for pair in there if pair[1].ndim > 1] or there
    products = torch.zeros(3, dtype=torch.float64)
    for one, other in weights:
        a, b = one.flatten().float(), other.flatten().float()
        products += torch.stack([a @ b, a @ a, b @ b]).double().cpu()
    inner, here, theirs = products.tolist()
    size = math.sqrt(here * theirs)
    return Likeness.CLOSE if not size or not inner < _FAR * size else Likeness.FAR
