"""Pruning groups: which channels must be removed together, found by running the module's own steps.

A *group* is a set of coupled slots (see :mod:`~lightning_softprune.layers`) together with its *channels*: the smallest
sets of indices that can go at once. The dependency graph comes from torch-pruning (DepGraph, arXiv 2301.12900); this
module is the only one that imports it. From its graph we walk each group ourselves, because one thing is lost in
torch-pruning's own groups: which *other* indices of a group an index drags along (``chunk`` and add, shared latents,
attention heads). Indices that share a slot position are united, and so are the equal parts of grouped layers.

The module is traced by running its steps, so no example input is asked for. What a step computes last, what it feeds
to layers that cannot be sliced and what the user asks to ignore ends in a *marker*; a group that reaches a marker is
not prunable, for the marker's reason. Whatever the graph gets wrong (a ``view`` with a constant, a tensor added to
the raw input) is found by :func:`probe`: remove one channel, run, undo.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch_pruning import _helpers, ops
from torch_pruning.dependency import index_mapping, shape_infer

from lightning_softprune.layers import Layout, layout_of
from lightning_softprune.utilities.patterns import no_match

__all__ = ["Component", "Member", "PruningGroup", "assign_components", "match_modules", "trace_groups"]

IntArray = NDArray[np.int64]
Step = Callable[[], Any]

_MOST_VISITS = 100_000
"""A walk that long goes in circles."""


@dataclass(frozen=True)
class Member:
    """One slot of one layer (or one dimension of a bare parameter) that belongs to a group.

    Attributes:
        module: Name of the layer or parameter, as in ``named_modules()`` / ``named_parameters()``.
        slot: ``"in"``, ``"out"``, ``"both"``, or ``"dim<k>"`` for a bare parameter.
        owner: The group's channel that each index of the slot belongs to, -1 for indices of other groups; shape
            ``(slot size,)``.
    """

    module: str
    slot: str
    owner: IntArray

    def __str__(self) -> str:
        return f"{self.module} ({self.slot})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Member):
            return NotImplemented
        return (self.module, self.slot) == (other.module, other.slot) and np.array_equal(self.owner, other.owner)

    def __hash__(self) -> int:
        return hash((self.module, self.slot))


@dataclass(frozen=True)
class PruningGroup:
    """Channels that must be removed together, because layers depend on each other.

    Attributes:
        name: Unique name: the first layer that produces the channels.
        component: The component the members lie in; several are joined by ``+``.
        kind: ``"intra"`` (one component) or ``"inter"`` (the group couples several).
        num_channels: Number of removable units.
        members: The coupled slots.
        prunable: Whether the group takes part in a search.
        reason: Why it does not; empty exactly when it does.
    """

    name: str
    component: str
    kind: str
    num_channels: int
    members: tuple[Member, ...]
    prunable: bool = True
    reason: str = ""

    def refuse(self, reason: str) -> PruningGroup:
        """Return this group as not prunable."""
        return replace(self, prunable=False, reason=reason)

    def slots(self) -> set[tuple[str, str]]:
        """The ``(module, slot)`` pairs of the members."""
        return {(member.module, member.slot) for member in self.members}


@dataclass(frozen=True)
class Component:
    """A named sub-network: the modules whose names match one of the patterns, and everything inside them."""

    name: str
    patterns: tuple[str, ...]

    def contains(self, module: str) -> bool:
        """Whether a module lies in this component."""
        parents = module.split(".")
        names = [".".join(parents[:depth]) for depth in range(1, len(parents) + 1)]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.patterns)


def match_modules(model: nn.Module, patterns: Iterable[str], argument: str) -> dict[str, list[str]]:
    """Find the modules (and bare parameters) that each pattern names.

    Args:
        model: Where to look.
        patterns: ``fnmatch`` patterns of module names.
        argument: The user's argument, for the error.

    Raises:
        ValueError: A pattern matches nothing; the message gives the nearest module names.
    """
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in names or "." not in name]
    found = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(no_match(argument, pattern, names, "module"))
        found[pattern] = hits
    return found


def default_components(model: nn.Module) -> list[Component]:
    """The top-level children with parameters; a single wrapping child is looked through."""
    prefix, current = "", model
    while True:
        children = [(name, child) for name, child in current.named_children() if any(True for _ in child.parameters())]
        bare = any(True for _ in current.parameters(recurse=False))
        nested = len(children) == 1 and not bare and any(True for _ in children[0][1].children())
        if not nested:
            return [Component(name, (prefix + name,)) for name, _ in children]
        prefix, current = f"{prefix}{children[0][0]}.", children[0][1]


def assign_components(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    components: Mapping[str, Sequence[str]] | None,
    twins: Iterable[str] = (),
) -> list[PruningGroup]:
    """Write component and kind into each group.

    Args:
        model: The traced model.
        groups: Groups of it.
        components: Component name -> module-name patterns; ``None``: the default components. Modules of the default
            components that no pattern names keep their default.
        twins: Modules that only follow others: what is in them does not count.

    Raises:
        ValueError: A pattern matches nothing.
    """
    named = []
    if components is not None:
        for name, patterns in components.items():
            match_modules(model, patterns, f"components[{name!r}]")
            named.append(Component(name, tuple(patterns)))
    defaults = default_components(model)

    def component_of(module: str) -> str:
        for component in (*named, *defaults):
            if component.contains(module):
                return component.name
        return module.split(".")[0]

    assigned = []
    for group in groups:
        own = [member.module for member in group.members if not any(_inside(member.module, twin) for twin in twins)]
        names = list(dict.fromkeys(map(component_of, own)))
        kind = "intra" if len(names) <= 1 else "inter"
        assigned.append(replace(group, component="+".join(names), kind=kind))
    return assigned


def mirror_twins(model: nn.Module, groups: Sequence[PruningGroup], twins: Mapping[str, str]) -> list[PruningGroup]:
    """Let twins follow the modules they mirror: the same plan, no coefficients of their own.

    Args:
        model: The traced model.
        groups: Groups of it.
        twins: Module name -> the module it mirrors (target networks, EMA teachers, momentum encoders).

    Returns:
        The groups without those of the twins; every member inside a mirrored module has its twin beside it.

    Raises:
        ValueError: A name matches no module, or a twin's parameters are not those of the module it mirrors.
    """
    match_modules(model, [*twins, *twins.values()], "twins")
    for twin, original in twins.items():
        shapes = [
            {name: tuple(p.shape) for name, p in model.get_submodule(module).named_parameters()}
            for module in (twin, original)
        ]
        if shapes[0] != shapes[1]:
            differing = sorted(dict(shapes[0].items() ^ shapes[1].items()))
            raise ValueError(
                f"twins: {twin!r} does not mirror {original!r}; different are: {', '.join(map(repr, differing))}"
            )
    mirrored = []
    for group in groups:
        own = [member for member in group.members if not any(_inside(member.module, twin) for twin in twins)]
        if not own or any(_inside(group.name.partition("#")[0], twin) for twin in twins):
            continue
        added = [
            replace(member, module=twin + member.module[len(original) :])
            for member in own
            for twin, original in twins.items()
            if _inside(member.module, original)
        ]
        mirrored.append(replace(group, members=(*own, *added)))
    return mirrored


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def trace_groups(model: nn.Module, steps: Sequence[Step], ignore: Sequence[str] = ()) -> list[PruningGroup]:
    """Find every group of a model by running it.

    Args:
        model: The model; its layers are run by ``steps`` under grad mode, in eval mode, and are not changed.
        steps: Functions that run the model (its ``validation_step`` on a batch, ...). What they return is not used.
        ignore: Patterns of modules that must keep their outputs and inputs.

    Returns:
        The groups in the order in which the model runs them; after them, one entry per layer or bare parameter that
        is in no group, with the reason. Components are not assigned yet.

    Raises:
        ValueError: A pattern of ``ignore`` matches nothing.
    """
    ignored = {n: p for p, names in match_modules(model, ignore, "ignore").items() for n in names}
    trace = _trace(model, steps)
    walker = _Walker(trace)
    groups: list[PruningGroup] = []
    seen: set[tuple[str, str]] = set()
    for module in trace.order:
        name = trace.names[module]
        layout = trace.layouts[module]
        slot = layout.slot("out")
        if slot not in layout.slots or (name, slot) in seen:
            continue
        if module not in trace.graph.module2node:
            continue  # it ran without gradients, and nothing is known of what it is coupled to
        if slot == "both" and not isinstance(module, nn.Embedding):
            continue  # it only passes on what another layer produces
        walked = walker.walk(module)
        group = _build(name, walked, trace, ignored)
        seen |= group.slots()
        groups.append(group)
    groups = _refuse_torn_parameters(model, groups, trace)
    return _unique_names(groups) + list(_left_alone(model, groups, trace))


# ---------------------------------------------------------------------------------------------------------- tracing


@dataclass
class _Trace:
    graph: Any  # torch_pruning.DependencyGraph
    names: dict[Any, str]  # layer or bare parameter -> name
    layouts: dict[nn.Module, Layout]
    order: list[nn.Module]  # sliceable layers in the order in which they first ran
    ran: set[str]  # names of the layers that ran, sliceable or not
    reasons: dict[str, str]  # names of layers that cannot be sliced -> why
    markers: dict[Any, str]  # autograd node -> why a group that reaches it is not prunable
    owners: dict[nn.Parameter, nn.Module]  # parameters of the sliceable layers


def _trace(model: nn.Module, steps: Sequence[Step]) -> _Trace:
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    layouts: dict[nn.Module, Layout] = {}
    reasons: dict[str, str] = {}
    inside_attention: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention |= {child for child in module.modules() if child is not module}
    for name, module in model.named_modules():
        if module in inside_attention:
            continue
        found = layout_of(module)
        if isinstance(found, Layout):
            layouts[module] = found
        elif found is not None:
            reasons[name] = found

    recorder = _Recorder(names, layouts, reasons)

    def run(_: nn.Module, __: Any) -> list[torch.Tensor]:
        with recorder.hooks(model), recorder:
            for step in steps:
                step()
        return recorder.finish()

    graph = _Graph()
    with _traceable(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning announces bare parameters and operators it does not know
        graph.build(model, run)
        _map_indices(graph, recorder)
    names.update({p: n for n, p in model.named_parameters()})
    owners = {parameter: layer for layer in layouts for parameter in layer.parameters(recurse=False)}
    return _Trace(graph, names, layouts, recorder.order, recorder.ran, reasons, recorder.markers, owners)


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


class _Recorder(TorchFunctionMode):
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
        handles = []
        for module in model.modules():
            name = self.names[module]
            if name in self.reasons:
                handles.append(module.register_forward_pre_hook(self._cut_inputs, with_kwargs=True))
                handles.append(module.register_forward_hook(self._cut_outputs))
            elif any(True for _ in module.parameters(recurse=False)) or module in self.layouts:
                handles.append(module.register_forward_hook(self._note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
            end = tensor + 0  # an autograd node of its own, so that the graph ends here whatever else follows
            self.markers[end.grad_fn] = reason
            self._ends.append(end)

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.ran.add(self.names[module])
        if module in self.layouts and module not in self.order:
            self.order.append(module)
        tensors = _tensors(output)
        if module in self.layouts:
            tensors = tensors[:1]  # attention weights hold no channels
        for tensor in tensors:
            if tensor.grad_fn is not None and tensor.ndim > 0:
                self._outputs.append((tensor, self.names[module]))
                self.made[module].append(tensor.grad_fn)

    def _cut_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self.names[module]
        self.ran.add(name)
        for tensor in _tensors((args, kwargs)):
            self._mark(tensor, f"feeds {name}: {self.reasons[name]}")
        return _map_tensors((args, kwargs), torch.Tensor.detach)

    def _cut_outputs(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return _map_tensors(output, lambda t: t.detach().requires_grad_(t.is_floating_point()))


_JOINS = (torch.cat, torch.concat, torch.concatenate)
_RESHAPES = (
    *(torch.flatten, torch.reshape, torch.unflatten),
    *(torch.Tensor.flatten, torch.Tensor.reshape, torch.Tensor.unflatten, torch.Tensor.view),
)


def _map_indices(graph: Any, recorder: _Recorder) -> None:
    """Map indices across reshapes, concatenations, splits and slices.

    torch-pruning guesses which input of a node is which from the order in which it met them. The edges of the
    autograd graph say it: an edge knows the number of the output it comes from. Shapes are those that were seen.
    """
    for node in list(graph.module2node.values()):
        made = node.grad_fn
        if node.type == ops.OPTYPE.CONCAT and made in recorder.joins:
            dim, sizes, joined = recorder.joins[made]
            offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
            along = _along_channels(graph, node, dim, joined)
            inputs = [parent for parent, _ in made.next_functions]
            for other in set(node.inputs):
                places = [j for j, parent in enumerate(inputs) if parent in recorder.makers(other)]
                spans = [offsets[j : j + 2] for j in places] if along else []
                _set(node, other, 1, [index_mapping._ConcatIndexMapping(offset=x, reverse=True) for x in spans])
                _set(other, node, 1, [index_mapping._ConcatIndexMapping(offset=x, reverse=False) for x in spans])
        elif node.type == ops.OPTYPE.SPLIT and hasattr(made, "_saved_dim"):
            shape = tuple(made._saved_self_sym_sizes)
            dim = _signed(made._saved_dim) % len(shape)
            widths = getattr(made, "_saved_split_sizes", None) or _even(shape[dim], made._saved_split_size)
            offsets = np.concatenate([[0], np.cumsum(widths)]).tolist()
            along = dim == 1 or (len(shape) == 3 and dim == 2)
            for other in set(node.outputs):
                edges = [edge for maker in recorder.makers(other) for edge in maker.next_functions]
                spans = [offsets[j : j + 2] for parent, j in edges if parent is made] if along else []
                _set(node, other, 0, [index_mapping._SplitIndexMapping(offset=x, reverse=False) for x in spans])
                _set(other, node, 0, [index_mapping._SplitIndexMapping(offset=x, reverse=True) for x in spans])
        elif node.type == ops.OPTYPE.SLICE and hasattr(made, "_saved_dim"):
            shape = tuple(made._saved_self_sym_sizes)
            dim = _signed(made._saved_dim) % len(shape)
            if (dim == 1 and len(shape) != 3) or (len(shape) == 3 and dim == 2):
                index_mapping.update_slice_index_mapping(graph, node)
        elif node.type == ops.OPTYPE.RESHAPE and made in recorder.reshapes:
            mapping, back = _reshape_mappings(graph, node, *recorder.reshapes[made])
            for other in set(node.inputs):
                _set(other, node, 0, [mapping] if mapping else [])
                _set(node, other, 0, [back] if back else [])


def _reshape_mappings(graph: Any, node: Any, before: torch.Size, after: torch.Size) -> tuple[Any, Any]:
    """The index mapping through a reshape and the one back; a pair of ``None`` where channels stay channels."""
    rows = len(before) > 1 and len(after) > 1 and before[0] == after[0]
    if rows and len(after) == 2 and len(before) > 2:  # flatten
        size, wide = before, after[1]
        channels = shape_infer.infer_out_channels_recursively(graph, node.inputs[0], [0]) if node.inputs else None
        if len(size) == 3 and channels == size[2] and channels != size[1]:  # tokens: the channels repeat
            return _Tiles(size[2], wide // size[2]), _Tiles(size[2], wide // size[2], back=True)
        return _Blocks(wide // size[1]), _Blocks(wide // size[1], back=True)
    if rows and len(before) == 2 and len(after) > 2:  # unflatten
        return _Blocks(before[1] // after[1], back=True), _Blocks(before[1] // after[1])
    return None, None


class _Blocks:
    """Channel c becomes the ``size`` consecutive indices ``c * size, ...``; or the way back."""

    def __init__(self, size: int, back: bool = False) -> None:
        self.size, self.back = size, back

    def __call__(self, indices: Sequence[Any]) -> list[Any]:
        if self.back:
            return list(dict.fromkeys(_helpers._HybridIndex(i.idx // self.size, i.root_idx) for i in indices))
        spread = range(self.size)
        return [_helpers._HybridIndex(i.idx * self.size + offset, i.root_idx) for i in indices for offset in spread]


class _Tiles:
    """Channel c becomes the indices ``c, c + width, c + 2 * width, ...``; or the way back."""

    def __init__(self, width: int, copies: int, back: bool = False) -> None:
        self.width, self.copies, self.back = width, copies, back

    def __call__(self, indices: Sequence[Any]) -> list[Any]:
        if self.back:
            return list(dict.fromkeys(_helpers._HybridIndex(i.idx % self.width, i.root_idx) for i in indices))
        copies = range(self.copies)
        return [_helpers._HybridIndex(i.idx + copy * self.width, i.root_idx) for i in indices for copy in copies]


def _along_channels(graph: Any, node: Any, dim: int, shape: torch.Size) -> bool:
    """Whether a concatenation along a dimension, with a result of this shape, joins channels, not samples or tokens."""
    wanted = shape_infer.infer_in_channels_recursively(graph, node, recursive_depth=[0])
    if dim == 0:
        return False
    if wanted != shape[dim] and wanted in shape[1:]:
        return False  # the channels are another dimension
    if dim == 1 and len(shape) != 3:
        return True  # also where what follows reads only a part
    return wanted is None or bool(wanted % shape[dim] == 0)


def _set(source: Any, target: Any, place: int, mappings: Sequence[Any]) -> None:
    """Give the dependencies from one node to another these mappings, in order; without mappings, none."""
    found = [dependency for dependency in source.dependencies if dependency.target is target]
    for number, dependency in enumerate(found):
        dependency.index_mapping[place] = mappings[number % len(mappings)] if mappings else None


def _even(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _signed(value: int) -> int:
    """Autograd hands out negative dimensions as unsigned 64-bit numbers."""
    return value - 2**64 if value >= 2**63 else value


def _tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map_tensors(tree, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, nn.utils.rnn.PackedSequence):
        return tree._replace(data=function(tree.data))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map_tensors(value, function) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map_tensors(value, function) for value in tree)
    return tree


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


# ---------------------------------------------------------------------------------------------------------- walking


@dataclass
class _Walked:
    """One group as pairs of (slot index, root index), slot by slot."""

    pairs: dict[tuple[str, str], set[tuple[int, int]]]
    sizes: dict[tuple[str, str], int]
    parts: dict[tuple[str, str], int]
    reasons: list[str]
    num_roots: int


class _Walker:
    """Follows a layer's output channels through the dependency graph."""

    def __init__(self, trace: _Trace) -> None:
        self.trace = trace

    def walk(self, root: nn.Module) -> _Walked:
        graph = self.trace.graph
        pruner = graph.get_pruner_of_module(root)
        start = graph.module2node[root]
        size = self.trace.layouts[root].slots[self.trace.layouts[root].slot("out")]
        indices = tuple(_helpers._HybridIndex(idx=i, root_idx=i) for i in range(size))
        walked = _Walked({}, {}, {}, [], size)
        self._visit(walked, start, pruner.prune_out_channels, indices)
        stack = [(start, pruner.prune_out_channels, indices)]
        seen = {(start, pruner.prune_out_channels, hash(indices))}
        while stack:
            node, triggered, indices = stack.pop()
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(triggered):
                    continue
                mapped = indices
                for mapping in dependency.index_mapping:
                    if mapping is not None:
                        mapped = tuple(mapping(mapped))
                state = (dependency.target, dependency.handler, hash(mapped))
                if not mapped or state in seen:
                    continue
                seen.add(state)
                if not self._visit(walked, dependency.target, dependency.handler, mapped) or len(seen) > _MOST_VISITS:
                    walked.reasons.append("the dependency graph does not match its layers' sizes")
                    return walked
                stack.append((dependency.target, dependency.handler, mapped))
        return walked

    def _visit(self, walked: _Walked, node: Any, handler: Any, indices: Sequence[Any]) -> bool:
        """Note the indices at a layer; whether they fit it."""
        trace, module = self.trace, node.module
        if isinstance(module, ops._OutputOp):
            walked.reasons.append(trace.markers.get(node.grad_fn, "is an output of the network"))
            return True
        if isinstance(module, nn.Parameter):
            slot, size, parts = f"dim{node.pruning_dim}", module.shape[node.pruning_dim], 1
            layer = trace.owners.get(module)
            if layer is not None:  # of a layer type that torch-pruning does not know (RMSNorm)
                module, slot = layer, trace.layouts[layer].slot("out")
        elif module in trace.layouts:
            layout = trace.layouts[module]
            slot = layout.slot("out" if trace.graph.is_out_channel_pruning_fn(handler) else "in")
            if slot not in layout.slots:
                return True  # a PReLU with one slope for all channels
            size, parts = layout.slots[slot], layout.parts.get(slot, 1)
        else:
            self._pass_on(walked, node, indices)
            return True  # an operator: it passes indices on and keeps nothing
        if any(pair.idx >= size or pair.root_idx is None for pair in indices):
            return False
        key = (trace.names[module], slot)
        walked.pairs.setdefault(key, set()).update((pair.idx, pair.root_idx) for pair in indices)
        walked.sizes[key], walked.parts[key] = size, parts
        return True

    def _pass_on(self, walked: _Walked, node: Any, indices: Sequence[Any]) -> None:
        """Note what an operator asks for that counts channels: with fewer of them it would pick others."""
        made = node.grad_fn
        if node.type not in (ops.OPTYPE.SPLIT, ops.OPTYPE.SLICE) or not hasattr(made, "_saved_dim"):
            return
        shape = tuple(made._saved_self_sym_sizes)
        dim = _signed(made._saved_dim) % len(shape)
        if node.type == ops.OPTYPE.SLICE:
            if made._saved_step > 1 and (dim == 1 or (len(shape) == 3 and dim == 2)):
                walked.reasons.append(f"a slice takes its channels in steps of {made._saved_step}")
        elif hasattr(made, "_saved_split_size") and (dim == 1 or (len(shape) == 3 and dim == 2)):
            size, width = shape[dim], made._saved_split_size
            if size % width:
                walked.reasons.append("its channels are chunked into unequal parts")
                return
            key = ("", str(id(node)))  # no layer: its parts lose the same channels, like those of a grouped layer
            walked.pairs.setdefault(key, set()).update((pair.idx, pair.root_idx) for pair in indices)
            walked.sizes[key], walked.parts[key] = size, size // width


