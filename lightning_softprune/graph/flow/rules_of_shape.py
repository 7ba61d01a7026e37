"""Rules of operators that move elements without computing: views, slices, concatenations, paddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_softprune.graph.flow.labels import (
    CROSSED,
    FIXED,
    FIXED_PLACE,
    FREE,
    FREE_PLACE,
    Label,
    Labels,
    Moved,
    Split,
    is_atoms,
    move,
    varies,
)
from lightning_softprune.graph.flow.rules import (
    BY_NUMBER,
    IN_FRONT,
    OWN_CODE,
    Flow,
    aligned,
    argument,
    dim_of,
    rule,
    said,
)
from lightning_softprune.graph.flow.tape import Operation, Value
from lightning_softprune.utilities.arrays import IntArray

_MOST_PARTS = 8
"""A dimension that is sliced at such a fraction of its size is taken for several parts that shrink alike."""


@rule("detach", "alias", "clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "_pin_memory", "_conj")
@rule("bernoulli", "normal", "uniform", "exponential", "random", "fill", "zero", "tril", "triu", "positive")
@rule("_fw_primal", "resolve_conj")
def _same(flow: Flow, operation: Operation) -> list[Labels]:
    first = operation.inputs[0]
    return [list(flow.labels(first)) for _ in operation.outputs]


@rule("native_dropout")
def _dropout(flow: Flow, operation: Operation) -> list[Labels]:
    labels = flow.labels(operation.inputs[0])
    return [list(labels), list(labels)]


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
def _new(flow: Flow, operation: Operation) -> list[Labels]:
    return [[FREE] * len(flow.shape(value)) for value in operation.outputs if value is not None]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten", "view_copy")
def _reshape(flow: Flow, operation: Operation) -> list[Labels]:
    source, result = operation.inputs[0], operation.result
    before, after = flow.shape(source), flow.shape(result)
    labels: Labels = [FREE] * len(after)
    if 0 in before or 0 in after or math.prod(before) != math.prod(after):
        _pin_all(flow, operation, source, "has no elements")
        return [[FIXED] * len(after)]
    given = flow.labels(source)
    if any(len(moved.carriers) > 1 for moved in move(given, before, after)):
        given = _without_pinned(flow, given)
    for moved in move(given, before, after):
        mine = [dim for dim in moved.before if before[dim] > 1]
        theirs = [dim for dim in moved.after if after[dim] > 1]
        if len(mine) == len(theirs) == 1:
            labels[theirs[0]] = given[mine[0]]
            continue
        for dim in moved.after:
            labels[dim] = moved.rest
        if moved.carriers:
            _lay_out(flow, operation, moved, _elements(flow, operation, moved, given, before), labels)
    if operation.name in ("view", "_unsafe_view", "reshape"):
        for label in (*labels, *given):
            if is_atoms(label):
                flow.couplings.extents.append((label, operation.site.module))
    return [labels]


def _without_pinned(flow: Flow, labels: Labels) -> Labels:
    """Labels, with those as fixed whose atoms stay in any case: they do not cross others, as a mask's windows heads."""
    return [FIXED if is_atoms(label) and flow.couplings.is_pinned(label) else label for label in labels]


def _elements(flow: Flow, operation: Operation, moved: Moved, given: Labels, before: Sequence[int]) -> IntArray:
    """The atom of each element: where several dimensions have atoms they are crossed, or one keeps its own."""
    if len(moved.carriers) == 1:
        return moved.elements[0]
    site, sizes = f"{operation.site.line} {CROSSED}", [before[dim] for dim in moved.carriers]
    alternative = flow.choices.get(site, 0) % 2
    if not alternative:
        result = flow.couplings.cross(moved.elements)
    else:
        hint = flow.hint(operation, sizes)
        kept = int(np.argmax(sizes)) if hint is None else hint
        for dim in (dim for place, dim in enumerate(moved.carriers) if place != kept):
            flow.couplings.pin(given[dim], said(operation, "lays it out together with another width that is pruned"))
        result = moved.elements[kept]
    flow.couplings.splits.append(Split(site, (2, 2), alternative, result[result >= 0].ravel()))
    return result


