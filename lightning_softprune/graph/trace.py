"""One run of a module as a dependency graph: torch-pruning's nodes and edges, with index mappings of our own.

The module is traced by running its steps, so no example input is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import ops
from torch_pruning.dependency import index_mapping

from lightning_softprune.graph.index_maps import map_indices
from lightning_softprune.graph.layers import Layout, layout_of, parts_of_layers
from lightning_softprune.graph.recorder import Recorder

Step = Callable[[], Any]


@dataclass
class Trace:
    """One run of a module, as a graph and as what was noted beside it."""

    graph: Any  # torch_pruning.DependencyGraph
    names: dict[Any, str]  # layer or bare parameter -> name
    layouts: dict[nn.Module, Layout]
    order: list[nn.Module]  # sliceable layers in the order in which they first ran
    ran: set[str]  # names of the layers that ran, sliceable or not
    reasons: dict[str, str]  # names of layers that cannot be sliced -> why
    markers: dict[Any, str]  # autograd node -> why a group that reaches it is not prunable
    owners: dict[nn.Parameter, nn.Module]  # parameters of the sliceable layers


def trace_model(model: nn.Module, steps: Sequence[Step], outside: Mapping[str, str] | None = None) -> Trace:
    """Run the model and build the graph of what ran.

    Args:
        model: The model.
        steps: Functions that run it.
        outside: Modules that are to be left alone with all that is in them -> why.
    """
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    layouts: dict[nn.Module, Layout] = {}
    reasons: dict[str, str] = {}
    inside = set(parts_of_layers(model))
    for name, module in model.named_modules():
        if module in inside:
            continue
        found = _left_alone(name, module, outside or {}) or layout_of(module)
        if isinstance(module, torch.jit.ScriptModule):  # its children are run by no one who calls hooks
            inside.update(child for child in module.modules() if child is not module)
        if isinstance(found, Layout):
            layouts[module] = found
        elif found is not None:
            reasons[name] = found

    recorder = Recorder(names, layouts, reasons)

    def run(_: nn.Module, __: Any) -> list[torch.Tensor]:
        with recorder.hooks(model), recorder:
            for step in steps:
                step()
        return recorder.finish()

    graph = _Graph()
    with _traceable(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning announces bare parameters and operators it does not know
        graph.build(model, run)
        map_indices(graph, recorder)
    names.update({p: n for n, p in model.named_parameters()})
    owners = {parameter: layer for layer in layouts for parameter in layer.parameters(recurse=False)}
    return Trace(graph, names, layouts, recorder.order, recorder.ran, reasons, recorder.markers, owners)


def _left_alone(name: str, module: nn.Module, outside: Mapping[str, str]) -> str | None:
    """Why a module with parameters is cut out of the graph, whatever its type."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript modules cannot be sliced"
    found = next((reason for other, reason in outside.items() if name == other or name.startswith(f"{other}.")), None)
    return found if any(True for _ in module.parameters(recurse=False)) else None


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """torch-pruning's dependency graph, without its index mappings: it guesses them, and stumbles over some."""

    def build(self, model: nn.Module, run: Callable[[nn.Module, Any], list[torch.Tensor]]) -> None:
        """Trace the model; every step but the mapping of indices is torch-pruning's."""
        self.verbose = False
        self.model = model
        self.ignored_params: list[nn.Parameter] = []
        self._module2name = {module: name for name, module in model.named_modules()}
        self._param_to_name, self.unwrapped_parameters = self._detect_unwrapped_parameters(None)
        self.module2node = self._trace(model, (), run, None)
        self._build_dependency(self.module2node)
        for node in self.module2node.values():
            if node.type == ops.OPTYPE.UNBIND:
                index_mapping.update_unbind_index_mapping(self, node)
            elif node.type == ops.OPTYPE.EXPAND:
                index_mapping.update_expand_index_mapping(self, node)


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Grad mode on, every floating-point parameter asks for gradients (frozen ones would vanish from the graph)."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modules = [(module, module.training, set(module._forward_hooks)) for module in model.modules()]
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode, hooks in modules:
            module.training = mode
            for handle in set(module._forward_hooks) - hooks:  # torch-pruning leaves its own when a step raises
                del module._forward_hooks[handle]
