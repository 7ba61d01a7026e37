"""How much memory statistics and regressions take, and which layers get smaller ones where that is too much.

A layer whose rows have ``f`` numbers holds a matrix of ``f x f`` in double precision while it is measured, and its
factor afterwards; :data:`MATRICES` of them lie side by side at most. Beyond that, the widest layer is worked on, with
:data:`WORKING` more. Layers whose unfolded inputs do not fit have the one regression over channels for all positions,
narrow ones first served: a wide one takes as much as many of them. The matrix of its channels has every layer, whatever
the budget is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_softprune.calibration.readers import Reader, weight_geometry
from lightning_softprune.calibration.unfold import rows_per_call

MATRICES, WORKING = 2, 3

_DOUBLE = 8


def statistics_bytes(model: nn.Module, readers: Sequence[Reader], unfolded: Sequence[str] = ()) -> int:
    """The most that statistics and regressions take while they are prepared.

    Args:
        model: The model.
        readers: Layers that are measured.
        unfolded: Names of those whose unfolded inputs are, too.
    """
    widths = {reader.name: weight_geometry(model.get_submodule(reader.name)) for reader in readers}
    sizes = [
        _matrix(geometry.inputs // reader.stride) for reader, geometry in zip(readers, widths.values(), strict=True)
    ]
    sizes += [_matrix(widths[name].features) for name in unfolded]
    rows = max((_row_bytes(model, reader) for reader in readers if reader.name in set(unfolded)), default=0)
    return MATRICES * sum(sizes) + WORKING * max(sizes, default=0) + rows


def unfolded_within(
    model: nn.Module, readers: Sequence[Reader], candidates: Sequence[str], budget: float | None
) -> list[str]:
    """Names of the candidates whose unfolded inputs can be measured within so many bytes.

    Args:
        model: The model.
        readers: All layers that are measured.
        candidates: Those whose outputs read several rows.
        budget: Bytes; `None`: no limit.
    """
    if budget is None:
        return list(candidates)
    width = {name: weight_geometry(model.get_submodule(name)).features for name in candidates}
    chosen: list[str] = []
    for name in sorted(candidates, key=lambda name: width[name]):
        if statistics_bytes(model, readers, [*chosen, name]) > budget:
            break  # the rest is wider still
        chosen.append(name)
    return chosen


def _matrix(width: int) -> int:
    return _DOUBLE * width * width


def _row_bytes(model: nn.Module, reader: Reader) -> int:
    """Three copies of the rows of one call, in single precision."""
    features = weight_geometry(model.get_submodule(reader.name)).features
    return 3 * 4 * features * rows_per_call(features)
