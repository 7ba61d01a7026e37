"""Checkpoints of pruned models: the record in the file, and modules that take the shape a file needs.

A pruned model's checkpoint is an ordinary one with one more entry, ``checkpoint["softprune"]``, in plain types:

- ``format``: version of the record;
- ``layers``: module name -> its slot sizes, for every layer that has slots (convolutions: ``in``, ``out``, ``groups``);
- ``shapes``: name of every parameter and buffer -> its shape, bare parameters included;
- ``created_biases``: names of the biases that compensation added; the class itself does not make them;
- ``dense``: ``layers`` and ``shapes`` of the model before its first round;
- ``results``: the rounds, as :meth:`PruningResult.to_dict` writes them;
- ``optimizers``: in full checkpoints, the parameters of each group of each optimizer by name, in order.

Sizes and shapes are read off the live module whenever it is saved, so they are right also after further rounds, and in
later runs without the callback. :func:`resize` is the way back. Where a file has no record, shapes tell the sizes of
all layers that keep a tensor along each of their slots.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from lightning_softprune.graph import Layout, TensorAxis, layout_of, set_sizes
from lightning_softprune.results import PruningResult

__all__ = [
    "RECORD",
    "Form",
    "LoadHook",
    "PrunedCheckpointMixin",
    "is_recorded",
    "keep_record",
    "load_from_checkpoint",
    "order_parameters",
    "resize",
]

RECORD = "softprune"
"""Key of the record in a checkpoint."""
FORMAT = 1

Sizes = dict[str, int]
Shape = tuple[int, ...]
Module = TypeVar("Module", bound=pl.LightningModule)


@dataclass(frozen=True)
class Form:
    """The sizes and shapes of a module: all that a plan changes but the values.

    Attributes:
        layers: Module name -> slot sizes. A layer has an entry under each of its names.
        shapes: Parameter or buffer name -> shape. A tied tensor has an entry under each of its names.
    """

    layers: Mapping[str, Sizes]
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, model: nn.Module) -> Form:
        """Read the form off a live module."""
        layers = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if sizes := _sizes(module):
                layers[name] = sizes
        return cls(layers, {place.name: tuple(place.tensor.shape) for place in _places(model) if not place.lazy})

    @classmethod
    def from_dict(cls, data: Any) -> Form:
        """The form that :meth:`to_dict` described.

        Raises:
            ValueError: It did not.
        """
        try:
            layers = {
                str(name): {str(slot): int(n) for slot, n in sizes.items()} for name, sizes in data["layers"].items()
            }
            return cls(layers, {str(name): tuple(int(n) for n in shape) for name, shape in data["shapes"].items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the {RECORD!r} record is damaged: {type(error).__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The form in plain types."""
        return {
            "layers": {name: dict(sizes) for name, sizes in self.layers.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    def has(self, state: Mapping[str, Shape]) -> bool:
        """Whether a state dict of these shapes is of this form, as far as both name the same tensors."""
        common = [name for name in state if name in self.shapes]
        return bool(common) and all(state[name] == self.shapes[name] for name in common)


# -------------------------------------------------------------------------------------------------------- the record


class _SaveHook:
    """A pruned module's `on_save_checkpoint`: the user's own, and then the record.

    It stays on the module (as an attribute of the instance) for as long as the module is pruned, so that whoever saves
    it, with which trainer and callbacks ever, writes a file that can be loaded. It is copied and pickled with its
    module.
    """

    name = "on_save_checkpoint"

    def __init__(self, module: pl.LightningModule, dense: Form, results: list[dict[str, Any]]) -> None:
        self.module, self.dense, self.results = module, dense, results
        self.before = module.__dict__.get(self.name)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        _call(self, checkpoint)
        form = Form.of(self.module)
        checkpoint[RECORD] = {
            "format": FORMAT,
            **form.to_dict(),
            "created_biases": [name for name in form.shapes if name not in self.dense.shapes],
            "dense": self.dense.to_dict(),
            "results": list(self.results),
        }
        if "optimizer_states" in checkpoint:
            checkpoint[RECORD]["optimizers"] = _parameter_names(self.module, self.module.trainer.optimizers)


class LoadHook:
    """A module's `on_load_checkpoint` while a checkpoint may come: takes the file's shape, then calls the user's own.

    Attributes:
        record: The record of the checkpoint that came, if it had one.

    Args:
        module: The module; the hook is an attribute of the instance until :meth:`remove`.
        copies: Lists the module's averaged copies, which take the same shape.
    """

    name = "on_load_checkpoint"

    def __init__(self, module: pl.LightningModule, copies: Callable[[], Iterable[nn.Module]] = tuple) -> None:
        self.module, self.copies = module, copies
        self.record: dict[str, Any] | None = None
        before = module.__dict__.get(self.name)
        self.before: Callable[[dict[str, Any]], None] | None
        self.before = before.before if isinstance(before, LoadHook) else before
        module.__dict__[self.name] = self

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Resize, and call what was there before."""
        self.record = checkpoint.get(RECORD)
        _resize_around(self.module, checkpoint, lambda: _call(self, checkpoint))
        for averaged in self.copies():
            with nullcontext() if self.record else suppress(ValueError):  # as for the module, which has passed
                _resize(averaged, checkpoint, strict=False)

    def remove(self) -> None:
        """Leave the module as it was before."""
        _put_back(self)


def _call(hook: _SaveHook | LoadHook, checkpoint: dict[str, Any]) -> None:
    """Call what the hook stands in front of."""
    if hook.before is not None:
        hook.before(checkpoint)
    else:
        getattr(type(hook.module), hook.name)(hook.module, checkpoint)


def _put_back(hook: _SaveHook | LoadHook) -> None:
    if hook.module.__dict__.get(hook.name) is not hook:
        return
    if hook.before is None:
        del hook.module.__dict__[hook.name]
    else:
        hook.module.__dict__[hook.name] = hook.before


def keep_record(module: pl.LightningModule, dense: Form, results: Iterable[PruningResult | dict[str, Any]]) -> None:
    """From now on, write the record into every checkpoint of this module.

    Args:
        module: A pruned module.
        dense: Its form before the first round; ignored where an earlier round has left one.
        results: The rounds so far.
    """
    plain = [result.to_dict() if isinstance(result, PruningResult) else result for result in results]
    hook = _save_hook(module)
    if hook is None:
        module.__dict__[_SaveHook.name] = _SaveHook(module, dense, plain)
    else:
        hook.results = plain


def is_recorded(module: nn.Module) -> bool:
    """Whether this module was pruned, and writes the record when it is saved."""
    return _save_hook(module) is not None


def _save_hook(module: nn.Module) -> _SaveHook | None:
    hook = module.__dict__.get(_SaveHook.name)
    return hook if isinstance(hook, _SaveHook) else None


def _parameter_names(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[list[list[str | None]]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def _flat(groups: list[list[str | None]]) -> list[str]:
    return [str(name) for name in itertools.chain(*groups)]


def order_parameters(module: nn.Module, optimizers: Sequence[Optimizer], record: Mapping[str, Any] | None) -> None:
    """Bring the parameters of fresh optimizers into the order in which a checkpoint has their state.

    PyTorch matches optimizer state by position. A bias that compensation created joined its weight's parameter group
    when it was made; an optimizer that is built later finds it elsewhere, perhaps in another group.

    Args:
        module: The module, in the checkpoint's shape.
        optimizers: Its optimizers. One that does not hold the same parameters as then is left alone.
        record: The checkpoint's record.
    """
    wanted = (record or {}).get("optimizers") or []
    parameters = dict(module.named_parameters())
    if len(wanted) != len(optimizers):
        return
    for optimizer, now, then in zip(optimizers, _parameter_names(module, optimizers), wanted, strict=True):
        if len(now) == len(then) and sorted(_flat(now)) == sorted(_flat(then)) and set(_flat(now)) <= parameters.keys():
            for group, names in zip(optimizer.param_groups, then, strict=True):
                group["params"][:] = [parameters[name] for name in names]


# -------------------------------------------------------------------------------------------------------- resizing


def resize(model: nn.Module, checkpoint_or_record: Mapping[str, Any]) -> None:
    """Give a module the shape that a checkpoint's weights have, in place; the weights are for `load_state_dict`.

    The module may be dense, pruned further or pruned less. New tensors keep dtype, device, memory format,
    `requires_grad` and attributes, and what overlaps with the old values; tied weights stay one tensor; biases that
    compensation created are made. Optimizers have to be built afterwards.

    Args:
        model: A module of the architecture that was saved.
        checkpoint_or_record: A checkpoint, its ``"softprune"`` record, or a state dict. Without a record, sizes are
            taken from the tensors' shapes.

    Raises:
        ValueError: The model is not of this architecture, or the shapes alone do not tell the size of a layer; the
            message names the module. Nothing is changed then.

    >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)]
    >>> model = nn.Sequential(*layers)
    >>> resize(model, {"0.weight": torch.ones(5, 4), "0.bias": torch.ones(5),
    ...                "2.weight": torch.ones(2, 5), "2.bias": torch.ones(2)})
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=5, bias=True)
      (1): ReLU()
      (2): Linear(in_features=5, out_features=2, bias=True)
    )
    """
    _resize(model, checkpoint_or_record, strict=True)


def _resize(model: nn.Module, source: Any, strict: bool) -> None:
    record, state = _read(source)
    hook = _save_hook(model)
    live = Form.of(model)
    exact = True  # the target is the form of this file, not a guess from shapes
    if record is not None:
        target = Form.from_dict(record)
    elif hook is not None and not live.has(state) and hook.dense.has(state):
        target = hook.dense
    else:
        target, exact = Form({}, state), False
    if strict:
        _check_names(model, live, target, exact)
    _Change(model, live, target, exact).apply()
    if isinstance(model, pl.LightningModule):
        if record is not None:
            if hook is not None:
                _put_back(hook)  # what it knows of rounds is not this file's history
            keep_record(model, Form.from_dict(record.get("dense", record)), record.get("results", []))
        elif hook is not None and exact:
            _put_back(hook)


def _read(source: Any) -> tuple[dict[str, Any] | None, dict[str, Shape]]:
    """Tell a checkpoint, a record and a state dict apart: the record, if there is one, and the state dict's shapes."""
    wrong = ValueError('neither a checkpoint, nor its "softprune" record, nor a state dict of tensors')
    if isinstance(source, (str, Path)):
        raise ValueError(f"{str(source)!r} is a path and {wrong}; load it first, as in torch.load(path)")
    if not isinstance(source, Mapping):
        raise wrong
    record = source.get(RECORD, source if "format" in source and "layers" in source else None)
    if record is not None:
        if not isinstance(record, Mapping) or not isinstance(record.get("format"), int):
            raise ValueError(f"the {RECORD!r} record is damaged: it has no format version")
        if record["format"] > FORMAT:
            raise ValueError(
                f"the {RECORD!r} record has format {record['format']}; this version of lightning-softprune "
                f"reads formats up to {FORMAT}"
            )
        return dict(record), {}
    state = source.get("state_dict", source)
    shapes = {}
    if isinstance(state, Mapping):
        shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not shapes:
        raise wrong
    return None, shapes


