"""What a pruning group is: channels that must be removed together, and the slots of layers that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_softprune.utilities.arrays import IntArray


@dataclass(frozen=True)
class Member:
    """One slot of one layer (or one dimension of a bare parameter) that belongs to a group.

    Attributes:
        module: Name of the layer or parameter, as in ``named_modules()`` / ``named_parameters()``.
        slot: A slot of the layer (``"in"``, ``"out"``, ``"both"``, ...), or ``"dim<k>"`` for a bare parameter.
        owner: The group's channel that each index of the slot belongs to, -1 for indices of other groups; shape
            ``(slot size,)``.
    """

    module: str
    slot: str
    owner: IntArray

    def __str__(self) -> str:
        return f"{self.module} ({self.slot})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Member):
            return NotImplemented
        return (self.module, self.slot) == (other.module, other.slot) and np.array_equal(self.owner, other.owner)

    def __hash__(self) -> int:
        return hash((self.module, self.slot))


@dataclass(frozen=True)
class Count:
    """An integer attribute of a module that counts channels of a group: it shrinks with the plan.

    Attributes:
        module: Name of the module.
        attribute: Name of the attribute (``num_heads``).
        per_channel: By how much it falls with every channel that goes (1 for heads, the width of a head for all of
            them together).
    """

    module: str
    attribute: str
    per_channel: int


@dataclass(frozen=True)
class PruningGroup:
    """Channels that must be removed together, because layers depend on each other.

    Attributes:
        name: Unique name: the first layer that produces the channels.
        component: The component the members lie in; several are joined by ``+``.
        kind: ``"intra"`` (one component) or ``"inter"`` (the group couples several).
        num_channels: Number of removable units.
        members: The coupled slots. Beside layers' these are ``"dim<k>"`` of bare parameters, of buffers, and of tensors
            that a module keeps as plain attributes.
        prunable: Whether the group takes part in a search.
        reason: Why it does not; empty exactly when it does.
        counts: Attributes that count its channels.
        least: How many channels have to stay.
        outputs: Who gives its channels to other code, the model itself being the empty name, and the width of what it
            gives. These are modules until components are assigned, and components then.
        crashed: Whether the reason is that the user's own code fails with fewer channels.
        step: Kept channels are a multiple of it: what code of the model's asks for, whatever the user does.
    """

    name: str
    component: str
    kind: str
    num_channels: int
    members: tuple[Member, ...]
    prunable: bool = True
    reason: str = ""
    counts: tuple[Count, ...] = ()
    least: int = 1
    outputs: tuple[tuple[str, int], ...] = ()
    crashed: bool = False
    step: int = 1

    def refuse(self, reason: str, *, crashed: bool = False) -> PruningGroup:
        """Return this group as not prunable."""
        return replace(self, prunable=False, reason=reason, crashed=crashed)

    def slots(self) -> set[tuple[str, str]]:
        """The ``(module, slot)`` pairs of the members."""
        return {(member.module, member.slot) for member in self.members}


def crossed_parts(owners: Sequence[IntArray]) -> list[tuple[tuple[int, ...], IntArray]]:
    """The parts of a slot, where members cross in it: an index of a flattened outer product belongs to several.

    Args:
        owners: Of each member of the slot.

    Returns:
        Numbers of members, and the indices that belong to these and no others. Nothing where no two members cross.
    """
    held = np.stack([owner >= 0 for owner in owners])
    if (held.sum(axis=0) <= 1).all():
        return []
    kinds, kind = np.unique(held, axis=1, return_inverse=True)
    numbers = [tuple(np.flatnonzero(column).tolist()) for column in kinds.T]
    return [(number, np.flatnonzero(kind.ravel() == n)) for n, number in enumerate(numbers)]


def is_even(owners: Sequence[IntArray]) -> bool:
    """Whether channels of members that cross in a part of a slot meet as often as each other: nothing of it is cut off.

    Args:
        owners: Of each member, for the indices of the part.
    """
    counts = np.unique(np.stack(owners), axis=1, return_counts=True)[1]
    wanted = np.prod([len(np.unique(owner)) for owner in owners])
    return len(counts) == wanted and bool((counts == counts[0]).all())
