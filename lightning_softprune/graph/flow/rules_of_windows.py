"""Rules of operators that cut maps and sequences into pieces, lay these out as channels, and put them together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_softprune.graph.flow.labels import FIXED, Label, Labels, is_atoms
from lightning_softprune.graph.flow.rules import Flow, argument, dim_of, rule, said
from lightning_softprune.graph.flow.tape import Operation


@rule("pixel_shuffle")
def _pixel_shuffle(flow: Flow, operation: Operation) -> list[Labels]:
    labels, factor = list(flow.labels(operation.inputs[0])), int(argument(operation, "upscale_factor"))
    _pin_dims(flow, operation, labels, (len(labels) - 1, len(labels) - 2))
    return [[*labels[:-3], _one_of_each(flow, labels[-3], factor * factor), FIXED, FIXED]]


@rule("pixel_unshuffle")
def _pixel_unshuffle(flow: Flow, operation: Operation) -> list[Labels]:
    labels, factor = list(flow.labels(operation.inputs[0])), int(argument(operation, "downscale_factor"))
    _pin_dims(flow, operation, labels, (len(labels) - 1, len(labels) - 2))
    return [[*labels[:-3], _several_of_each(labels[-3], factor * factor), FIXED, FIXED]]


@rule("im2col")
def _im2col(flow: Flow, operation: Operation) -> list[Labels]:
    """`F.unfold`: every channel at each place of the kernel."""
    labels, places = list(flow.labels(operation.inputs[0])), math.prod(argument(operation, "kernel_size"))
    _pin_dims(flow, operation, labels, (len(labels) - 1, len(labels) - 2))
    return [[*labels[:-3], _several_of_each(labels[-3], places), FIXED]]


@rule("col2im")
def _col2im(flow: Flow, operation: Operation) -> list[Labels]:
    """`F.fold`: what lies at each place of the kernel becomes one channel."""
    labels, places = list(flow.labels(operation.inputs[0])), math.prod(argument(operation, "kernel_size"))
    _pin_dims(flow, operation, labels, (len(labels) - 1,))
    return [[*labels[:-2], _one_of_each(flow, labels[-2], places), FIXED, FIXED]]


@rule("unfold", "unfold_copy")
def _unfold(flow: Flow, operation: Operation) -> list[Labels]:
    """`Tensor.unfold`: windows along a dimension, which stand in a new one."""
    labels = list(flow.labels(operation.inputs[0]))
    dim = dim_of(operation, len(labels), "dimension")
    _pin_dims(flow, operation, labels, (dim,))
    labels[dim] = FIXED
    return [[*labels, FIXED]]


def _several_of_each(label: Label, number: int) -> Label:
    return np.repeat(label, number) if is_atoms(label) else label


def _one_of_each(flow: Flow, label: Label, number: int) -> Label:
    """What is left of a dimension of which so many indices at a time become one: these go together."""
    if not is_atoms(label):
        return label
    rows = label.reshape(-1, number)
    for column in range(1, number):
        flow.couplings.unite(np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, column]))
    return np.ascontiguousarray(rows[:, 0])


def _pin_dims(flow: Flow, operation: Operation, labels: Labels, dims: Sequence[int]) -> None:
    for dim in dims:
        flow.couplings.pin(labels[dim], said(operation, "tells its channels apart by their place"))
