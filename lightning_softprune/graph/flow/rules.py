"""The table of rules: how each elementary operator moves and unites labels.

A rule is called with the flow and an operation and returns the labels of the outputs. An operator without a rule pins
all that it is given. `rules_of_shape`, `rules_of_windows`, `rules_of_products`, `rules_of_masks` and `rules_of_numbers`
hold the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lightning_softprune.graph.flow.labels import Couplings, Label, Labels, is_atoms
from lightning_softprune.graph.flow.tape import Operation, Value


class Flow(Protocol):
    """What rules may ask of what calls them."""

    couplings: Couplings
    choices: Mapping[str, int]

    def labels(self, value: Value) -> Labels:
        """Labels of a value's dimensions."""

    def shape(self, value: Value) -> tuple[int, ...]:
        """Its shape."""

    def is_read(self, value: Value) -> bool:
        """Whether something that is shown depends on it."""

    def describe(self, value: Value) -> str:
        """The tensor in words."""

    def is_parameter(self, value: Value) -> bool:
        """Whether it is a parameter, or looks at one."""

    def of_the_layer(self, operation: Operation, size: int) -> Label:
        """The channels of the layer whose code runs an operation, if it has one slot of this size; else free."""

    def hint(self, operation: Operation, sizes: Sequence[int]) -> int | None:
        """Which of some dimensions the code around counts as heads."""

    def taken_apart(self, value: Value) -> set[int]:
        """The dimensions whose indices are taken one by one further on."""


Rule = Callable[[Flow, Operation], "list[Labels]"]

RULES: dict[str, Rule] = {}
"""By the operator's name, without the underscore of in-place variants."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def argument(operation: Operation, name: str, default: Any = None) -> Any:
    """An argument of an operation; the default where it was not given."""
    value = operation.arguments.get(name, default)
    return default if value is None else value


def dim_of(operation: Operation, rank: int, name: str = "dim", default: int = 0) -> int:
    """An argument that is a dimension, not negative."""
    return int(argument(operation, name, default)) % max(rank, 1)


OWN_CODE = "put it into a module and describe that with register_layer, or name the module in ignore"
BY_NUMBER = "what is read by its number needs a layer of its own"
FIXED_WIDTH = "put a layer between them to prune both"
IN_FRONT = "put a layer in front of it, which keeps its width, to prune what comes before"


def said(operation: Operation, text: str, hint: str = IN_FRONT) -> str:
    """A reason that names the operation and where it is; and what would help."""
    return f"{operation.name} {operation.site} {text}; {hint}"


def aligned(flow: Flow, values: Sequence[Value], rank: int, operation: Operation) -> Labels:
    """The labels of a result of this rank that tensors broadcast to, index by index."""
    result: list[Label] = ["free"] * rank
    sizes = [1] * rank
    holders: list[Value | None] = [None] * rank
    for value in values:
        shape, labels = flow.shape(value), flow.labels(value)
        for dim, (size, label) in enumerate(zip(shape, labels, strict=True), rank - len(shape)):
            if dim < 0 or (size == 1 and sizes[dim] != 1):
                continue
            if size != 1 and sizes[dim] == 1:
                result[dim], sizes[dim], holders[dim] = label, size, value
                continue
            fixed = value if isinstance(label, str) and label == "fixed" else holders[dim]
            reason = ""
            if fixed is not None and is_atoms(result[dim]) != is_atoms(label):
                text = f"meets a tensor whose width is fixed: {flow.describe(fixed)}"
                reason = said(operation, text, FIXED_WIDTH)
            result[dim], holders[dim] = flow.couplings.merge(result[dim], label, reason), value
    return result


def sized(flow: Flow, value: Value) -> Labels:
    """Labels of a tensor about whose dimensions nothing can be said."""
    return ["fixed"] * len(flow.shape(value))


def unknown(flow: Flow, operation: Operation) -> list[Labels]:
    """An operator without a rule: it pins all that it is given."""
    for value in operation.inputs:
        for label in flow.labels(value):
            flow.couplings.pin(label, said(operation, "is an operator that is not known here", OWN_CODE))
    return [sized(flow, value) for value in operation.outputs if value is not None]
