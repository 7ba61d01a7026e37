"""What runs while a module is traced: hooks that note layers, cut the graph around some, and mark outputs.

What a step computes last, and what it feeds to layers that cannot be sliced, ends in a *marker*: an autograd node of
its own, with the reason why a group that reaches it is not prunable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_softprune.graph.layers import Layout
from lightning_softprune.utilities.hooks import forward_hook, forward_pre_hook, registered
from lightning_softprune.utilities.nested import map_tensors, tensors_in


class Recorder(TorchFunctionMode):
    """Forward hooks that note what runs, cut the graph around layers that cannot be sliced and mark the outputs.

    As a function mode it also notes what autograd does not keep: the sizes that were concatenated (a raw action joined
    to a latent state has no gradient) and the shapes before and after a reshape.
    """

    def __init__(
        self, names: Mapping[Any, str], layouts: Mapping[nn.Module, Layout], reasons: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.reshapes: dict[Any, tuple[torch.Size, torch.Size]] = {}  # autograd node -> shapes before and after
        # autograd node of a concatenation -> (dim, sizes along it, shape of the result)
        self.joins: dict[Any, tuple[int, tuple[int, ...], torch.Size]] = {}
        self.names, self.layouts, self.reasons = names, layouts, reasons
        self.order: list[nn.Module] = []
        self.ran: set[str] = set()
        self.made: dict[nn.Module, list[Any]] = defaultdict(list)  # layer -> autograd nodes of its outputs, by call
        self.markers: dict[Any, str] = {}
        self._ends: list[torch.Tensor] = []
        self._outputs: list[tuple[torch.Tensor, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _RESHAPES and isinstance(output, torch.Tensor) and output.grad_fn is not None:
            self.reshapes[output.grad_fn] = (args[0].shape if args else kwargs["input"].shape, output.shape)
        if func in _JOINS and output.grad_fn is not None:
            given = {**dict(zip(("tensors", "dim"), args, strict=False)), **(kwargs or {})}
            dim = int(given.get("dim", given.get("axis", 0))) % output.ndim
            # torch lets an empty tensor of one dimension join any others
            sizes = [tensor.shape[dim] if tensor.ndim == output.ndim else 0 for tensor in given["tensors"]]
            self.joins[output.grad_fn] = (dim, tuple(sizes), output.shape)
        return output

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """While this lasts, what runs is noted."""
        with registered(self._hooks_of(model)):
            yield

    def _hooks_of(self, model: nn.Module) -> Iterator[RemovableHandle]:
        for module in model.modules():
            name = self.names[module]
            if name in self.reasons:
                yield forward_pre_hook(module, self._cut_inputs)
                yield forward_hook(module, self._cut_outputs)
            elif any(True for _ in module.parameters(recurse=False)) or module in self.layouts:
                yield forward_hook(module, self._note)

    def finish(self) -> list[torch.Tensor]:
        """Mark the outputs that no later layer depends on; return every end of the graph."""
        last: dict[Any, tuple[torch.Tensor, str]] = {}
        for tensor, name in self._outputs:
            last.setdefault(tensor.grad_fn, (tensor, name))  # the innermost layer, not the modules around it
        fed = [end.grad_fn for end in self._ends]  # what feeds a layer that cannot be sliced is no output
        consumed = _reached_from([*last, *fed], set(last))
        for node, (tensor, name) in last.items():
            if node not in consumed:
                self._mark(tensor, f"{name} produces an output of the network")
        return self._ends

    def makers(self, node: Any) -> list[Any]:
        """The autograd nodes behind a node of the dependency graph: one per call of a layer."""
        if isinstance(node.module, nn.Module) and node.module in self.made:
            return self.made[node.module]
        return [node.grad_fn] if node.grad_fn is not None else []

    def _mark(self, tensor: torch.Tensor, reason: str) -> None:
        if tensor.grad_fn is not None and tensor.ndim > 0:
            with torch.enable_grad():  # metrics run their networks without
                end = tensor + 0  # an autograd node of its own, so that the graph ends here whatever else follows
            self.markers[end.grad_fn] = reason
            self._ends.append(end)

    def _note(self, module: nn.Module, _: Any, output: Any) -> None:
        self.ran.add(self.names[module])
        if module in self.layouts and module not in self.order:
            self.order.append(module)
        tensors = tensors_in(output)
        if module in self.layouts:
            tensors = tensors[:1]  # attention weights hold no channels
        for tensor in tensors:
            if tensor.grad_fn is not None and tensor.ndim > 0:
                self._outputs.append((tensor, self.names[module]))
                self.made[module].append(tensor.grad_fn)

    def _cut_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self.names[module]
        self.ran.add(name)
        for tensor in tensors_in((args, kwargs)):
            self._mark(tensor, f"feeds {name}: {self.reasons[name]}")
        return map_tensors((args, kwargs), torch.Tensor.detach)

    def _cut_outputs(self, _: nn.Module, __: Any, output: Any) -> Any:
        return map_tensors(output, lambda t: t.detach().requires_grad_(t.is_floating_point()))


_JOINS = (torch.cat, torch.concat, torch.concatenate)

_RESHAPES = (
    *(torch.flatten, torch.reshape, torch.unflatten),
    *(torch.Tensor.flatten, torch.Tensor.reshape, torch.Tensor.unflatten, torch.Tensor.view),
)


def _reached_from(starts: Sequence[Any], wanted: set[Any]) -> set[Any]:
    """Return the autograd nodes of ``wanted`` that are a strict ancestor of some start."""
    reached: set[Any] = set()
    seen: set[Any] = set()
    stack = [parent for start in starts for parent, _ in start.next_functions if parent is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in wanted:
            reached.add(node)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return reached
