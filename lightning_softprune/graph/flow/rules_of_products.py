"""Rules of products: what is summed over meets index by index, the rest goes on."""

from __future__ import annotations

import numpy as np

from lightning_softprune.graph.flow.labels import FIXED, FREE, Label, Labels, is_atoms
from lightning_softprune.graph.flow.rules import BY_NUMBER, Flow, argument, rule, said, unknown
from lightning_softprune.graph.flow.rules_of_shape import alike
from lightning_softprune.graph.flow.tape import Operation, Value
from lightning_softprune.utilities.arrays import IntArray


def _contract(flow: Flow, operation: Operation, one: Label, other: Label) -> None:
    flow.couplings.contract(one, other, said(operation, "multiplies it by a tensor whose width is fixed"))


def _added(flow: Flow, operation: Operation, labels: Labels, value: Value | None) -> list[Labels]:
    """The labels of a product to which something is added, with broadcasting."""
    if value is not None:
        shape = flow.shape(value)
        for dim, (size, label) in enumerate(zip(shape, flow.labels(value), strict=True), len(labels) - len(shape)):
            if size > 1:
                labels[dim] = flow.couplings.merge(
                    labels[dim], label, said(operation, "adds a tensor whose width is fixed")
                )
    return [labels]


@rule("mm", "addmm", "_addmm_activation", "linear")
def _mm(flow: Flow, operation: Operation) -> list[Labels]:
    arguments = operation.arguments
    if operation.name == "linear":
        one, weight = flow.labels(arguments["input"]), list(reversed(flow.labels(arguments["weight"])))
        _contract(flow, operation, one[-1], weight[0])
        return _added(flow, operation, [*one[:-1], weight[1]], arguments.get("bias"))
    first, second, added = ("self", "mat2", None) if operation.name == "mm" else ("mat1", "mat2", "self")
    one, other = flow.labels(arguments[first]), flow.labels(arguments[second])
    _contract(flow, operation, one[1], other[0])
    return _added(flow, operation, [one[0], other[1]], arguments[added] if added else None)


@rule("_sparse_mm", "_sparse_addmm")
def _sparse_mm(flow: Flow, operation: Operation) -> list[Labels]:
    """A sparse matrix, which keeps its sizes, times another."""
    first, second, *added = [
        operation.arguments[n] for n in ("sparse", "dense", "mat1", "mat2", "self") if n in operation.arguments
    ]
    one, other = flow.labels(first), flow.labels(second)
    _contract(flow, operation, one[1], other[0])
    for label in one:
        flow.couplings.pin(label, said(operation, "multiplies it by a sparse matrix, whose width is fixed"))
    return _added(flow, operation, [one[0], other[1]], added[0] if added else None)


@rule("bmm", "baddbmm")
def _bmm(flow: Flow, operation: Operation) -> list[Labels]:
    arguments = operation.arguments
    first, second, added = ("self", "mat2", None) if operation.name == "bmm" else ("batch1", "batch2", "self")
    one, other = flow.labels(arguments[first]), flow.labels(arguments[second])
    batch = flow.couplings.merge(one[0], other[0], said(operation, "multiplies it by a tensor whose width is fixed"))
    _contract(flow, operation, one[2], other[1])
    return _added(flow, operation, [batch, one[1], other[2]], arguments[added] if added else None)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped_mm(flow: Flow, operation: Operation) -> list[Labels]:
    """Rows, each by the matrix of its expert."""
    rows, weight = (flow.labels(value) for value in operation.inputs[:2])
    if len(rows) != 2 or len(weight) != 3:
        return unknown(flow, operation)
    flow.couplings.pin(weight[0], said(operation, "picks experts by their numbers"))
    _contract(flow, operation, rows[1], weight[1])
    return [[rows[0], weight[2]]]


@rule("mv", "addmv")
def _mv(flow: Flow, operation: Operation) -> list[Labels]:
    arguments = operation.arguments
    matrix, added = ("self", None) if operation.name == "mv" else ("mat", "self")
    one, other = flow.labels(arguments[matrix]), flow.labels(arguments["vec"])
    _contract(flow, operation, one[1], other[0])
    return _added(flow, operation, [one[0]], arguments[added] if added else None)


