"""Search strategies: numbers only, no torch.

`SearchSpace` is what they may know of a network, `SearchStrategy` the class to subclass, `run_search` the one loop.
"""

from lightning_softprune.search.base import SearchStrategy, SensitivityCurve, StopReason
from lightning_softprune.search.coefficients import (
    Budgets,
    Coefficients,
    ExpectedErrors,
    Realisation,
    build_rounding,
    build_space,
)
from lightning_softprune.search.curves import carried_over, modelled_increases
from lightning_softprune.search.look_ups import reaches
from lightning_softprune.search.loop import SearchLoop, SearchOutcome, run_search
from lightning_softprune.search.max_sparsity import MaxSparsitySearch
from lightning_softprune.search.objective import (
    AUTO,
    Constraint,
    Objective,
    better,
    mode_of,
    mode_of_name,
    parse_constraint,
)
from lightning_softprune.search.plan import Plan, Rounding
from lightning_softprune.search.separable import best_combinations
from lightning_softprune.search.solving import Known, OutOfReachError, Question, Solution, best_plan, solve
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.search.stored import COSTS, SearchNumbers, StoredCosts, StoredSlot, StoredTerm, compressed
from lightning_softprune.search.strategies.baselines import NormBaseline, UniformBaseline
from lightning_softprune.search.strategies.by_name import strategy_of
from lightning_softprune.search.strategies.gradient import GradientSearch
from lightning_softprune.search.strategies.grid import GridSearch
from lightning_softprune.search.strategies.optuna_search import OptunaSearch
from lightning_softprune.search.strategies.random_search import RandomSearch
from lightning_softprune.search.strategies.sensitivity import SensitivitySearch
from lightning_softprune.utilities.arrays import FloatArray, IntArray

__all__ = [
    "AUTO",
    "COSTS",
    "Budgets",
    "Coefficients",
    "Constraint",
    "ExpectedErrors",
    "FloatArray",
    "GradientSearch",
    "GridSearch",
    "IntArray",
    "Known",
    "MaxSparsitySearch",
    "NormBaseline",
    "Objective",
    "OptunaSearch",
    "OutOfReachError",
    "Plan",
    "Question",
    "RandomSearch",
    "Realisation",
    "Rounding",
    "SearchLoop",
    "SearchNumbers",
    "SearchOutcome",
    "SearchSpace",
    "SearchStrategy",
    "SensitivityCurve",
    "SensitivitySearch",
    "Solution",
    "StopReason",
    "StoredCosts",
    "StoredSlot",
    "StoredTerm",
    "UniformBaseline",
    "best_combinations",
    "best_plan",
    "better",
    "build_rounding",
    "build_space",
    "carried_over",
    "compressed",
    "mode_of",
    "mode_of_name",
    "modelled_increases",
    "parse_constraint",
    "reaches",
    "run_search",
    "solve",
    "strategy_of",
]
