"""Results of functions between layers, kept from one run of a step to the next.

A function's result is given out again where it is given the very same tensors as before, unchanged, and these are
themselves results that are kept. Only functions are that depend on nothing but their arguments and change none.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.overrides import TorchFunctionMode

from lightning_softprune.compensation.activations import POINTWISE, SUMS
from lightning_softprune.utilities.nested import tensors_in

_ARITHMETIC = ("mul", "__mul__", "__rmul__", "multiply", "sub", "__sub__", "subtract", "div", "__truediv__", "divide")
_POOLING = [f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)]
_OTHERS = ("cat", "concat", "mean", "softmax", "pad", "interpolate")
_VIEWS = ("flatten", "view", "reshape", "transpose", "permute", "movedim", "squeeze", "unsqueeze", "contiguous")

_IN_PLACE = re.compile("[^_].*_|__i(add|sub|mul|truediv)__")
_PURE = frozenset(
    n for n in {*POINTWISE, *SUMS, *_ARITHMETIC, *_POOLING, *_OTHERS, *_VIEWS} if not _IN_PLACE.fullmatch(n)
)


@dataclass
class Room:
    """Bytes that what is kept may still take.

    Attributes:
        left: So many.
    """

    left: float = float("inf")

    def takes(self, tensor: torch.Tensor) -> bool:
        """Take what a tensor needs, if there is as much."""
        fits = _size(tensor) <= self.left
        self.left -= _size(tensor) if fits else 0
        return fits

    def gets_back(self, tensor: torch.Tensor) -> None:
        """A tensor is kept no longer."""
        self.left += _size(tensor)


@dataclass(frozen=True)
class _Result:
    """What a function computed.

    Attributes:
        given: The tensors it was given: as long as they are held, their ids are theirs.
        output: What it made of them.
        version: Of the output: in-place functions raise it.
        place: How many layers had run in the step.
    """

    given: Sequence[torch.Tensor]
    output: torch.Tensor
    version: int
    place: int

    @property
    def is_as_it_was(self) -> bool:
        return self.output._version == self.version


Results = dict[Hashable, _Result]
"""What functions computed in one step, by what they were given."""


class KeptFunctions(TorchFunctionMode):
    """A mode: while it is on, and a step has begun, functions need not compute twice.

    Args:
        room: For the results.

    Attributes:
        place: How many layers have run in the step.
        pauses: Whether nothing is kept or given out for now.
    """

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room, self.place, self.pauses = room, 0, False
        self._results: Results | None = None
        self._known: dict[int, torch.Tensor] = {}
        self._changed: set[tuple[Any, int]] = set()

    def begin(self, results: Results) -> None:
        """A step begins that has computed these before."""
        self._results, self._known, self.place, self.pauses = results, {}, 0, False

    def stop(self) -> None:
        """What follows is not to be kept."""
        self._results = None

    def know(self, tensor: torch.Tensor) -> None:
        """This tensor will be the same object in the next run, unless it is changed."""
        self._known[id(tensor)] = tensor

    def forget_from(self, results: Results, place: int) -> None:
        """Drop what was computed from the outputs of this layer or later ones."""
        for key in [key for key, result in results.items() if result.place > place]:
            self._drop(results, key)

    def forget_changed(self, results: Results) -> None:
        """Drop what was changed in place after it had been computed, and do not keep its like again."""
        for key in [key for key, result in results.items() if not result.is_as_it_was]:
            self._changed.add((key[0], results[key].place))  # type: ignore[index]
            self._drop(results, key)

    def _drop(self, results: Results, key: Hashable) -> None:
        self.room.gets_back(results.pop(key).output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = None if self.pauses else self._results
        key = None if results is None or (func, self.place) in self._changed else self._key(func, args, kwargs)
        if results is None or key is None:
            return func(*args, **kwargs)
        result = results.get(key)
        if result is not None and result.is_as_it_was:
            self.know(result.output)
            return result.output
        given = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        changes = [tensor._version for tensor in given] != versions or any(output is tensor for tensor in given)
        if result is None and not changes and is_plain(output) and self.room.takes(output):
            results[key] = _Result(given, output, output._version, self.place)
            self.know(output)
        return output

    def _key(self, func: Any, args: Any, kwargs: Any) -> tuple[Hashable, ...] | None:
        """What tells one call of a function from others; ``None`` for one whose result is not kept."""
        name: str = getattr(func, "__name__", "")
        if name not in _PURE or kwargs.get("inplace", False) or not tensors_in((args, kwargs)):
            return None
        try:
            return (func, self._told(args), tuple((name, self._told(value)) for name, value in sorted(kwargs.items())))
        except (LookupError, TypeError):
            return None

    def _told(self, value: Any) -> Hashable:
        """An argument as a part of a key."""
        if isinstance(value, torch.Tensor):
            if self._known.get(id(value)) is not value:
                raise LookupError
            return (id(value), value._version)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._told, value))
        hash(value)
        return (type(value), value)


def is_plain(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is a dense tensor that can be kept: its version tells whether it has been changed."""
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_inference()


def _size(tensor: torch.Tensor) -> int:
    return 0 if tensor._is_view() else tensor.numel() * tensor.element_size()
