"""The one loop every strategy runs in: one budget, one cache keyed on the realised plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_softprune.search.base import SearchStrategy, StopReason
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.checks import optional_whole_number

MAX_REPEATS = 1000
"""A strategy that asks this many times in a row for plans it has asked before in this search is ended."""


@dataclass(frozen=True)
class SearchOutcome:
    """How a search went.

    Attributes:
        evaluations: Calls of `evaluate`.
        asked: Vectors the strategy asked for, those answered from the cache included.
        stop_reason: The strategy's own, or ``"max_evaluations"``, ``"enough"`` or ``"repeating"``.
    """

    evaluations: int
    asked: int
    stop_reason: str


@dataclass
class SearchLoop:
    """The loop, with what its caller brings.

    A vector whose plan is in the cache is told at once and costs nothing. A search that was interrupted is therefore
    resumed by running it again with the same seed and the same cache: what was measured is not measured again.

    Attributes:
        evaluate: The loss of a vector (k,): lower is better, nan for no usable value. Called once per plan.
        seed: Of the strategy's random numbers.
        cache: Plan to loss; read and added to.
        max_evaluations: Calls of `evaluate` allowed. The smaller of this and the strategy's own counts.
        enough: Asked before each call of `evaluate`; where it says yes, the search ends.
        on_asked: Called after every vector with (vector, loss, whether it was evaluated now rather than cached).
    """

    evaluate: Callable[[FloatArray], float]
    seed: int
    cache: dict[tuple[int, ...], float] = field(default_factory=dict)
    max_evaluations: int | None = None
    enough: Callable[[], bool] | None = None
    on_asked: Callable[[FloatArray, float, bool], None] | None = None

    def run(self, strategy: SearchStrategy, space: SearchSpace) -> SearchOutcome:
        """Run one search to its end.

        Args:
            strategy: Started here, so any earlier search of it is forgotten.
            space: What is searched.

        Returns:
            The numbers of evaluations and of vectors asked, and why the search ended.

        Raises:
            ValueError: If the strategy cannot serve this space. Exceptions of `evaluate` reach the caller untouched.
        """
        allowed = self._allowed(strategy)
        strategy.start(space, self.seed)
        evaluations = asked = repeats = 0
        seen: set[tuple[int, ...]] = set()
        while (x := strategy.ask()) is not None:
            key = space.key(x)
            evaluated = key not in self.cache
            if evaluated:
                if allowed is not None and evaluations >= allowed:
                    strategy.stop_reason = StopReason.MAX_EVALUATIONS
                    break
                if self.enough is not None and self.enough():
                    strategy.stop_reason = StopReason.ENOUGH
                    break
                self.cache[key] = float(self.evaluate(x.copy()))
                evaluations += 1
            asked += 1
            repeats = repeats + 1 if key in seen else 0
            seen.add(key)
            strategy.tell(self.cache[key])
            if self.on_asked is not None:
                self.on_asked(x, self.cache[key], evaluated)
            if repeats >= MAX_REPEATS:
                strategy.stop_reason = StopReason.REPEATING
                break
        return SearchOutcome(evaluations, asked, str(strategy.stop_reason))

    def _allowed(self, strategy: SearchStrategy) -> int | None:
        own = optional_whole_number("max_evaluations", self.max_evaluations)
        return min((limit for limit in (strategy.max_evaluations, own) if limit is not None), default=None)


def run_search(
    strategy: SearchStrategy,
    space: SearchSpace,
    evaluate: Callable[[FloatArray], float],
    *,
    seed: int,
    cache: dict[tuple[int, ...], float] | None = None,
    **options: Any,
) -> SearchOutcome:
    """Run one search to its end; see `SearchLoop`.

    Args:
        strategy: Started here, so any earlier search of it is forgotten.
        space: What is searched.
        evaluate: The loss of a vector (k,): lower is better, nan for no usable value. Called once per plan.
        seed: Of the strategy's random numbers.
        cache: Plan to loss; read and added to. Default: an empty one.
        options: `max_evaluations`, `enough` and `on_asked` of `SearchLoop`.

    Returns:
        The numbers of evaluations and of vectors asked, and why the search ended.

    Raises:
        ValueError: If the strategy cannot serve this space. Exceptions of `evaluate` reach the caller untouched.

    Example:
        >>> import numpy as np
        >>> from lightning_softprune.search import UniformBaseline
        >>> space = SearchSpace(
        ...     low=np.zeros(2), high=np.ones(2), channels=np.array([8, 8]), norms=np.ones(2),
        ...     target=0.75, tolerance=0.02,
        ...     realise=lambda x: np.minimum(np.rint(x * 8), 7).astype(np.int64),
        ...     sparsity=lambda removed: 1 - ((8 - removed) / 8).prod(axis=1),
        ... )
        >>> run_search(UniformBaseline(), space, lambda x: float(x.sum()), seed=0)
        SearchOutcome(evaluations=1, asked=1, stop_reason='exhausted')
    """
    return SearchLoop(evaluate, seed, {} if cache is None else cache, **options).run(strategy, space)
