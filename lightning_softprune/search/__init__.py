"""Search strategies: numbers only, no torch.

`SearchSpace` is what they may know of a network, `SearchStrategy` the class to subclass, `run_search` the one loop.
"""

from lightning_softprune.search.base import SearchStrategy, SensitivityCurve
from lightning_softprune.search.baselines import NormBaseline, UniformBaseline
from lightning_softprune.search.gradient import GradientSearch
from lightning_softprune.search.grid import GridSearch
from lightning_softprune.search.highest import search_highest
from lightning_softprune.search.loop import SearchOutcome, run_search
from lightning_softprune.search.optuna_search import OptunaSearch
from lightning_softprune.search.random_search import RandomSearch
from lightning_softprune.search.sensitivity import SensitivitySearch
from lightning_softprune.search.separable import best_combinations
from lightning_softprune.search.space import FloatArray, IntArray, SearchSpace

__all__ = [
    "FloatArray",
    "GradientSearch",
    "GridSearch",
    "IntArray",
    "NormBaseline",
    "OptunaSearch",
    "RandomSearch",
    "SearchOutcome",
    "SearchSpace",
    "SearchStrategy",
    "SensitivityCurve",
    "SensitivitySearch",
    "UniformBaseline",
    "best_combinations",
    "run_search",
    "search_highest",
]
