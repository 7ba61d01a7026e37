"""How much of a model can be pruned: the share of its parameters that prunable groups reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.graph.groups import PruningGroup
from lightning_softprune.graph.layers import Layout, layout_of, tensor_at

_MOST_MEMBERS = 3
"""So many are named in a table."""


@dataclass(frozen=True)
class Coverage:
    """What prunable groups reach.

    Attributes:
        share: Parameters of the tensors of which prunable groups can remove something, over all parameters.
        largest: Name of the largest group, layer or parameter that is left out; empty where there is none.
        reason: Why it is.
    """

    share: float
    largest: str = ""
    reason: str = ""

    def __str__(self) -> str:
        left = f"; largest left out: {self.largest} ({self.reason})" if self.largest else ""
        return f"{100 * self.share:.0f} % of the parameters are in prunable groups{left}"


class Groups(list[PruningGroup]):
    """A list of groups that prints as a table, with the coverage below.

    Attributes:
        coverage: How much of the model the prunable ones reach.
    """

    def __init__(self, groups: Iterable[PruningGroup], coverage: Coverage) -> None:
        super().__init__(groups)
        self.coverage = coverage

    def __str__(self) -> str:
        rows = [("group", "channels", "members", "prunable?")]
        rows += [(g.name, str(g.num_channels or ""), _members(g), g.reason or "prunable") for g in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{name:{widths[0]}}  {channels:>{widths[1]}}  {members:{widths[2]}}  {what}"
            for name, channels, members, what in rows
        ]
        return "\n".join([*lines, "", str(self.coverage)])

    __repr__ = __str__

    def __reduce__(self) -> tuple[type[Groups], tuple[list[PruningGroup], Coverage]]:
        return type(self), (list(self), self.coverage)


def _members(group: PruningGroup) -> str:
    names = list(dict.fromkeys(member.module for member in group.members))
    more = f" and {len(names) - _MOST_MEMBERS} more" if len(names) > _MOST_MEMBERS else ""
    return ", ".join(names[:_MOST_MEMBERS]) + more


def coverage(model: nn.Module, groups: Sequence[PruningGroup]) -> Coverage:
    """Measure it.

    Args:
        model: The model.
        groups: All its groups, prunable or not.
    """
    modules = dict(model.named_modules())
    sizes = {id(one): one.numel() for one in model.parameters() if not is_lazy(one)}
    reached: set[int] = set()
    for group in groups:
        if group.prunable:
            reached |= _tensors_of(modules, group)
    reached &= sizes.keys()
    share = sum(sizes[key] for key in reached) / max(sum(sizes.values()), 1)
    left = {
        group.name: (sum(sizes.get(key, 0) for key in _tensors_of(modules, group) - reached), group.reason)
        for group in groups
        if not group.prunable
    }
    name = max(left, key=lambda name: left[name][0], default="")
    if not left or not left[name][0]:
        return Coverage(share)
    return Coverage(share, name or "the module itself", left[name][1])


def _tensors_of(modules: dict[str, nn.Module], group: PruningGroup) -> set[int]:
    found: set[int] = set()
    for member in group.members:
        module = modules.get(member.module)
        layout = None if module is None else layout_of(module)
        if isinstance(layout, Layout) and module is not None and member.slot in layout.slots:
            tensors = [tensor_at(module, axis.tensor) for axis in layout.axes if axis.slot == member.slot]
        elif module is not None:
            tensors = list(module.parameters())
        else:
            owner, _, attribute = member.module.rpartition(".")
            tensors = [getattr(modules.get(owner), attribute, None)]
        found |= {id(tensor) for tensor in tensors if tensor is not None}
    return found
