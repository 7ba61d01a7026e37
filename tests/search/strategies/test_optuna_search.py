from __future__ import annotations

import copy
import json
import logging
import math
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from lightning_softprune import search
from lightning_softprune.search import OptunaSearch, RandomSearch, run_search
from support.networks import CASES, LOSSES, coupled, mlp_space, plan_loss, steep

pytestmark = pytest.mark.slow

optuna = pytest.importorskip("optuna")


@pytest.fixture
def space():
    return mlp_space([64, 48, 64, 32, 10])


@pytest.fixture
def loss(space):
    return plan_loss(space, coupled([1.0, 0.5, 2.0]))


@pytest.fixture(params=["sqlite", "file"])
def storage(request, tmp_path):
    return f"sqlite:///{tmp_path}/studies.db" if request.param == "sqlite" else str(tmp_path / "new" / "studies.log")


def opened(storage):
    """The storage as a user of Optuna opens it."""
    if "://" in storage:
        return storage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(optuna.storages, "journal"):
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
        return optuna.storages.JournalStorage(optuna.storages.JournalFileStorage(storage))


def studies(storage):
    """Study name -> its trials, in the order they were begun."""
    store = opened(storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [summary.study_name for summary in optuna.get_all_study_summaries(store)]
        return {name: optuna.load_study(study_name=name, storage=store).trials for name in sorted(names)}


def searched(strategy, space, loss, **arguments):
    """Plan -> loss of one search."""
    cache = {}
    outcome = run_search(strategy, space, loss, seed=arguments.pop("seed", 0), cache=cache, **arguments)
    assert outcome.evaluations == len(cache)
    return cache


# ------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("shape", ["coupled", "valley"])
@pytest.mark.parametrize("case", list(CASES))
def test_it_comes_close_to_the_best_plan_and_beats_random_search(case, shape):
    widths, weights = CASES[case]
    space = mlp_space(widths)
    loss = plan_loss(space, LOSSES[shape](weights))
    losses = searched(OptunaSearch(num_trials=60), space, loss)
    assert all(space.within(space.sparsity(np.array(list(losses)))))
    assert min(losses.values()) < 0.97 * min(searched(RandomSearch(60), space, loss).values())
    if space.table is not None:
        points, sparsities, _ = space.table
        best = min(loss(x) for x in points[space.within(sparsities)])
        assert min(losses.values()) <= 1.03 * best


@pytest.mark.parametrize("sampler", ["random", "qmc", "nsgaii", "nsgaiii", "cmaes", "gp"])
def test_every_sampler_gives_seeded_plans_on_target(space, loss, sampler):
    for package in {"cmaes": ["cmaes"], "gp": ["torch"]}.get(sampler, []):
        pytest.importorskip(package)
    first, again, other = (searched(OptunaSearch(20, sampler), space, loss, seed=seed) for seed in (3, 3, 4))
    assert list(first.items()) == list(again.items())
    assert list(first) != list(other)
    assert len(first) == 20
    assert all(space.within(space.sparsity(np.array(list(first)))))


def test_the_uniform_plans_come_first_and_the_best_of_them_decides_the_sparsity(space):
    def sparsities(loss):
        return space.sparsity(np.array(list(searched(OptunaSearch(30), space, loss))))

    low = sparsities(lambda x: space.sparsity_of(x))
    high = sparsities(lambda x: -space.sparsity_of(x))
    for values in (low, high):
        np.testing.assert_allclose(values[:3], [0.68, 0.70, 0.72], atol=0.01)
    assert low[3:].mean() < 0.69
    assert high[3:].mean() > 0.71


def test_num_trials_is_the_budget_and_known_plans_do_not_count(space, loss):
    strategy = OptunaSearch(num_trials=12)
    assert strategy.max_evaluations == 12
    outcome = run_search(strategy, space, loss, seed=0)
    assert (outcome.evaluations, outcome.asked, outcome.stop_reason) == (12, 12, "max_evaluations")


@pytest.mark.parametrize("num_trials", [1, 2, 3])
def test_the_smallest_budgets_are_kept(space, loss, num_trials):
    assert len(searched(OptunaSearch(num_trials), space, loss)) == num_trials


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_it_ends_when_there_are_no_more_plans(sampler):
    single = mlp_space([8, 4, 4], target=0.5, tolerance=0.1)  # of its four plans one is on target
    outcome = run_search(OptunaSearch(sampler=sampler), single, lambda x: 1.0, seed=0)
    assert (outcome.evaluations, outcome.stop_reason) == (1, "repeating")


def test_it_ends_where_the_bounds_leave_one_plan():
    fixed = np.array([0.5, 0.5])
    space = mlp_space([8, 8, 8, 4], target=0.58, tolerance=0.02, low=fixed, high=fixed)
    outcome = run_search(OptunaSearch(), space, lambda x: 1.0, seed=0)
    assert (outcome.evaluations, outcome.stop_reason) == (1, "exhausted")


def test_coefficients_with_one_value_are_left_at_it(loss):
    low, high = np.array([0.0, 0.25, 0.0]), np.array([1.0, 0.25, 1.0])
    space = mlp_space([64, 48, 64, 32, 10], low=low, high=high)
    asked = []
    run_search(OptunaSearch(20), space, lambda x: float(x @ x), seed=0, on_asked=lambda x, *_: asked.append(x))
    assert {x[1] for x in asked} == {0.25}
    assert len(asked) == 20


def test_a_target_that_no_plan_meets_ends_without_evaluating():
    space = mlp_space([8, 2, 4], target=0.3, tolerance=0.01)
    outcome = run_search(OptunaSearch(), space, lambda x: 1.0, seed=0)
    assert (outcome.evaluations, outcome.stop_reason) == (0, "off target")


def test_losses_of_nan_teach_the_sampler_to_stay_away(space):
    losses = list(searched(OptunaSearch(60), space, lambda x: math.nan if x[0] > 0.5 else 1.0).values())
    assert np.isnan(losses[3:13]).mean() > 0.4
    assert np.isnan(losses[-30:]).mean() < 0.4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_search_of_useless_losses_ends_at_its_budget(space, value):
    outcome = run_search(OptunaSearch(25), space, lambda x: value, seed=0)
    assert (outcome.evaluations, outcome.stop_reason) == (25, "max_evaluations")


# ------------------------------------------------------------------------------------------------- good manners


def test_nothing_is_printed_and_nothing_global_changes(space, loss, capfd, storage):
    before = optuna.logging.get_verbosity(), logging.getLogger("optuna").level, warnings.filters[:]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what others may rely on
    expected = random.Random(0).random(), np.random.RandomState(0).random()
    for sampler in ("tpe", "qmc", "nsgaii"):
        searched(OptunaSearch(15, sampler, storage), space, loss)
    assert capfd.readouterr() == ("", "")
    assert (optuna.logging.get_verbosity(), logging.getLogger("optuna").level, warnings.filters[:]) == before
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002


def test_the_user_s_verbosity_is_in_force_while_the_model_is_evaluated(space):
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        seen = set()
        run_search(OptunaSearch(5), space, lambda x: seen.add(optuna.logging.get_verbosity()) or 0.0, seed=0)
        assert seen == {optuna.logging.DEBUG}
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


# ------------------------------------------------------------------------------------------------------- storage


def test_the_storage_shows_every_trial(space, storage):
    def loss(x):
        return math.nan if x[0] > 0.6 else float(x @ x)

    asked = []
    run_search(OptunaSearch(20, storage=storage), space, loss, seed=0, on_asked=lambda *a: asked.append(a))
    [(name, trials)] = studies(storage).items()
    assert name.startswith("softprune-tpe-")
    assert len(trials) == len(asked) == 20
    for (x, value, _), trial in zip(asked, trials, strict=True):
        np.testing.assert_allclose([trial.params[f"coefficient_{i}"] for i in range(3)], x)
        assert trial.user_attrs == {"sparsity": space.sparsity_of(x), "removed": list(space.key(x))}
        assert trial.value == (None if math.isnan(value) else value)
        assert trial.state.name == ("FAIL" if math.isnan(value) else "COMPLETE")
        assert trial.datetime_start <= trial.datetime_complete
    assert {trial.state.name for trial in trials} == {"FAIL", "COMPLETE"}


def test_a_storage_does_not_change_the_search(space, loss, storage):
    plain = searched(OptunaSearch(20), space, loss)
    for _ in range(2):  # nor does what is in it already
        assert list(searched(OptunaSearch(20, storage=storage), space, loss).items()) == list(plain.items())


def test_a_killed_search_goes_on_in_its_study_and_adds_what_is_missing(space, loss, storage):
    cache = {}

    def dies(x):
        if len(cache) == 8:
            raise KeyboardInterrupt
        return loss(x)

    with pytest.raises(KeyboardInterrupt):
        run_search(OptunaSearch(20, storage=storage), space, dies, seed=0, cache=cache)
    [begun] = studies(storage).values()
    assert len(begun) == 8
    outcome = run_search(OptunaSearch(20, storage=storage), space, loss, seed=0, cache=cache)
    assert outcome.evaluations == 12
    [(name, trials)] = studies(storage).items()
    assert [trial.value for trial in trials] == list(cache.values())
    assert [trial.datetime_complete for trial in trials[:8]] == [trial.datetime_complete for trial in begun]

    longer = searched(OptunaSearch(25, storage=storage), space, loss)
    assert {name: [trial.value for trial in trials] for name, trials in studies(storage).items()} == {
        name: list(longer.values())
    }


def test_a_state_that_was_saved_goes_on_in_the_study_too(space, loss, storage):
    strategy = OptunaSearch(10, storage=storage)
    strategy.start(space, 1)
    for _ in range(6):
        strategy.tell(loss(strategy.ask()))
    state = json.loads(json.dumps(strategy.state_dict()))
    resumed = copy.deepcopy(strategy)
    resumed.start(space, 0)
    resumed.load_state_dict(state)
    while (x := resumed.ask()) is not None:
        resumed.tell(loss(x))
    [trials] = studies(storage).values()
    assert len(trials) == 10
    assert len({tuple(trial.user_attrs["removed"]) for trial in trials}) == 10


def test_searches_that_are_not_the_same_have_studies_of_their_own(space, loss, storage):
    def run(space=space, loss=loss, seed=0, sampler="tpe"):
        searched(OptunaSearch(5, sampler, storage), space, loss, seed=seed)
        return studies(storage)

    [name] = run()
    assert len(run(seed=1)) == 2
    assert len(run(sampler="random")) == 3
    assert len(run(space=mlp_space([64, 48, 64, 32, 10], target=0.6))) == 4
    other_data = plan_loss(space, steep([1.0, 0.5, 2.0]))
    assert len(run(loss=other_data)) == 5
    assert f"{name}-2" in run(loss=other_data)
    assert len(run()) == len(run(sampler="TPESampler")) == 5
    assert all(len(trials) == 5 for trials in studies(storage).values())


def test_a_search_that_differs_late_is_whole_in_a_study_of_its_own(space, loss, storage):
    first = searched(OptunaSearch(10, storage=storage), space, loss)
    known = dict(list(first.items())[:6])
    second = searched(OptunaSearch(10, storage=storage), space, lambda x: known.get(space.key(x), 7.0))
    found = {name: [trial.value for trial in trials] for name, trials in studies(storage).items()}
    assert list(found.values()) == [list(first.values()), list(second.values())]


def test_only_one_of_several_processes_writes(space, loss, storage, tmp_path):
    def asked(first):
        strategy = OptunaSearch(8, storage=storage)
        strategy.is_global_zero = first
        found = searched(strategy, space, loss)
        assert copy.deepcopy(strategy).is_global_zero
        return found

    other = asked(False)
    assert list(tmp_path.iterdir()) == []
    assert list(asked(True).items()) == list(other.items())
    [trials] = studies(storage).values()
    assert len(trials) == 8


def test_a_storage_that_cannot_be_opened_is_an_error_before_any_evaluation(space, tmp_path):
    (tmp_path / "text").write_text("not a journal\nat all\n")
    for storage in (f"sqlite:///{tmp_path}/none/x.db", "nonsense://x", str(tmp_path), str(tmp_path / "text")):
        evaluated = []
        with pytest.raises(
            ValueError, match=r"storage: .* cannot be opened; allowed are the URL of a database"
        ) as error:
            run_search(OptunaSearch(storage=storage), space, evaluated.append, seed=0)
        assert repr(storage) in str(error.value)
        assert evaluated == []


def test_a_storage_that_fails_later_is_one_warning_and_the_search_goes_on(space, loss, storage, monkeypatch):
    strategy = OptunaSearch(10, storage=storage)
    plain = searched(OptunaSearch(10), space, loss)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    def evaluate(x):
        if len(cache) == 4:
            monkeypatch.setattr(optuna.Study, "add_trial", full)
        return loss(x)

    cache = {}
    with pytest.warns(UserWarning, match="goes on without its storage: OSError: no space left") as caught:
        run_search(strategy, space, evaluate, seed=0, cache=cache)
    assert len(caught) == 1
    assert cache == plain
    [trials] = studies(storage).values()
    assert len(trials) == 4


# ------------------------------------------------------------------------------------------------------ arguments


def test_samplers_are_found_in_any_spelling(space, loss):
    expected = searched(OptunaSearch(15, "nsgaii"), space, loss)
    for name in ("NSGAII", "NSGA-II", "nsgaiisampler", "NSGAIISampler", "nsga_ii"):
        assert searched(OptunaSearch(15, name), space, loss) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_trials": 0}, ValueError, "num_trials: 0 is less than 1"),
        ({"num_trials": 2.5}, TypeError, "num_trials: 2.5 is not a whole number"),
        ({"sampler": "tpu"}, ValueError, r"sampler: 'tpu' is not one of .*'nsgaii'.*'tpe'; did you mean 'tpe'"),
        ({"sampler": "grid"}, ValueError, "sampler: .* is not one of"),
        ({"sampler": "base"}, ValueError, "sampler: .* is not one of"),
        ({"sampler": "bruteforce"}, ValueError, "sampler: .* is not one of"),
        ({"sampler": ""}, ValueError, "sampler: .* is not one of"),
        ({"sampler": optuna.samplers.RandomSampler}, TypeError, "sampler: .* is not the name"),
        ({"storage": 5}, TypeError, "storage: 5 is not the URL of a database, the path of a file or None"),
        ({"storage": ""}, ValueError, "storage: '' is not the URL of a database, the path of a file or None"),
    ],
)
def test_an_argument_that_cannot_work_is_named_with_what_is_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        OptunaSearch(**arguments)