def _check_names(model: nn.Module, live: Form, target: Form, exact: bool) -> None:
    """Refuse a file that has other tensors than the model."""
    places = _places_by_name(model)
    own = {*live.shapes, *model.state_dict(), *places}
    for name in target.shapes:
        if name not in own and _missing_bias(model, name) is None:
            raise ValueError(f"{_owner(name)}: the checkpoint has {name!r}, {type(model).__name__} has not")
    named = {
        id(place.tensor) for name, place in places.items() if name in target.shapes
    }  # a tied tensor: once is enough
    for name, place in places.items():
        removable = exact and name.endswith("bias") and _owner(name) in target.layers
        if place.is_parameter and not place.lazy and id(place.tensor) not in named and not removable:
            raise ValueError(f"{_owner(name)}: {type(model).__name__} has {name!r}, the checkpoint has not")


def _owner(name: str) -> str:
    return name.rpartition(".")[0] or name


def _missing_bias(model: nn.Module, name: str) -> nn.Module | None:
    """The layer without bias whose bias this would be."""
    path, _, attribute = name.rpartition(".")
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return None
    empty = attribute == "bias" and layer._parameters.get("bias", layer) is None
    return layer if empty and isinstance(layer, (nn.Linear, _ConvNd)) else None


@dataclass(frozen=True)
class _Place:
    """A tensor where a module holds it."""

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_parameter: bool

    @property
    def lazy(self) -> bool:
        """Whether it has no shape yet."""
        return isinstance(self.tensor, (UninitializedParameter, UninitializedBuffer))

    @property
    def container(self) -> dict[str, Any]:
        return self.module._parameters if self.is_parameter else self.module._buffers


