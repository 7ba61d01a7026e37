"""Optuna's samplers as a search strategy.

Two studies are kept apart. The sampler learns from one in memory, which starts empty in every search: so the same seed
and the same losses repeat the search, on any number of processes and after any restart. What `storage` names is a
*record* of what was measured, for Optuna's dashboard and `optuna.load_study`. It is written and never learned from:
a stored loss says nothing about a network that was trained on, and a plan that is answered from a record instead of
being evaluated is one the caller has not seen. What a killed search need not measure again is its caller's to know
(the ``cache`` of `run_search`, the journal of a round); told the same losses again, it goes on in the record it began.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_softprune.search.base import SearchStrategy, StopReason
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.checks import near_miss, whole_number

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


_MISSES = 100  # suggestions in a row without a new plan on target, after which there are taken to be no more

_PACKAGES = {"cmaes": ("cmaes",), "gp": ("scipy", "torch"), "qmc": ("scipy",)}  # that Optuna itself does without

_STORAGES = "the URL of a database, the path of a file or None"
_UNFIT = {"bruteforce", "motpe"}  # steps instead of ranges; another name of tpe, and deprecated

_ARGUMENTS = {
    "gp": {"deterministic_objective": True},
    "qmc": {"scramble": True},  # without it the seed changes nothing
}


class OptunaSearch(SearchStrategy):
    """Any of Optuna's samplers. Needs the extra ``optuna``: ``pip install "lightning-softprune[optuna]"``.

    Every suggestion is moved onto the sparsity target (see `SearchSpace.project`) and evaluated there; the sampler is
    told that loss for what it suggested, and a loss of nan as a pruned trial. The first plans are uniform ones, at the
    lowest, the middle and the highest sparsity within the tolerance; whichever does best decides where the suggestions
    are moved to. Suggestions of a plan that is known already cost nothing; after many in a row the search ends.

    With a `storage`, every search is recorded as a study of its own. Its name tells the sampler, the seed and the
    network (its channels, bounds, weight norms and target): the same search, started again, goes on in the same study
    and adds what is missing there. Where it measures something else than is there (other data, another metric), it
    begins a study with a number at the end of the name. A trial's value is the loss: with a metric that is maximised,
    its negative. Its parameters are the coefficients that were evaluated; ``sparsity`` and ``removed`` (channels per
    group) are user attributes. A trial whose loss was nan has failed.

    Args:
        num_trials: How many different plans are evaluated; fewer where no new ones are found.
        sampler: Name of one of Optuna's samplers, with or without "Sampler", in any case: ``"tpe"``, ``"cmaes"``
            (needs the package cmaes), ``"gp"``, ``"qmc"``, ``"nsgaii"``, ``"random"``, ...
        storage: Where studies are recorded: the URL of a database, ``"sqlite:///optuna.db"``, or the path of a file,
            which Optuna's journal storage then keeps. Where several processes search together, one of them writes (see
            `SearchStrategy.is_global_zero`). Default: nowhere.

    Raises:
        ModuleNotFoundError: If Optuna, or a package that the sampler needs, is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or there is no such sampler.
    """

    first_tries = 8

    def __init__(self, num_trials: int = 100, sampler: str = "tpe", storage: str | None = None) -> None:
        self.num_trials = self.max_evaluations = whole_number("num_trials", num_trials)
        if not isinstance(sampler, str):
            raise TypeError(f"sampler: {sampler!r} is not the name of one of Optuna's samplers")
        if storage is not None and not isinstance(storage, str):
            raise TypeError(f"storage: {storage!r} is not {_STORAGES}")
        if storage is not None and not storage.strip():
            raise ValueError(f"storage: {storage!r} is not {_STORAGES}")
        self.sampler = sampler
        self.storage = storage
        _find_sampler(sampler)

    def __repr__(self) -> str:
        shown = self.storage if self.storage is None else _without_password(self.storage)
        return super().__repr__().replace(repr(self.storage), repr(shown))

    def check(self, space: SearchSpace) -> None:
        """Raises ValueError when the storage cannot be opened."""
        if self.storage is not None and self.is_global_zero:
            _Record(self.storage, "").close()

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields vectors whose plans all differ and are on target."""
        seed = int(rng.integers(2**31))
        record = None
        if self.storage is not None and self.is_global_zero:
            record = _Record(self.storage, self._study_name(space, seed))
        try:
            return (yield from self._converse(space, seed, record))
        finally:
            if record is not None:
                record.close()

    def _converse(self, space: SearchSpace, seed: int, record: _Record | None) -> Generator[FloatArray, float, str]:
        optuna = _optuna()
        states = optuna.trial.TrialState
        losses: dict[tuple[int, ...], float] = {}

        def measure(x: FloatArray) -> Generator[FloatArray, float, float]:
            """The loss of a vector that is on target."""
            key = space.key(x)
            if key not in losses:
                began = datetime.datetime.now()
                loss = yield x
                losses[key] = loss if math.isfinite(loss) else math.nan
                if record is not None:
                    record.add(_measured(space, x, losses[key], began))
            return losses[key]

        uniform = space.scale(np.ones(space.size))
        aim, least = space.floor, math.nan
        for level in (space.floor, space.target, space.target + space.tolerance):
            x = space.project(uniform, aim=level)
            if len(losses) < self.num_trials and space.on_target(x):
                loss = yield from measure(x)
                if loss < least or math.isnan(least):
                    aim, least = level, loss

        free = np.flatnonzero(space.low < space.high)
        if not len(free):
            return StopReason.EXHAUSTED if losses else StopReason.OFF_TARGET
        ranges = {
            f"coefficient_{i}": optuna.distributions.FloatDistribution(float(space.low[i]), float(space.high[i]))
            for i in free
        }
        with _quietly():
            study = optuna.create_study(sampler=_make_sampler(self.sampler, seed))
            study.enqueue_trial({f"coefficient_{i}": float(uniform[i]) for i in free})
        misses = 0
        while len(losses) < self.num_trials:
            if misses >= _MISSES:
                return StopReason.REPEATING if losses else StopReason.OFF_TARGET
            with _quietly():
                trial = study.ask(ranges)
            suggested = space.low.copy()
            suggested[free] = [trial.params[name] for name in ranges]
            x = space.project(suggested, aim=aim)
            known = len(losses)
            loss = (yield from measure(x)) if space.on_target(x) else math.nan
            misses = 0 if len(losses) > known else misses + 1
            with _quietly():
                if math.isnan(loss):
                    study.tell(trial, state=states.PRUNED)  # as bad as can be; a failed trial would teach nothing
                else:
                    study.tell(trial, loss)
        return StopReason.MAX_EVALUATIONS

    def _study_name(self, space: SearchSpace, seed: int) -> str:
        norms = [f"{norm:.6g}" for norm in space.norms]
        unit = None if space.unit is None else space.unit.tolist()
        arrays = (space.low.tolist(), space.high.tolist(), space.channels.tolist())
        told = json.dumps([seed, *arrays, unit, space.target, space.tolerance, norms])
        return f"softprune-{_plain(self.sampler)}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


