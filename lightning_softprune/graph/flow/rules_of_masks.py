"""The rules of operators that pick elements by a mask, or write them.

A mask that is one and the same for all channels (``mask[..., None].expand_as(x)``) picks whole rows of them: as a
tensor of one dimension, these are the channels again and again. What it tells apart stays.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lightning_softprune.graph.flow.labels import FIXED, FREE, Label, Labels, is_atoms
from lightning_softprune.graph.flow.rules import BY_NUMBER, FIXED_WIDTH, OWN_CODE, Flow, argument, rule, said
from lightning_softprune.graph.flow.tape import Operation, Value


def dims_of_mask(flow: Flow, operation: Operation) -> range:
    """The dimensions that an index goes over, which is one mask over several of them; none for other indices."""
    target, indices = operation.inputs[0], argument(operation, "indices")
    found = [(dim, index) for dim, index in enumerate(indices) if isinstance(index, Value)]
    if len(found) != 1:
        return range(0)
    first, mask = found[0]
    size = flow.shape(mask)
    over = range(first, first + len(size))
    return over if len(size) > 1 and flow.shape(target)[over.start : over.stop] == size else range(0)


def goes_over_rows(flow: Flow, operation: Operation) -> bool:
    """Whether that mask is one and the same along the last of them."""
    (mask,) = (index for index in argument(operation, "indices") if isinstance(index, Value))
    return _is_of_rows(flow, mask)


def pick_rows(flow: Flow, operation: Operation, over: range) -> Labels:
    """The labels of a tensor, some dimensions of which have become one by a mask over whole rows of the last."""
    labels, first, last = list(flow.labels(operation.inputs[0])), over[0], over[-1]
    channels, size = labels[last], flow.shape(operation.result)[first]
    for label in labels[first:last]:
        flow.couplings.pin(label, said(operation, "tells its channels apart by their place", BY_NUMBER))
    picked: Label = FIXED
    if is_atoms(channels) and size and size % len(channels) == 0:
        picked = np.tile(channels, size // len(channels))
    else:  # no whole rows after all
        flow.couplings.pin(channels, said(operation, "tells its channels apart by their place", BY_NUMBER))
    return [*labels[:first], picked, *labels[last + 1 :]]


def write_rows(flow: Flow, operation: Operation, over: range, values: Value) -> list[Labels]:
    """The labels of a tensor into which whole rows of one of its dimensions are written by a mask."""
    labels, last = list(flow.labels(operation.inputs[0])), over[-1]
    for label in labels[over[0] : last]:
        flow.couplings.pin(label, said(operation, "writes channels by their numbers", BY_NUMBER))
    for row in _rows(flow, operation, values, flow.shape(operation.inputs[0])[last]):
        labels[last] = flow.couplings.merge(
            labels[last], row, said(operation, "writes into a fixed width", FIXED_WIDTH)
        )
    return [labels]


def _rows(flow: Flow, operation: Operation, values: Value, width: int) -> Iterator[Label]:
    """The labels of the rows that values are made of, each once; what is no row of this width stays."""
    shape, labels = flow.shape(values), flow.labels(values)
    for label in labels[:-1]:
        flow.couplings.pin(label, said(operation, "writes it to places by their numbers"))
    if not labels or shape[-1] == 1:
        return
    last = labels[-1]
    if not is_atoms(last):
        yield last
    elif len(last) % width:
        flow.couplings.pin(last, said(operation, "writes it to places by their numbers"))
    else:
        yield from np.unique(last.reshape(-1, width), axis=0)


def _is_of_rows(flow: Flow, mask: Value) -> bool:
    """Whether a mask is one and the same along its last dimension."""
    shape, labels = flow.shape(mask), flow.labels(mask)
    return not shape or shape[-1] == 1 or (isinstance(labels[-1], str) and labels[-1] == FREE)


def _pin_mask(flow: Flow, operation: Operation) -> None:
    for label in flow.labels(argument(operation, "mask")):
        flow.couplings.pin(label, said(operation, "picks by an index that has its width"))


@rule("masked_select")
def _masked_select(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    labels = flow.labels(source)
    _pin_mask(flow, operation)
    if labels and _is_of_rows(flow, argument(operation, "mask")):
        return [pick_rows(flow, operation, range(len(labels)))]
    for label in labels:
        text = f"picks elements of {flow.shape(source)} by their place"
        flow.couplings.pin(label, said(operation, text, OWN_CODE))
    return [[FIXED]]


@rule("masked_scatter")
def _masked_scatter(flow: Flow, operation: Operation) -> list[Labels]:
    labels, values = list(flow.labels(operation.inputs[0])), argument(operation, "source")
    _pin_mask(flow, operation)
    if labels and _is_of_rows(flow, argument(operation, "mask")):
        return write_rows(flow, operation, range(len(labels)), values)
    for label in labels:
        flow.couplings.pin(label, said(operation, "writes channels by their numbers", BY_NUMBER))
    for label in flow.labels(values):
        flow.couplings.pin(label, said(operation, "writes it to places by their numbers"))
    return [labels]
