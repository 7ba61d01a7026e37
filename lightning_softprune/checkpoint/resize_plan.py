"""Give a module the shape that a file needs: worked out first, and done when nothing can fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.checkpoint.doubts import doubtful_counts
from lightning_softprune.checkpoint.parts import keep_in_parts
from lightning_softprune.checkpoint.reading import read_source, tensor_shapes
from lightning_softprune.checkpoint.record import counts_in, keep_record, save_hook
from lightning_softprune.checkpoint.shapes import (
    RECORD,
    ModelShapes,
    TensorSite,
    counts_of,
    damaged,
    number_of_elements,
    of_shape,
    owner_of,
    recorded_sizes,
    stored_elements,
    tensor_sites,
    tensor_sites_by_name,
    write_values,
)
from lightning_softprune.graph import LayerType, Shape, Sizes, layer_type, layout_of, refresh, shape_mismatch
from lightning_softprune.utilities.libraries import counterparts
from lightning_softprune.utilities.names import is_inside, joined
from lightning_softprune.utilities.nested import integer_of, with_integer


def resize(model: nn.Module, checkpoint_or_record: Mapping[str, Any]) -> None:
    """Give a module the shape that a checkpoint's weights have, in place; the weights are for `load_state_dict`.

    The module may be dense, pruned further or pruned less. New tensors keep dtype, device, memory format,
    `requires_grad` and attributes, and what overlaps with the old values; tied weights stay one tensor; biases that
    compensation created are made. What no state dict has comes from the record with its values: attributes that count
    channels, tensors in plain attributes, buffers that are not persistent, and what the module's own `state_dict`
    leaves out. Optimizers have to be built afterwards.

    Args:
        model: A module of the architecture that was saved.
        checkpoint_or_record: A checkpoint, its ``"softprune"`` record, or a state dict. Without a record, sizes are
            taken from the tensors' shapes, and a warning names what they leave in doubt, such as a number of heads.

    Raises:
        ValueError: The model is not of this architecture, or the shapes alone do not tell the size of a layer; the
            message names the module. Or the record is damaged, or not that of the tensors beside it; the message names
            the field. Or it asks for far more memory than the model and the file's tensors take. Nothing is changed
            then, and nothing was allocated.

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
    resize_together([plan_resize(model, checkpoint_or_record, strict=True)])


@dataclass(frozen=True)
class PlannedResize:
    """A resize that is worked out: nothing in the file is wrong.

    Attributes:
        model: The model.
        do: Does it.
        left_out: Values to be written when all is done, by name: the model's state dict leaves them out.
    """

    model: nn.Module
    do: Callable[[], None]
    left_out: Mapping[str, torch.Tensor]


def resize_together(planned: Iterable[PlannedResize]) -> None:
    """Do all of them or, if one fails after all (no memory), none."""
    planned = list(planned)
    with ExitStack() as stack:
        for one in planned:
            stack.enter_context(_all_or_nothing(one.model))
        for one in planned:
            one.do()
    for one in planned:
        write_values(one.model, one.left_out)


def plan_resize(model: nn.Module, source: Any, strict: bool) -> PlannedResize:
    """Work a resize out; without `strict`, tensors that only one of the two has are passed over.

    Raises:
        ValueError: See :func:`resize`.
    """
    record, state = read_source(source)
    hook = save_hook(model)
    live = ModelShapes.of(model)
    shapes = tensor_shapes(state)
    exact = True  # the target is the form of this file, not a guess from shapes
    if record is not None:
        target, dense = record.form, record.dense
        for name in shapes:
            if name in live.shapes and name not in target.shapes:
                raise damaged(f"shapes: it has not {name!r}, of which there is a tensor beside it")
    elif hook is not None and not live.has(shapes) and hook.dense.has(shapes):
        target = dense = hook.dense
    else:
        told = counts_in(state)
        counts = {name: value for name, value in told.items() if counts_of(model, [name])}
        target, dense, exact = ModelShapes(_told_layers(live, told), shapes, counts), live, False
    if exact and hook is not None:  # what this file does not know of was never pruned there
        target = target.completed(hook.dense)
    if strict:
        _check_names(model, live, target, exact)
    plan = _ResizePlan(model, live, target, dense, exact)
    _check_amount(plan, state, "the state dict" if record is None else f"the {RECORD!r} record")

    doubtful = [] if exact else doubtful_counts(model, plan.places, plan.wanted)
    doubtful = [name for name in doubtful if name.partition(" ")[0] not in target.counts]

    def do() -> None:
        plan.apply()
        keep_in_parts(model, target)
        if doubtful:
            rank_zero_warn(_DOUBTFUL.format(", ".join(doubtful)))
        if isinstance(model, counterparts(pl.LightningModule)):
            if hook is not None and exact:
                hook.remove()  # what it knows of rounds is not this file's history
            if record is not None:
                keep_record(model, record.dense, record.results, record.earlier)

    return PlannedResize(model, do, target.left_out)