class _Record:
    """The studies in a storage that one search is written to.

    Args:
        storage: URL or path.
        name: Of the first study; the others have a number behind it.

    Raises:
        ValueError: If the storage cannot be opened.
    """

    def __init__(self, storage: str, name: str) -> None:
        self._name, self._number = name, 1
        self._measured: list[FrozenTrial] = []
        self._study: Study | None = None
        self._gave_up = False
        try:
            with _quietly():
                self._storage = _open_storage(storage)
        except Exception as error:  # of the operating system, SQLAlchemy, a database's driver, JSON
            raise ValueError(
                f"storage: {_without_password(storage)!r} cannot be opened; allowed are the URL of a database such as "
                f"'sqlite:///optuna.db', or the path of a file that is new or Optuna's journal ({error})"
            ) from error

    def add(self, trial: FrozenTrial) -> None:
        """Writes a finished trial, unless it is there from an earlier run of this search.

        A storage that fails later on stops the record, not the search: one warning.
        """
        self._measured.append(trial)
        if self._gave_up:
            return
        try:
            with _quietly():
                while not self._written():
                    self._number, self._study = self._number + 1, None
        except Exception as error:  # the same: the search goes on without its record
            self._gave_up = True
            warnings.warn(
                f"OptunaSearch goes on without its storage: {type(error).__name__}: {error}", UserWarning, stacklevel=2
            )

    def _written(self) -> bool:
        """Completes the study, or says that it is another search's."""
        if self._study is None:
            name = self._name if self._number == 1 else f"{self._name}-{self._number}"
            self._study = _optuna().create_study(storage=self._storage, study_name=name, load_if_exists=True)
        there = self._study.get_trials(deepcopy=False)
        if not all(_same(a, b) for a, b in zip(there, self._measured, strict=False)):
            return False
        for trial in self._measured[len(there) :]:
            self._study.add_trial(trial)
        return True

    def close(self) -> None:
        """Lets go of the database."""
        self._study = None
        if hasattr(self._storage, "engine"):
            with contextlib.suppress(Exception):
                self._storage.remove_session()
                self._storage.engine.dispose()