def _lay_out(flow: Flow, operation: Operation, moved: Moved, elements: IntArray, labels: Labels) -> None:
    """Give the dimensions behind a reshape their labels: one of them carries the atoms, or of crossed ones several."""
    large = [axis for axis in range(elements.ndim) if elements.shape[axis] > 1]
    if len(large) == 1:
        labels[moved.after[large[0]]] = elements.ravel()
        return
    for axis in large:
        labels[moved.after[axis]] = FIXED
    found: dict[int, list[IntArray]] = {}
    for part in flow.couplings.crossed.factors(elements) or [elements]:
        axis, label = _carried(flow, operation, part, moved.after, large[:1])
        found.setdefault(axis, []).append(label)
    for axis, parts in found.items():
        labels[moved.after[axis]] = parts[0] if len(parts) == 1 else flow.couplings.cross(parts)


def _carried(
    flow: Flow, operation: Operation, elements: IntArray, dims: Sequence[int], otherwise: list[int]
) -> tuple[int, IntArray]:
    """The axis that carries atoms, and its label; along the others they are united."""
    axes = [axis for axis in range(elements.ndim) if varies(elements, axis)] or otherwise
    chosen = axes[0]
    if len(axes) > 1:
        chosen = axes[_choice(flow, operation, [dims[axis] for axis in axes], elements)]
    rows = np.moveaxis(elements, chosen, 0).reshape(elements.shape[chosen], -1)
    label = np.ascontiguousarray(rows[:, 0])
    for column in range(1, rows.shape[1] if len(axes) > 1 else 1):
        flow.couplings.unite(label, np.ascontiguousarray(rows[:, column]))
    return chosen, label


def _choice(flow: Flow, operation: Operation, dims: list[int], elements: IntArray) -> int:
    """Which of some dimensions carries the atoms of one: a guess that probes confirm, or that is tried otherwise."""
    sizes = [flow.shape(operation.result)[dim] for dim in dims]
    site = f"{operation.site.line} {operation.site.module if not operation.site.line else ''} {len(sizes)}"
    result = operation.outputs[0]
    rank = len(flow.shape(result)) if result is not None else 0
    source = len(flow.shape(operation.inputs[0]))
    hint = flow.hint(operation, sizes)
    if hint is not None:
        default = hint
    elif source >= 3 and rank >= 5 and len(sizes) == 2 and source == 4:  # the groups of a channel shuffle
        default = int(np.argmax(sizes))
    elif source == 2:  # a vector becomes a map
        default = 0
    else:
        default = len(sizes) - 2  # heads stand in front of their widths
    apart = flow.taken_apart(operation.result)
    order = [default, *(place for place in range(len(sizes)) if place != default)]
    order.sort(key=lambda place: dims[place] in apart)  # these would have to stay
    chosen = order[flow.choices.get(site, 0) % len(order)]
    flow.couplings.splits.append(Split(site, tuple(sizes), chosen, elements[elements >= 0].ravel()))
    return chosen


@rule("permute")
def _permute(flow: Flow, operation: Operation) -> list[Labels]:
    labels = flow.labels(operation.inputs[0])
    return [[labels[dim] for dim in argument(operation, "dims")]]


@rule("transpose", "swapaxes", "swapdims")
def _transpose(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.inputs[0]))
    if labels:
        one, other = (int(operation.arguments[name]) for name in ("dim0", "dim1"))
        labels[one], labels[other] = labels[other], labels[one]
    return [labels]


@rule("t", "numpy_T", "mT")
def _t(flow: Flow, operation: Operation) -> list[Labels]:
    return [list(reversed(flow.labels(operation.inputs[0])))]


@rule("expand", "broadcast_to", "expand_copy")
def _expand(flow: Flow, operation: Operation) -> list[Labels]:
    source, result = operation.inputs[0], operation.result
    before, after = flow.shape(source), flow.shape(result)
    new = len(after) - len(before)
    labels: Labels = [FREE] * new
    for size, wide, label in zip(before, after[new:], flow.labels(source), strict=True):
        labels.append(FREE if size == 1 and wide != 1 else label)
        if is_atoms(label):
            flow.couplings.extents.append((label, operation.site.module))
    return [labels]


