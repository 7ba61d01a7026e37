"""Weights that a layer computes from other tensors, its *sources*, each time it is used.

Weight norm has two: a direction of the weight's shape, and one length per index of one dimension, or one for all. A
parametrization of PyTorch with one source of the weight's shape is served as well if it can compute any slice of what
it computes now, which is tried. Others (spectral norm, orthogonal) compute something else from a slice.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_softprune.utilities.hooks import forward_hook, forward_pre_hook, registered
from lightning_softprune.utilities.nested import attribute_at


@dataclass(frozen=True)
class ComputedWeight:
    """How a layer computes its weight.

    Attributes:
        name: Name of the weight.
        direction: Name, in the layer, of the source that has the weight's shape.
        length: Name of the source with the lengths that weight norm gives to it; empty for other parametrizations.
        dim: The dimension that has one length per index; -1 for one length of all.
        takes_any: Whether any values can be written; otherwise slices of those that it has.
    """

    name: str
    direction: str
    length: str = ""
    dim: int = -1
    takes_any: bool = True

    def sources(self, ndim: int) -> dict[str, Collection[int]]:
        """Names of the sources -> which of the weight's dimensions they have."""
        own: dict[str, Collection[int]] = {self.direction: range(ndim)}
        return own | ({self.length: () if self.dim < 0 else (self.dim,)} if self.length else {})

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names of the sources -> their shapes, for a weight of this shape."""
        if not self.length:
            return {self.direction: shape}
        lengths = tuple(n if dim == self.dim else 1 for dim, n in enumerate(shape)) if self.dim >= 0 else ()
        return {self.direction: shape, self.length: lengths}

    def value(self, layer: nn.Module) -> torch.Tensor:
        """The weight now."""
        with torch.inference_mode(False), torch.no_grad():
            source = _tensor(layer, self.direction)
            if self.length:
                found: torch.Tensor = torch._weight_norm(source, _tensor(layer, self.length), self.dim)
                return found
            return _forward(_parametrizations(layer, self.name), source)

    def settle(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Make a weight the computed one, whose sources were sliced alike: they change as little as possible."""
        if _is_close(self.value(layer), weight):
            return
        if self.length:
            with torch.inference_mode(False), torch.no_grad():
                direction, length = _tensor(layer, self.direction), _tensor(layer, self.length)
                along = self._sum(direction.double() * weight.double()) / self._sum(direction.double().square()).sqrt()
                length.copy_(along.reshape(length.shape))
        if not self.length or not _is_close(self.value(layer), weight):
            self.write(layer, weight)
        self.renew(layer)

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Make a weight the computed one, in place; a direction keeps its length, so that steps keep their size."""
        with torch.inference_mode(False), torch.no_grad():
            source = _tensor(layer, self.direction)
            if not self.length:
                source.copy_(_inverse(_parametrizations(layer, self.name), weight.to(source.dtype)))
                return
            length = _tensor(layer, self.length)
            sign = torch.where(length < 0, -1.0, 1.0).double()
            norm = self._sum(weight.double().square()).sqrt().reshape(length.shape)
            before = self._sum(source.double().square()).sqrt().reshape(length.shape)
            before = torch.where(before > 0, before, torch.ones_like(before))
            unit = weight.double() / torch.where(norm > 0, norm, torch.ones_like(norm))
            some = (
                torch.ones_like(unit) / max(unit.numel() // max(norm.numel(), 1), 1) ** 0.5
            )  # a zero has no direction
            source.copy_(sign * before * torch.where(norm > 0, unit, some))
            length.copy_(sign * norm)
        self.renew(layer)

    def renew(self, layer: nn.Module) -> None:
        """The older form of weight norm keeps what it has computed last as an attribute."""
        if self.name in vars(layer):
            vars(layer)[self.name] = self.value(layer)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all dimensions but that of the lengths."""
        return tensor.sum() if self.dim < 0 else tensor.movedim(self.dim, 0).flatten(1).sum(1)


def computed_weight(layer: nn.Module, name: str) -> ComputedWeight | str | None:
    """How a layer computes the weight of this name.

    Returns:
        That; or, as a string, by what, if slices of it cannot be computed; or ``None`` if it is not computed.
    """
    if parametrize.is_parametrized(layer):
        others = [other for other in _dictionary(layer) if other != name]
        if others:
            return f"a parametrization of its {others[0]}"
        return _by_parametrization(layer, name, _parametrizations(layer, name))
    if layer._parameters.get(name) is not None or not isinstance(vars(layer).get(name), torch.Tensor):
        return None
    for hook in layer._forward_pre_hooks.values():
        if type(hook) is WeightNorm and hook.name == name:
            return ComputedWeight(name, f"{name}_v", f"{name}_g", hook.dim)
        if type(hook) is SpectralNorm:
            return "SpectralNorm"
    return "code of its own"


_TRIED: MutableMapping[nn.Module, tuple[tuple[int, ...], ComputedWeight | None]] = weakref.WeakKeyDictionary()
"""What was found out of a parametrization by trying, for one shape."""


