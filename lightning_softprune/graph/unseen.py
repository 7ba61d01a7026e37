"""Layers that no traced batch ran, and the groups whose channels they might read.

A branch that is taken later (tasks in turn, a loss that starts at some epoch, a rare expert) reads what it reads when a
plan has long been committed. The graph knows nothing of it, so only sizes tell: a group is refused where an unseen part
of the model could take its channels, or could give as many to be added to them.

An *unseen module* is one of whose parameters none was used, and which lies in no other such module. Inside of it, a
layer that takes what an earlier one gives is explained; the other sizes are those that it needs from outside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set

from torch import nn

from lightning_softprune.graph.groups import PruningGroup
from lightning_softprune.graph.layers import Layout, layer_type, layout_of, tensor_at
from lightning_softprune.utilities.names import is_inside

_Need = tuple[str, str, int, bool]
"""A layer, whether it takes or gives, how many channels, and whether these may be an image's, flattened."""

_Found = tuple[str, _Need]
"""The unseen module that a layer lies in, and what the layer needs."""


def refuse_unseen_readers(
    model: nn.Module, groups: Sequence[PruningGroup], seen: Set[str], known: Collection[str] = ()
) -> list[PruningGroup]:
    """Refuse the groups that a part of the model which was not run could read.

    Args:
        model: The traced model.
        groups: Groups of it.
        seen: Names of the parameters that tracing has used.
        known: Modules that need not run: twins, and those that are left alone.

    Returns:
        The groups; the reason names the layer that was not run.
    """
    covered = {member.module for group in groups for member in group.members if group.num_channels}
    needs = list(_needs(model, seen, known, covered))
    checked = []
    for group in groups:
        sizes = {len(member.owner) for member in group.members}
        flat = {len(member.owner) for member in group.members if _is_spatial(model, member.module)}
        hit = next(
            (
                (whole, name, does, size)
                for whole, (name, does, size, flattens) in needs
                if size > 1 and (size in sizes or (flattens and any(n > 1 and size % n == 0 for n in flat)))
            ),
            None,
        )
        if group.prunable and hit is not None:
            whole, name, does, size = hit
            group = group.refuse(
                f"{name}, which no traced batch ran, may be coupled to its channels (it {does} {size}); have the first "
                f"batches of training or validation run it, or delete {'it' if whole == name else whole} (None in its "
                "place) if none ever does, or name it in twins if it mirrors a module"
            )
        checked.append(group)
    return checked


def _needs(model: nn.Module, seen: Set[str], known: Collection[str], covered: Set[str]) -> Iterator[_Found]:
    """What the layers in unseen modules take from outside and give to it."""
    used = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in seen}
    done: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if not name or not parameters or any(id(parameter) in used for parameter in parameters):
            continue
        if any(is_inside(name, other) for other in (*done, *known)) or any(is_inside(o, name) for o in covered):
            continue
        done.append(name)
        yield from ((name, need) for need in _needs_of(name, module))
    for name, parameter in model.named_parameters():
        outer = [*done, *known, *covered]
        if name not in seen and not any(is_inside(name, other) for other in outer) and _is_bare(model, name):
            yield from ((name, (name, "takes", size, False)) for size in parameter.shape)


def _is_bare(model: nn.Module, name: str) -> bool:
    return layout_of(model.get_submodule(name.rpartition(".")[0])) is None


def _needs_of(name: str, module: nn.Module) -> Iterator[_Need]:
    found: list[tuple[str, int | None, int | None, bool]] = []
    for inner, layer in module.named_modules():
        full = f"{name}.{inner}".rstrip(".")
        layout = _sized(layer)
        outer, computed, _ = f".{inner}".rpartition(".parametrizations.")
        if computed and isinstance(_sized(module.get_submodule(outer.lstrip("."))), Layout):
            continue  # the layer has told its needs
        if isinstance(layout, Layout):
            both = layout.slots.get("both")
            others = [size for slot, size in layout.slots.items() if slot not in ("in", "out", "both")]
            found.extend((full, size, None, False) for size in others)
            each = max((axis.each for axis in layout.axes), default=1)  # it gives so many of each channel
            gives = None if both is None else both * each
            found.append((full, layout.slots.get("in", both), layout.slots.get("out", gives), _is_flat(layer)))
        else:
            sizes = {size for parameter in layer.parameters(recurse=False) for size in parameter.shape}
            found.extend((full, size, None, False) for size in sorted(sizes))
    given: set[int] = set()
    for full, takes, gives, flat in found:
        if takes is not None and not any(takes == n or (flat and n > 1 and takes % n == 0) for n in given):
            yield full, "takes", takes, flat
        given |= {gives} if gives is not None else set()
    taken: set[int] = set()
    for full, takes, gives, _ in reversed(found):
        if gives is not None and not any(size == gives or (gives > 1 and size % gives == 0) for size in taken):
            yield full, "gives", gives, False
        taken |= {takes} if takes is not None else set()


def _sized(layer: nn.Module) -> Layout | str | None:
    """A layer's layout; what its weights are computed from does not change what it takes and gives."""
    layout, entry = layout_of(layer), layer_type(layer)
    return entry.describe(layer) if isinstance(layout, str) and entry is not None else layout


def _is_flat(layer: nn.Module) -> bool:
    """Whether a layer's weight is a matrix: it may read all positions of an image at once."""
    weight = tensor_at(layer, "weight")
    return weight is not None and weight.ndim == 2


def _is_spatial(model: nn.Module, name: str) -> bool:
    """Whether a layer's weight is a kernel over positions."""
    weight = tensor_at(model, f"{name}.weight")
    return weight is not None and weight.ndim > 2