@rule("repeat")
def _repeat(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    repeats = argument(operation, "repeats")
    new = len(repeats) - len(flow.shape(source))
    labels: Labels = [FREE] * new
    for times, size, label in zip(repeats[new:], flow.shape(source), flow.labels(source), strict=True):
        labels.append(np.tile(label, times) if is_atoms(label) and size > 1 else FREE if size == 1 else label)
    return [labels]


@rule("cat", "concat", "concatenate")
def _cat(flow: Flow, operation: Operation) -> list[Labels]:
    result = operation.result
    rank = len(flow.shape(result))
    parts = [value for value in argument(operation, "tensors") if len(flow.shape(value)) == rank]
    dim = dim_of(operation, rank)
    labels: Labels = []
    for other in range(rank):
        if other != dim:
            label: Label = FREE
            for value in parts:
                label = flow.couplings.merge(
                    label, flow.labels(value)[other], said(operation, "joins it to a tensor whose width is fixed")
                )
            labels.append(label)
            continue
        along = [(flow.labels(value)[dim], flow.shape(value)[dim]) for value in parts]
        labels.append(_joined_to_fit(flow, operation, along))
    return [labels]


def joined(parts: Sequence[tuple[Label, int]]) -> Label:
    """The label of dimensions one after another."""
    if not any(is_atoms(label) for label, _ in parts):
        return FIXED if any(label == FIXED for label, _ in parts) else FREE
    if len(parts) == 1:
        return parts[0][0]
    places = [
        FREE_PLACE if isinstance(label, str) and label == FREE and size > 1 else FIXED_PLACE for label, size in parts
    ]
    return np.concatenate(
        [
            label if is_atoms(label) else np.full(size, place, np.int64)
            for (label, size), place in zip(parts, places, strict=True)
        ]
    )


def _joined_to_fit(flow: Flow, operation: Operation, parts: Sequence[tuple[Label, int]]) -> Label:
    """The same, where zeros among the parts may fit what they meet, as a first state; or be of a width written down."""
    label = joined(parts)
    if not is_atoms(label) or not (label == FREE_PLACE).any():
        return label
    site = f"{operation.site.line} {FREE}"
    alternative = flow.choices.get(site, 0) % 2
    flow.couplings.splits.append(Split(site, (2, 2), alternative, label[label >= 0]))
    return np.maximum(label, FIXED_PLACE) if alternative else label


@rule("stack")
def _stack(flow: Flow, operation: Operation) -> list[Labels]:
    values: Sequence[Value] = argument(operation, "tensors")
    rank = len(flow.shape(values[0]))
    labels = aligned(flow, values, rank, operation)
    labels.insert(dim_of(operation, rank + 1), FIXED)
    return [labels]


@rule("split", "split_with_sizes", "split_with_sizes_copy", "chunk")
@rule("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _split(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    shape, labels = flow.shape(source), flow.labels(source)
    dim = dim_of(operation, len(shape))
    widths = [flow.shape(value)[dim] for value in operation.outputs if value is not None]
    whole, results, start = labels[dim], [], 0
    if is_atoms(whole) and len(widths) > 1:
        if len(set(widths)) == 1:
            alike(flow, whole, widths[0])
        elif operation.name == "split":
            flow.couplings.pin(whole, said(operation, f"chunks its channels into unequal parts of {widths}"))
        else:
            _shared_out(flow, operation, whole, widths)
        flow.couplings.extents.append((whole, operation.site.module))
    for width in widths:
        part = whole
        if is_atoms(whole):
            part = whole[start : start + width]
            flow.couplings.extents.append((part, operation.site.module))
        results.append([*labels[:dim], part, *labels[dim + 1 :]])
        start += width
    return results


def _shared_out(flow: Flow, operation: Operation, whole: IntArray, widths: Sequence[int]) -> None:
    """Unequal parts have widths of their own; as another way to read it, they are shares of what there is."""
    part = math.gcd(*widths)
    if part == 1 or len(whole) // part > _MOST_PARTS:
        return
    site = f"{operation.site.line} shares"
    alternative = flow.choices.get(site, 0) % 2
    flow.couplings.splits.append(Split(site, (2, 2), alternative, whole[whole >= 0], bool(alternative)))
    if alternative:
        alike(flow, whole, part)


def alike(flow: Flow, atoms: IntArray, width: int) -> None:
    """Equal parts of a dimension lose the same channels."""
    for start in range(width, len(atoms), width):
        flow.couplings.unite(atoms[:width], atoms[start : start + width])


@rule("slice", "slice_copy", "narrow")
def _slice(flow: Flow, operation: Operation) -> list[Labels]:
    source, result = operation.inputs[0], operation.result
    shape, labels = flow.shape(source), list(flow.labels(source))
    dim = dim_of(operation, len(shape))
    size, kept = shape[dim], flow.shape(result)[dim]
    whole = labels[dim]
    if not is_atoms(whole) or kept == size:
        return [labels]
    start, step = int(argument(operation, "start", 0)), int(argument(operation, "step", 1))
    start = min(start + size if start < 0 else start, size)
    stop = start + (kept - 1) * step + 1 if kept else start
    labels[dim] = taken = whole[start:stop:step]
    flow.couplings.extents += [(taken, operation.site.module), (whole, operation.site.module)]
    if step > 1:
        if size % step:
            flow.couplings.pin(whole, said(operation, f"takes its channels in steps of {step}", BY_NUMBER))
        else:  # in every run of so many channels, all stay or all go
            for place in range(1, step):
                flow.couplings.unite(np.ascontiguousarray(whole[0::step]), np.ascontiguousarray(whole[place::step]))
        return [labels]
    part = math.gcd(start, start + kept, size)
    if part > 1 and size // part <= _MOST_PARTS:
        alike(flow, whole, part)
    else:
        flow.couplings.cut(taken)
    return [labels]


@rule("select", "select_copy")
def _select(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    shape, labels = flow.shape(source), list(flow.labels(source))
    dim = dim_of(operation, len(shape))
    picked = labels.pop(dim)
    index = argument(operation, "index", 0)
    flow.couplings.pin(picked, said(operation, f"takes channel {index} of {shape[dim]} by its number", BY_NUMBER))
    return [labels]


@rule("unbind", "unbind_copy")
def _unbind(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    shape, labels = flow.shape(source), list(flow.labels(source))
    dim = dim_of(operation, len(shape))
    flow.couplings.pin(labels.pop(dim), said(operation, f"takes its {shape[dim]} channels apart", BY_NUMBER))
    return [list(labels) for _ in operation.outputs]


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _pad(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    labels, pad = list(flow.labels(source)), list(argument(operation, "pad", argument(operation, "padding", ())))
    for place in range(len(pad) // 2):
        dim = len(labels) - 1 - place
        before, after = int(pad[2 * place]), int(pad[2 * place + 1])
        if not is_atoms(labels[dim]) or not (before or after):
            continue
        if operation.name == "constant_pad_nd" and min(before, after) >= 0:
            labels[dim] = joined([(FIXED, before), (labels[dim], len(labels[dim])), (FIXED, after)])
        else:
            flow.couplings.pin(labels[dim], said(operation, "pads its channels with others of them"))
            labels[dim] = FIXED
    return [labels]


@rule("_pack_padded_sequence")
def _pack(flow: Flow, operation: Operation) -> list[Labels]:
    """Time and batch become one dimension."""
    labels = list(flow.labels(operation.arguments["input"]))
    for label in (*labels[:2], *flow.labels(operation.arguments["lengths"])):
        flow.couplings.pin(label, said(operation, "packs sequences along its channels"))
    return [[FIXED, *labels[2:]], [FIXED]]


@rule("_pad_packed_sequence")
def _unpack(flow: Flow, operation: Operation) -> list[Labels]:
    """The other way round."""
    labels = list(flow.labels(operation.arguments["data"]))
    flow.couplings.pin(labels[0], said(operation, "packs sequences along its channels"))
    return [[FIXED, FIXED, *labels[1:]], [FIXED]]


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(flow: Flow, operation: Operation) -> list[Labels]:
    labels, groups = list(flow.labels(operation.inputs[0])), int(argument(operation, "groups"))
    if is_atoms(labels[1]):
        whole: IntArray = labels[1]
        alike(flow, whole, len(whole) // groups)
        labels[1] = np.ascontiguousarray(whole.reshape(groups, -1).T).ravel()
    return [labels]


@rule("as_strided", "as_strided_copy", "diagonal", "diag_embed", "nonzero", "take", "rot90")
def _unfollowed(flow: Flow, operation: Operation) -> list[Labels]:
    source, result = operation.inputs[0], operation.outputs[0]
    if result is not None and flow.shape(source) == flow.shape(result) and operation.name.startswith("as_strided"):
        return [list(flow.labels(source))]
    _pin_all(flow, operation, source, f"picks elements of {flow.shape(source)} by their place", OWN_CODE)
    return [[FIXED] * len(flow.shape(value)) for value in operation.outputs if value is not None]


def _pin_all(flow: Flow, operation: Operation, value: Value, text: str, hint: str = IN_FRONT) -> None:
    for label in flow.labels(value):
        flow.couplings.pin(label, said(operation, text, hint))
