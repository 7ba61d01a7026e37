"""Labels: which atoms the indices of a tensor's dimensions belong to, and how they move.

An *atom* is one index of one slot of a layer, or of one dimension of a bare parameter or buffer. A dimension's *label*
is an array that gives the atom of each of its indices (`FIXED_PLACE` for one of a fixed place, as of a padding, and
`FREE_PLACE` for one of zeros made to fit), or `FIXED` where the whole dimension has a size that is given from outside
(a batch, positions, raw data), or `FREE` where nothing is known against any size (zeros made to fit). Atoms that have
to go together are *united*; atoms that cannot go are *pinned*, with the reason. Where several dimensions with atoms
become one, its atoms are *crossed* (`crossings`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lightning_softprune.graph.flow.crossings import CrossedAtoms
from lightning_softprune.utilities.arrays import IntArray

FREE, FIXED = "free", "fixed"
FIXED_PLACE, FREE_PLACE = -1, -2
CROSSED = "crossed"
"""The slot under which crossed atoms are numbered; nothing has one of this name."""

_UNLIKE = "its channels meet others that were laid out with them in another way; put a layer between them to prune both"

Label = str | IntArray
"""FREE, FIXED, or the atoms."""

Labels = list[Label]


def is_atoms(label: Label) -> TypeGuard[IntArray]:
    """Whether a label names atoms."""
    return isinstance(label, np.ndarray)


@dataclass
class Split:
    """A dimension that was laid out over several: which of them carries the atoms is a choice.

    Attributes:
        site: Tells it from others; calls from the same line share their choice.
        sizes: Of the dimensions that the atoms vary along.
        chosen: Which of these carries them.
        atoms: The atoms.
        compared: Whether the choice may change what is computed, so that it is compared with the masked network.
    """

    site: str
    sizes: tuple[int, ...]
    chosen: int
    atoms: IntArray
    compared: bool = True


@dataclass(frozen=True, eq=False)
class Pin:
    """Atoms that cannot go.

    Attributes:
        atoms: The atoms.
        reason: Why they cannot.
        whole: Whether a group with one of them is refused as a whole.
        output: Who produces an output of the network that they are, where that is the reason; else empty.
    """

    atoms: IntArray
    reason: str
    whole: bool = True
    output: str = ""


@dataclass
class Couplings:
    """What has been found out of atoms.

    Attributes:
        count: Atoms so far.
        slots: Layer or tensor name and slot -> its first atom, its size.
        pins: Atoms that cannot go.
        splits: Dimensions that were laid out over several.
        contracted: Atoms over which products of two tensors sum, in the order in which they do.
        averaged: Atoms over which something is computed that misses those that go (a mean, a softmax).
        shown: Atoms of what leaves the steps.
        pinning: Whether pins count now; they do not where nobody reads what is computed.
        returned: Dimensions of what modules gave that hold atoms: name of the module, atoms.
        extents: Sizes of dimensions that hold atoms where the user's code names sizes: atoms, module.
        crossed: Atoms that go with any of several others.
    """

    count: int = 0
    slots: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    extents: list[tuple[IntArray, str]] = field(default_factory=list)
    returned: list[tuple[str, IntArray]] = field(default_factory=list)
    contracted: list[IntArray] = field(default_factory=list)
    averaged: list[IntArray] = field(default_factory=list)
    shown: list[IntArray] = field(default_factory=list)
    pinning: bool = True
    crossed: CrossedAtoms = field(default_factory=CrossedAtoms)
    _edges: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _known: set[tuple[int, int]] = field(default_factory=set)
    _held: list[IntArray] = field(default_factory=list)
    _cut: dict[int, IntArray] = field(default_factory=dict)
    _stays: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # by atom, whether it is pinned

    def slot(self, name: str, slot: str, size: int) -> IntArray:
        """The atoms of a slot."""
        first, size = self.slots.setdefault((name, slot), (self.count, size))
        self.count = max(self.count, first + size)
        return np.arange(first, first + size)

    def unite(self, one: IntArray, other: IntArray) -> None:
        """Atoms at the same place go together; what meets a fixed place stays, what meets a free one may go."""
        if (id(one), id(other)) in self._known:
            return
        self._known.add((id(one), id(other)))
        self._held += [one, other]  # their identities stay taken
        both = (one >= 0) & (other >= 0)
        if both.all():
            self._edges.append((one, other))
            return
        self._edges.append((one[both], other[both]))
        for atoms, there in ((one, other), (other, one)):
            lonely = atoms[(atoms >= 0) & (there == FIXED_PLACE)]
            if len(lonely) and self.pinning:
                self.pins.append(Pin(lonely, "it is added to a place whose size is fixed", whole=False))

    def cross(self, dims: Sequence[IntArray]) -> IntArray:
        """Atoms that go with any of those at the same place of several arrays of one shape."""
        factors = [factor for atoms in dims for factor in self.crossed.factors(atoms) or [atoms]]
        found = self.slot(f"{CROSSED} {self.count}", CROSSED, dims[0].size)
        self.crossed.add(int(found[0]), np.stack([factor.ravel() for factor in factors], axis=1))
        return found.reshape(dims[0].shape)

    def cut(self, label: IntArray) -> IntArray:
        """The label of a slice whose ends are no shares of what it is taken from."""
        self._cut[id(label)] = label  # its identity stays taken
        return label

    def is_cut(self, label: Label) -> bool:
        """Whether it is one, as it was taken."""
        return id(label) in self._cut

    def average(self, label: Label) -> None:
        """Something is computed over the atoms of a label that zeros in their place would change."""
        if is_atoms(label):
            self.averaged.append(label[label >= 0])

    def contract(self, one: Label, other: Label, reason: str) -> None:
        """A product sums over a dimension that two tensors meet in; see `merge`."""
        self.contracted += [label for label in (one, other) if is_atoms(label)]
        self.merge(one, other, reason)

    def pin(self, label: Label, reason: str, output: str = "") -> None:
        """The atoms of a label cannot go, and no others of their group; see `Pin`."""
        if self.pinning and is_atoms(label) and (label >= 0).any():
            atoms = label[label >= 0]
            self.pins.append(Pin(atoms, reason, output=output))
            if len(self._stays) < self.count:
                self._stays = np.pad(self._stays, (0, 2 * self.count - len(self._stays)))
            self._stays[atoms] = 1

    def is_pinned(self, label: IntArray) -> bool:
        """Whether none of a label's atoms can go, as far as is known yet, whatever they are united with."""
        atoms = label[label >= 0]
        return bool(atoms.max(initial=0) < len(self._stays) and self._stays[atoms].all())

    def merge(self, one: Label, other: Label, reason: str) -> Label:
        """The label of a dimension that two tensors meet in, index by index.

        Args:
            one: The label of the one's dimension.
            other: The other's, of the same size.
            reason: Why atoms that meet a fixed size cannot go.
        """
        if is_atoms(one) and is_atoms(other):
            if one is not other:
                self.unite(one, other)
                if (one < 0).any() and len(one) == len(other):
                    return np.where(one >= 0, one, np.maximum(one, other))
            return one
        for label, there in ((one, other), (other, one)):
            if is_atoms(label):
                if there != FIXED:
                    return label
                self.pin(label, reason)
                return np.where(label == FREE_PLACE, FIXED_PLACE, label) if (label == FREE_PLACE).any() else label
        return FIXED if FIXED in (one, other) else FREE

    def classes(self) -> IntArray:
        """The class of each atom: those that go together have the same."""
        while True:
            found = self.united()
            together, stuck = self.crossed.met(found)
            self.pins += [Pin(atoms, _UNLIKE) for atoms in stuck]
            if not together:
                return found
            self._edges += together

    def united(self) -> IntArray:
        """The same, without what crossed atoms bring together."""
        if not self.count:
            return np.zeros(0, dtype=np.int64)
        one = np.concatenate([edge[0] for edge in self._edges] or [np.zeros(0, np.int64)])
        other = np.concatenate([edge[1] for edge in self._edges] or [np.zeros(0, np.int64)])
        graph = coo_matrix((np.ones(len(one), dtype=np.int8), (one, other)), shape=(self.count, self.count))
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