def _by_parametrization(layer: nn.Module, name: str, chain: Any) -> ComputedWeight | str:
    kinds = " and ".join(type(part).__name__.lstrip("_") for part in chain)
    place = f"parametrizations.{name}"
    if not chain.is_tensor:
        dim = getattr(chain[0], "dim", None)
        if kinds == "WeightNorm" and chain.ntensors == 2 and isinstance(dim, int):
            found = ComputedWeight(name, f"{place}.original1", f"{place}.original0", dim)
            shape = tuple(_tensor(layer, found.direction).shape)
            if found.shapes(shape)[found.length] == tuple(_tensor(layer, found.length).shape):
                return found
        return kinds
    shape = tuple(chain.original.shape)
    if chain not in _TRIED or _TRIED[chain][0] != shape:
        slices, takes_any = _tried(chain)
        served = ComputedWeight(name, f"{place}.original", takes_any=takes_any) if slices else None
        _TRIED[chain] = shape, served
    return _TRIED[chain][1] or kinds


def _tried(chain: Any) -> tuple[bool, bool]:
    """Whether a parametrization can compute slices of what it computes now; and whether any other values."""
    if any(part.state_dict() or not hasattr(part, "right_inverse") for part in chain):
        return False, False  # what has tensors of its own may have their shapes from the weight
    training = [(part, part.training) for part in chain.modules()]
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            chain.eval()
            whole = _forward(chain, chain.original)
            parts = [whole, *(whole.index_select(dim, _half(whole.shape[dim])) for dim in range(min(whole.ndim, 2)))]
            slices = whole.shape == chain.original.shape and all(_comes_back(chain, part) for part in parts)
            return slices, slices and _comes_back(chain, 0.5 * whole.max() - 2.0 * whole)
    except Exception:  # whatever the user's code says to another shape
        return False, False
    finally:
        for part, mode in training:
            part.training = mode


def _half(size: int) -> torch.Tensor:
    return torch.arange(0, size, 2)


def _comes_back(chain: Any, weight: torch.Tensor) -> bool:
    source = _inverse(chain, weight)
    return source.shape == weight.shape and _is_close(_forward(chain, source), weight)


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = float(other.abs().max()) if other.numel() else 0.0
    coarse = max(1e-5, 4 * torch.finfo(one.dtype).eps)
    return one.shape == other.shape and torch.allclose(one, other, rtol=coarse, atol=0.1 * coarse * scale)


def _inverse(chain: Any, weight: torch.Tensor) -> torch.Tensor:
    for part in reversed(list(chain)):
        weight = part.right_inverse(weight)
    return weight


def _forward(chain: Any, source: torch.Tensor) -> torch.Tensor:
    for part in chain:
        source = part(source)
    return source


def _dictionary(layer: nn.Module) -> Any:
    return layer.parametrizations


def _parametrizations(layer: nn.Module, name: str) -> Any:
    return _dictionary(layer)[name]


def _tensor(layer: nn.Module, path: str) -> torch.Tensor:
    found: torch.Tensor = attribute_at(layer, path)
    return found


@dataclass
class WeightGradients:
    """The gradients of computed weights: those of their sources are others.

    Attributes:
        values: Layers' identities -> each weight that one has computed since they were last forgotten.
    """

    values: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def of(self, layer: nn.Module) -> torch.Tensor | None:
        """The sum over all uses; ``None`` without one."""
        found = {id(value): value.grad for value in self.values.get(id(layer), ())}.values()
        grads = [grad for grad in found if grad is not None]
        return torch.stack([grad.to_dense() for grad in grads]).sum(0) if grads else None


@contextmanager
def watch_gradients(computed: Mapping[nn.Module, ComputedWeight]) -> Iterator[WeightGradients]:
    """While this lasts, the weights that layers compute keep their gradients."""
    gradients = WeightGradients()

    def note(layer: nn.Module, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.retain_grad()
            gradients.values.setdefault(id(layer), []).append(value)

    def hook_for(layer: nn.Module, found: ComputedWeight) -> Any:
        if parametrize.is_parametrized(layer):
            chain = _parametrizations(layer, found.name)
            return forward_hook(chain, lambda _, __, output: note(layer, output))
        return forward_pre_hook(layer, lambda _, __, ___: note(layer, vars(layer)[found.name]))

    with registered(hook_for(layer, found) for layer, found in computed.items()):
        yield gradients


def why_not_sliced(name: str, module: nn.Module, by: str = "weight norm or another parametrization") -> str:
    """Why a layer of this name cannot be sliced whose weights are computed, and what would help."""
    reason = f"the weights of this {name} are computed by {by}: slices of them cannot be; remove it before pruning"
    return ": ".join([reason, *_removers(module)])


_REMOVERS = {
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove",
}
"""Hooks that compute weights -> what takes them away."""


def _removers(module: nn.Module) -> list[str]:
    """What removes what computes the weights of a module; nothing where that is code of its own."""
    if parametrize.is_parametrized(module):
        return ["torch.nn.utils.parametrize.remove_parametrizations"]
    hooks = module._forward_pre_hooks.values()
    return [how for kind, how in _REMOVERS.items() if any(isinstance(hook, kind) for hook in hooks)][:1]
