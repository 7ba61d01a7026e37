"""Strategies by name: what stands for one with its default arguments."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lightning_softprune.search.base import SearchStrategy
from lightning_softprune.search.strategies.baselines import NormBaseline, UniformBaseline
from lightning_softprune.search.strategies.gradient import GradientSearch
from lightning_softprune.search.strategies.grid import GridSearch
from lightning_softprune.search.strategies.optuna_search import OptunaSearch
from lightning_softprune.search.strategies.random_search import RandomSearch
from lightning_softprune.search.strategies.sensitivity import SensitivitySearch
from lightning_softprune.utilities.checks import one_of

BY_NAME: Mapping[str, type[SearchStrategy]] = MappingProxyType(
    {
        "gradient": GradientSearch,
        "sensitivity": SensitivitySearch,
        "grid": GridSearch,
        "random": RandomSearch,
        "uniform": UniformBaseline,
        "norm": NormBaseline,
        "optuna": OptunaSearch,
    }
)


def strategy_of(value: Any) -> SearchStrategy:
    """A strategy that is the caller's own: a copy of the one given, or a new one of that name.

    Raises:
        ValueError: No strategy has this name.
        TypeError: It is neither a name nor a strategy.

    >>> strategy_of("grid")
    GridSearch(levels=11, max_evaluations=None)
    >>> strategy_of("sensitivty")
    Traceback (most recent call last):
        ...
    ValueError: search: 'sensitivty' is not one of 'gradient', 'sensitivity', 'grid', 'random', 'uniform', 'norm', 'optuna'; did you mean 'sensitivity'?
    """  # noqa: E501
    if isinstance(value, str):
        return BY_NAME[one_of("search", value, tuple(BY_NAME))]()
    if inspect.isclass(value) and issubclass(value, SearchStrategy):
        raise TypeError(f"search: {value!r} is a class; give an instance of it, {value.__name__}()")
    if not isinstance(value, SearchStrategy):
        raise TypeError(f"search: {value!r} is not a SearchStrategy, for example GradientSearch(), or the name of one")
    return copy.deepcopy(value)