@dataclass
class Moved:
    """What a reshape does to the labels of some neighbouring dimensions.

    Attributes:
        before, after: The dimensions.
        carriers: Those of them before that carry atoms.
        elements: For each of these, its atom of each element, in the shape of ``after``.
        rest: What the dimensions are that carry no atoms.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    carriers: tuple[int, ...]
    elements: list[IntArray]
    rest: Label


def blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The dimensions of two shapes with the same number of elements, in blocks of the same size.

    >>> list(blocks((2, 6, 5), (2, 2, 3, 5)))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        mine, theirs = [], []
        left = right = 1
        if i < len(before):
            mine, left, i = [i], before[i], i + 1
        if j < len(after):
            theirs, right, j = [j], after[j], j + 1
        while left != right or not mine or not theirs:
            if (left < right or not mine) and i < len(before):
                mine, left, i = [*mine, i], left * before[i], i + 1
            elif j < len(after):
                theirs, right, j = [*theirs, j], right * after[j], j + 1
            else:
                break
        # dimensions of one element go where they fall
        yield mine, theirs


def move(labels: Labels, before: Sequence[int], after: Sequence[int]) -> Iterator[Moved]:
    """Follow labels through a reshape, block by block.

    Args:
        labels: Of the dimensions before.
        before: Their sizes.
        after: Sizes of the dimensions after.
    """
    for mine, theirs in blocks(before, after):
        large = [dim for dim in mine if before[dim] > 1]
        carriers = {dim: label for dim in large if is_atoms(label := labels[dim])}
        free = any(isinstance(labels[dim], str) and labels[dim] == FREE for dim in large)
        rest = FREE if free or not large else FIXED  # what is expanded along goes with anything
        shape, elements = [before[dim] for dim in mine], []
        for carrier, atoms in carriers.items():
            view = [1] * len(mine)
            view[mine.index(carrier)] = before[carrier]
            spread = np.broadcast_to(atoms.reshape(view), shape)
            elements.append(spread.reshape([after[dim] for dim in theirs]))
        yield Moved(tuple(mine), tuple(theirs), tuple(carriers), elements, rest)


def varies(elements: IntArray, axis: int) -> bool:
    """Whether the atoms of an array differ along an axis."""
    return elements.shape[axis] > 1 and bool((elements != elements.take([0], axis=axis)).any())
