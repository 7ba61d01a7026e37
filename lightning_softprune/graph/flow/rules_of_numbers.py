"""Rules of operators that compute along dimensions: sums, norms, softmax, pooling, indexing, losses."""

from __future__ import annotations

from typing import Any

from lightning_softprune.graph.flow.labels import FIXED, FREE, Labels, is_atoms
from lightning_softprune.graph.flow.rules import BY_NUMBER, Flow, aligned, argument, dim_of, rule, said, sized
from lightning_softprune.graph.flow.rules_of_masks import dims_of_mask, goes_over_rows, pick_rows, write_rows
from lightning_softprune.graph.flow.rules_of_shape import alike
from lightning_softprune.graph.flow.tape import Operation, Value


def pointwise(flow: Flow, operation: Operation) -> list[Labels]:
    """Element by element, with broadcasting."""
    result = operation.outputs[0]
    rank = len(flow.shape(result)) if result is not None else 0
    labels = aligned(flow, operation.inputs, rank, operation)
    return [labels if value is not None else [] for value in operation.outputs]


@rule(
    "where",
    "masked_fill",
    "lerp",
    "addcmul",
    "addcdiv",
    "clamp",
    "maximum",
    "minimum",
    "prelu",
    "_prelu_kernel",
    "hardswish",
    "rrelu_with_noise",
    "complex",
    "polar",
    "abs",
    "rsub",
    "floor_divide",
    "fake_quantize_per_tensor_affine_cachemask",
    "alias_copy",
    "detach_copy",
)
def _pointwise(flow: Flow, operation: Operation) -> list[Labels]:
    return pointwise(flow, operation)


@rule("log_sigmoid_forward")
def _log_sigmoid(flow: Flow, operation: Operation) -> list[Labels]:
    """Element by element; what it keeps for its gradient is nobody's."""
    kept: list[Labels] = [[FIXED] * len(flow.shape(value)) for value in operation.outputs[1:] if value is not None]
    return [list(flow.labels(operation.inputs[0])), *kept]


_SWAPPED = "let Lightning's WeightAveraging keep averaged weights and validate with them"


@rule("copy")
def _copy(flow: Flow, operation: Operation) -> list[Labels]:
    """Weights that are written over while steps run are of the width of what is written."""
    target, source = operation.inputs[0], operation.arguments.get("src")
    fixed = isinstance(source, Value) and any(isinstance(n, str) and n == FIXED for n in flow.labels(source))
    if fixed and flow.is_parameter(target):
        text = f"writes a tensor of fixed width into {flow.describe(target)}"
        for label in flow.labels(target):
            flow.couplings.pin(label, said(operation, text, _SWAPPED))
    return pointwise(flow, operation)


@rule("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "randint_like", "full_like")
def _like(flow: Flow, operation: Operation) -> list[Labels]:
    """New numbers in a tensor's shape, which is all that is read of it: a slice of one channel has it in any case."""
    labels = flow.labels(operation.inputs[0])
    return [[FREE if flow.couplings.is_cut(label) else label for label in labels]]


@rule("mul")
def _mul(flow: Flow, operation: Operation) -> list[Labels]:
    other = operation.arguments.get("other")
    if isinstance(other, (int, float)) and other == 0:
        return _like(flow, operation)
    return pointwise(flow, operation)


_TELL_PLACES = {"max", "min", "median", "nanmedian", "mode"}
"""Operators that along a dimension give values, and where these are."""


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm")
@rule("prod", "any", "all", "nansum", "count_nonzero", "median", "nanmedian", "aminmax", "max", "min", "mode")
@rule("argmax", "argmin", "_is_all_true", "_is_any_true")
def _reduction(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    if operation.name in ("max", "min") and "other" in operation.arguments:
        return pointwise(flow, operation)
    labels = flow.labels(source)
    dims = operation.arguments.get("dim", operation.arguments.get("dims"))
    dims = (dims,) if isinstance(dims, int) else dims
    over = {int(dim) % max(len(labels), 1) for dim in dims} if dims else set(range(len(labels)))
    places = operation.outputs[1] if dims and operation.name in _TELL_PLACES else None
    numbers = operation.name in ("argmax", "argmin") or (places is not None and flow.is_read(places))
    for dim in over if numbers else ():
        flow.couplings.pin(
            labels[dim], said(operation, "tells which of its channels is the largest, by number", BY_NUMBER)
        )
    for dim in over if operation.name not in ("sum", "nansum", "linalg_vector_norm", "norm", "any") else ():
        flow.couplings.average(labels[dim])
    keep = bool(argument(operation, "keepdim", False))
    kept = [FREE if dim in over else label for dim, label in enumerate(labels) if keep or dim not in over]
    return [list(kept) for _ in operation.outputs]


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "renorm")
def _softmax(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.inputs[0]))
    if labels:
        flow.couplings.average(labels[int(argument(operation, "dim", -1))])
    return [labels]


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "flip", "roll", "kthvalue")
def _ordered(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.inputs[0]))
    dims = operation.arguments.get("dim", operation.arguments.get("dims", -1))
    dims = (dims,) if isinstance(dims, int) else dims or range(len(labels))
    for dim in dims:
        if labels and is_atoms(labels[int(dim)]):
            flow.couplings.pin(labels[int(dim)], said(operation, "tells its channels apart by their place", BY_NUMBER))
            labels[int(dim)] = FIXED
    return [labels[: len(flow.shape(value))] for value in operation.outputs if value is not None]


