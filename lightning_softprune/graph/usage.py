"""What a run of the model uses: parameters and layers, whoever calls them.

A score can only see the damage to what validation runs. So a group is prunable if validation *judges* it, that is, uses
parameters that produce its channels; and costs count the parameters that validation uses. Layers of loss networks,
projection heads and teachers, which only training runs, are neither pruned for their own sake nor counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_softprune.graph.groups import PruningGroup
from lightning_softprune.graph.layers import layer_type
from lightning_softprune.utilities.hooks import forward_hook, registered
from lightning_softprune.utilities.names import is_inside


@dataclass
class Usage:
    """What has been used so far.

    Attributes:
        parameters: Names of the parameters, tied ones under all their names.
        layers: Names of the modules with parameters of their own that were called.
    """

    parameters: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


@contextmanager
def record_usage(model: nn.Module, outside: Collection[str] = ()) -> Iterator[Usage]:
    """Record, while the block runs the model, which parameters and layers it uses.

    Args:
        model: The model.
        outside: Names of modules that do not count, with all that is in them.
    """
    left_alone = tuple(outside)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not any(is_inside(name, module) for module in left_alone):
            names.setdefault(id(parameter), []).append(name)
    usage = Usage()

    def use(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            usage.parameters.update(names.get(id(parameter), ()))

    def hooks() -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            entry = layer_type(module)
            # nobody calls the hooks of what is inside of TorchScript
            whole = isinstance(module, torch.jit.ScriptModule) or (entry is not None and entry.owns_children)
            if name in left_alone or not any(True for _ in module.parameters(recurse=whole)):
                continue

            def note(module: nn.Module, *_: Any, name: str = name, whole: bool = whole) -> None:
                usage.layers.add(name)
                use(module.parameters(recurse=whole))

            yield forward_hook(module, note)

    with registered(hooks()), _Watch(use, {id(parameter) for parameter in model.parameters(recurse=False)}):
        yield usage


class _Watch(TorchFunctionMode):
    """Notes the parameters that functions of torch are given: layers may be used without being called.

    What is asked of a parameter alone (its norm, for a log) does not run a layer. Parameters of the outermost module
    count all the same: a scale may be `self.log_scale.exp()`, and that module need not be called.
    """

    def __init__(self, use: Any, outermost: Set[int]) -> None:
        super().__init__()
        self._use, self._outermost = use, outermost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, torch.Tensor)]
        found = [value for value in given if isinstance(value, nn.Parameter)]
        if found and not getattr(func, "__name__", "").startswith("__get__"):  # who asks for a shape uses nothing
            alone = len(found) == len(given)
            self._use([value for value in found if not alone or id(value) in self._outermost])
        return func(*args, **kwargs)


_COMPUTED = ".parametrizations."
"""What a weight is computed from is held by modules inside of the layer."""


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if type(value) in (list, tuple):
            yield from value
        else:
            yield value


def refuse_unjudged(groups: Sequence[PruningGroup], judged: Set[str]) -> list[PruningGroup]:
    """Refuse the groups whose channels are produced by nothing that validation uses.

    Args:
        groups: Groups; twins are members of them already.
        judged: Names of the parameters that validation uses.

    Returns:
        The groups; those that no score can see are not prunable.
    """
    used = {name.rpartition(".")[0].partition(_COMPUTED)[0] for name in judged} | judged
    kept = []
    for group in groups:
        producers = [member.module for member in group.members if not member.slot.startswith("in")]
        if group.prunable and not any(name in used for name in producers):
            group = group.refuse(
                f"validation does not use {producers[0] if producers else group.name}, so no score would see the damage"
                "; have validation_step run it to prune it"
            )
        kept.append(group)
    return kept