def _told_layers(live: ModelShapes, told: Mapping[str, int]) -> dict[str, Sizes]:
    """The layers of a module whose sizes a state dict tells beside its tensors."""
    found = {name: {slot: told.get(joined(name, slot), -1) for slot in sizes} for name, sizes in live.layers.items()}
    return {name: sizes for name, sizes in found.items() if -1 not in sizes.values()}


_DOUBTFUL = (
    "SoftPruning: {}: the shapes alone do not tell whether this counts what the file has fewer of (as heads are "
    "counted); it stays as it is: pass the whole checkpoint, or its 'softprune' record, or set it after this"
)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If an exception ends the block, every module has the attributes, tensors and hooks that it had."""
    before = [
        (held, dict(held)) for m in model.modules() for held in (m.__dict__, m._parameters, m._buffers)
    ]  # the modules' own dictionaries
    classes = [(module, type(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for held, content in before:
            held.clear()
            held.update(content)
        for module, kind in classes:
            module.__class__ = kind
        raise


_BELIEVED = 2**22
"""New tensors of so many elements (16 MiB of floats) are made without asking what shows that they are right."""

_GROWTH = 4
"""And of so many times the model's own: a model that was pruned may grow back by a record alone."""


def _check_amount(plan: _ResizePlan, state: Mapping[str, Any], what: str) -> None:
    """Refuse to allocate what a file only claims, before anything is allocated.

    A small file can name any size. What its tensors really hold is no claim, nor is the model. A record alone shows
    nothing, its dense form included: it can be larger than the model by a factor (`_GROWTH`), no more.
    """
    wanted = {owners[0].name: shape for _, shape, owners in plan.tensors}
    wanted |= {f"the bias {number}": (size,) for number, (_, size) in enumerate(plan.created)}
    wanted |= {name: tuple(value.shape) for name, (*_, value) in plan.missing.items()}
    total = sum(map(number_of_elements, wanted.values()))
    own = sum({id(p.tensor): p.tensor.numel() for p in plan.places}.values())
    stored = stored_elements([*state.values(), *plan.target.unsaved.values(), *plan.target.left_out.values()])
    if total > _BELIEVED + max(_GROWTH * own, stored):
        name = max(wanted, key=lambda name: number_of_elements(wanted[name]))
        raise ValueError(
            f"{what} asks for new tensors of {total:,} elements (above all {name}: {wanted[name]}), but this model has "
            f"{own:,}, and the tensors beside hold {stored:,}; pass the whole checkpoint, or a model of the dense size"
        )


def _check_names(model: nn.Module, live: ModelShapes, target: ModelShapes, exact: bool) -> None:
    """Refuse a file that has other tensors than the model."""
    places = tensor_sites_by_name(model)
    own = {*live.shapes, *model.state_dict(), *places}
    for name in target.shapes:
        if name not in own and name not in target.unsaved and _missing_bias(model, name) is None:
            raise ValueError(f"{_owner(name)}: the checkpoint has {name!r}, {type(model).__name__} has not")
    named = {id(place.tensor) for name, place in places.items() if name in target.shapes}  # a tied one: once is enough
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
    entry = layer_type(layer)
    return layer if empty and entry is not None and entry.takes_bias else None


