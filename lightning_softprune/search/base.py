"""The base class of search strategies: who calls what, and when.

One search is one conversation (`run_search` holds it)::

    strategy.start(space, seed)             # begins afresh, after check(space)
    while (x := strategy.ask()) is not None:
        strategy.tell(loss_of(x))           # lower is better; nan: no usable value
    strategy.stop_reason                    # why it ended

A subclass normally writes only `propose`, a generator that yields a vector of coefficients and receives its loss::

    class Halving(SearchStrategy):
        def propose(self, space, rng):
            x = space.scale(np.ones(space.size))
            loss = yield x
            ...
            return "converged"

`ask`, `tell`, `state_dict` and `load_state_dict` come from the base class, which records the losses told and, to
resume, replays them through a fresh generator. That is exact because a strategy may draw on `space`, `rng` and the
losses only. A subclass that has to be driven from outside (an optimiser with an ask and tell of its own) overrides
`ask` and `tell` instead, and with them `start`, `state_dict` and `load_state_dict`.

Vectors that are off the sparsity target may be asked too: they are measurements (a sensitivity curve, for one). Whoever
evaluates reports the loss of that plan as of any other, and alone decides which plans may be used in the end.

Stop reasons are data: `StopReason` has those of this package. A strategy of somebody else's may give its own, a string.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from lightning_softprune.search.look_ups import ErrorCurve
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray

_GIVEN = frozenset({"is_global_zero", "known", "expected"})
_RUNNING = _GIVEN | {"stop_reason", "_space", "_seed", "_generator", "_pending", "_told", "_curves"}


class StopReason(str, Enum):
    """Why a search ended; each is also the string that files and logs show."""

    EXHAUSTED = "exhausted"
    """Every candidate was asked."""
    STEPS = "steps"
    """All steps were made."""
    PATIENCE = "patience"
    """Too many steps in a row without improvement."""
    PAID_OFF = "further steps gain too little"
    """What a step gains is no longer worth its evaluations."""
    CONVERGED = "converged"
    """There was nothing better near by."""
    NO_USABLE_LOSS = "no usable loss"
    """The loss was nan wherever the strategy looked."""
    OFF_TARGET = "off target"
    """No plan within the tolerance was found."""
    REPEATING = "repeating"
    """Only plans that were known were asked for."""
    MAX_EVALUATIONS = "max_evaluations"
    """The budget is spent."""
    ENOUGH = "enough"
    """Whoever runs the search has what it needs."""
    HIGHEST = "highest"
    """The highest sparsity that meets the constraints is known to within the tolerance."""

    def __str__(self) -> str:
        """The string."""
        return self.value


@dataclass(frozen=True)
class SensitivityCurve:
    """The loss as one coefficient rises and the others stay at their lowest.

    Attributes:
        index: Which coefficient.
        coefficients: Its values, ascending; the first is its lowest.
        losses: The loss at each, as measured; nan where there was none.
        shape: What is known of it before any measurement; None where nothing is.
    """

    index: int
    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    shape: ErrorCurve | None = field(default=None, compare=False, repr=False)


class SearchStrategy:
    """Proposes coefficient vectors and learns their losses. Knows numbers only, never a model.

    An instance holds its arguments and, between `start` and the end, one running search. It can be started again, which
    begins afresh, and copied, which copies the arguments alone.

    Attributes:
        max_evaluations: At most this many vectors are really evaluated; the loop sees to it. None: no limit.
        is_global_zero: Whether this process may write files. Where several processes run the same search together,
            whoever runs it sets False, after copying the strategy, in all of them but one.
        first_tries: After how many plans on a target a search over targets judges whether it can be met: 1 where the
            first proposal is a good guess, more where it is a random one.
        stop_reason: Why the search ended; empty while it runs.
        known: Sensitivity curves that were measured on the same network before, for strategies that can use them.
            Whoever runs the strategy sets them before `start`.
        expected: Curves that this network should have, going by those of an earlier round: nothing of them is
            measured, but they tell where to look first. Set like `known`.
    """

    max_evaluations: int | None = None
    first_tries: int = 1
    is_global_zero: bool = True
    known: tuple[SensitivityCurve, ...] = ()
    expected: tuple[SensitivityCurve, ...] = ()
    stop_reason: str = ""

    _space: SearchSpace | None = None
    _seed: int = 0
    _generator: Generator[FloatArray, float, str] | None = None
    _pending: FloatArray | None = None
    _told: tuple[float, ...] = ()
    _curves: tuple[SensitivityCurve, ...] = ()

    @property
    def wants_errors(self) -> bool:
        """Whether to tell it what is known of coefficients before any evaluation (`SearchSpace.shapes`); takes time."""
        return False

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """The strategy itself: yields a vector (k,) within the bounds, receives its loss, returns its stop reason.

        It must draw randomness from `rng` alone, so that replaying the losses repeats the search.

        Args:
            space: What is searched.
            rng: Seeded by `start`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define propose(space, rng), a generator of coefficient vectors, or else "
            "override ask() and tell()."
        )

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """How many vectors it may ask for at most; None: it cannot tell."""
        del space  # what subclasses may need
        return self.max_evaluations

    def check(self, space: SearchSpace) -> None:
        """Raises ValueError, before any evaluation, when this strategy cannot serve this space."""

    def check_target(self, space: SearchSpace) -> None:
        """Raises ValueError where nothing that it would propose is on the target; asked where there is one target."""

    def start(self, space: SearchSpace, seed: int) -> None:
        """Begins a search, forgetting any earlier one.

        Args:
            space: What is searched.
            seed: The same seed and the same losses give the same proposals.

        Raises:
            ValueError: If the strategy cannot serve this space (see `check`).
        """
        self.check(space)
        self._space, self._seed = space, int(seed)
        self._generator = self.propose(space, np.random.default_rng(self._seed))
        self._pending, self._told, self._curves, self.stop_reason = None, (), (), ""

    def ask(self) -> FloatArray | None:
        """The next vector (k,) to evaluate, or None when the search has ended (`stop_reason` says why).

        Asking again before `tell` gives the same vector.

        Raises:
            RuntimeError: If the search was not started.
            ValueError: If `propose` yields a vector of the wrong shape or out of bounds.
        """
        if self._space is None or self._generator is None:
            raise RuntimeError(f"{type(self).__name__}.ask() needs start(space, seed) first.")
        if self._pending is None and not self.stop_reason:
            try:
                x = self._generator.send(self._told[-1]) if self._told else next(self._generator)
            except StopIteration as end:
                self.stop_reason = end.value or StopReason.EXHAUSTED
                return None
            x = np.array(x, dtype=np.float64)
            space = self._space
            if x.shape != (space.size,) or not ((x >= space.low - 1e-9) & (x <= space.high + 1e-9)).all():
                raise ValueError(
                    f"{type(self).__name__}.propose: {x} is not a vector of shape ({space.size},) within the bounds "
                    f"{space.low} to {space.high}"
                )
            self._pending = space.clip(x)
        return None if self._pending is None else self._pending.copy()

    def tell(self, loss: float) -> None:
        """Reports the loss of the vector last asked for.

        Args:
            loss: Lower is better; nan: the vector has no usable value.

        Raises:
            RuntimeError: If no vector is waiting for its loss.
        """
        if self._pending is None:
            raise RuntimeError(f"{type(self).__name__}.tell({loss!r}): no vector is waiting for its loss; ask() first.")
        self._told = (*self._told, float(loss))
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """The running search as plain data (JSON can hold it; nan stays nan)."""
        return {"strategy": type(self).__name__, "seed": self._seed, "losses": list(self._told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the search `state` was taken from; call it after `start` with the same space.

        Args:
            state: What `state_dict` returned.

        Raises:
            RuntimeError: If the search was not started.
            ValueError: If the state is of another strategy, or does not fit this space and these arguments.
        """
        if self._space is None:
            raise RuntimeError(f"{type(self).__name__}.load_state_dict() needs start(space, seed) first.")
        if state["strategy"] != type(self).__name__:
            raise ValueError(f"state: {state['strategy']!r} is not this strategy, {type(self).__name__!r}")
        self.start(self._space, state["seed"])
        for number, loss in enumerate(state["losses"]):
            if self.ask() is None:
                raise ValueError(
                    f"state: {len(state['losses'])} losses are more than {self!r} asks for on this space, {number}; "
                    "it was saved with other arguments or for another network"
                )
            self.tell(loss)

    @property
    def sensitivity(self) -> tuple[SensitivityCurve, ...]:
        """The sensitivity curves measured so far; empty for a strategy that measures none."""
        return self._curves

    def keep_curves(self, curves: tuple[SensitivityCurve, ...]) -> None:
        """For strategies that measure curves: these are `sensitivity` from now on."""
        self._curves = curves

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _RUNNING}

    def __repr__(self) -> str:
        held = {name.removeprefix("_"): value for name, value in self.__getstate__().items()}
        names = [name for name in inspect.signature(type(self)).parameters if name in held]
        return f"{type(self).__name__}({', '.join(f'{name}={held[name]!r}' for name in names)})"
