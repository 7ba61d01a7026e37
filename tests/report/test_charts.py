import itertools

import pytest

from lightning_softprune.report.charts import ticks


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-1e-9, 1e-9), (1e6, 1e6 + 1), (-3e140, 3e149), (5.0, 5.0), (0.123, 0.1231), (-7.0, 900.0)],
)
def test_ticks_are_few_ordered_and_within(low: float, high: float) -> None:
    found = ticks(low, high)

    assert 1 <= len(found) <= 7
    assert all(a < b for a, b in itertools.pairwise(found))
    assert all(low - 1e-6 * abs(low) <= value <= high + 1e-6 * abs(high) for value in found)
