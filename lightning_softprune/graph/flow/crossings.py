"""Crossings: atoms of a dimension that several dimensions with atoms were laid out over, as a flattened outer product.

A *crossed* atom lies where one atom of each dimension meets, its *factors*: it goes as soon as one of these does, and
never alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lightning_softprune.utilities.arrays import IntArray


@dataclass
class CrossedAtoms:
    """All crossed atoms, and their factors.

    Attributes:
        parts: First atom of a run of crossed atoms; the factors of each, shape ``(atoms, dimensions)``, -1 for none.
    """

    parts: list[tuple[int, IntArray]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def add(self, first: int, factors: IntArray) -> None:
        """Atoms from this number on have these factors."""
        self.parts.append((first, factors))

    def factors(self, atoms: IntArray) -> list[IntArray] | None:
        """One array of factors per dimension, in the shape of the atoms; ``None`` where not all of them are crossed."""
        held = atoms >= 0
        if not self.parts or not held.any():
            return None
        firsts = np.array([first for first, _ in self.parts])
        number = np.searchsorted(firsts, atoms[held], side="right") - 1
        if (number < 0).any() or len({self.parts[n][1].shape[1] for n in np.unique(number).tolist()}) != 1:
            return None
        rows = np.full((*atoms.shape, self.parts[number[0]][1].shape[1]), -1, dtype=np.int64)
        own = np.empty((len(number), rows.shape[-1]), dtype=np.int64)
        for n in np.unique(number).tolist():
            first, factors = self.parts[n]
            here = number == n
            places = atoms[held][here] - first
            if (places >= len(factors)).any():
                return None
            own[here] = factors[places]
        rows[held] = own
        return [np.ascontiguousarray(rows[..., dim]) for dim in range(rows.shape[-1])]

    def met(self, classes: IntArray) -> tuple[list[tuple[IntArray, IntArray]], list[IntArray]]:
        """What has to go together because crossed atoms do.

        Args:
            classes: The class of each atom.

        Returns:
            Pairs of factors that are not of one class yet; and factors of atoms that meet though they cross unlike
            dimensions, which cannot go.
        """
        pairs: list[tuple[IntArray, IntArray]] = []
        stuck: list[IntArray] = []
        leaders: dict[int, IntArray] = {}
        for first, factors in self.parts:
            own = classes[first : first + len(factors)]
            for number, row in zip(own.tolist(), factors, strict=True):
                leader = leaders.setdefault(number, row)
                if leader is row:
                    continue
                if len(leader) != len(row) or ((leader < 0) != (row < 0)).any():
                    stuck += [leader[leader >= 0], row[row >= 0]]
                    continue
                apart = (row >= 0) & (classes[row] != classes[leader])
                if apart.any():
                    pairs.append((row[apart], leader[apart]))
        return pairs, stuck

    def by_class(self, classes: IntArray) -> dict[int, tuple[int, ...]]:
        """Crossed classes and those of their factors; factors that are crossed themselves are taken apart."""
        direct: dict[int, tuple[int, ...]] = {}
        for first, factors in self.parts:
            found = np.where(factors >= 0, classes[factors], -1)
            for number, row in zip(classes[first : first + len(factors)].tolist(), found.tolist(), strict=True):
                direct.setdefault(number, tuple(row))

        def taken_apart(number: int, inside: tuple[int, ...]) -> tuple[int, ...]:
            if number not in direct or number in inside:
                return (number,)
            return tuple(f for factor in direct[number] for f in taken_apart(factor, (*inside, number)))

        return {number: taken_apart(number, ()) for number in direct}
