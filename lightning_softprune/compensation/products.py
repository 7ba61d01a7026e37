"""Products of two layers' outputs over channels, as of queries and keys, found by watching who reads the outputs.

A tensor is followed through whatever only moves its elements, by moving the numbers of the outputs with them, and
through multiplication by a number. So the product knows which outputs of which layers meet. What reads outputs in any
other way (a rotary embedding, a norm) is noted: they are not free to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_softprune.calibration import in_double
from lightning_softprune.utilities.hooks import registered
from lightning_softprune.utilities.nested import tensors_in

_VIEWED = ("view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "expand", "contiguous", "clone")
_TURNED = ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint")
_PARTS = ("chunk", "split", "tensor_split", "unbind", "narrow", "select", "__getitem__", "__iter__")
_MOVES = frozenset([*_VIEWED, *_TURNED, *_PARTS, "repeat", "repeat_interleave"])
_TRANSPOSED = ("T", "mT", "H", "mH")
_TIMES = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_OVER = ("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")
_PRODUCTS = ("matmul", "bmm", "__matmul__")


@dataclass
class Meeting:
    """One product ``q k^T``.

    Attributes:
        query, key: Names of the layers.
        rows: Which outputs meet, head by head, shape ``(heads, 2, dimensions)``.
        moments: Means of ``q q^T`` and ``k k^T`` over all positions, times the matrices of a head that were multiplied,
            shape ``(heads, 2, dimensions, dimensions)``.
    """

    query: str
    key: str
    rows: torch.Tensor
    moments: torch.Tensor


@dataclass
class Meetings:
    """What was seen: products in the order of the run, and outputs that something else reads.

    Attributes:
        products: In the order in which they were taken.
        elsewhere: Layer -> numbers of outputs.
    """

    products: list[Meeting] = field(default_factory=list)
    elsewhere: dict[str, set[int]] = field(default_factory=dict)


@contextmanager
def watch_products(model: nn.Module, names: Sequence[str]) -> Iterator[Meetings]:
    """Note products of outputs of the named layers while the block runs one step."""
    watcher = _Watcher()
    layers = {name: model.get_submodule(name) for name in names}
    hooks = (
        layer.register_forward_hook(lambda _, __, output, name=name: watcher.watch(name, output))
        for name, layer in layers.items()
    )
    with registered(hooks), watcher:
        yield watcher.seen


@dataclass(frozen=True)
class _Followed:
    """A tensor made of a layer's outputs, and the number of the output that each element is."""

    tensor: torch.Tensor
    name: str
    index: torch.Tensor


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Meetings()
        self.followed: dict[int, _Followed] = {}

    def watch(self, name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            index = torch.arange(output.shape[-1], device=output.device).expand(output.shape)
            self.followed[id(output)] = _Followed(output, name, index)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        read = {id(tensor): self.followed[id(tensor)] for tensor in given if id(tensor) in self.followed}
        result = func(*args, **kwargs)
        if not read:
            return result
        name = _name(func)
        if name == "__iter__":
            result = tuple(result)
        if any(True for _ in tensors_in(result)):
            self._follow(func, name, (args, kwargs), list(read.values()), result)
        return iter(result) if name == "__iter__" else result

    def _follow(self, func: Any, name: str, call: Any, read: list[_Followed], result: Any) -> None:
        args, kwargs = call
        alone = len(tensors_in((args, kwargs))) == 1 and any(one is read[0].tensor for one in args[:1])
        if name in _MOVES and alone:
            moved = func(read[0].index, *args[1:], **kwargs)
            pairs = zip(tensors_in(result), tensors_in(tuple(moved) if name == "__iter__" else moved), strict=True)
            for tensor, index in pairs:
                self.followed[id(tensor)] = _Followed(tensor, read[0].name, index)
        elif _is_scaling(name, args, kwargs) and isinstance(result, torch.Tensor):
            self.followed[id(result)] = _Followed(result, read[0].name, read[0].index)
        else:
            met = self._met(func, name, args, kwargs)
            if met is not None:
                self.seen.products.append(met)
            operands = args[:2] if met is not None else ()
            for one in read:
                if not any(one.tensor is operand for operand in operands):
                    self.seen.elsewhere.setdefault(one.name, set()).update(torch.unique(one.index).tolist())

    def _met(self, func: Any, name: str, args: Any, kwargs: Any) -> Meeting | None:
        """The product that a function takes of outputs; ``None`` if it does something else."""
        if len(args) < 2 or any(id(operand) not in self.followed for operand in args[:2]):
            return None
        one, other = (self.followed[id(operand)] for operand in args[:2])
        if min(one.tensor.ndim, other.tensor.ndim) < 3 or one.tensor is other.tensor:
            return None
        keys, key_index = other.tensor, other.index
        if func is F.scaled_dot_product_attention:
            times = one.tensor.shape[-3] // keys.shape[-3] if kwargs.get("enable_gqa") else 1
            if times > 1:
                keys, key_index = (t.repeat_interleave(times, dim=-3) for t in (keys, key_index))
        elif name in _PRODUCTS and not kwargs:
            keys, key_index = keys.mT, key_index.mT
        else:
            return None
        return _meeting(one, other, keys, key_index)


def _meeting(one: _Followed, other: _Followed, keys: torch.Tensor, key_index: torch.Tensor) -> Meeting | None:
    index = [one.index, key_index]
    if any(bool((i != i[..., :1, :]).any()) for i in index):
        return None  # not the same outputs at every position
    dimensions = keys.shape[-1]
    leading: tuple[int, ...] = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        one.tensor.shape[:-2], keys.shape[:-2]
    )
    heads = torch.stack([i[..., 0, :].expand(*leading, dimensions).reshape(-1, dimensions) for i in index], 1)
    rows, place = torch.unique(heads, dim=0, return_inverse=True)
    moments = []
    for tensor in (one.tensor, keys):
        matrices = in_double(tensor.expand(*leading, *tensor.shape[-2:]).reshape(-1, *tensor.shape[-2:]))
        products = matrices.mT @ matrices / tensor.shape[-2]
        empty = products.new_zeros(len(rows), dimensions, dimensions)
        moments.append(empty.index_add(0, place.to(products.device), products))
    return Meeting(one.name, other.name, rows, torch.stack(moments, 1))


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _TRANSPOSED:
        return "t"
    return name


def _is_scaling(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function multiplies a tensor by a number."""
    if len(args) != 2 or kwargs or name not in (*_TIMES, *_OVER):
        return False
    numbers = [isinstance(value, (int, float)) or _is_number(value) for value in args]
    return numbers == [False, True] or (numbers == [True, False] and name in _TIMES)


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0
