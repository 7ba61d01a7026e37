"""Whatever else points at parameters: hooks, lists, dictionaries, averages, optimizers inside of optimizers.

A committed plan replaces parameters by smaller ones. Layers hold the new ones, and so do optimizers (`optimizers`).
Here everything else follows that can be found from the *holders*: the modules of the model, the optimizers, and the
run's other callbacks.

- A *reference* is a parameter itself, in whatever container: the new parameter takes its place.
- A *companion* has one tensor per parameter, or one for all: a dictionary by parameters' names (a shadow of the
  weights), a list in their order, a vector, a module with the same parameters. It is sliced as the parameters were. It
  is an attribute of its holder, or one of several alike in a container: deeper down, and among other things, lie
  records of how the model was, which nobody goes on with. A tensor of a parameter's shape that lies beside it, in a
  pair or in a dictionary that has the parameter as a key, is its companion wherever it lies.

What has the shape of a sliced parameter and is neither is named in a warning: its owner has to see to it, which is what
`on_softprune(surgery)` is for.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_softprune.graph import Layout, Shape, computed_of, layer_type, layout_of, refresh, set_sizes
from lightning_softprune.surgery.apply import Surgery, slice_tensor
from lightning_softprune.surgery.following.companions import Companions
from lightning_softprune.surgery.following.hooked import HeldByHooks, held_by_hooks, nodes_to_replace
from lightning_softprune.surgery.following.judgement import Judgement
from lightning_softprune.surgery.following.mirrors import Mirrors, is_of_positions
from lightning_softprune.surgery.following.places import hidden_places, is_foreign
from lightning_softprune.surgery.following.weakly import in_place_of, of_weak_container
from lightning_softprune.utilities.names import joined
from lightning_softprune.utilities.ownership import packages_of
from lightning_softprune.utilities.snapshot import ATOMS, elements_of

_DEPTH, _MOST = 6, 20_000
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules", "_trainer", "_fabric"})


class References:
    """Carries all that points at the parameters of a model over to the pruned one.

    Args:
        model: The pruned model.
        surgery: What was done to it.
        shapes: Shapes of its parameters and buffers before that, by name.
        alone: Copies of the model that were pruned alike: they, and what wraps them, are not looked into.
    """

    def __init__(
        self, model: nn.Module, surgery: Surgery, shapes: Mapping[str, Shape], alone: Sequence[nn.Module] = ()
    ) -> None:
        self.model, self.surgery, self.shapes = model, surgery, shapes
        self.new = {id(old): new for old, new, _ in surgery.parameters}
        self.apart: set[int] = set()  # identities of what is looked into by itself
        self._mirrors = Mirrors(model, surgery, shapes)
        self.judged: Mapping[int, Judgement] = {}  # by identity of the module
        self.doubtful: list[str] = []
        self._packages = packages_of(type(model))
        self.left: list[str] = []
        self._slices = Companions(model, surgery, shapes)
        self._sliced = {tuple(shapes[name]) for name, by_dim in surgery.kept.items() if by_dim and name in shapes}
        self._undo: list[Callable[[], None]] = []
        self._unsettled: list[tuple[HeldByHooks, Any]] = []  # kept by hooks of those who are told of the surgery
        self._asked = self._companions = True
        self._level = 0  # of containers around what is looked at
        self._own = {id(module) for part in (model, *alone) for module in part.modules()}
        self._seen: set[int] = set()

    def undo(self) -> None:
        """Put back what was carried over."""
        for step in reversed(self._undo):
            step()
        self._undo.clear()

    # ------------------------------------------------------------------------------------------------------- walking

    def carry(self, name: str, holder: object, *, companions: bool = True) -> None:
        """Look into an object, and let all that points at parameters follow.

        Args:
            name: What people call it; `left` then has the places of what does not follow.
            holder: The object.
            companions: Whether its companions follow too; they are not, where it sees to them itself.
        """
        self._asked = self._companions = companions
        if isinstance(holder, nn.Module):
            for path, module in holder.named_modules():
                self._attributes(f"{name}.{path}".rstrip("."), module, _DEPTH)
        else:
            self._attributes(name, holder, _DEPTH)

    def _attributes(self, place: str, owner: object, depth: int) -> None:
        mapping = getattr(owner, "__dict__", None)
        if not isinstance(mapping, dict) or id(mapping) in self._seen or len(self._seen) > _MOST:
            return
        self._seen.add(id(mapping))
        if isinstance(owner, nn.Module) and self._asked:
            self._buffers(place, owner)
        outside = self._companions, self._level
        self._companions, self._level = self._asked, 0
        computed = computed_of(owner) if isinstance(owner, nn.Module) else None  # what a hook of the layer's writes
        known = _REGISTRIES if computed is None else {*_REGISTRIES, computed.name}
        for key, value in list(mapping.items()):
            if key not in known and not (isinstance(owner, Optimizer) and key in ("param_groups", "state")):
                followed = self._followed(f"{place}.{key}", value, depth)
                if followed is not value:
                    self._set(mapping, key, followed)
        self._companions, self._level = outside

    def _buffers(self, place: str, owner: nn.Module) -> None:
        """Buffers of a module that the surgery has not touched, and that belong to parameters."""
        after, left = self._mirrors.of(owner)
        self.left += [f"{place}.{key}" for key in left]
        for key, buffer in after.items():
            self._set(owner._buffers, key, buffer)

    def _items(self, places: Sequence[str], items: Sequence[Any], depth: int) -> list[Any]:
        """What takes the place of the items of a container."""
        outside = self._companions, self._level
        self._level += 1
        self._companions = self._companions and self._level == 1 and len({type(item) for item in items}) == 1
        carried = {id(item): item for item in items if isinstance(item, nn.Parameter) and id(item) in self.new}
        owner = next(iter(carried.values())) if len(carried) == 1 else None
        after = [
            self._followed(place, item, depth - 1) if (beside := self._beside(owner, item)) is None else beside
            for place, item in zip(places, items, strict=True)
        ]
        self._companions, self._level = outside
        return after

    def _hidden(self, place: str, holder: object, depth: int) -> None:
        """What lies in no dictionary: variables of closures, default arguments, slots.

        Functions may hold records of how the model was, so companions and copies are not looked for in what they hold.
        """
        outside = self._companions, self._level, self._asked
        self._asked = self._asked and not isinstance(holder, (FunctionType, MethodType, functools.partial))
        self._companions, self._level = self._asked, 0
        for held in hidden_places(holder, self._packages):
            followed = self._followed(f"{place}.{held.name}", held.value, depth - 1)
            if followed is not held.value:
                try:
                    held.put(followed)
                except (AttributeError, TypeError):  # it can only be read
                    self.left.append(f"{place}.{held.name}")
                else:
                    self._undo.append(functools.partial(held.put, held.value))
        self._companions, self._level, self._asked = outside

    def _set(self, mapping: Any, key: Any, value: Any) -> None:
        self._undo.append(functools.partial(mapping.__setitem__, key, mapping[key]))
        mapping[key] = value

    def _refill(self, container: Any, add: Callable[[Any], None], before: Any, after: Any) -> None:
        """Give a container other contents; the object stays the same."""

        def fill(content: Any) -> None:
            container.clear()
            add(content)

        self._undo.append(lambda: fill(before))
        fill(after)

    def _followed(self, place: str, value: Any, depth: int) -> Any:
        """What takes a value's place: itself, if it is none of ours or was changed as the object that it is."""
        if (after := in_place_of(value, self.new)) is not value:
            return after
        if isinstance(value, torch.Tensor):
            flat = self._slices.flat(value) if self._companions else None
            if flat is not None:
                return flat.requires_grad_(value.requires_grad and value.is_leaf)
            strange = tuple(value.shape) in self._sliced and not isinstance(value, nn.Parameter)
            if strange and value.ndim and self._companions and not is_of_positions(value):
                self.left.append(place)
            return value
        function = isinstance(value, (FunctionType, MethodType))
        if depth == 0 or (type(value) in ATOMS and not function) or isinstance(value, type):
            return value
        if id(value) in self._seen or id(value) in self.apart:
            return value
        if isinstance(value, nn.Module):
            if not any(id(module) in self._own for module in value.modules()):
                self._seen.add(id(value))
                self._module(place, value, depth)
            return value
        if isinstance(value, (tuple, frozenset)):
            return self._immutable(place, value, depth)
        self._seen.add(id(value))
        if isinstance(value, dict):
            self._mapping(place, value, depth)
        elif isinstance(value, (list, deque)):
            self._sequence(place, value, depth)
        elif isinstance(value, set):
            before = elements_of(value)
            members = set(self._items([place] * len(before), before, depth))
            if members != set(before):
                self._refill(value, value.update, set(before), members)
        elif (content := of_weak_container(value)) is not None:
            self._followed(place, content, depth)
        elif isinstance(value, functools.partial):
            self._followed(place, value.keywords, depth - 1)
            self._hidden(place, value, depth)
        elif function or not is_foreign(value):
            self._attributes(place, value, depth - 1)
            self._hidden(place, value, depth)
        return value

    def _immutable(self, place: str, value: Any, depth: int) -> Any:
        items = elements_of(value)
        companion = self._in_order(items) if isinstance(value, tuple) else None
        after = companion or self._items([f"{place}[{n}]" for n in range(len(items))], items, depth)
        if len(after) == len(items) and all(a is b for a, b in zip(after, items, strict=True)):
            return value
        return type(value)(*after) if hasattr(value, "_fields") else type(value)(after)

    def _sequence(self, place: str, value: Any, depth: int) -> None:
        items = elements_of(value)
        after = self._in_order(items) or self._items([f"{place}[{n}]" for n in range(len(items))], items, depth)
        if len(after) != len(items) or any(a is not b for a, b in zip(after, items, strict=True)):
            self._refill(value, value.extend, items, after)

    def _mapping(self, place: str, value: dict[Any, Any], depth: int) -> None:
        before = dict(value)
        tensors = {key: item for key, item in value.items() if isinstance(item, torch.Tensor)}
        prefix = self._slices.prefix(tensors) if self._companions else None
        keyed = {}
        if self._asked:
            keyed = {key: mine for key, item in before.items() if (mine := self._slices.under(key, item)) is not None}
        held = {
            key: item
            for key, item in before.items()
            if key not in keyed
            and (prefix is None or not isinstance(item, torch.Tensor) or isinstance(item, nn.Parameter))
        }
        places = [f"{place}[{key!r:.40}]" for key in held]
        followed = dict(zip(held, self._items(places, list(held.values()), depth), strict=True))
        after: dict[Any, Any] = {}
        for key, item in before.items():
            new = self._key(key)
            if key in followed:
                after[new] = followed[key]
                continue
            if key in keyed:
                after[new] = keyed[key]
                created = self._slices.new_bias_under(new, item)
            else:
                name = f"{prefix}{key}"
                after[key] = self._slices.of(name, item)
                created = self._slices.with_new_bias(name, item)
                created = created and (created[0].removeprefix(prefix or ""), created[1])
            if created is not None:
                after[created[0]] = created[1]
        if [*map(id, after)] != [*map(id, before)] or any(after[key] is not before[key] for key in before):
            self._refill(value, value.update, before, after)

    def _key(self, key: Any) -> Any:
        return id(self.new[key]) if type(key) is int and key in self.new else in_place_of(key, self.new)

    # ----------------------------------------------------------------------------------------------------- companions

    def _beside(self, owner: nn.Parameter | None, tensor: object) -> torch.Tensor | None:
        return self._slices.beside(owner, tensor) if self._asked else None

    def _in_order(self, items: Sequence[Any]) -> list[Any] | None:
        return self._slices.in_order(items) if self._companions else None

    def _module(self, place: str, module: nn.Module, depth: int, *, is_copy: bool = True) -> None:
        """A module outside of the model: copies of parts of it follow; in any other, parameters of ours may be.

        Args:
            place: What people call it.
            module: The module.
            depth: How far to look into its attributes.
            is_copy: Whether it is one already where it has the parameters of a single layer. Inside of another module,
                a layer that happens to have the size of one of ours is none.
        """
        judgement = self.judged.get(id(module)) if self._companions else None
        if judgement is Judgement.STAYS:
            return
        inner: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        strange = not inner or any(id(parameter) in self.new for parameter in module.parameters())
        layers = sum(bool(part._parameters) for part in module.modules())
        may_be = self._companions and not strange and (is_copy or layers > 1)
        prefix = self._slices.prefix(inner) if may_be else None
        if prefix is not None:
            if judgement is Judgement.IN_DOUBT:
                self.doubtful.append(place)
            self._copy(module, prefix)
            return
        listed = list(module) if isinstance(module, nn.ParameterList) and not strange else []
        companion = self._in_order([one.detach() for one in listed]) if listed else None
        if companion is not None:
            after = {str(n): nn.Parameter(one, listed[0].requires_grad) for n, one in enumerate(companion)}
            self._refill(module._parameters, module._parameters.update, dict(module._parameters), after)
            self._set(vars(module), "_size", len(after))
            return
        for key, parameter in module._parameters.items():
            if id(parameter) in self.new:
                self._set(module._parameters, key, self.new[id(parameter)])
            elif self._companions and parameter is not None and tuple(parameter.shape) in self._sliced:
                self.left.append(f"{place}.{key}")
        if isinstance(module, torch.jit.ScriptModule):
            return
        self._attributes(place, module, depth - 1)
        for name, child in module.named_children():
            if id(child) not in self._seen:
                self._seen.add(id(child))
                self._module(f"{place}.{name}", child, depth, is_copy=isinstance(module, AveragedModel))

    def _copy(self, copy: nn.Module, prefix: str) -> None:
        """Slice a copy of a part of the model."""
        computed = [(module, found, found.value(module)) for module in copy.modules() if (found := computed_of(module))]
        for path, module in copy.named_modules():
            layer = self.model.get_submodule(f"{prefix}{path}".rstrip("."))
            before = [(held, dict(held)) for held in (module._parameters, module._buffers, module.__dict__)]
            self._undo.append(functools.partial(_refill, before))
            self._undo.append(functools.partial(setattr, module, "__class__", type(module)))
            layout = layout_of(layer)
            if layer_type(module) is not None and isinstance(layout, Layout):
                set_sizes(module, layout.slots)
            for held in (module._parameters, module._buffers, module.__dict__):
                for key, tensor in list(held.items()):
                    name = f"{prefix}{path}.{key}".replace("..", ".").lstrip(".")
                    if held is module.__dict__:
                        held[key] = self.surgery.recounted(name, tensor)
                    if not isinstance(tensor, torch.Tensor):
                        continue
                    sliced = self._slices.of(name, tensor)
                    if sliced is not tensor and isinstance(tensor, nn.Parameter):
                        sliced = nn.Parameter(sliced.detach(), requires_grad=tensor.requires_grad)
                    held[key] = sliced
                    created = self._slices.with_new_bias(name, tensor)
                    if created is not None:
                        module._parameters["bias"] = nn.Parameter(created[1], requires_grad=tensor.requires_grad)
            refresh(module)
        names = {id(module): f"{prefix}{path}".rstrip(".") for path, module in copy.named_modules()}
        for module, found, weight in computed:
            by_dim = self.surgery.kept.get(joined(names[id(module)], found.direction), {})
            found.settle(module, slice_tensor(weight, by_dim))

    # ---------------------------------------------------------------------------------------------------------- hooks

    def carry_hooks(self) -> None:
        """Tensors in the hooks of parameters (a mask of a gradient) follow; the hooks themselves have followed."""
        parameters = [*(new for _, new, _ in self.surgery.parameters), *self.model.parameters()]
        for nodes, after in nodes_to_replace(parameters, self.new):
            self._refill(nodes, nodes.extend, list(nodes), after)
        for held in held_by_hooks(parameters):
            value = held.read()
            possible = self._possible(held, value)
            if len(possible) == 1 and held.put is not None:
                self._undo.append(functools.partial(held.put, value))
                held.put(possible[0])
            elif possible and callable(getattr(held.owner, "on_softprune", None)):
                self._unsettled.append((held, value))
            elif possible:
                self.left.append(held.place)

    def _possible(self, held: HeldByHooks, value: torch.Tensor) -> list[torch.Tensor]:
        """What may take the place of a tensor that hooks keep: its slices by all parameters that it may belong to."""
        if isinstance(value, nn.Parameter) and id(value) in self.new:
            return [self.new[id(value)]]
        if not value.ndim or any(value is parameter for parameter in self.model.parameters()):
            return []
        sliced = {id(new): (old.shape, by_dim) for old, new, by_dim in self.surgery.parameters}
        hooked = [sliced.get(id(parameter), (parameter.shape, {})) for parameter in held.parameters]
        if not any(by_dim and shape == value.shape for shape, by_dim in hooked):
            return []
        others = [(shape, by_dim) for shape, by_dim in sliced.values() if by_dim] if held.by_method else []
        found = {
            tuple((dim, tuple(by_dim[dim].tolist())) for dim in sorted(by_dim)): by_dim
            for shape, by_dim in (*hooked, *others)
            if shape == value.shape
        }
        slices = [slice_tensor(value, by_dim) for by_dim in found.values()]
        if isinstance(value, nn.Parameter):
            return [nn.Parameter(tensor, requires_grad=value.requires_grad) for tensor in slices]
        return slices

    def left_by_listeners(self) -> list[str]:
        """What hooks keep that could not follow, and that the `on_softprune` of its owner has not touched either."""
        return [held.place for held, value in self._unsettled if held.read() is value]


def _refill(before: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for held, content in before:
        held.clear()
        held.update(content)
