"""REPAIR (Jordan et al. 2022, arXiv 2211.08403): channels get back the mean and the deviation they had.

Where channels are removed or merged, the statistics of what is left shift, layer by layer. REPAIR gives each channel an
affine map that sets its mean and standard deviation to those of the original network (eq. 2, 3). Where a BatchNorm
follows, its statistics and its affine map are that map. Layers are treated in the order in which they run, each on what
the ones before it compute by then, within one pass over one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CHANNELS = 1  # the dimension


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of every channel of a layer's outputs."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, outputs: Tensor) -> Moments:
        """Those of observations `(batch, channels, ...)`."""
        others = [dim for dim in range(outputs.ndim) if dim != CHANNELS]
        variance, mean = torch.var_mean(outputs.double(), others, correction=0)
        return cls(mean.float(), variance.sqrt().float())

    def mapped(self, produce: Tensor) -> Moments:
        """The target of channels that were selected, or merged to means: the mean of the clusters' (2602.18116)."""
        return Moments(produce @ self.mean, produce @ self.deviation)


@torch.no_grad()
def channel_moments(network: nn.Module, images: Tensor) -> dict[str, Moments]:
    """What every BatchNorm's outputs are like.

    Args:
        network: In eval mode.
        images: One large batch.
    """
    found: dict[str, Moments] = {}

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_hook(lambda _, __, outputs: found.update({name: Moments.of(outputs)}))

    handles = [watch(name, layer) for name, layer in _norms(network).items()]
    network(images)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def repair(network: nn.Module, targets: Mapping[str, Moments], images: Tensor) -> None:
    """Give the channels of every BatchNorm's outputs their targets' mean and deviation, in place.

    Args:
        network: The smaller network, in eval mode.
        targets: One for each BatchNorm, of its channels as they are now.
        images: The batch that the targets were taken on.
    """

    def watch(name: str, layer: nn.BatchNorm2d) -> RemovableHandle:
        return layer.register_forward_pre_hook(lambda _, inputs: _reset(layer, targets[name], Moments.of(inputs[0])))

    handles = [watch(name, layer) for name, layer in _norms(network).items()]
    network(images)
    for handle in handles:
        handle.remove()


def _reset(layer: nn.BatchNorm2d, target: Moments, given: Moments) -> None:
    variance = given.deviation.square()
    layer.running_mean, layer.running_var = given.mean, variance
    scale = target.deviation * (variance + layer.eps).sqrt() / given.deviation.clamp(min=1e-12)
    scale = torch.where(given.deviation > 0, scale, torch.zeros_like(scale))  # a constant channel stays one
    layer.weight.copy_(torch.where(layer.weight < 0, -scale, scale))
    layer.bias.copy_(target.mean)


def _norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