@rule("glu")
def _glu(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.inputs[0]))
    dim = dim_of(operation, len(labels), default=-1)
    whole = labels[dim]
    if is_atoms(whole):
        half = len(whole) // 2
        alike(flow, whole, half)
        labels[dim] = whole[:half]
    return [labels]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    values = [source, *(operation.arguments[n] for n in ("weight", "bias") if operation.arguments.get(n) is not None)]
    labels = aligned(flow, values, len(flow.shape(source)), operation)
    inner = len(argument(operation, "normalized_shape"))
    if inner == 1 and is_atoms(labels[-1]):  # a layer without weights has its size in an attribute alone
        own = flow.of_the_layer(operation, flow.shape(source)[-1])
        labels[-1] = flow.couplings.merge(labels[-1], own, said(operation, "meets a tensor whose width is fixed"))
    for label in labels[len(labels) - inner :]:
        flow.couplings.average(label)
        if is_atoms(label):
            flow.couplings.extents.append((label, operation.site.module))
    moments = [*labels[: len(labels) - inner], *[FREE] * inner]
    return [labels, *[list(moments) for _ in operation.outputs[1:]]]


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("batch_norm", "_batch_norm_with_update", "native_group_norm", "miopen_batch_norm")
def _channel_norm(flow: Flow, operation: Operation) -> list[Labels]:
    source = operation.inputs[0]
    labels = list(flow.labels(source))
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = operation.arguments.get(name)
        if value is not None:
            labels[1] = flow.couplings.merge(
                labels[1], flow.labels(value)[0], said(operation, "meets a tensor whose width is fixed")
            )
    groups = operation.arguments.get("group")
    channels = labels[1]
    if groups and is_atoms(channels):
        flow.couplings.average(channels)
        alike(flow, channels, len(channels) // int(groups))
    moments: list[Labels] = [[FIXED] * len(flow.shape(v)) for v in operation.outputs[1:] if v is not None]
    return [labels, *moments]


_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule(
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"
)
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d")
@rule("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "max_pool2d")
@rule("fractional_max_pool2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
@rule("max_unpool2d")
def _pool(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.inputs[0]))
    dims = next((n for name, n in _SPATIAL.items() if name in operation.name.replace("_", "")), 2)
    first = len(labels) - dims
    for dim in range(dims):
        if not _leaves(operation, dim, dims):
            flow.couplings.pin(labels[first + dim], said(operation, "pools or resizes along its channels"))
            labels[first + dim] = FIXED
    return [list(labels) for _ in operation.outputs]


def _leaves(operation: Operation, dim: int, dims: int) -> bool:
    """Whether a pooling leaves one of its dimensions as it is: windows of one, which take no padding, side by side."""
    windows = operation.arguments.get("kernel_size")
    if windows is None:
        return False
    sizes = _each(windows, dims)
    return sizes[dim] == _each(operation.arguments.get("stride") or sizes, dims)[dim] == 1


def _each(numbers: Any, dims: int) -> list[int]:
    """An argument for each dimension; one number, or a list of one, is for all."""
    found = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
    return found * dims if len(found) == 1 else found


@rule("grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(flow: Flow, operation: Operation) -> list[Labels]:
    labels, places = flow.labels(argument(operation, "input")), flow.labels(argument(operation, "grid"))
    for label in labels[2:]:
        flow.couplings.pin(label, said(operation, "pools or resizes along its channels"))
    flow.couplings.pin(places[-1], said(operation, "picks by an index that has its width"))
    batch = flow.couplings.merge(labels[0], places[0], said(operation, "meets a tensor whose width is fixed"))
    return [[batch, labels[1], *places[1:-1]]]


@rule("index", "_unsafe_index")
def _index(flow: Flow, operation: Operation) -> list[Labels]:
    source, result = operation.inputs[0], operation.result
    labels, indices = list(flow.labels(source)), argument(operation, "indices")
    for label in (label for index in indices if isinstance(index, Value) for label in flow.labels(index)):
        flow.couplings.pin(label, said(operation, "picks by an index that has its width"))
    over = dims_of_mask(flow, operation)
    if over and len(flow.shape(result)) == len(labels) - len(over) + 1:
        if goes_over_rows(flow, operation):
            return [pick_rows(flow, operation, over)]
        for dim in over:
            flow.couplings.pin(labels[dim], _picks(operation, flow.shape(source)[dim]))
        return [[*labels[: over.start], FIXED, *labels[over.stop :]]]
    used = [dim for dim, index in enumerate(indices) if isinstance(index, Value)]
    for dim in used:
        flow.couplings.pin(labels[dim], _picks(operation, flow.shape(source)[dim]))
    new = len(flow.shape(result)) - (len(labels) - len(used))
    if used and used != list(range(used[0], used[0] + len(used))):
        return [[FIXED] * new + [label for dim, label in enumerate(labels) if dim not in used]]
    first = used[0] if used else 0
    return [[*labels[:first], *[FIXED] * new, *labels[first + len(used) :]]]


@rule("index_select", "gather", "take_along_dim")
def _gather(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.arguments["self"]))
    dim = dim_of(operation, len(labels))
    size = flow.shape(operation.arguments["self"])[dim] if labels else 0
    flow.couplings.pin(labels[dim], _picks(operation, size))
    labels[dim] = FIXED
    if operation.name == "gather":
        return [_with_index(flow, operation, labels, dim)]
    return [labels]


def _picks(operation: Operation, size: int) -> str:
    return said(operation, f"picks some of {size} channels by their numbers", BY_NUMBER)


def _with_index(flow: Flow, operation: Operation, labels: Labels, dim: int) -> Labels:
    """Labels that an index of the same rank goes along with, but in the dimension that it picks from."""
    index = operation.arguments["index"]
    for other, label in enumerate(flow.labels(index)):
        if other != dim:
            labels[other] = flow.couplings.merge(
                labels[other], label, said(operation, "picks by an index whose width is fixed")
            )
    return labels


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "select_scatter")
@rule("slice_scatter", "index_reduce", "index_put", "_index_put_impl")
def _scatter(flow: Flow, operation: Operation) -> list[Labels]:
    target = operation.inputs[0]
    labels = list(flow.labels(target))
    rest = [value for value in operation.inputs[1:] if value.number != target.number]
    if operation.name in ("index_put", "_index_put_impl"):
        over = dims_of_mask(flow, operation)
        if over and goes_over_rows(flow, operation):
            return write_rows(flow, operation, over, argument(operation, "values"))
        indexed = [*over] or [d for d, i in enumerate(argument(operation, "indices")) if isinstance(i, Value)]
    else:
        indexed = [dim_of(operation, len(labels))] if labels else []
    for dim in indexed:
        flow.couplings.pin(labels[dim], said(operation, "writes channels by their numbers", BY_NUMBER))
    for value in rest:
        shape = flow.shape(value)
        for dim, label in enumerate(flow.labels(value), len(labels) - len(shape)):
            same = 0 <= dim < len(labels) and dim not in indexed and flow.shape(target)[dim] == shape[dim - len(labels)]
            if same and is_atoms(label):
                labels[dim] = flow.couplings.merge(labels[dim], label, said(operation, "writes into a fixed width"))
            else:
                flow.couplings.pin(label, said(operation, "writes it to places by their numbers"))
    return [labels]


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss", "l1_loss")
def _loss(flow: Flow, operation: Operation) -> list[Labels]:
    result = operation.outputs[0]
    rank = max((len(flow.shape(value)) for value in operation.inputs), default=0)
    labels = aligned(flow, operation.inputs, rank, operation)
    return [labels if result is not None and len(flow.shape(result)) == rank else []]


@rule("nll_loss_forward", "nll_loss2d_forward", "nll_loss", "multi_margin_loss", "multilabel_margin_loss_forward")
def _class_loss(flow: Flow, operation: Operation) -> list[Labels]:
    labels = flow.labels(operation.inputs[0])
    if labels:
        flow.couplings.pin(labels[min(1, len(labels) - 1)], said(operation, "reads classes by their numbers"))
    return [sized(flow, value) for value in operation.outputs if value is not None]


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _fft(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.inputs[0]))
    for dim in argument(operation, "dim", ()):
        flow.couplings.pin(labels[int(dim)], said(operation, "transforms along its channels"))
        labels[int(dim)] = FIXED
    return [labels]


@rule("view_as_real", "view_as_complex")
def _complex(flow: Flow, operation: Operation) -> list[Labels]:
    labels = list(flow.labels(operation.inputs[0]))
    if operation.name == "view_as_real":
        return [[*labels, FIXED]]
    flow.couplings.pin(labels[-1], said(operation, "makes complex numbers of it"))
    return [labels[:-1]]


@rule("_local_scalar_dense", "equal", "is_nonzero", "sym_size", "_assert_async", "_assert_scalar", "is_same_size")
@rule("resize_as", "set", "record_stream", "_has_same_storage_numel", "prim::layout")
def _nothing(flow: Flow, operation: Operation) -> list[Labels]:
    return [sized(flow, value) for value in operation.outputs if value is not None]
