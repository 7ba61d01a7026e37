"""Digests of what a plan's score depends on, the same in every process."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence, Set
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.trainer import BatchesReadAgain
from lightning_softprune.utilities.ownership import package_of
from lightning_softprune.utilities.version import __version__

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_WITHOUT_SOURCE = frozenset(
    {"builtins", "lightning", "lightning_softprune", "pytorch_lightning", "torch", "torchmetrics"}
)
"""Packages whose code does not count. Not `utilities.ownership.FRAMEWORKS`: digests are in files, and have to stay."""

_MODULES_THEN = {  # digests hold names of classes: where a class of this package was when journals began
    "lightning_softprune.checkpoint.load": "lightning_softprune.checkpoint",
    "lightning_softprune.search.objective": "lightning_softprune.objective",
    **{
        f"lightning_softprune.search.strategies.{name}": f"lightning_softprune.search.{name}"
        for name in ("baselines", "gradient", "grid", "optuna_search", "random_search", "sensitivity")
    },
}


def fingerprint(module: nn.Module, configuration: Mapping[str, object], data: Sequence[Any]) -> dict[str, str]:
    """Digests of all that a plan's score depends on before the network is looked at (`Key.network` has the rest).

    Not seen: code outside the classes of the module and its submodules, and attributes of theirs that are neither
    parameters, buffers, saved hyperparameters nor in their ``repr``.

    Args:
        module: The module before the round.
        configuration: What the user asked for.
        data: The batches that plans are scored on.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    kinds = {kind for child in module.modules() for kind in type(child).__mro__}
    return {
        "version": __version__,
        "settings": digest(configuration),
        "weights": digest(tensors),
        "module": digest(module, sorted((_name(kind), _source(kind)) for kind in kinds)),
        "hyperparameters": digest(getattr(module, "hparams_initial", None)),  # `hparams` would create them
        "data": digest(data),
    }


def digest(*values: object) -> str:
    """A hash of nested data by value, the same in every process. What cannot be looked into counts by its type.

    >>> digest([1, torch.zeros(2)]) == digest([1, torch.zeros(2)])
    True
    >>> digest([1, torch.zeros(2)]) == digest([1, torch.zeros(3)])
    False
    """
    sha = hashlib.sha256()
    _feed(sha.update, values, ())
    return sha.hexdigest()


def _feed(update: Callable[[Any], None], value: Any, outer: tuple[int, ...]) -> None:
    def put(text: str) -> None:
        encoded = text.encode(errors="surrogatepass")
        update(b"%d:%s" % (len(encoded), encoded))

    put(_name(list if isinstance(value, BatchesReadAgain) else type(value)))
    if id(value) in outer:  # it holds itself
        return
    if isinstance(value, BatchesReadAgain):  # as a list, but never all of them at once
        put(str(len(value)))
        for item in value:
            _feed(update, item, outer)
        return
    try:
        content = _content(value)
        if isinstance(content, list):
            put(str(len(content)))
            for item in content:
                _feed(update, item, (*outer, id(value)))
        elif isinstance(content, str):
            put(content)
        else:
            put(str(content.nbytes))
            update(content)
    except Exception:  # whatever users' own tensors and batches raise
        put("unknown")


def _content(value: Any) -> list[Any] | str | memoryview:
    """What a value consists of: other values, text, or bytes."""
    kind = type(value)
    if isinstance(value, memoryview):
        return value
    if isinstance(value, torch.Tensor):
        return [str((value.dtype, value.layout)), tuple(value.shape), *([] if value.is_meta else [_bytes_of(value)])]
    if hasattr(kind, "__array__") or hasattr(kind, "__array_interface__"):
        array = np.asarray(value)
        if array.dtype.hasobject:
            return [array.shape, *array.reshape(-1)]
        return [array.dtype.str, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data]
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, Set):
        return sorted(map(digest, value))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return list(value)
    if isinstance(value, (type, FunctionType, MethodType, BuiltinFunctionType)):
        return _name(value)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and attributes and not isinstance(value, nn.Module):
        return [*attributes.keys(), *attributes.values()]
    return _ADDRESS.sub("", repr(value))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _name(value: Any) -> str:
    module = getattr(value, "__module__", "")
    return f"{_MODULES_THEN.get(module, module)}.{getattr(value, '__qualname__', '')}"


def _source(kind: type) -> str:
    """The code of a class that the user wrote; where it cannot be found (typed into a console), nothing."""
    if package_of(kind) in _WITHOUT_SOURCE:
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError, SyntaxError):  # no file, no class of Python's, a file that has changed since
        return ""