@rule("dot", "vdot")
def _dot(flow: Flow, operation: Operation) -> list[Labels]:
    one, other = (flow.labels(value) for value in operation.inputs[:2])
    _contract(flow, operation, one[0], other[0])
    return [[]]


@rule("_cdist_forward", "_euclidean_dist", "cdist")
def _cdist(flow: Flow, operation: Operation) -> list[Labels]:
    one, other = (flow.labels(value) for value in operation.inputs[:2])
    _contract(flow, operation, one[-1], other[-1])
    return [[*one[:-1], other[-2]]]


@rule("convolution", "_convolution", "conv1d", "conv2d", "conv3d")
def _convolution(flow: Flow, operation: Operation) -> list[Labels]:
    arguments = operation.arguments
    source, weight = flow.labels(arguments["input"]), flow.labels(arguments["weight"])
    groups, transposed = int(argument(operation, "groups", 1)), bool(argument(operation, "transposed", False))
    reads, makes = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    rank = len(flow.shape(arguments["weight"])) - 2
    channel = len(source) - rank - 1
    inputs = source[channel]
    if groups > 1 and is_atoms(inputs) and len(inputs) == groups:
        makes = _made_depthwise(flow, operation, inputs, reads, makes)
    elif groups > 1:
        if is_atoms(inputs):
            alike(flow, inputs, len(inputs) // groups)
        part = inputs[: len(inputs) // groups] if is_atoms(inputs) else inputs
        if transposed:
            _contract(flow, operation, inputs, reads)
            makes = np.tile(makes, groups) if is_atoms(makes) else makes
        else:
            _contract(flow, operation, part, reads)
            if is_atoms(makes):
                alike(flow, makes, len(makes) // groups)
    else:
        _contract(flow, operation, inputs, reads)
    for label in source[channel + 1 :]:
        flow.couplings.pin(label, said(operation, "slides over its channels"))
    labels = [*source[:channel], makes, *[FIXED] * rank]
    bias = arguments.get("bias")
    if bias is not None:
        labels[channel] = flow.couplings.merge(
            labels[channel], flow.labels(bias)[0], said(operation, "adds a fixed bias")
        )
    return [labels]


def _made_depthwise(flow: Flow, operation: Operation, inputs: IntArray, reads: Label, makes: Label) -> Label:
    """What is made of each channel by itself, which goes with it; the number of groups is that of the channels."""
    weight = flow.shape(operation.arguments["weight"])
    fixed = said(operation, "multiplies it by a tensor whose width is fixed")
    flow.couplings.extents.append((inputs, operation.site.module))
    if not argument(operation, "transposed", False):
        return flow.couplings.merge(np.repeat(inputs, weight[0] // len(inputs)), makes, fixed)
    flow.couplings.merge(inputs, reads, fixed)
    flow.couplings.pin(makes, said(operation, f"makes {weight[1]} channels of each, by their numbers", BY_NUMBER))
    return np.repeat(inputs, weight[1])


@rule("embedding")
def _embedding(flow: Flow, operation: Operation) -> list[Labels]:
    table, indices = flow.labels(operation.arguments["weight"]), flow.shape(operation.arguments["indices"])
    flow.couplings.pin(table[0], said(operation, "looks its rows up by their numbers"))
    return [[FIXED] * len(indices) + [table[1]]]


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(flow: Flow, operation: Operation) -> list[Labels]:
    arguments = operation.arguments
    direction, scale = arguments["v"], arguments["g"]
    labels = list(flow.labels(direction))
    for dim, (size, label) in enumerate(zip(flow.shape(scale), flow.labels(scale), strict=True)):
        if size > 1:
            labels[dim] = flow.couplings.merge(labels[dim], label, said(operation, "meets a fixed width"))
    norms = [FREE if size == 1 else labels[dim] for dim, size in enumerate(flow.shape(scale))]
    return [labels, norms]
