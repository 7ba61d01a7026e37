"""A conformance kit for search strategies: what each must do, checked on networks that are nothing but numbers.

Every strategy of this package passes it, and one of your own can be held to it. In a file of tests for pytest (or
unittest: the kit needs neither)::

    from lightning_softprune.testing import StrategyConformance

    class TestHalving(StrategyConformance):
        strategy = Halving()
        within = 0.05       # on a smooth loss it ends at most 5 % above the best plan of all

or at once, without a test runner:

>>> from lightning_softprune import SensitivitySearch
>>> check_strategy(SensitivitySearch(levels=5), within=0.05)

Words: a *space* is what a strategy may know of a network (`lightning_softprune.search.SearchSpace`), a *loss* what it
is told of each vector it asks for; a *plan* is the whole numbers of channels that a vector stands for.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Sequence

import numpy as np

from lightning_softprune.search import SearchSpace, SearchStrategy, StopReason, run_search
from lightning_softprune.utilities.arrays import FloatArray, IntArray

__all__ = ["StrategyConformance", "check_strategy", "coupled", "mlp_space", "plan_loss", "steep"]

Loss = Callable[[FloatArray], float]


def mlp_space(
    widths: Sequence[int],
    target: float = 0.7,
    tolerance: float = 0.02,
    *,
    rounding: str = "nearest",
    **bounds: FloatArray,
) -> SearchSpace:
    """The space of a multilayer perceptron: its hidden layers are the groups.

    Args:
        widths: Of its layers, input and output included, k + 2 of them.
        target: The sparsity asked for; weights and biases are counted exactly.
        tolerance: How far from it a plan may be.
        rounding: From coefficients to channels, ``"nearest"`` or ``"down"``.
        bounds: `low` and `high`, shape (k,); default: 0 and 1.
    """
    hidden = np.array(widths[1:-1])

    def rounded(x: FloatArray) -> FloatArray:
        return np.rint(x) if rounding == "nearest" else np.floor(x + 1e-9)

    def parameters(kept: IntArray) -> FloatArray:
        n = len(kept)
        full = np.column_stack([np.full(n, widths[0]), kept, np.full(n, widths[-1])]).astype(float)
        return np.asarray((full[:, :-1] * full[:, 1:] + full[:, 1:]).sum(axis=1), dtype=np.float64)

    dense = parameters(hidden[None])[0]
    return SearchSpace(
        low=bounds.get("low", np.zeros(len(hidden))),
        high=bounds.get("high", np.ones(len(hidden))),
        channels=hidden,
        realise=lambda x: np.minimum(rounded(x * hidden), hidden - 1).astype(np.int64),
        sparsity=lambda removed: 1 - parameters(hidden - removed) / dense,
        target=target,
        tolerance=tolerance,
        norms=np.linspace(1.0, 2.0, len(hidden)),
    )


def plan_loss(space: SearchSpace, loss: Loss) -> Loss:
    """A loss of the plan alone, as a real evaluation is; `loss` gets the fractions really removed, shape (k,)."""
    return lambda x: float(loss(np.array(space.key(x)) / space.channels))


def steep(weights: Sequence[float]) -> Loss:
    """Flat at first and steep at the end, as the loss of a pruned layer is."""
    return lambda r: 0.1 + float(np.dot(weights, r**2 / (1.1 - r)))


def coupled(weights: Sequence[float]) -> Loss:
    """Neighbouring layers hurt each other: not separable."""
    alone = steep(weights)
    return lambda r: alone(r) + 0.8 * float((r[1:] * r[:-1]).sum())


class StrategyConformance:
    """One method per property; subclass it and set `strategy`.

    Attributes:
        strategy: The strategy to check; each method works on copies.
        within: How far above the best plan of all it may end on a smooth loss, as a fraction; infinite where it need
            only be on target.
    """

    strategy: SearchStrategy
    within: float = math.inf

    def fresh(self) -> SearchStrategy:
        """A copy of the strategy."""
        return copy.deepcopy(self.strategy)

    def space(self) -> SearchSpace:
        """Three groups, with bounds that forbid a part of each."""
        return mlp_space([64, 48, 64, 32, 10], low=np.array([0.0, 0.1, 0.0]), high=np.array([0.9, 1.0, 0.8]))

    def test_proposals_stay_within_the_bounds(self) -> None:
        """Every vector asked for lies between `space.low` and `space.high`, and there is one."""
        space, strategy = self.space(), self.fresh()
        strategy.start(space, 0)
        asked = _converse(strategy, plan_loss(space, steep([1.0, 0.5, 2.0])))
        _require(len(asked) > 0, "it asks for nothing")
        _require(bool((asked >= space.low).all() and (asked <= space.high).all()), "it leaves the bounds")

    def test_the_same_seed_gives_the_same_proposals(self) -> None:
        """Started again with the same seed and told the same losses, it asks for the same vectors."""
        space, strategy = self.space(), self.fresh()
        loss = plan_loss(space, steep([1.0, 0.5, 2.0]))
        strategy.start(space, 3)
        first, reason = _converse(strategy, loss), strategy.stop_reason
        strategy.start(space, 3)
        _require(np.array_equal(_converse(strategy, loss), first), "the same seed gives other proposals")
        _require(strategy.stop_reason == reason != "", "it does not say why it ended, or not twice the same")

    def test_a_search_resumed_in_the_middle_equals_one_that_was_not_interrupted(self) -> None:
        """`load_state_dict` continues what `state_dict`, through JSON, was taken from."""
        space, strategy = self.space(), self.fresh()
        loss = plan_loss(space, coupled([1.0, 0.5, 2.0]))
        strategy.start(space, 5)
        whole = _converse(strategy, loss)
        half = len(whole) // 2
        interrupted = self.fresh()
        interrupted.start(space, 5)
        _converse(interrupted, loss, half)
        interrupted.ask()  # asked, but the process died before the loss was known
        saved = json.loads(json.dumps(interrupted.state_dict()))
        resumed = self.fresh()
        resumed.start(space, 0)
        resumed.load_state_dict(saved)
        _require(np.array_equal(_converse(resumed, loss), whole[half:]), "resumed, it asks for other vectors")
        _require(resumed.stop_reason == strategy.stop_reason, "resumed, it ends for another reason")
        _require(resumed.sensitivity == strategy.sensitivity, "resumed, its curves are others")

    def test_a_nan_told_before_the_interruption_is_kept(self) -> None:
        """A loss of nan is part of the state."""
        space, strategy = self.space(), self.fresh()

        def loss(x: FloatArray) -> float:
            return math.nan if x[0] > 0.5 else float(x @ x)

        strategy.start(space, 1)
        whole = _converse(strategy, loss)
        strategy.start(space, 1)
        _converse(strategy, loss, len(whole) - 1)
        saved = json.loads(json.dumps(strategy.state_dict()))
        strategy.start(space, 1)
        strategy.load_state_dict(saved)
        _require(np.array_equal(_asked(strategy), whole[-1]), "a nan is forgotten")

    def test_it_finds_the_known_optimum_of_a_smooth_constrained_function(self) -> None:
        """A plan on target is among those asked for, and the best is at most `within` above the best of all."""
        space = self.space()
        loss = plan_loss(space, coupled([1.0, 0.5, 2.0]))
        cache: dict[tuple[int, ...], float] = {}
        run_search(self.fresh(), space, loss, seed=0, cache=cache)
        found = [value for plan, value in cache.items() if space.within(space.sparsity(np.array([plan])))[0]]
        _require(bool(found), "no plan on the sparsity target was asked for")
        if space.table is None:
            raise RuntimeError("this space has too many plans to know the best of all")
        points, sparsities, _ = space.table
        best = min(loss(x) for x in points[space.within(sparsities)])
        _require(min(found) <= best * (1 + self.within), f"it ends at {min(found):.6g}, the best of all is {best:.6g}")

    def test_the_budget_is_kept(self) -> None:
        """It copes with being ended after few evaluations, and says that it was."""
        whole = run_search(self.fresh(), self.space(), lambda x: float(x @ x), seed=0).evaluations
        for limit in (1, 7):
            outcome = run_search(self.fresh(), self.space(), lambda x: float(x @ x), seed=0, max_evaluations=limit)
            _require(1 <= outcome.evaluations <= limit, f"{outcome.evaluations} evaluations, {limit} allowed")
            ended = outcome.stop_reason == StopReason.MAX_EVALUATIONS
            _require(ended or whole <= limit, f"it was ended, and says {outcome.stop_reason!r}")

    def test_nan_losses_are_survived(self) -> None:
        """Where some losses are nan, or all, it ends and says why."""
        for share in (0.3, 1.0):
            rng = np.random.default_rng(0)

            def loss(x: FloatArray, share: float = share, rng: np.random.Generator = rng) -> float:
                return math.nan if rng.random() < share else float(x @ x)

            outcome = run_search(self.fresh(), self.space(), loss, seed=0)
            _require(outcome.evaluations >= 1, "it evaluates nothing")
            _require(outcome.stop_reason != "", "it does not say why it ended")

    def test_it_can_be_copied_before_and_in_the_middle_of_a_search(self) -> None:
        """Copies, also pickled ones, hold the arguments alone."""
        space, strategy = self.space(), self.fresh()
        strategy.start(space, 0)
        expected = _converse(strategy, lambda x: float(x @ x), 3)
        for twin in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
            _require(repr(twin) == repr(strategy), "a copy has other arguments")
            _require(twin.stop_reason == "", "a copy is in the middle of a search")
            twin.start(space, 0)
            _require(np.array_equal(_converse(twin, lambda x: float(x @ x), 3), expected), "a copy proposes others")

    def test_one_instance_can_serve_another_network_next(self) -> None:
        """`start` forgets the search before."""
        other = mlp_space([32, 16, 24, 16, 32, 8], target=0.5, tolerance=0.03)
        strategy = self.fresh()
        for one in (self.space(), other, self.space()):
            strategy.start(one, 0)
            _require(strategy.sensitivity == (), "curves of the search before are still there")
            asked = _converse(strategy, lambda x: float(x @ x))
            _require(len(asked) > 0, "it asks for nothing")
            _require(asked.shape[1] == one.size, "it asks for vectors of the network before")

    def test_asking_twice_gives_the_same_vector_and_does_not_expose_it(self) -> None:
        """`ask` without `tell` between gives the same vector again, whatever was done to the first."""
        strategy = self.fresh()
        strategy.start(self.space(), 0)
        first = _asked(strategy)
        kept = first.copy()
        first += 1
        _require(np.array_equal(_asked(strategy), kept), "asking again gives another vector")


def check_strategy(strategy: SearchStrategy, *, within: float = math.inf) -> None:
    """Check every property of `StrategyConformance`.

    Args:
        strategy: The strategy; it is copied.
        within: How far above the best plan of all it may end on a smooth loss, as a fraction.

    Raises:
        AssertionError: A property does not hold; the message names the first one in the order of the class. What the
            strategy itself has raised is the cause.
    """
    kit = StrategyConformance()
    kit.strategy, kit.within = strategy, within
    for name in (name for name in vars(StrategyConformance) if name.startswith("test_")):
        what = name.removeprefix("test_").replace("_", " ")
        try:
            getattr(kit, name)()
        except AssertionError as error:
            raise AssertionError(f"{type(strategy).__name__}: {error} ({what})") from None
        except Exception as error:  # of the strategy: whatever it raises, a property does not hold
            raised = f"it raises {type(error).__name__}: {error}"
            raise AssertionError(f"{type(strategy).__name__}: {raised} ({what})") from error


def _converse(strategy: SearchStrategy, loss: Loss, count: int = 10_000) -> FloatArray:
    """Ask and tell until the strategy ends, at most `count` times; what was asked, shape (n, k)."""
    asked: list[FloatArray] = []
    while len(asked) < count and (x := strategy.ask()) is not None:
        asked.append(x)
        strategy.tell(loss(x))
    return np.array(asked)


def _asked(strategy: SearchStrategy) -> FloatArray:
    x = strategy.ask()
    if x is None:
        raise AssertionError("it ends where it has more to ask")
    return x


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
