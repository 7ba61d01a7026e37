"""Attributes that shapes alone leave in doubt: 24 channels in the place of 32 are 4 narrower heads, or 3 of the 4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_softprune.checkpoint.shapes import TensorSite
from lightning_softprune.graph import Shape, layer_type
from lightning_softprune.utilities.ownership import names_by_function

_LAYS_OUT = frozenset({"rearrange", "reshape", "unflatten", "view"})
"""Functions that are told how many parts a dimension has."""


def doubtful_counts(model: nn.Module, places: Iterable[TensorSite], shapes: Mapping[str, Shape]) -> list[str]:
    """The attributes that may count channels which a module is about to lose, by name, and may as well not.

    These are integers of the module that has the layers. Its code reads them where it lays tensors out, and they divide
    the width before and after; and so does the width of one part, which goes whole where parts do.

    Args:
        model: The module, as it is.
        places: Its tensors.
        shapes: Name -> shape that a tensor is to have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, int] = {}
    for place in places:
        before = tuple(place.tensor.shape)
        after = shapes.get(place.name, before)
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        path = _owner(modules, place.name.rpartition(".")[0]) if changed else None
        for name, value in vars(modules[path]).items() if path is not None else ():
            torn = type(value) is int and any(_is_torn(value, *sizes) for sizes in changed)
            if torn and _lays_out(type(modules[path]), name):
                found[f"{path}.{name}".lstrip(".")] = value
    return [f"{name} ({value})" for name, value in found.items() if "dim" not in name and "size" not in name]


def _is_torn(count: int, before: int, after: int) -> bool:
    """Whether so many parts of a width may have become narrower, or fewer."""
    return 1 < count < before and not (before % count or after % count or after % (before // count))


def _owner(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The innermost module around a tensor that is no layer and has code of its own."""
    while layer_type(modules[path]) is not None or type(modules[path]).__module__.startswith("torch."):
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def _lays_out(kind: type, name: str) -> bool:
    """Whether code of a class reads an attribute of this name where it lays tensors out."""
    read = (names for function, names in names_by_function(kind) if function != "__init__")
    return any(name in names and not names.isdisjoint(_LAYS_OUT) for names in read)
