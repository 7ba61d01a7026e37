"""Buffers that belong to parameters though no run of the model shows it: averages, anchors, masks of gradients.

An average registers a buffer for each parameter, under its name without dots (``LitEma`` of latent-diffusion), or with
something before or behind it. A hook of a parameter reads a buffer by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_softprune.graph import Shape, layer_type
from lightning_softprune.surgery.apply import KeptByDim, Surgery, slice_tensor
from lightning_softprune.surgery.following.hooked import hooks_of
from lightning_softprune.utilities.names import joined

_JOINTS = ("", "_", "__", "-")


def is_of_positions(tensor: torch.Tensor) -> bool:
    """Whether a tensor of which nothing else is known has positions in it, and nothing about a parameter."""
    return tensor.dtype is torch.int64


class Mirrors:
    """Finds what buffers have to become.

    Args:
        model: The pruned model.
        surgery: What was done to it.
        shapes: Shapes of its parameters and buffers before that, by name.
    """

    def __init__(self, model: nn.Module, surgery: Surgery, shapes: Mapping[str, Shape]) -> None:
        self._surgery, self._shapes = surgery, shapes
        self._known = {name: parameter for name, parameter in model.named_parameters() if name in shapes}
        self._model = model
        self._sliced = [tuple(shapes[name]) for name in self._known if surgery.kept.get(name)]

    @functools.cached_property
    def _parts(self) -> list[tuple[str, list[str]]]:
        """The parts of the model with several layers: prefix and names of their parameters, all or trained ones."""
        parts = []
        for path, part in self._model.named_modules():
            prefix = f"{path}." if path else ""
            own = [name for name in self._known if name.startswith(prefix)]
            if sum(bool(inner._parameters) for inner in part.modules()) > 1:
                parts += [(prefix, own), (prefix, [name for name in own if self._known[name].requires_grad])]
        return [(prefix, own) for prefix, own in parts if own]

    @functools.cached_property
    def _hooked(self) -> list[tuple[Shape, KeptByDim, set[str]]]:
        """Of parameters that have hooks, the shape before, what is left, and what the hooks read."""
        sliced = [(tuple(old.shape), by_dim, new) for old, new, by_dim in self._surgery.parameters if by_dim]
        return [(shape, by_dim, read) for shape, by_dim, new in sliced if (read := _names_read_by_hooks(new))]

    @functools.cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in self._model.named_modules()}

    def of(self, owner: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
        """What takes the place of buffers of a module, and the names of those that nothing tells how to change.

        Args:
            owner: A module of the model, or outside of it. What the surgery has sliced in it is left out, and so are
                layers, whose buffers are known, and TorchScript.
        """
        if layer_type(owner) is not None or isinstance(owner, torch.jit.ScriptModule):
            return {}, []
        path = self._paths.get(id(owner))
        full = {key: None if path is None else joined(path, key) for key in owner._buffers}
        held = {
            key: buffer
            for key, buffer in owner._buffers.items()
            if buffer is not None and full[key] not in self._surgery.kept
        }
        after, left = self._settled(held)
        for key in after:
            name = full[key]
            if name is not None and key in owner._non_persistent_buffers_set:
                self._surgery.unsaved[name] = held[key]
        return after, left

    def _settled(self, buffers: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
        suspect = [key for key, buffer in buffers.items() if buffer.ndim and tuple(buffer.shape) in self._sliced]
        if not suspect:
            return {}, []
        names = self._by_name(buffers)
        after, left = {}, []
        for key in suspect:
            shape = tuple(buffers[key].shape)
            if key in names:
                found = [self._surgery.kept.get(names[key]) or {}]
            else:
                found = _different([kept for of, kept, read in self._hooked if of == shape and key in read])
            if len(found) == 1:
                after[key] = slice_tensor(buffers[key], found[0])
            elif found or (len(shape) > 1 and self._sliced.count(shape) == 1 and not is_of_positions(buffers[key])):
                left.append(key)
        return after, left

    def _by_name(self, buffers: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Buffer -> parameter, where all parameters of a part of the model have buffers here; the largest such part."""
        found: list[dict[str, str]] = []
        for prefix, own in self._parts:
            if len(own) <= len(buffers):
                found += self._matches(buffers, prefix, own)
        most = max(map(len, found), default=0)
        found = [names for names in found if len(names) == most]
        cuts = [{key: self._surgery.kept.get(name) or {} for key, name in names.items()} for names in found]
        alike = all(cut.keys() == cuts[0].keys() for cut in cuts) and all(
            len(_different([cut[key] for cut in cuts])) == 1 for key in (cuts[0] if cuts else ())
        )
        return found[0] if found and alike else {}

    def _matches(
        self, buffers: Mapping[str, torch.Tensor], prefix: str, own: Sequence[str]
    ) -> Iterator[dict[str, str]]:
        for joint in _JOINTS:
            flat = [name.removeprefix(prefix).replace(".", joint) for name in own]
            for key in buffers:
                before, met, behind = key.partition(flat[0])
                if not met or (before and behind):
                    continue
                names = {f"{before}{name}{behind}": parameter for name, parameter in zip(flat, own, strict=True)}
                if all(
                    key in buffers and tuple(buffers[key].shape) == self._shapes[name] for key, name in names.items()
                ):
                    yield names


def _different(cuts: Sequence[KeptByDim]) -> list[KeptByDim]:
    """Those that keep other indices than the ones before them."""
    by_indices = {tuple((dim, tuple(cut[dim].tolist())) for dim in sorted(cut)): cut for cut in cuts}
    return list(by_indices.values())


def _names_read_by_hooks(parameter: nn.Parameter) -> set[str]:
    """The attributes that the hooks of a parameter read, of whatever."""
    names: set[str] = set()
    for hook in hooks_of(parameter):
        function: Any = hook
        while isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__func__", function)
        if isinstance(function, FunctionType):
            names.update(function.__code__.co_names)
    return names