@pytest.mark.parametrize(("sampler", "package"), [("cmaes", "cmaes"), ("gp", "torch"), ("GPSampler", "torch")])
def test_a_package_that_a_sampler_needs_is_named(monkeypatch, sampler, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"sampler='{sampler}' .*needs the package {package}.*pip install"):
        OptunaSearch(sampler=sampler)


def test_without_optuna_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-softprune\[optuna\]"'):
        OptunaSearch()


def test_optuna_is_imported_with_the_first_instance_only():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('lightning_softprune')\n"
        f"package.__path__ = [{str(Path(search.__file__).parent.parent)!r}]\n"
        "sys.modules['lightning_softprune'] = package\n"  # without its __init__, which imports Lightning
        "import lightning_softprune.search as search\n"
        "assert 'optuna' not in sys.modules\n"
        "search.OptunaSearch()\n"
        "assert 'optuna' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_password_is_not_shown():
    strategy = OptunaSearch(storage="mysql+pymysql://me:secret@localhost:1/optuna")
    assert "secret" not in repr(strategy)
    assert "storage='mysql+pymysql://me:***@localhost:1/optuna'" in repr(strategy)
    assert strategy.storage.count("secret") == 1
    assert repr(OptunaSearch()) == "OptunaSearch(num_trials=100, sampler='tpe', storage=None)"