def _places(model: nn.Module) -> Iterator[_Place]:
    """All parameters and buffers, under each of their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for attribute, tensor in tensors.items():
                if tensor is not None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    yield _Place(name, module, attribute, tensor, is_parameter)


def _places_by_name(model: nn.Module) -> dict[str, _Place]:
    return {place.name: place for place in _places(model)}


def _layout(module: nn.Module) -> Layout | str | None:
    """The layer table's word, but a PReLU has its slot also when one channel is left."""
    layout = layout_of(module)
    if isinstance(module, nn.PReLU) and isinstance(layout, Layout):
        return Layout({"both": module.num_parameters}, (TensorAxis("weight", 0, "both"),))
    return layout


def _sizes(module: nn.Module) -> Sizes:
    """Slot sizes; nothing for a module without slots, or whose weights are computed.

    A convolution's groups go with its channels if it is depthwise, and what was grouped before a prune may look
    depthwise after it: convolutions are described by all three numbers.
    """
    layout = _layout(module)
    if isinstance(module, _ConvNd):
        if module._parameters.get("weight") is None:
            return {}
        return {"in": module.in_channels, "out": module.out_channels, "groups": module.groups}
    return dict(layout.slots) if isinstance(layout, Layout) else {}


def _is_depthwise(sizes: Sizes) -> bool:
    return sizes["in"] == sizes["out"] == sizes["groups"]


