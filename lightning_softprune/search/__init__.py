"""Search strategies: numbers only, no torch.

`SearchSpace` is what they may know of a network, `SearchStrategy` the class to subclass, `run_search` the one loop.
"""

from lightning_softprune.search.base import SearchStrategy, SensitivityCurve
from lightning_softprune.search.coefficients import Budgets, Coefficients, Realisation, build_rounding, build_space
from lightning_softprune.search.loop import SearchOutcome, run_search
from lightning_softprune.search.max_sparsity import search_max_sparsity
from lightning_softprune.search.objective import Constraint, Objective, parse_constraint
from lightning_softprune.search.plan import Plan, Rounding
from lightning_softprune.search.separable import best_combinations
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.search.strategies.baselines import NormBaseline, UniformBaseline
from lightning_softprune.search.strategies.gradient import GradientSearch
from lightning_softprune.search.strategies.grid import GridSearch
from lightning_softprune.search.strategies.optuna_search import OptunaSearch
from lightning_softprune.search.strategies.random_search import RandomSearch
from lightning_softprune.search.strategies.sensitivity import SensitivitySearch
from lightning_softprune.utilities.arrays import FloatArray, IntArray

__all__ = [
    "Budgets",
    "Coefficients",
    "Constraint",
    "FloatArray",
    "GradientSearch",
    "GridSearch",
    "IntArray",
    "NormBaseline",
    "Objective",
    "OptunaSearch",
    "Plan",
    "RandomSearch",
    "Realisation",
    "Rounding",
    "SearchOutcome",
    "SearchSpace",
    "SearchStrategy",
    "SensitivityCurve",
    "SensitivitySearch",
    "UniformBaseline",
    "best_combinations",
    "build_rounding",
    "build_space",
    "parse_constraint",
    "run_search",
    "search_max_sparsity",
]