def _build(name: str, walked: _Walked, trace: _Trace, ignored: Mapping[str, str]) -> PruningGroup:
    roots = _Union(walked.num_roots)
    at: dict[tuple[str, str], dict[int, int]] = {}
    for key, pairs in walked.pairs.items():
        place: dict[int, int] = {}
        for index, root in pairs:
            roots.unite(place.setdefault(index, root), root)
        at[key] = place
    reason = walked.reasons[0] if walked.reasons else ""
    for key, place in at.items():
        parts, size = walked.parts[key], walked.sizes[key]
        if parts == 1:
            continue
        if len(place) != size:
            reason = reason or f"{key[0] or 'a chunk'} has {parts} parts, which channels of several groups share"
            continue
        width = size // parts
        for index, root in place.items():
            roots.unite(place[index % width], root)
    channel = roots.numbers()
    members = []
    for key, place in at.items():
        if not key[0]:
            continue  # a chunk
        owner = np.full(walked.sizes[key], -1, dtype=np.int64)
        for index, root in place.items():
            owner[index] = channel[root]
        members.append(Member(*key, owner))
    num_channels = int(channel.max()) + 1
    if not reason and num_channels < 2:
        reason = "it has a single channel"
    for member in members:
        for hit in _self_and_parents(member.module):
            if hit in ignored:
                reason = f"ignored: {member.module} matches {ignored[hit]!r}"
    return PruningGroup(name, "", "intra", num_channels, tuple(members), not reason, reason)