class _Change:
    """What has to be done to a model so that it has a form: worked out first, and done when nothing can fail.

    Args:
        model: The model.
        live: Its form now.
        target: The form it shall have; with `exact` unset, its layers are unknown and follow from the shapes.
        exact: Whether the target is known to be a form of this very architecture.
    """

    def __init__(self, model: nn.Module, live: Form, target: Form, exact: bool) -> None:
        self.live, self.target, self.exact = live, target, exact
        self.places = [place for place in _places(model) if not place.lazy]
        self.shapes = self._with_aliases()
        self.resized: list[tuple[nn.Module, Sizes]] = []
        self.created: list[tuple[nn.Module, int]] = []
        self.removed: list[nn.Module] = []
        self.wanted: dict[str, Shape] = {}
        self.refused: dict[str, str] = {}
        self._plan_layers(model)
        self._plan_bare()
        self.tensors = self._by_tensor()

    def _with_aliases(self) -> dict[str, Shape]:
        """The file's shapes; a tied tensor that it names once has the same shape under its other names."""
        shapes, named = dict(self.target.shapes), {}
        for place in self.places:
            if place.name in shapes:
                named[id(place.tensor)] = shapes[place.name]
        for place in self.places:
            if id(place.tensor) in named:
                shapes.setdefault(place.name, named[id(place.tensor)])
        return shapes

    def _plan_layers(self, model: nn.Module) -> None:
        unknown, changed = [], set()
        for name, module in model.named_modules(remove_duplicate=False):
            layout = _layout(module)
            if isinstance(layout, str):
                self.refused[name] = layout
            now = self.live.layers.get(name)
            if now is None or any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
                continue
            try:
                sizes = self.target.layers.get(name) or self._derive(name, module, now)
                if sizes is None:
                    unknown.append((name, module, now))
                    continue
                self._plan_layer(name, module, now, sizes)
            except ValueError as error:
                raise ValueError(f"{name or 'the model'}: {error}") from None
            if sizes != now:
                changed |= {now[slot] for slot in now if now[slot] != sizes[slot]}
                self.resized.append((module, sizes))
        for name, module, now in unknown:
            if changed & set(now.values()):
                raise ValueError(
                    f"{name}: no tensor of this {type(module).__name__} tells its size, so a state dict alone is not "
                    "enough; pass the whole checkpoint, or its 'softprune' record"
                )

    def _derive(self, name: str, module: nn.Module, now: Sizes) -> Sizes | None:
        """Read a layer's sizes off the shapes in the file; `None`: they do not tell."""
        prefix = f"{name}." if name else ""
        if isinstance(module, _ConvNd):
            weight = self.shapes.get(f"{prefix}weight")
            if weight is None:
                return None
            self._check_rank(weight, module.weight)
            if _is_depthwise(now) and now["groups"] > 1:
                return dict.fromkeys(now, weight[0])
            first, second = ("in", "out") if isinstance(module, _ConvTransposeNd) else ("out", "in")
            return {**now, first: weight[0], second: weight[1] * module.groups}
        layout = _layout(module)
        if not isinstance(layout, Layout):
            return None
        sizes: Sizes = {}
        for axis in layout.axes:
            shape, tensor = self.shapes.get(prefix + axis.tensor), _tensor(module, axis.tensor)
            if shape is not None and tensor is not None:
                self._check_rank(shape, tensor)
                sizes.setdefault(axis.slot, shape[axis.dim] * axis.parts // axis.repeat)
        return sizes if sizes.keys() == layout.slots.keys() else None

    @staticmethod
    def _check_rank(shape: Shape, tensor: torch.Tensor) -> None:
        if len(shape) != tensor.ndim:
            raise ValueError(_mismatch(shape, tuple(tensor.shape)))

    def _plan_layer(self, name: str, module: nn.Module, now: Sizes, sizes: Sizes) -> None:
        """Check that the layer can have these sizes, and note the shapes its tensors then have."""
        if sizes.keys() != now.keys():
            raise ValueError(f"the checkpoint has another kind of layer here, this is a {type(module).__name__}")
        if min(sizes.values()) < 0:
            raise ValueError(f"the checkpoint gives it the sizes {sizes}")
        prefix = f"{name}." if name else ""
        for tensor, shape in self._shapes_of(module, now, sizes).items():
            known = self.shapes.get(prefix + tensor, shape)
            if known != shape:
                raise ValueError(_mismatch(known, shape))
            self.wanted[prefix + tensor] = shape
        if not isinstance(module, (nn.Linear, _ConvNd)) or "bias" not in module._parameters:
            return
        given = self.shapes.get(f"{prefix}bias")
        if module.bias is None and given is not None:
            if given != (sizes["out"],):
                raise ValueError(_mismatch(given, (sizes["out"],)))
            if not any(layer is module for layer, _ in self.created):
                self.created.append((module, sizes["out"]))
        elif module.bias is not None and given is None and self.exact and name in self.target.layers:
            self.removed.append(module)

    @staticmethod
    def _shapes_of(module: nn.Module, now: Sizes, sizes: Sizes) -> dict[str, Shape]:
        if isinstance(module, _ConvNd):
            groups = sizes["groups"]
            if groups != now["groups"] and not (_is_depthwise(now) or _is_depthwise(sizes)):
                raise ValueError(f"it has {now['groups']} groups, in the checkpoint {groups}")
            if groups == 0 or sizes["in"] % groups or sizes["out"] % groups:
                raise ValueError(f"{sizes['in']} -> {sizes['out']} channels do not make {groups} equal groups")
            first, second = ("in", "out") if isinstance(module, _ConvTransposeNd) else ("out", "in")
            shapes = {"weight": (sizes[first], sizes[second] // groups, *module.weight.shape[2:])}
            return shapes | ({} if module.bias is None else {"bias": (sizes["out"],)})
        layout = _layout(module)
        if not isinstance(layout, Layout):
            raise ValueError(str(layout))
        for slot, parts in layout.parts.items():
            if sizes[slot] % parts:
                raise ValueError(f"{sizes[slot]} channels do not make {parts} equal parts")
        result: dict[str, Shape] = {}
        for axis in layout.axes:
            tensor = _tensor(module, axis.tensor)
            if tensor is not None:
                shape = list(result.get(axis.tensor, tensor.shape))
                shape[axis.dim] = sizes[axis.slot] * axis.repeat // axis.parts
                result[axis.tensor] = tuple(shape)
        return result

    def _plan_bare(self) -> None:
        """Tensors that no slot describes: parameters of the user's own modules, mostly."""
        layers = {id(place.module) for place in self.places if _sizes(place.module)}
        for place in self.places:
            now = tuple(place.tensor.shape)
            shape = self.shapes.get(place.name, now)
            if place.name in self.wanted or shape == now:
                continue
            owner = _owner(place.name)
            for name, reason in self.refused.items():
                if owner == name or owner.startswith(f"{name}."):
                    raise ValueError(f"{name}: {_mismatch(shape, now)}; {reason}")
            if not self.exact and not place.is_parameter:
                continue  # a buffer of the user's own; no round changes its shape
            if len(shape) != len(now) or (id(place.module) in layers and not self.exact):
                raise ValueError(f"{owner}: {_mismatch(shape, now)}")
            self.wanted[place.name] = shape

    def _by_tensor(self) -> list[tuple[torch.Tensor, Shape, list[_Place]]]:
        found: dict[int, tuple[torch.Tensor, Shape, list[_Place]]] = {}
        for place in self.places:
            shape = self.wanted.get(place.name, tuple(place.tensor.shape))
            _, known, owners = found.setdefault(id(place.tensor), (place.tensor, shape, []))
            if known != shape:
                other = owners[0].name
                raise ValueError(f"{_owner(place.name)}: {place.name} is one tensor with {other}, which has {known}")
            owners.append(place)
        return [item for item in found.values() if tuple(item[0].shape) != item[1]]

    def apply(self) -> None:
        """Do it."""
        with torch.inference_mode(False), torch.no_grad():
            made = [(_of_shape(tensor, shape), owners) for tensor, shape, owners in self.tensors]
            biases = []
            for layer, size in self.created:
                weight = layer.get_parameter("weight")
                biases.append((layer, nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)))
        for module, sizes in self.resized:
            if isinstance(module, _ConvNd):
                module.in_channels, module.out_channels, module.groups = sizes["in"], sizes["out"], sizes["groups"]
            else:
                set_sizes(module, sizes)
        for new, owners in made:
            for place in owners:
                place.container[place.attribute] = new
        for layer, bias in biases:
            layer._parameters["bias"] = bias
        for layer in self.removed:
            layer._parameters["bias"] = None


def _mismatch(there: Shape, here: Shape) -> str:
    return f"a tensor has the shape {there} in the checkpoint, this model would have {here}"


def _tensor(module: nn.Module, path: str) -> torch.Tensor | None:
    outer, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(outer), name, None)
    return found if isinstance(found, torch.Tensor) else None


def _of_shape(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A tensor of this shape like the given one, with the values where both have any, and zeros elsewhere."""
    new = tensor.detach().new_zeros(shape)
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)
    common = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    new[common].copy_(tensor.detach()[common])
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        new.__dict__.update(tensor.__dict__)
    return new


# --------------------------------------------------------------------------------------------------------- loading


def _resize_around(module: pl.LightningModule, checkpoint: dict[str, Any], own: Callable[[], None]) -> None:
    """Resize, then call the user's own hook.

    Where there is no record, the user's hook may be what makes a checkpoint fit (an older class's names, a larger
    vocabulary): it has its turn before anything is refused.
    """
    problem: ValueError | None = None
    try:
        _resize(module, checkpoint, strict=False)
    except ValueError as error:
        if RECORD in checkpoint:
            raise
        problem = error
    own()
    if problem is not None:
        shapes = Form.of(module).shapes
        for name, value in checkpoint.get("state_dict", {}).items():
            if isinstance(value, torch.Tensor) and shapes.get(name, tuple(value.shape)) != tuple(value.shape):
                raise problem


_PATCHING = threading.RLock()


@contextmanager
def _resizing(module_class: type[pl.LightningModule]) -> Iterator[None]:
    """While this lasts, modules of this class and of its subclasses take the shape of the checkpoint they load.

    Lightning builds the module and loads its weights in one call; between the two it calls the module's
    `on_load_checkpoint`, and which subclass it builds may be written in the checkpoint.
    """
    name = LoadHook.name
    classes = [module_class]
    for cls in classes:
        classes += [sub for sub in cls.__subclasses__() if sub not in classes]
    with _PATCHING:
        before = [(cls, vars(cls).get(name)) for cls in classes if cls is module_class or name in vars(cls)]
        running: list[pl.LightningModule] = []

        def around(original: Callable[[Any, dict[str, Any]], None]) -> Callable[[Any, dict[str, Any]], None]:
            def on_load_checkpoint(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
                if running:  # `super().on_load_checkpoint`, or a module inside
                    original(self, checkpoint)
                    return
                running.append(self)
                try:
                    _resize_around(self, checkpoint, lambda: original(self, checkpoint))
                finally:
                    running.clear()

            return on_load_checkpoint

        wrapped = [(cls, around(getattr(cls, name))) for cls, _ in before]
        try:
            for cls, function in wrapped:
                setattr(cls, name, function)
            yield
        finally:
            for cls, own in before:
                if own is None:
                    delattr(cls, name)
                else:
                    setattr(cls, name, own)


_FOREIGN = (AttributeError, KeyError, TypeError)
_DAMAGED = (EOFError, OSError, RuntimeError, UnpicklingError, struct.error)


@contextmanager
def _naming(path: Any) -> Iterator[None]:
    """Say so if a file is not a Lightning checkpoint; Lightning stumbles over a missing key or over its bytes."""
    try:
        yield
    except (*_FOREIGN, *_DAMAGED) as error:
        if isinstance(path, (str, Path)) and Path(path).is_file():
            content: Any = None
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError as unpickling:
                if "GLOBAL" in str(unpickling):  # a whole file with other objects in it: the error above says which
                    raise error from None
            except Exception:  # whatever a damaged file raises
                raise ValueError(f"{path}: this file cannot be read as a checkpoint ({error})") from error
            keys = content.keys() if isinstance(content, Mapping) else set()
            if not {"state_dict", "pytorch-lightning_version"} <= keys:
                raise ValueError(f"{path}: this file is not a Lightning checkpoint") from error
        raise


def load_from_checkpoint(module_class: type[Module], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Module:
    """Load a module from a checkpoint, pruned or dense: no trainer and no callback are needed.

    Args:
        module_class: The LightningModule's class.
        checkpoint_path: Path, URL or file object.
        args: See `LightningModule.load_from_checkpoint`.
        kwargs: As there: `map_location`, `hparams_file`, `strict`, `weights_only`, and hyperparameters to override.

    Returns:
        The module, in the checkpoint's shape, with its weights.

    Raises:
        ValueError: The file is no Lightning checkpoint, or does not fit the class; the message names the file or the
            module.
    """
    with _resizing(module_class), _naming(checkpoint_path):
        return module_class.load_from_checkpoint(checkpoint_path, *args, **kwargs)


class PrunedCheckpointMixin:
    """Makes `load_from_checkpoint` of a LightningModule understand pruned checkpoints.

    To be named first: ``class Net(PrunedCheckpointMixin, LightningModule)``. The arguments stay the same.
    """

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a module from a checkpoint, pruned or dense; see `LightningModule.load_from_checkpoint`."""
        if not issubclass(cls, pl.LightningModule):
            raise TypeError(f"{cls.__name__} is not a LightningModule")
        with _resizing(cls), _naming(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[misc]