def _measured(space: SearchSpace, x: FloatArray, loss: float, began: datetime.datetime) -> FrozenTrial:
    """One evaluation in Optuna's words."""
    optuna = _optuna()
    names = [f"coefficient_{i}" for i in range(space.size)]
    ranges = zip(space.low, space.high, strict=True)
    failed = math.isnan(loss)
    with _quietly():
        trial: FrozenTrial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
            value=None if failed else loss,
            params=dict(zip(names, map(float, space.clip(x)), strict=True)),
            distributions={
                name: optuna.distributions.FloatDistribution(float(low), float(high))
                for name, (low, high) in zip(names, ranges, strict=True)
            },
            user_attrs={"sparsity": space.sparsity_of(x), "removed": list(space.key(x))},
        )
    trial.datetime_start = began
    return trial


def _same(a: FrozenTrial, b: FrozenTrial) -> bool:
    """Whether two trials measured the same plan with the same result."""
    return (
        a.state == b.state
        and a.user_attrs.get("removed") == b.user_attrs.get("removed")
        and (a.value is None or (b.value is not None and math.isclose(a.value, b.value, rel_tol=1e-9)))
    )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ModuleNotFoundError(
            'OptunaSearch needs Optuna, which is not installed: pip install "lightning-softprune[optuna]"'
        ) from error
    return optuna


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Optuna's log lines and its warnings about experimental parts are kept from the terminal, only here."""
    logging = _optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _plain(name: str) -> str:
    """`name` as samplers are looked up: "TPESampler", "cma-es" -> "tpe", "cmaes"."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("sampler")


def _find_sampler(name: str) -> type[BaseSampler]:
    """The class of a sampler.

    Raises:
        ModuleNotFoundError: If a package it needs is not installed.
        ValueError: If there is none of this name.
    """
    samplers = _optuna().samplers
    known: dict[str, type[BaseSampler]] = {}
    for found in samplers.__all__:
        kind = getattr(samplers, found)
        if not found.endswith("Sampler") or _plain(found) in _UNFIT:
            continue
        parameters = inspect.signature(kind).parameters
        if "seed" in parameters and all(p.default is not p.empty for p in parameters.values()):
            known[_plain(found)] = kind
    plain = _plain(name)
    if plain not in known:
        hint = near_miss(plain, known, most=2)
        raise ValueError(f"sampler: {name!r} is not one of {', '.join(map(repr, sorted(known)))}{hint}")
    for package in _PACKAGES.get(plain, ()):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"sampler={name!r} of OptunaSearch needs the package {package}, which is not installed: "
                f"pip install {package}"
            )
    return known[plain]


def _make_sampler(name: str, seed: int) -> BaseSampler:
    make: Any = _find_sampler(name)
    made: BaseSampler = make(seed=seed, **_ARGUMENTS.get(_plain(name), {}))
    return made


def _without_password(storage: str) -> str:
    """The storage as it may be shown.

    >>> _without_password("mysql://me:secret@host/db")
    'mysql://me:***@host/db'
    """
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", storage)


def _open_storage(storage: str) -> Any:
    storages = _optuna().storages
    if "://" in storage:
        return storages.RDBStorage(storage)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    try:
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError:  # before Optuna 4
        from optuna.storages import JournalFileOpenLock
        from optuna.storages import JournalFileStorage as JournalFileBackend
    # links, which the default lock is made of, are not everybody's to create on Windows
    lock = JournalFileOpenLock(storage) if os.name == "nt" else None
    return storages.JournalStorage(JournalFileBackend(storage, lock_obj=lock))
