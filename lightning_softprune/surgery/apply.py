"""Apply a plan: the tensors of the layers it touches are replaced by smaller ones, everything else stays as it is.

No graph is needed. The `Surgery` record says which elements of every tensor survived, and puts the layers back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.graph import ComputedWeight, Layout, PruningGroup, computed_of, layout_of, refresh, set_sizes
from lightning_softprune.search import Plan
from lightning_softprune.utilities.names import joined
from lightning_softprune.utilities.nested import integer_of, integers_in, laid_out_like, with_integer

KeptByDim = dict[int, torch.Tensor]
_Site = tuple[nn.Module, str, str]  # who holds a tensor, as which attribute, under which full name
_NO_COUNTS: Mapping[tuple[str, str], int] = {}
_OF_THE_CLASS = object()  # an attribute that the instance has not


@dataclass
class Surgery:
    """What a plan did to the tensors of a model.

    Attributes:
        parameters: Pairs of (old, new) parameter with the kept indices of every sliced dimension.
        kept: Name of every sliced parameter, buffer and plain tensor attribute -> kept indices by dimension, in the
            numbering before.
        counts: Name of every attribute that counts channels -> what it was, and what it is.
        computed: Name of every weight that a touched layer computes from others -> what it computed before, and the
            kept indices.
        unsaved: Name of every sliced tensor that no state dict has (a plain attribute, a buffer that is not persistent)
            -> the tensor before.
        created: Biases that compensation had to create: name, the weight beside it, the bias.
        order: The pruned model's parameters in its order, where biases were created.
        shifted: Readers without a bias whose BatchNorm took what compensation adds to their outputs -> its running mean
            now, and before that.
    """

    parameters: list[tuple[nn.Parameter, nn.Parameter, KeptByDim]] = field(default_factory=list)
    kept: dict[str, KeptByDim] = field(default_factory=dict)
    created: list[tuple[str, nn.Parameter, nn.Parameter]] = field(default_factory=list)
    order: list[nn.Parameter] = field(default_factory=list)
    shifted: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    unsaved: dict[str, torch.Tensor] = field(default_factory=dict)
    computed: dict[str, tuple[torch.Tensor, KeptByDim]] = field(default_factory=dict)
    _counted: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    _contents: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    _classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    _replaced: dict[int, nn.Parameter] = field(default_factory=dict)

    def add(self, old: nn.Parameter, new: nn.Parameter, by_dim: KeptByDim) -> None:
        """Note that a parameter has taken another's place."""
        self.parameters.append((old, new, by_dim))
        self._replaced[id(new)] = old

    def count(self, module: nn.Module, attribute: str, value: int) -> None:
        """Give an attribute that counts channels a new value; of its module, nothing else is remembered for that."""
        held, name = module.__dict__, attribute.partition("[")[0]
        self._counted.append((held, name, held.get(name, _OF_THE_CLASS)))
        held[name] = with_integer(held.get(name), attribute, value)

    def recounted(self, name: str, value: Any) -> Any:
        """An attribute's value in a copy of its module, with the integers in it that count channels as they are now."""
        for place, _ in integers_in(name, value):
            if place in self.counts:
                value = with_integer(value, place, self.counts[place][1])
        return value

    def before(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """The parameter whose place this one has taken; ``None`` if it is none of the new ones."""
        return self._replaced.get(id(parameter))

    def slice(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of a tensor that has the shape which a parameter or buffer had before.

        Args:
            name: The parameter's or buffer's full name in the module.
            tensor: Any tensor of its former shape: an average of it, a mask.
        """
        return slice_tensor(tensor, self.kept.get(name, {}))

    def undo(self) -> None:
        """Put the layers back: the same tensor objects, the same attributes. Values are nobody's business here."""
        # what was noted first is how it was
        _put_back(self._counted[::-1], self._contents[::-1], self._classes[::-1])

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The layers as they were, for as long as the block lasts; afterwards, as they are now."""
        counted = [(held, attribute, held.get(attribute, _OF_THE_CLASS)) for held, attribute, _ in self._counted]
        contents = [(mapping, dict(mapping)) for mapping, _ in self._contents]
        classes = [(module, type(module)) for module, _ in self._classes]
        self.undo()
        try:
            yield
        finally:
            _put_back(counted, contents, classes)

    def replace(self, module: nn.Module, attribute: str, name: str, new: nn.Parameter) -> None:
        """Put a parameter of the same shape in the place of one that was not sliced: the old one has to survive."""
        old = module.get_parameter(attribute)
        _share_hooks(old, new)
        module._parameters[attribute] = new
        refresh(module)
        self.add(old, new, {})
        self.kept[name] = {}

    def remember(self, module: nn.Module) -> None:
        """Note what a module holds, so that :meth:`undo` can put it back."""
        self._classes.append((module, type(module)))
        for mapping in (module._parameters, module._buffers, module.__dict__):
            self._contents.append((mapping, dict(mapping)))


def _put_back(
    counted: Sequence[tuple[dict[str, Any], str, Any]],
    contents: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    classes: Sequence[tuple[nn.Module, type[nn.Module]]],
) -> None:
    for held, attribute, value in counted:
        if value is _OF_THE_CLASS:
            held.pop(attribute, None)
        else:
            held[attribute] = value
    for mapping, items in contents:
        mapping.clear()
        mapping.update(items)
    for module, kind in classes:
        module.__class__ = kind


def apply_plan(model: nn.Module, groups: Sequence[PruningGroup], plan: Plan) -> Surgery:
    """Remove a plan's channels from the model, in place.

    Each tensor is sliced once, from the indices that all groups remove together, in the numbering before the plan.
    New parameters keep ``requires_grad``, dtype, memory format, attributes and the slice of a pending gradient;
    tied parameters stay one tensor. So do buffers, and tensors that modules keep as plain attributes. Attributes that
    count channels fall.

    Args:
        model: The model whose modules the groups name.
        groups: The groups the plan speaks of, in its order.
        plan: Removed channels by group.

    Returns:
        The record of what was sliced.

    Raises:
        ValueError: Groups do not fit the model, or the plan the groups; or an attribute that counts channels is no
            integer, or would fall below 1. Nothing is changed then.
    """
    removed = _removed_by_slot(groups, plan)
    counts = counts_after(model, groups, [len(channels) for channels in plan.removed])
    return select_channels(
        model,
        {name: {slot: _kept(m) for slot, m in slots.items()} for name, slots in removed.items()},
        {(name, slot): len(mask) for name, slots in removed.items() for slot, mask in slots.items()},
        counts,
    )


def counts_after(model: nn.Module, groups: Sequence[PruningGroup], lost: Sequence[int]) -> dict[tuple[str, str], int]:
    """What attributes that count channels have to be when every group has lost so many.

    Args:
        model: The model as it is.
        groups: The groups.
        lost: How many channels each of them loses.

    Returns:
        Module and attribute -> its new value.

    Raises:
        ValueError: There is no such attribute, or it is no integer.
    """
    after: dict[tuple[str, str], int] = {}
    for group, number in zip(groups, lost, strict=True):
        for count in group.counts if number else ():
            place = (count.module, count.attribute)
            now = after[place] if place in after else _count_of(_module_of(model, count.module, place), place)
            after[place] = now - number * count.per_channel
    return after


def select_channels(
    model: nn.Module,
    selected: Mapping[str, Mapping[str, torch.Tensor]],
    expected: Mapping[tuple[str, str], int],
    counts: Mapping[tuple[str, str], int] = _NO_COUNTS,
) -> Surgery:
    """Make every slot hold the given indices of what it holds now.

    Args:
        model: The model.
        selected: Indices to keep, in their new order, by module and slot.
        expected: How many each slot should hold now.
        counts: New values of attributes that count channels, by module and attribute.

    Returns:
        The record of what was sliced.

    Raises:
        ValueError: A slot holds another number, or two layers would keep different channels of one tensor, or there is
            no such tensor or attribute, or the attribute would be less than 1. Nothing is changed then.
    """
    modules = dict(model.named_modules())
    cut = _Cut(model)
    for name, slots in selected.items():
        module = modules.get(name)
        if module is None:
            cut.add_bare(name, slots, expected)
        else:
            cut.add_layer(module, name, slots, expected)
    for place, value in counts.items():
        cut.add_count(place, value)
    return cut.made()


class _Cut:
    """What is to be sliced: collected first, and written when nothing can fail any more."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.slices: dict[int, tuple[torch.Tensor, KeptByDim, list[_Site]]] = {}
        self.resized: list[tuple[nn.Module, dict[str, int]]] = []
        self.counted: list[tuple[nn.Module, tuple[str, str], int, int]] = []
        self.computed: list[tuple[nn.Module, str, ComputedWeight]] = []

    def add_bare(self, name: str, slots: Mapping[str, torch.Tensor], expected: Mapping[tuple[str, str], int]) -> None:
        """Slice a parameter, a buffer or a plain tensor attribute that belongs to no layer."""
        path, _, attribute = name.rpartition(".")
        parent = _module_of(self.model, path, (name,))
        tensor = _holder(parent, attribute).get(attribute)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: the group expects a tensor here, there is none")
        for slot, kept in slots.items():
            dim = int(slot.removeprefix("dim"))
            size = tensor.shape[dim] if dim < tensor.ndim else 0
            if size != expected[name, slot]:
                raise ValueError(f"{name}: the group expects {expected[name, slot]} channels, there are {size}")
            self._add(parent, name, dim, kept)

    def add_count(self, place: tuple[str, str], value: int) -> None:
        """Give an attribute that counts channels a new value."""
        module = _module_of(self.model, place[0], place)
        now = _count_of(module, place)
        if value < 1:
            raise ValueError(f"{_full(place)}: it counts channels, and would fall from {now} to {value}")
        self.counted.append((module, place, now, value))

    def add_layer(
        self,
        module: nn.Module,
        name: str,
        slots: Mapping[str, torch.Tensor],
        expected: Mapping[tuple[str, str], int],
    ) -> None:
        """Slice the tensors of a layer that follow some of its slots."""
        layout = layout_of(module)
        if not isinstance(layout, Layout):
            raise ValueError(f"{name}: {layout or 'this module is not a layer'}")
        for slot, kept in slots.items():
            size = layout.slots[slot]
            if size != expected[name, slot]:
                raise ValueError(f"{name}: the group expects {expected[name, slot]} channels, there are {size}")
            for axis in layout.axes:
                path, _, attribute = axis.tensor.rpartition(".")
                owner = module.get_submodule(path)
                if axis.slot == slot and getattr(owner, attribute, None) is not None:
                    self._add(owner, f"{name}.{axis.tensor}", axis.dim, axis.expand(kept, size))
        self.resized.append((module, {slot: len(kept) for slot, kept in slots.items()}))
        computed = computed_of(module)
        if computed is not None:
            self._add_computed(module, name, computed)

    def _add_computed(self, module: nn.Module, name: str, computed: ComputedWeight) -> None:
        """All that a layer computes its weight from is replaced: lengths change where a direction loses indices."""
        self.computed.append((module, name, computed))
        for source in computed.sources(0):
            path, _, attribute = source.rpartition(".")
            owner = module.get_submodule(path)
            tensor = getattr(owner, attribute)
            site = (owner, attribute, joined(name, source))
            _, _, sites = self.slices.setdefault(id(tensor), (tensor, {}, []))
            if site not in sites:
                sites.append(site)

    def _add(self, owner: nn.Module, full: str, dim: int, kept: torch.Tensor) -> None:
        attribute = full.rpartition(".")[2]
        tensor = getattr(owner, attribute)
        _, by_dim, sites = self.slices.setdefault(id(tensor), (tensor, {}, []))
        if dim in by_dim and not torch.equal(by_dim[dim], kept):
            raise ValueError(f"{full}: two layers share this tensor and would keep different channels of it")
        by_dim[dim] = kept
        if (owner, attribute, full) not in sites:
            sites.append((owner, attribute, full))

    def made(self) -> Surgery:
        """Slice everything, and put it in its place."""
        _complete_tied(self.model, self.slices)
        sliced = {
            key: _slice_parameter(tensor, by_dim) if isinstance(tensor, nn.Parameter) else _slice_plain(tensor, by_dim)
            for key, (tensor, by_dim, _) in self.slices.items()
        }
        before = [computed.value(module) for module, _, computed in self.computed]
        # Nothing has been written so far; from here on nothing can fail.
        record = Surgery()
        touched = {id(module): module for module, _ in self.resized}
        touched |= {id(owner): owner for *_, sites in self.slices.values() for owner, *_ in sites}
        for outer in touched.values():
            for inner in outer.modules():
                record.remember(inner)
        for module, sizes in self.resized:
            set_sizes(module, sizes)
        for key, (tensor, by_dim, sites) in self.slices.items():
            new = sliced[key]
            for owner, attribute, full in sites:
                holder = _holder(owner, attribute)
                holder[attribute] = new
                record.kept[full] = by_dim
                unsaved = holder is owner.__dict__ or attribute in owner._non_persistent_buffers_set
                if unsaved and not isinstance(new, nn.Parameter):
                    record.unsaved[full] = tensor
            if isinstance(new, nn.Parameter):
                record.add(tensor, new, by_dim)  # type: ignore[arg-type]
        for (module, name, computed), weight in zip(self.computed, before, strict=True):
            by_dim = record.kept[joined(name, computed.direction)]
            record.computed[joined(name, computed.name)] = weight, by_dim
            computed.settle(module, slice_tensor(weight, by_dim))
        for module in touched.values():
            refresh(module)
        for module, place, now, value in self.counted:  # last: a layer's own sizes are written by its type
            record.count(module, place[1], value)
            record.counts[_full(place)] = (now, value)
        return record


def slice_tensor(tensor: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Keep the given indices of the given dimensions; memory format is preserved, autograd is not involved."""
    with torch.inference_mode(False), torch.no_grad():
        result = tensor.detach()
        for dim, kept in by_dim.items():
            result = result.index_select(dim, kept.to(tensor.device))
        return laid_out_like(result, tensor)


def _full(place: Sequence[str]) -> str:
    return ".".join(place).lstrip(".")


def _module_of(model: nn.Module, path: str, place: Sequence[str]) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{_full(place)}: the group names it, and there is no module {path!r}") from None


def _count_of(module: nn.Module, place: tuple[str, str]) -> int:
    """The value of an attribute that counts channels."""
    value = integer_of(module, place[1])
    if value is None:
        raise ValueError(f"{_full(place)}: the group counts its channels by it, and it is no integer attribute")
    return value


def _holder(module: nn.Module, attribute: str) -> dict[str, Any]:
    """The dictionary in which a module has a tensor; that of plain attributes, where it is neither of the others."""
    holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return next((held for held in holders if attribute in held), module.__dict__)


def _share_hooks(old: nn.Parameter, new: nn.Parameter) -> None:
    """Give a parameter the attributes of another, and its hooks: the same dictionaries, so that handles remove them."""
    new.__dict__.update(old.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks, None):
            setattr(new, hooks, getattr(old, hooks))


def _slice_parameter(parameter: nn.Parameter, by_dim: KeptByDim) -> nn.Parameter:
    values = slice_tensor(parameter, by_dim)
    new = nn.Parameter(values if by_dim else values.clone(), requires_grad=parameter.requires_grad)
    _share_hooks(parameter, new)
    if parameter.grad is not None:
        new.grad = slice_tensor(parameter.grad, by_dim)
        new.grad = new.grad if by_dim else new.grad.clone()
    return new


def _slice_plain(tensor: torch.Tensor, by_dim: KeptByDim) -> torch.Tensor:
    return slice_tensor(tensor, by_dim).requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _complete_tied(model: nn.Module, slices: Mapping[int, tuple[Any, Any, list[tuple[nn.Module, str, str]]]]) -> None:
    """Every module that holds a sliced tensor gets the new one, also under names that no group knows."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            full = joined(prefix, name)
            if isinstance(tensor, torch.Tensor) and id(tensor) in slices:
                owners = slices[id(tensor)][2]
                if not any(known == full for *_, known in owners):
                    owners.append((module, name, full))


def _removed_by_slot(groups: Sequence[PruningGroup], plan: Plan) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    if len(groups) != len(plan.removed):
        raise ValueError(f"plan: {len(plan.removed)} groups planned for {len(groups)} groups")
    removed: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for group, channels in zip(groups, plan.removed, strict=True):
        if not channels:
            continue
        if not all(0 <= channel < group.num_channels for channel in channels):
            raise ValueError(f"plan: {group.name} has {group.num_channels} channels, and should lose {channels}")
        gone = np.zeros(group.num_channels + 1, dtype=bool)  # the last place serves owner == -1
        gone[list(channels)] = True
        for member in group.members:
            masks = removed.setdefault(member.module, {})
            mask = masks.setdefault(member.slot, np.zeros(len(member.owner), dtype=bool))
            mask |= gone[member.owner]
    return removed


def _kept(mask: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(~mask))
