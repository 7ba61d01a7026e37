"""What hooks of parameters keep: arguments of a partial function, variables of a closure, attributes of an object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


@dataclass
class HeldByHooks:
    """A value that hooks keep.

    Attributes:
        place: What people call it.
        read: Gives what is kept now.
        put: Writes something else in its place; ``None`` where nothing can be written.
        by_method: Whether it is an attribute of an object whose method is the hook: there it may serve other ends.
        owner: That object, or the hook.
        parameters: Those whose hooks keep it.
    """

    place: str
    read: Callable[[], Any]
    put: Callable[[Any], None] | None
    by_method: bool
    owner: object
    parameters: list[nn.Parameter] = field(default_factory=list)


def held_by_hooks(parameters: Iterable[nn.Parameter]) -> list[HeldByHooks]:
    """The tensors that hooks of these parameters keep, each with all parameters that have such a hook."""
    found: dict[tuple[int, Any], HeldByHooks] = {}
    for parameter in parameters:
        for hook in hooks_of(parameter):
            for key, held in _held_by(hook):
                known = found.setdefault(key, held).parameters
                if not any(parameter is other for other in known):
                    known.append(parameter)
    return list(found.values())


def hooks_of(parameter: nn.Parameter) -> list[Any]:
    """Its hooks, whenever they run."""
    kinds = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return [hook for hooks in kinds for hook in (hooks or {}).values()]


def nodes_to_replace(
    parameters: Iterable[nn.Parameter], new: Mapping[int, nn.Parameter]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Lists of the nodes that accumulate gradients, in closures of hooks, and what they are for the pruned model.

    A hook that waits for several gradients (`torch.autograd.graph.register_multi_grad_hook`) asks which of them come.

    Args:
        parameters: Those whose hooks are looked at.
        new: What has taken the place of parameters, by the identities of these.
    """
    seen: set[int] = set()
    for hook in (hook for parameter in parameters for hook in hooks_of(parameter)):
        for nodes, _, _ in _variables(hook):
            if type(nodes) is list and id(nodes) not in seen:
                seen.add(id(nodes))
                after = [_node_now(node, new) for node in nodes]
                if any(one is not other for one, other in zip(nodes, after, strict=True)):
                    yield nodes, after


def _node_now(node: Any, new: Mapping[int, nn.Parameter]) -> Any:
    """The node at which the gradient of a parameter arrives, for the one that has taken its place; else itself."""
    parameter = new.get(id(getattr(node, "variable", None)))
    if parameter is None:
        return node
    with torch.enable_grad():
        made = parameter.view_as(parameter).grad_fn
    return node if made is None else made.next_functions[0][0]


def _variables(hook: Any) -> Iterator[tuple[Any, Any, str]]:
    """What a function keeps in its closure, with the cell, and what people call it."""
    for cell in getattr(hook, "__closure__", None) or ():
        with suppress(ValueError):  # empty
            yield cell.cell_contents, cell, f"a variable of {hook.__qualname__}"


def _held_by(hook: Any) -> Iterator[tuple[tuple[int, Any], HeldByHooks]]:
    while isinstance(hook, functools.partial):
        place = f"an argument of {hook!r:.60}"
        for number, value in enumerate(hook.args):
            if isinstance(value, torch.Tensor):
                yield (id(hook), number), HeldByHooks(place, functools.partial(_itself, value), None, False, hook)
        for key, held in _items(hook.keywords, hook, by_method=False):
            yield key, replace(held, place=place)
        hook = hook.func
    for value, cell, place in _variables(hook):
        if isinstance(value, torch.Tensor):
            read, put = (functools.partial(function, cell, "cell_contents") for function in (getattr, setattr))
            yield (id(cell), None), HeldByHooks(place, read, put, False, hook)
    owner = getattr(hook, "__self__", hook)
    attributes = getattr(owner, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(owner, nn.Module):
        yield from _items(attributes, owner, by_method=owner is not hook)


def _items(mapping: dict[Any, Any], owner: object, *, by_method: bool) -> Iterator[tuple[tuple[int, Any], HeldByHooks]]:
    for key, value in list(mapping.items()):
        if isinstance(value, torch.Tensor):
            read, put = functools.partial(mapping.get, key), functools.partial(mapping.__setitem__, key)
            yield (id(mapping), key), HeldByHooks(f"{type(owner).__name__}.{key}", read, put, by_method, owner)


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value
