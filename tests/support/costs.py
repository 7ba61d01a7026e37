"""Counts of a live model from its layers' own attributes: an oracle for the cost model, which counts plans."""

from __future__ import annotations

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd


def count_parameters(model):
    """Elements of ``model.parameters()``: tied weights once, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model, applications, samples=1.0):
    """MACs of a model whose run was recorded, per sample."""
    modules = dict(model.named_modules())
    return int(np.rint(sum(_layer_macs(modules[name], seen) for name, seen in applications.items()) / samples))


def _layer_macs(module, seen):
    if isinstance(module, nn.MultiheadAttention):
        width = module.num_heads * module.head_dim
        projected = 2 * seen.applied * module.embed_dim + seen.keys * (module.kdim + module.vdim)
        return (projected + 2 * seen.pairs) * width
    if isinstance(module, _ConvNd):
        return seen.applied * module.in_channels * module.out_channels / module.groups
    if isinstance(module, nn.Linear):
        return seen.applied * module.in_features * module.out_features
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):  # what each time step multiplies, once
        return seen.applied * sum(p.numel() for p in module.parameters() if p.ndim == 2)
    return 0.0
