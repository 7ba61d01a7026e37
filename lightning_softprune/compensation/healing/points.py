"""Outputs at which the dense and the pruned network are compared: what modules give to the code of a step, and blocks.

That is what a step gets from the modules that it calls itself: the module's own `forward`, or an encoder and a decoder.
A *block* is an element of a list of modules that has several layers and no such list of blocks inside: where deep
networks add to their residual stream. An output of another shape in the pruned network was changed by the plan, and is
not compared.

Blocks are what makes healing quick in deep networks: on ResNet-20 (CIFAR-10, 65 % gone, 98 batches, one seed), it
reaches 78.9 % with the outputs alone, 80.9 % with blocks besides and 80.8 % with blocks alone, from 65.7 %. A small
ViT is none the better for them (five epochs of healing, two seeds: 95.7 and 94.5 % with outputs, 95.2 and 94.0 % with
both, 94.7 and 94.2 % with blocks alone, of 398 images). Borders between components are outputs of a step already.
These figures are of Adam's steps alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_softprune.utilities.hooks import forward_pre_hook, registered
from lightning_softprune.utilities.names import joined
from lightning_softprune.utilities.nested import tensors_in

Place = tuple[str, int, int]
"""A module, the number of its call, and that of the tensor among what it returns."""


@contextmanager
def watch_outputs(
    model: nn.Module, parameters: Collection[str], blocks: bool = True
) -> Iterator[dict[Place, torch.Tensor]]:
    """Note what the code of a step gets from modules, and what blocks give, while the context lasts.

    Args:
        model: The model.
        parameters: Names of the parameters that count: modules without any of them are passed by (losses, metrics).
        blocks: Whether to note what blocks give.
    """
    outputs: dict[Place, torch.Tensor] = {}
    calls, depth = Counter[str](), 0
    inner = _blocks_in(model) if blocks else set()
    counted = {"", *(name[:end] for name in parameters for end, letter in enumerate(name) if letter == ".")}

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(name: str, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0 or name in inner:
            calls[name] += 1
            for number, tensor in enumerate(tensors_in(output)):
                if tensor.is_floating_point() and tensor.ndim > 0 and tensor.numel() > 1:  # not: a loss
                    outputs[name, calls[name], number] = tensor

    def hooks() -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            if name in counted:
                yield forward_pre_hook(module, enter)
                yield nn.Module.register_forward_hook(
                    module, lambda _, __, output, name=name: leave(name, output), always_call=True
                )

    with registered(hooks()):
        yield outputs


def _blocks_in(model: nn.Module) -> set[str]:
    """Names of the innermost elements of lists of modules that have several layers with parameters."""
    found: set[str] = set()
    for name, part in reversed(list(model.named_modules())):  # what is inside comes first
        if isinstance(part, (nn.Sequential, nn.ModuleList)):
            for key, element in part.named_children():
                block = joined(name, key)
                layers = sum(bool(layer._parameters) for layer in element.modules())
                if layers > 1 and not any(other.startswith(f"{block}.") for other in found):
                    found.add(block)
    return found


def mismatch(dense: Mapping[Place, torch.Tensor], pruned: Mapping[Place, torch.Tensor]) -> torch.Tensor | None:
    """How far the pruned network is from the dense one: the fraction of the outputs' variance that it misses.

    Args:
        dense: What the dense network computed.
        pruned: The same of the pruned network.

    Returns:
        The mean over the outputs; ``None`` where there are none in common that can be learned from.
    """
    found = errors_at({place: output for place, output in pruned.items() if output.requires_grad}, dense)
    return torch.stack(found).mean() if found else None


def errors_at(pruned: Mapping[Place, torch.Tensor], dense: Mapping[Place, torch.Tensor]) -> list[torch.Tensor]:
    """The fraction of its variance that the pruned network misses of each output that both have, in one shape."""
    errors = [
        _missed(wanted.detach().float(), pruned[place].float())
        for place, wanted in dense.items()
        if place in pruned and pruned[place].shape == wanted.shape
    ]
    return [error for error in errors if error is not None]


def _missed(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor | None:
    """The squared error of one output, over its variance from sample to sample; ``None`` for a constant."""
    finite = wanted.isfinite()
    if not bool(finite.all()):  # what a model masks out
        wanted, found = torch.where(finite, wanted, 0.0), torch.where(finite, found, 0.0)
    centre = wanted.mean(0) if len(wanted) > 1 else wanted.mean()
    variance = (wanted - centre).square().mean()
    if variance <= 1e-12 * wanted.square().mean():
        return None
    return (found - wanted).square().mean() / variance