def _self_and_parents(name: str) -> list[str]:
    parents = name.split(".")
    return [".".join(parents[:depth]) for depth in range(1, len(parents) + 1)]


class _Union:
    """Union-find over root indices; a set's number follows its smallest index."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def unite(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self.parent[max(one, other)] = min(one, other)

    def numbers(self) -> IntArray:
        heads = np.array([self.find(item) for item in range(len(self.parent))], dtype=np.int64)
        return np.unique(heads, return_inverse=True)[1].astype(np.int64)


# --------------------------------------------------------------------------------------------- what is left alone


def _refuse_torn_parameters(model: nn.Module, groups: list[PruningGroup], trace: _Trace) -> list[PruningGroup]:
    """Refuse groups that would slice a shared parameter (tied weights) on one side only, or in two ways."""
    modules = dict(model.named_modules())
    owners: dict[int, list[tuple[str, str, int]]] = defaultdict(list)  # parameter -> (layer, slot, dim)
    for module, layout in trace.layouts.items():
        for axis in layout.axes:
            tensor = _get(module, axis.tensor)
            if isinstance(tensor, nn.Parameter):
                owners[id(tensor)].append((trace.names[module], axis.slot, axis.dim))
    kept = []
    for group in groups:
        reason = ""
        places = {(member.module, member.slot): member.owner for member in group.members}
        for name, slot in places:
            found = trace.layouts.get(modules[name]) if name in modules else None
            for axis in found.axes if found and group.prunable else ():
                tensor = _get(modules[name], axis.tensor)
                if axis.slot != slot or not isinstance(tensor, nn.Parameter):
                    continue
                for other, other_slot, dim in owners[id(tensor)]:
                    if dim != axis.dim or (other, other_slot) == (name, slot):
                        continue
                    there = places.get((other, other_slot))
                    if there is None or not np.array_equal(there, places[name, slot]):
                        reason = f"{name} shares its {axis.tensor} with {other}, which needs other channels of it"
        kept.append(group.refuse(reason) if reason else group)
    return kept


def _left_alone(model: nn.Module, groups: Sequence[PruningGroup], trace: _Trace) -> Iterator[PruningGroup]:
    """Entries for layers and bare parameters that are in no group, so that nothing is left out in silence."""
    covered = {member.module for group in groups for member in group.members}
    covered |= {f"{name}.out_proj" for name in covered}
    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if not own or name in covered or _parent_in(name, covered, model):
            continue
        if any(parent in trace.reasons for parent in _self_and_parents(name)[:-1]):
            continue  # said of the layer it belongs to
        layout = trace.layouts.get(module)
        if layout is not None or name in trace.reasons:
            if name in trace.reasons:
                reason = trace.reasons[name]
            elif name not in trace.ran:
                reason = f"{name} was run by neither validation_step nor training_step"
            elif module not in trace.graph.module2node:
                reason = f"{name} ran without gradients only, so what it is coupled to is not known"
            else:
                reason = f"no sliceable layer produces the channels of {name}"
            yield PruningGroup(name, "", "intra", 0, (Member(name, "out", np.empty(0, np.int64)),), False, reason)
            continue
        for parameter in own:
            full = f"{name}.{parameter}".lstrip(".")
            if full not in covered:
                reason = f"{full} is a parameter of {type(module).__name__}, which is no layer that can be sliced"
                yield PruningGroup(full, "", "intra", 0, (Member(full, "dim0", np.empty(0, np.int64)),), False, reason)


def _parent_in(name: str, covered: set[str], model: nn.Module) -> bool:
    """Whether the module lies inside an attention layer that is covered (its output projection)."""
    parent = name.rpartition(".")[0]
    return bool(parent) and isinstance(model.get_submodule(parent), nn.MultiheadAttention) and parent in covered


def _unique_names(groups: Sequence[PruningGroup]) -> list[PruningGroup]:
    """One producer may lead two groups (disjoint channels); number them."""
    count: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        count[group.name] += 1
        named.append(replace(group, name=f"{group.name}#{count[group.name]}") if count[group.name] > 1 else group)
    return named


def _get(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module