class _ResizePlan:
    """What has to be done to a model so that it has a form: worked out first, and done when nothing can fail.

    Args:
        model: The model.
        live: Its form now.
        target: The form it shall have; with `exact` unset, its layers are unknown and follow from the shapes.
        dense: The form before the first round, as far as it is known.
        exact: Whether the target is known to be a form of this very architecture.
    """

    def __init__(
        self, model: nn.Module, live: ModelShapes, target: ModelShapes, dense: ModelShapes, exact: bool
    ) -> None:
        self.live, self.target, self.dense, self.exact = live, target, dense, exact
        self.places = [place for place in tensor_sites(model, target.unsaved) if not place.lazy]
        self.shapes = self._with_aliases()
        self.resized: list[tuple[LayerType, nn.Module, Sizes]] = []
        self.changes: set[tuple[int, int]] = set()  # sizes of layers and parameters, before and after
        self.created: list[tuple[nn.Module, int]] = []
        self.removed: list[nn.Module] = []
        self.counted: list[tuple[nn.Module, str, int]] = []
        self.missing: dict[str, tuple[nn.Module, str, torch.Tensor]] = {}
        self.wanted: dict[str, Shape] = {}
        self.refused: dict[str, str] = {}
        self._plan_layers(model)
        self._plan_bare()
        self._plan_counts(model)
        self._plan_missing(model)
        self.values = {
            id(place.tensor): target.unsaved[place.name]
            for place in self.places
            if place.name in target.unsaved and not isinstance(place.tensor, nn.Parameter)
        }
        self.tensors = self._by_tensor()

    def _with_aliases(self) -> dict[str, Shape]:
        """The file's shapes; a tied tensor that it names once has the same shape under its other names."""
        unsaved = {name: tuple(value.shape) for name, value in self.target.unsaved.items()}
        shapes, named = {**unsaved, **self.target.shapes}, {}
        for place in self.places:
            if place.name in shapes:
                named[id(place.tensor)] = shapes[place.name]
        for place in self.places:
            if id(place.tensor) in named:
                shapes.setdefault(place.name, named[id(place.tensor)])
        return shapes

    def _plan_layers(self, model: nn.Module) -> None:
        unknown = []
        for name, module in model.named_modules(remove_duplicate=False):
            layout = layout_of(module)
            if isinstance(layout, str):
                self.refused[name] = layout
            entry, now = layer_type(module), self.live.layers.get(name)
            if entry is None or now is None or any(is_lazy(p) for p in module._parameters.values()):
                continue
            now = entry.completed_sizes(module, now)
            try:
                sizes = self.target.layers.get(name) or entry.sizes_from(module, self._shapes_in(name, module))
                if sizes is None:
                    unknown.append((name, module, now))
                    continue
                sizes = entry.completed_sizes(module, sizes)
                self._plan_layer(entry, name, module, sizes)
            except ValueError as error:
                raise ValueError(f"{name or 'the model'}: {error}") from None
            if sizes != now:
                self.changes |= {(now[slot], sizes[slot]) for slot in now if now[slot] != sizes[slot]}
                self.resized.append((entry, module, sizes))
        for name, module, now in unknown:
            if {size for size, _ in self.changes} & set(now.values()):
                raise ValueError(
                    f"{name}: no tensor of this {type(module).__name__} tells its size, so a state dict alone is not "
                    "enough; pass the whole checkpoint, or its 'softprune' record"
                )

    def _shapes_in(self, name: str, module: nn.Module) -> dict[str, Shape]:
        """The file's shapes of a layer's tensors, by their names in the layer."""
        prefix = f"{name}." if name else ""
        own = [tensor for tensor, _ in (*module.named_parameters(), *module.named_buffers())]
        return {tensor: self.shapes[prefix + tensor] for tensor in own if prefix + tensor in self.shapes}

    def _plan_layer(self, entry: LayerType, name: str, module: nn.Module, sizes: Sizes) -> None:
        """Check that the layer can have these sizes, and note the shapes its tensors then have."""
        if sizes.keys() != entry.completed_sizes(module, self.live.layers[name]).keys():
            raise ValueError(f"the checkpoint has another kind of layer here, this is a {type(module).__name__}")
        if min(sizes.values()) < 0:
            raise ValueError(f"the checkpoint gives it the sizes {sizes}")
        prefix = f"{name}." if name else ""
        shapes = entry.shapes_at(module, sizes)
        if not any(prefix + tensor in self.shapes for tensor in shapes):
            self._check_claim(name, sizes)
        for tensor, shape in shapes.items():
            known = self.shapes.get(prefix + tensor, shape)
            if known != shape:
                raise ValueError(shape_mismatch(known, shape))
            self.wanted[prefix + tensor] = shape
        if not entry.takes_bias or "bias" not in module._parameters:
            return
        given = self.shapes.get(f"{prefix}bias")
        if module.bias is None and given is not None:
            if given != (sizes["out"],):
                raise ValueError(shape_mismatch(given, (sizes["out"],)))
            if not any(layer is module for layer, _ in self.created):
                self.created.append((module, sizes["out"]))
        elif module.bias is not None and given is None and self.exact and name in self.target.layers:
            self.removed.append(module)

    def _check_claim(self, name: str, sizes: Sizes) -> None:
        """Refuse sizes that no tensor tells, if they are larger than both the model's and the dense model's."""
        for slot, size in sizes.items():
            largest = max(self.live.layers[name].get(slot, 0), self.dense.layers.get(name, {}).get(slot, 0))
            if size > largest:
                raise ValueError(f"the checkpoint gives it {size} channels, it never had more than {largest}")

    def _plan_bare(self) -> None:
        """Tensors that no slot describes: parameters of the user's own modules, mostly."""
        layers = {id(place.module) for place in self.places if recorded_sizes(place.module)}
        for place in sorted(self.places, key=lambda place: not place.is_parameter):
            now = tuple(place.tensor.shape)
            shape = self.shapes.get(place.name, now)
            if place.name in self.wanted or shape == now:
                continue
            owner = _owner(place.name)
            for name, reason in self.refused.items():
                if is_inside(owner, name):
                    raise ValueError(f"{name}: {shape_mismatch(shape, now)}; {reason}")
            dims = {pair for pair in zip(now, shape, strict=False) if pair[0] != pair[1]}
            if not (self.exact or place.is_parameter or (len(shape) == len(now) and dims <= self.changes)):
                continue  # a buffer of the user's own that no round has changed: what it holds has sizes of its own
            if len(shape) != len(now) or (id(place.module) in layers and not self.exact):
                raise ValueError(f"{owner}: {shape_mismatch(shape, now)}")
            self.wanted[place.name] = shape
            self.changes |= dims

    def _plan_counts(self, model: nn.Module) -> None:
        """Attributes that count channels."""
        for name, value in self.target.counts.items():
            module, attribute = owner_of(model, name)
            now = integer_of(module, attribute)
            if module is None or now is None:
                raise ValueError(
                    f"{_owner(name)}: the checkpoint has {name!r}, which counts channels, and this model has no such "
                    "integer attribute"
                )
            if now != value:
                self.counted.append((module, attribute, value))

    def _plan_missing(self, model: nn.Module) -> None:
        """Tensors that no state dict has, and that this model has not made yet."""
        known = {place.name for place in self.places}
        for name, value in self.target.unsaved.items():
            if name in known:
                continue
            module, attribute = owner_of(model, name)
            taken = (
                module is None or attribute in {*module._parameters, *module._modules} or hasattr(nn.Module, attribute)
            )
            taken = taken or inspect.getattr_static(module, attribute, None) is not None
            if module is None or taken or not attribute.isidentifier():
                raise ValueError(f"{_owner(name)}: the checkpoint has the tensor {name!r}, this model cannot have it")
            self.missing[name] = module, attribute, value

    def _by_tensor(self) -> list[tuple[torch.Tensor, Shape, list[TensorSite]]]:
        found: dict[int, tuple[torch.Tensor, Shape, list[TensorSite]]] = {}
        for place in self.places:
            shape = self.wanted.get(place.name, tuple(place.tensor.shape))
            _, known, owners = found.setdefault(id(place.tensor), (place.tensor, shape, []))
            if known != shape:
                other = owners[0].name
                raise ValueError(f"{_owner(place.name)}: {place.name} is one tensor with {other}, which has {known}")
            owners.append(place)
        return [item for key, item in found.items() if tuple(item[0].shape) != item[1] or key in self.values]

    def apply(self) -> None:
        """Do it."""
        with torch.inference_mode(False), torch.no_grad():
            made = [
                (of_shape(tensor, shape, self.values.get(id(tensor))), owners) for tensor, shape, owners in self.tensors
            ]
            device = next((place.tensor.device for place in self.places), torch.device("cpu"))
            unsaved = {id(value): value.detach().to(device, copy=True) for *_, value in self.missing.values()}
            biases = []
            for layer, size in self.created:
                weight = next(layer.parameters(recurse=False))
                biases.append((layer, nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)))
        for entry, module, sizes in self.resized:
            entry.restore(module, sizes)
        for new, owners in made:
            for place in owners:
                place.container[place.attribute] = new
        for module, attribute, value in self.missing.values():
            holder = module._buffers if attribute in module._buffers else module.__dict__
            holder[attribute] = unsaved[id(value)]
        for module, attribute, count in self.counted:
            name = attribute.partition("[")[0]
            module.__dict__[name] = with_integer(module.__dict__.get(name), attribute, count)
        for layer, bias in biases:
            layer._parameters["bias"] = bias
        for layer in self.removed:
            layer._parameters["bias"] = None
        for module in {id(place.module): place.module for _, owners in made for place in owners}.values():
            refresh(module)
