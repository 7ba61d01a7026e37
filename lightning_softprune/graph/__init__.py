"""The dependency graph of a network: its layers, its pruning groups, what is left alone and why, and what plans cost.

A module is traced by running its own steps (`trace`), its channels are followed through everything that is computed
(`flow`), and what was found is sorted into groups (`grouping`; the idea of groups is DepGraph's, arXiv 2301.12900).
`layers` is the one table of layer types.
"""

from lightning_softprune.graph.components import (
    Component,
    Form,
    assign_components,
    check_twins,
    equal_parts,
    form_of,
    match_modules,
    mirror_counts,
    mirror_twins,
    undeclared_twins,
)
from lightning_softprune.graph.computed import ComputedWeight, WeightGradients, watch_gradients
from lightning_softprune.graph.costs import CostModel, record_macs, with_macs_recorded
from lightning_softprune.graph.flow import BY_NUMBER
from lightning_softprune.graph.geometry import Kernel, Shape, WeightGeometry, shape_mismatch
from lightning_softprune.graph.grouping import (
    Grouping,
    Place,
    groups_of,
    groups_of_one_width,
    trace_groups,
    with_outputs_of,
)
from lightning_softprune.graph.groups import Count, Member, PruningGroup
from lightning_softprune.graph.layer_types import (
    LAYER_TYPES,
    LayerSpec,
    check_layers,
    checked_layers,
    register_layer,
    register_layers,
)
from lightning_softprune.graph.layers import (
    Applications,
    LayerType,
    Layout,
    Sizes,
    TensorAxis,
    computed_of,
    geometry_of,
    layer_type,
    layout_of,
    parts_called,
    refresh,
    set_sizes,
    takes_bias,
    tensor_at,
    weight_of,
    write_weight,
)
from lightning_softprune.graph.reach import Groups, coverage
from lightning_softprune.graph.trace import find_yardsticks, trace_model
from lightning_softprune.graph.unseen import refuse_unseen_readers
from lightning_softprune.graph.usage import record_usage, refuse_unjudged

__all__ = [
    "BY_NUMBER",
    "LAYER_TYPES",
    "Applications",
    "Component",
    "ComputedWeight",
    "CostModel",
    "Count",
    "Form",
    "Grouping",
    "Groups",
    "Kernel",
    "LayerSpec",
    "LayerType",
    "Layout",
    "Member",
    "Place",
    "PruningGroup",
    "Shape",
    "Sizes",
    "TensorAxis",
    "WeightGeometry",
    "WeightGradients",
    "assign_components",
    "check_layers",
    "check_twins",
    "checked_layers",
    "computed_of",
    "coverage",
    "equal_parts",
    "find_yardsticks",
    "form_of",
    "geometry_of",
    "groups_of",
    "groups_of_one_width",
    "layer_type",
    "layout_of",
    "match_modules",
    "mirror_counts",
    "mirror_twins",
    "parts_called",
    "record_macs",
    "record_usage",
    "refresh",
    "refuse_unjudged",
    "refuse_unseen_readers",
    "register_layer",
    "register_layers",
    "set_sizes",
    "shape_mismatch",
    "takes_bias",
    "tensor_at",
    "trace_groups",
    "trace_model",
    "undeclared_twins",
    "watch_gradients",
    "weight_of",
    "with_macs_recorded",
    "with_outputs_of",
    "write_weight",
]
