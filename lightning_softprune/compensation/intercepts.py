"""What becomes of the constants that compensation adds to readers without a bias.

Such a reader gets a bias, unless

- a BatchNorm follows it: in eval mode it subtracts its running mean, and ``W x + b - mean`` is ``W x - (mean - b)``; in
  training it subtracts the batch's mean, to which ``b`` does not matter. So its running mean takes the constant, and
  the network keeps its parameters and the names in its state dict. Only where this BatchNorm alone reads the outputs,
  and nothing else; that is found by watching every function that is called with them while the steps run.
- code of its owner's computes with its weight by itself, as the merging of low-rank factors does, which would leave the
  bias out: the reader gets no constant, and its regressions have no intercept.
- no optimizer could train a bias there (`surgery/optimizers.py`), or the layer computes with none: the same.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_softprune.calibration import find_readers, weight_geometry
from lightning_softprune.graph import PruningGroup, layer_type, parts_called, takes_bias
from lightning_softprune.surgery import weights_without_bias
from lightning_softprune.utilities.distributed import same_over_processes
from lightning_softprune.utilities.hooks import registered
from lightning_softprune.utilities.nested import attribute_at, tensors_in
from lightning_softprune.utilities.ownership import is_framework_name, names_by_function


@dataclass(frozen=True)
class Intercepts:
    """Readers without a bias that are to get none.

    Attributes:
        norms: Reader -> the BatchNorm whose running mean takes what would be its bias.
        refused: Readers whose regressions have no intercept.
    """

    norms: Mapping[str, str] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()


def find_intercepts(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    steps: Sequence[Callable[[], Any]],
    optimizers: Sequence[Optimizer] = (),
    twins: Mapping[str, str] | None = None,
) -> Intercepts:
    """Decide, for the readers without a bias, which of them are to get none.

    A twin and its original are treated alike: their parameters correspond.

    Args:
        model: The dense model.
        groups: Its prunable groups.
        steps: Run the model.
        optimizers: Those of the model.
        twins: Module name -> the module it mirrors.
    """
    layers = {reader.name: model.get_submodule(reader.name) for reader in find_readers(model, groups)}
    layers = {name: layer for name, layer in layers.items() if _lacks_bias(layer)}
    if not layers:
        return Intercepts()
    uses = _Uses(model, layers)
    hooks = (
        layer.register_forward_hook(lambda _, __, output, name=name: uses.watch(name, output), prepend=True)
        for name, layer in layers.items()
    )
    with parts_called(model), registered(hooks), torch.no_grad():
        for step in steps:
            with uses:
                returned = step()
            uses.end_step(returned)
    norms, ran = _agreed(model, uses.absorbing()), set(uses.read_by)
    pairs = list(_pairs(layers, twins or {}))
    for twin, original, path, path_of_original in pairs:
        norm = norms.get(original, "")
        mirrored = path + norm.removeprefix(path_of_original)
        if twin not in ran and norm.startswith(f"{path_of_original}.") and mirrored in uses.reads:
            norms[twin] = mirrored
    for twin, original, *_ in pairs:
        if not {twin, original} <= norms.keys():
            norms = {name: norm for name, norm in norms.items() if name not in (twin, original)}
    weights = {
        name: layer.get_parameter(weight_geometry(layer).weight)
        for name, layer in layers.items()
        if name not in norms and takes_bias(layer)
    }
    refused = weights_without_bias(optimizers, weights)
    refused |= {name for name, layer in layers.items() if name not in norms and not takes_bias(layer)}
    refused |= {name for name in layers if name not in norms and _is_read_apart(model, name)}
    for twin, original, *_ in pairs:
        refused |= {twin, original} if refused & {twin, original} else set()
    return Intercepts(norms, frozenset(refused))


def _lacks_bias(layer: nn.Module) -> bool:
    geometry = weight_geometry(layer)
    return geometry.is_whole and layer._parameters.get(geometry.bias) is None


_PREPARES = ("init", "reset", "tie")
"""In the names of functions that only give weights their values."""


def _is_read_apart(model: nn.Module, name: str) -> bool:
    """Whether code of a module around a layer names the layer and its weight, outside of what training runs.

    What PyTorch and Lightning call (`forward`, steps, hooks) is left out: there the layer itself is called as well.
    """
    weight = weight_geometry(model.get_submodule(name)).weight
    above, parts = [""], name.split(".")
    above += [".".join(parts[:end]) for end in range(1, len(parts))]
    for place, path in enumerate(above):
        keyed = [isinstance(model.get_submodule(other), _CONTAINERS) for other in above[place:]]
        if keyed[0]:
            continue
        wanted = {weight, *(part for part, key in zip(parts[place:], keyed, strict=True) if not key)}
        kind: type = type(model.get_submodule(path))
        for function, names in names_by_function(kind):
            prepares = "init" in names or any(word in function for word in _PREPARES)
            if wanted <= names and not prepares and not is_framework_name(kind, function):
                return True
    return False


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)
"""Their layers have keys, which no code names."""


def _pairs(names: Mapping[str, Any], twins: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """Twin and original among the readers, and the modules in which they correspond."""
    for twin, original in twins.items():
        for name in names:
            if name.startswith(f"{twin}."):
                other = original + name[len(twin) :]
                if other in names:
                    yield name, other, twin, original


def _agreed(model: nn.Module, norms: Mapping[str, str]) -> dict[str, str]:
    """Those that every process has found; which names there are is the same everywhere."""
    names = [name for name, _ in model.named_modules()]
    place = {name: number for number, name in enumerate(names)}
    device = next(model.parameters()).device
    same = same_over_processes([place[norms[name]] if name in norms else -1 for name in names], device)
    return {reader: norm for reader, norm in norms.items() if same[place[reader]]}


_ANYTHING = ""
"""Whoever reads, or is read, besides the layers in question."""

_LOOKS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device"})
"""Functions that read no values."""


_COPIES = frozenset({"__get__", "detach", "clone", "narrow", "copy_"})
"""What a step that leaves nothing behind does with every buffer, to put it back."""


class _Uses(TorchFunctionMode):
    """Notes what is called with the outputs of layers and with the running means of BatchNorms."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.norms = [
            (name, module, buffer)
            for name, module in model.named_modules()
            if (entry := layer_type(module)) is not None and (buffer := entry.mean_buffer(module)) is not None
        ]
        self.outputs: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self.read_by: dict[str, set[str]] = {}  # layer -> BatchNorms that read its outputs
        self.reads: dict[str, set[str]] = {name: set() for name, *_ in self.norms}  # BatchNorm -> layers that it reads

    def watch(self, name: str, output: Any) -> None:
        readers = self.read_by.setdefault(name, set())
        if not isinstance(output, torch.Tensor) or output.ndim != self._rank(name):
            readers.add(_ANYTHING)
        else:
            key = id(output)  # for as long as it lives; whole batches of all layers are not to be held on to
            self.outputs[key] = (weakref.ref(output, lambda _: self.outputs.pop(key, None)), name)

    def _rank(self, name: str) -> int:
        """Dimensions of outputs whose second one holds the layer's channels, as a BatchNorm takes them."""
        kernel = weight_geometry(self.layers[name]).kernel
        return 2 if kernel is None else 2 + len(kernel.size)

    def end_step(self, returned: Any) -> None:
        self._read_by_others(tensors_in(returned))
        self.outputs.clear()

    def absorbing(self) -> dict[str, str]:
        """Layers whose outputs one BatchNorm reads, and nothing else, and that reads nothing else -> this BatchNorm."""
        found = {}
        for name, readers in self.read_by.items():
            norm = next(iter(readers), _ANYTHING)
            if norm != _ANYTHING and len(readers) == 1 and self.reads[norm] == {name}:
                found[name] = norm
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _only_looks(func):
            read = tensors_in((args, kwargs))
            if func is F.batch_norm:
                read = self._normalise(args, kwargs, read)
            self._read_by_others(read, copies=getattr(func, "__name__", "") in _COPIES)
        return func(*args, **kwargs)

    def _normalise(self, args: Any, kwargs: Any, read: list[torch.Tensor]) -> list[torch.Tensor]:
        """Note a BatchNorm's input and running mean; the tensors that are read besides."""
        given = inspect.signature(F.batch_norm).bind(*args, **kwargs).arguments
        source, mean = given["input"], given.get("running_mean")
        names = [name for name, norm, buffer in self.norms if mean is not None and getattr(norm, buffer) is mean]
        if id(source) not in self.outputs or not names:
            return read
        layer = self.outputs[id(source)][1]
        for name in names:  # several where modules share the tensor
            self.reads[name].add(layer)
            self.read_by[layer].add(name)
        return [tensor for tensor in read if tensor is not source and tensor is not mean]

    def _read_by_others(self, tensors: Sequence[torch.Tensor], copies: bool = False) -> None:
        ids = {id(tensor) for tensor in tensors}
        for key in ids & self.outputs.keys():
            self.read_by[self.outputs[key][1]].add(_ANYTHING)
        for name, norm, buffer in [] if copies else self.norms:
            if id(attribute_at(norm, buffer)) in ids:
                self.reads[name].add(_ANYTHING)


def _only_looks(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property: those that give tensors read values
        return getattr(getattr(func, "__self__", None), "__name__", "") in _PROPERTIES
    return name in _LOOKS or (name.startswith("is_") and name != "is_nonzero")


_PROPERTIES = frozenset(
    {"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "names"}
)
