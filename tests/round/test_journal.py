"""A search that is killed goes on where it stopped."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_softprune.round.preparing.prepare as prepare
from lightning_softprune import GradientSearch, OptunaSearch, RandomSearch
from lightning_softprune.round.journal import BASELINE, Journal, Key, journal_path
from lightning_softprune.round.journal.fingerprint import digest, fingerprint
from support.modules import AutoEncoder, fit, loaders, made, softpruning, trainer_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SEARCHES = {
    "gradient": lambda: GradientSearch(steps=2, max_evaluations=24),
    "random": lambda: RandomSearch(num_candidates=6),
}


# --------------------------------------------------------------------------------------------- a fit that can be killed


class Stopped(BaseException):
    """Not an error of a step, which would make a trial infeasible."""


class Passes:
    """The validation passes of the round: where finished ones are counted, in which to stop, and how."""

    running, file, stop_at, kill = False, Path(), 0, False

    @classmethod
    def finished(cls):
        return len(cls.file.read_text()) if cls.file.exists() else 0


class Fragile(AutoEncoder):
    """Stops in the middle of a validation pass."""

    def validation_step(self, batch, batch_idx):
        if Passes.running and batch_idx == 1 and Passes.finished() == Passes.stop_at - 1:
            if Passes.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stopped
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        if Passes.running:
            with Passes.file.open("a") as file:
                file.write(".")


KIND = {"kind": Fragile}


class Switch(Callback):
    def __init__(self, running, epoch):
        self.running, self.epoch = running, epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            Passes.running = self.running


def fragile_fit(
    folder, stop_at=0, *, kill=False, search="random", weights=0, data=None, checkpoint=None, epoch=1, **arguments
):
    """One fit, resumed if there is a checkpoint; returns module and round, or raises Stopped, or does not return."""
    Passes.running, Passes.file, Passes.stop_at, Passes.kill = False, folder / "passes", stop_at, kill
    pl.seed_everything(7, verbose=False)
    module = made(KIND["kind"], seed=weights)
    callback = softpruning(**{"search": SEARCHES[search](), "epochs": epoch, **arguments})
    callbacks = [Switch(True, epoch), callback, Switch(False, epoch)]
    if checkpoint:
        callbacks.append(ModelCheckpoint(checkpoint.parent, save_last=True))
    trainer = trainer_of(folder / "root", *callbacks, num_sanity_val_steps=0, enable_checkpointing=bool(checkpoint))
    resumed = checkpoint if checkpoint and checkpoint.exists() else None
    trainer.fit(module, **(data or loaders(module)), ckpt_path=resumed)
    return module, callback.results[0]


def stopped_fit(folder, stop_at, **arguments):
    with pytest.raises(Stopped):
        fragile_fit(folder, stop_at, **arguments)


def killed_fit(folder, stop_at, **arguments):
    """The same in a process of its own, which kills itself."""
    call = f"module.fragile_fit(pathlib.Path({str(folder)!r}), {stop_at}, kill=True, **{arguments!r})"
    module = f"importlib.import_module({__name__!r})"  # under the name that it has here: journals know it
    prelude = "import importlib, pathlib, torch; torch.set_num_threads(1)"
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", f"{prelude}; module = {module}; {call}"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Search -> module, round and number of passes of a fit that nobody stopped."""
    found = {}

    def get(search):
        if search not in found:
            module, result = fragile_fit(tmp_path_factory.mktemp(search), search=search)
            found[search] = module.state_dict(), without_times(result), Passes.finished()
        return found[search]

    return get


def without_times(result):
    trials = tuple(dataclasses.replace(trial, seconds=0.0) for trial in result.trials)
    timed = {
        "seconds": 0.0,
        "phases": {},
        "latency_before": None,
        "latency_after": None,
        "latency_spread": None,
        "shares": {},
    }
    return dataclasses.replace(result, **timed, trials=trials, configuration={})


def assert_ends_as(expected, folder, *, confirmed=0, continued=True, **arguments):
    """A last fit in this folder: together with those before it, it makes as many passes as one alone, and equals it.

    Those that confirm what an earlier fit has found come on top: `confirmed` before the last fit, the baseline in it,
    and the chosen plan where it is an earlier fit's.
    """
    weights, round_, passes = expected
    found = trials_in(journal_of(folder))
    module, result = fragile_fit(folder, **arguments)
    if continued:
        confirmed += 1 + (list(result.trials[result.chosen].coefficients) in found)
    assert Passes.finished() - confirmed == passes == result.evaluations
    assert without_times(result) == round_
    found = module.state_dict()
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not (folder / "root").exists(), "nothing is left behind"


def journal_of(folder, epoch=1):
    return journal_path(folder / "root", epoch)


def trials_in(path):
    """The coefficients of a journal's trials; ``None`` where there is no journal."""
    if not path.exists():
        return None
    entries = []
    for line in path.read_bytes().splitlines()[1:]:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry["coefficients"] for entry in entries if isinstance(entry, dict) and "coefficients" in entry]


# --------------------------------------------------------------------------------------------------------------- killed


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_search_goes_on_and_ends_as_if_nothing_had_happened(tmp_path, uninterrupted):
    expected = uninterrupted("gradient")
    killed_fit(tmp_path, 6, search="gradient")
    assert len((tmp_path / "passes").read_text()) == 5
    header, *passes = [json.loads(line) for line in journal_of(tmp_path).read_text().splitlines()]
    assert header["softprune_journal"] == 1
    assert [entry["kind"] for entry in passes] == ["baseline"] + ["trial"] * 4
    assert [entry["score"] for entry in passes[1:]] == [trial.score for trial in expected[1].trials[:4]]
    assert [entry["metrics"] for entry in passes[1:]] == [trial.metrics for trial in expected[1].trials[:4]]
    assert [tuple(entry["coefficients"]) for entry in passes[1:]] == [t.coefficients for t in expected[1].trials[:4]]
    assert_ends_as(expected, tmp_path, search="gradient")


@pytest.mark.parametrize("search", SEARCHES)
def test_wherever_a_round_fails_the_next_one_goes_on_from_there(tmp_path, uninterrupted, search):
    expected = uninterrupted(search)
    passes = expected[2]
    for stop_at in sorted({3, passes // 2, passes - 1, passes}):  # the last one is the refit's, after the search
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        stopped_fit(folder, stop_at, search=search)
        assert len(journal_of(folder).read_text().splitlines()) == stop_at
        assert_ends_as(expected, folder, search=search)


def test_a_round_that_fails_after_it_has_healed_heals_anew_and_ends_with_the_same_weights(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    folder.mkdir()
    more = {"healing": 3, "target_sparsity": 0.8}  # so that something is lost
    module, result = fragile_fit(whole, **more)
    expected = module.state_dict(), without_times(result), Passes.finished()
    assert result.healing is not None
    stopped_fit(folder, expected[2], **more)  # the last pass is the healed network's
    assert_ends_as(expected, folder, confirmed=1, **more)  # the refit is scored in both


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_stopped_search_with_optuna_goes_on_in_the_study_it_began(tmp_path, monkeypatch, sampler):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/studies.db"
    monkeypatch.setitem(SEARCHES, "optuna", lambda: OptunaSearch(13, sampler, storage))

    def trials():
        [study] = optuna.get_all_study_summaries(storage)
        return optuna.load_study(study_name=study.study_name, storage=storage).trials

    stopped_fit(tmp_path, 13, search="optuna")
    begun = trials()
    assert len(begun) == 11  # the twelve finished passes, without the baseline
    _, result = fragile_fit(tmp_path, search="optuna")
    assert [trial.datetime_complete for trial in trials()[:11]] == [trial.datetime_complete for trial in begun]
    assert [trial.value for trial in trials()] == [trial.score for trial in result.trials[:13]]
    assert [trial.user_attrs["sparsity"] for trial in trials()] == [t.sparsity for t in result.trials[:13]]


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_in_the_place_of_the_journal_is_neither_read_nor_written_to(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 4)
    journal, elsewhere = journal_of(tmp_path), tmp_path / "elsewhere"
    journal.rename(elsewhere)
    content = elsewhere.read_bytes()
    journal.symlink_to(elsewhere)
    (tmp_path / "passes").unlink()
    _, result = fragile_fit(tmp_path)
    assert without_times(result) == expected[1]
    assert Passes.finished() == expected[2], "nothing was taken over"
    assert elsewhere.read_bytes() == content


def test_a_search_that_is_stopped_again_and_again_gets_there(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    for stop_at in (3, 5, 7):
        stopped_fit(tmp_path, stop_at)
    assert_ends_as(expected, tmp_path, confirmed=2)


def test_a_search_on_a_part_of_the_data_goes_on_with_its_finalists(tmp_path):
    """Of the baseline, the dense model on the part, the trials, the finalists and the refit."""
    folders = [tmp_path / name for name in ("alone", "in the search", "among finalists")]
    weights, results, passes = [], [], []
    for folder, stop_at in zip(folders, (0, 5, 11), strict=True):
        folder.mkdir()
        if stop_at:
            stopped_fit(folder, stop_at, search_batches=2)
        module, result = fragile_fit(folder, search_batches=2)
        weights.append(module.state_dict())
        results.append(without_times(result))
        passes.append(Passes.finished())
    assert results[0] == results[1] == results[2]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights for name in other)
    assert {trial.share for trial in results[0].trials} == {2 / 3, 1.0}
    assert passes[0] == len(results[0].trials) + 2
    assert all(passes[0] < number <= passes[0] + 3 for number in passes[1:]), "what is confirmed comes on top"


def test_a_search_goes_on_in_a_fit_that_resumes_from_a_checkpoint(tmp_path, uninterrupted):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    stopped_fit(tmp_path, 4, checkpoint=checkpoint)
    assert checkpoint.exists()
    _, expected, passes = uninterrupted("random")
    _, result = fragile_fit(tmp_path, weights=5, checkpoint=checkpoint)
    assert Passes.finished() == passes + 1
    assert without_times(result) == expected


def test_a_round_that_fails_before_its_first_trial_leaves_nothing_behind(tmp_path):
    stopped_fit(tmp_path, 2)
    assert not (tmp_path / "root").exists()


def test_a_skipped_round_removes_its_journal(tmp_path):
    class Nan(AutoEncoder):
        def on_validation_epoch_end(self):
            self.log("nan", math.nan)

    with pytest.warns(UserWarning, match="left as it is"):
        fit(tmp_path / "root", made(Nan), softpruning(monitor="nan", mode="min"))
    assert not (tmp_path / "root").exists()


def test_the_journal_leaves_other_files_alone(tmp_path):
    root = tmp_path / "root"
    journal_path(root, 7).parent.mkdir(parents=True)
    journal_path(root, 7).write_text("another round's")
    fit(root, made(), softpruning(report=True))
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert files == [
        "softprune/.run",
        "softprune/epoch=1/report.html",
        "softprune/epoch=1/result.json",
        "softprune/epoch=1/trials.csv",
        "softprune/journal/epoch=7.jsonl",
    ]


# -------------------------------------------------------------------------------------------------------- damaged files


def test_a_torn_last_line_and_garbage_are_ignored(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 5)
    header, baseline, first, second, third = journal_of(tmp_path).read_bytes().splitlines(keepends=True)
    garbage = b'\x00\xff\n[1]\n{}\n\n{"kind": "trial", "removed": 3, "network": "", "metrics": {}, "seconds": 1}\n'
    journal_of(tmp_path).write_bytes(header + baseline + garbage + first + second + third[: len(third) // 2])
    (tmp_path / "passes").write_text("." * 3)  # the third trial is lost
    assert_ends_as(expected, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"{}\n", b"[]\n", b'{"softprune_journal": 1, "fingerpr'])
def test_a_journal_without_a_readable_header_is_replaced(tmp_path, uninterrupted, content):
    expected = uninterrupted("random")
    journal_of(tmp_path).parent.mkdir(parents=True)
    journal_of(tmp_path).write_bytes(content)
    fragile_fit(tmp_path)
    assert Passes.finished() == expected[2]
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_a_folder_that_cannot_be_written_costs_the_journal_and_nothing_else(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    (tmp_path / "root").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="keeps no journal") as warned:
        module, result = fragile_fit(tmp_path)
    assert len([warning for warning in warned if "keeps no journal" in str(warning.message)]) == 1
    assert without_times(result) == expected[1]
    assert all(torch.equal(value, expected[0][name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_full_disk_costs_the_journal_and_nothing_else(tmp_path, uninterrupted, monkeypatch, after):
    expected = uninterrupted("random")
    real, calls = os.fsync, []

    def full_after_a_while(number):
        calls.append(number)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full_after_a_while)
    with pytest.warns(UserWarning, match="No space left"):
        _, result = fragile_fit(tmp_path)
    assert without_times(result) == expected[1]
    assert not (tmp_path / "root").exists()


def test_a_folder_in_a_cloud_gets_no_journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="not a local folder"):
        fit("memory://runs", made(), softpruning())
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- another fingerprint


def test_changed_weights_start_a_fresh_search(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 4, weights=1)
    (tmp_path / "passes").unlink()
    old = journal_of(tmp_path).read_text().splitlines()
    stopped_fit(tmp_path, 5)
    new = journal_of(tmp_path).read_text().splitlines()
    assert len(new) == 5
    assert not set(old) & set(new), "the old journal was replaced"
    assert_ends_as(expected, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"monitor": "val_psnr", "mode": "max"},
        {"seed": 1},
        {"search_batches": 2},
        {"target_sparsity": 0.45},
        {"calibration_batches": 2},
        {"search": "gradient"},
        {"search": "random", "ignore": ["encoder.0"]},
        {"importance": "magnitude"},
    ],
    ids=str,
)
def test_changed_settings_start_a_fresh_search(tmp_path, uninterrupted, arguments):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 4, **arguments)
    (tmp_path / "passes").unlink()
    assert_ends_as(expected, tmp_path, continued=False)


def test_trials_on_other_calibration_batches_do_not_count(tmp_path, monkeypatch):
    same = {"importance": "magnitude"}  # whatever the batches are
    (tmp_path / "alone").mkdir()
    module, result = fragile_fit(tmp_path / "alone", **same)
    expected = module.state_dict(), without_times(result), Passes.finished()
    with monkeypatch.context() as fewer:
        fewer.setattr(prepare, "batches_wanted", lambda *_: 2)
        stopped_fit(tmp_path, 4, **same)
    (tmp_path / "passes").unlink()
    assert_ends_as(expected, tmp_path, continued=False, **same)


@pytest.mark.parametrize(("compensation", "goes_on"), [("none", True), ("least_squares", False)])
def test_a_search_ranked_by_activation_goes_on_under_the_default_where_that_is_the_same(
    tmp_path, compensation, goes_on
):
    stopped_fit(tmp_path, 4, compensation=compensation, importance="activation")
    begun = Passes.finished()
    _, result = fragile_fit(tmp_path, compensation=compensation)
    again = Passes.finished() - result.evaluations
    assert 1 <= again <= 2 < begun if goes_on else again == begun  # the baseline, and a chosen plan that was read


def test_settings_that_only_speak_may_change(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 4)
    assert_ends_as(expected, tmp_path, verbose=True)


@pytest.mark.parametrize("sizes", [{"val": 19}, {"train": 47}], ids=str)
def test_changed_data_start_a_fresh_search(tmp_path, sizes):
    """Before the first training step, with the same weights."""
    stopped_fit(tmp_path, 4, epoch=0, data=loaders(made(), **sizes))
    (tmp_path / "passes").unlink()
    _, result = fragile_fit(tmp_path, epoch=0)
    assert Passes.finished() == result.evaluations


# ------------------------------------------------------------------------------------------- what is taken over holds


FACTOR = {"value": 1.0}


def helper(value):
    """What a step calls: no fingerprint sees it."""
    return value * FACTOR["value"]


class Helped(Fragile):
    """Scores by a function outside of its class."""

    def on_validation_epoch_end(self):
        self.log("val_helped", helper(-10 * torch.log10(self.mse.compute())))
        super().on_validation_epoch_end()


class Silent(Fragile):
    """Logs its metric where a table outside of its class says so."""

    def on_validation_epoch_end(self):
        value = self.mse.compute()
        if FACTOR["value"] == 1.0:
            self.log("val_score", value)
        super().on_validation_epoch_end()


@pytest.fixture
def factor(monkeypatch):
    def put(value):
        monkeypatch.setitem(FACTOR, "value", value)

    return put


def aside(folder):
    return sorted(path for path in folder.rglob("*set-aside*"))


def lines_of(folder):
    return [json.loads(line) for line in journal_of(folder).read_text().splitlines()]


def write_lines(folder, lines):
    journal_of(folder).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def of(monkeypatch):
    """Fits are of this class."""

    def put(kind):
        monkeypatch.setitem(KIND, "kind", kind)

    return put


@pytest.mark.parametrize("monitor", ["val_helped", "val_loss"])
def test_after_a_change_that_no_fingerprint_sees_the_search_starts_from_the_beginning(tmp_path, factor, of, monitor):
    of(Helped)
    arguments = {"monitor": monitor, "mode": "min"}
    factor(-1.0)
    (tmp_path / "whole").mkdir()
    _, expected = fragile_fit(tmp_path / "whole", **arguments)
    factor(1.0)
    stopped_fit(tmp_path, 5, **arguments)
    before = journal_of(tmp_path).read_bytes()
    (tmp_path / "passes").unlink()
    factor(-1.0)
    with pytest.warns(UserWarning, match="search starts from the beginning.*val_helped") as warned:
        _, result = fragile_fit(tmp_path, **arguments)
    assert without_times(result) == without_times(expected)
    [kept] = aside(tmp_path)
    assert kept.read_bytes() == before
    [message] = [str(warning.message) for warning in warned if "set-aside" in str(warning.message)]
    assert str(journal_of(tmp_path)) in message
    assert str(kept) in message
    assert not journal_of(tmp_path).exists()


def test_a_killed_search_after_a_set_aside_goes_on_from_the_new_journal(tmp_path, factor, of):
    of(Helped)
    stopped_fit(tmp_path, 5)
    (tmp_path / "passes").unlink()
    factor(2.0)
    with pytest.warns(UserWarning, match="from the beginning"), pytest.raises(Stopped):
        fragile_fit(tmp_path, 6)
    assert [line.get("kind") for line in lines_of(tmp_path)] == [None, "baseline", *["trial"] * 3]
    _, result = fragile_fit(tmp_path)  # a warning would be an error
    assert result.metrics_before["val_helped"] == pytest.approx(2 * result.metrics_before["val_psnr"])
    assert len(aside(tmp_path)) == 1


def test_a_score_that_was_planted_in_a_line_is_not_believed(tmp_path, uninterrupted, caplog):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 5)
    header, baseline, first, second, third = lines_of(tmp_path)
    second["metrics"]["val_loss"] = second["score"] = 0.0
    write_lines(tmp_path, [header, baseline, first, second, third])
    (tmp_path / "passes").write_text("." * 3)  # it is run again
    assert_ends_as(expected, tmp_path, verbose=True)
    assert f"1 lines of {journal_of(tmp_path)} are not as they were written" in caplog.text


@pytest.mark.parametrize("which", ["best", "worst"])
def test_a_planted_line_without_digests_is_found_out_before_the_plan_is_committed(tmp_path, uninterrupted, which):
    weights, expected, passes = uninterrupted("random")
    stopped_fit(tmp_path, 6)
    header, *lines = lines_of(tmp_path)
    del header["digests"]
    for line in lines:
        del line["digest"]
    scores = [line["score"] for line in lines[1:]]
    planted = lines[1 + scores.index(max(scores))]
    if which == "best":
        planted["metrics"]["val_loss"] = planted["score"] = 0.0
        write_lines(tmp_path, [header, *lines])
        with pytest.warns(UserWarning, match="the chosen plan has val_loss="):
            module, result = fragile_fit(tmp_path)
        assert len(aside(tmp_path)) == 1
    else:
        write_lines(tmp_path, [header, *lines])
        module, result = fragile_fit(tmp_path)
    assert without_times(result) == expected
    assert result.evaluations == passes
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "torn", "edited"])
def test_trials_without_a_baseline_are_set_aside(tmp_path, uninterrupted, damage):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 5)
    header, baseline, *trials = journal_of(tmp_path).read_bytes().splitlines(keepends=True)
    changed = {"missing": b"", "torn": baseline[:50] + b"\n", "edited": baseline.replace(b'"score": ', b'"score": 9')}
    journal_of(tmp_path).write_bytes(header + changed[damage] + b"".join(trials))
    (tmp_path / "passes").unlink()
    with pytest.warns(UserWarning, match="trials, and no score of the model as it was"):
        _, result = fragile_fit(tmp_path)
    assert Passes.finished() == expected[2]
    assert without_times(result) == expected[1]
    assert len(aside(tmp_path)) == 1


@pytest.mark.parametrize("broken", [None, "nan", "inf"])
def test_a_metric_that_was_missing_once_is_not_missing_again(tmp_path, of, broken):
    of(Silent)
    arguments = {"monitor": "val_score", "mode": "min"}
    (tmp_path / "whole").mkdir()
    _, expected = fragile_fit(tmp_path / "whole", **arguments)
    stopped_fit(tmp_path, 4, **arguments)
    header, baseline, *trials = lines_of(tmp_path)
    del header["digests"]
    for trial in trials:
        if broken is None:
            del trial["metrics"]["val_score"]
        else:
            trial["metrics"]["val_score"] = broken
    write_lines(tmp_path, [header, baseline, *trials])
    _, result = fragile_fit(tmp_path, **arguments)
    assert without_times(result) == without_times(expected)


@pytest.mark.filterwarnings("ignore:.*is not logged in a validation before training")
def test_a_first_run_that_never_logged_the_metric_leaves_nothing_that_the_next_one_repeats(tmp_path, factor, of):
    of(Silent)
    factor(3.0)
    with pytest.raises(Exception, match="monitor='val_score' is not logged"):
        fragile_fit(tmp_path, monitor="val_score", mode="min")
    factor(1.0)
    _, result = fragile_fit(tmp_path, monitor="val_score", mode="min")
    assert result.applied


def test_a_journal_that_is_a_folder_or_a_pipe_costs_the_journal_and_nothing_else(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    journal_of(tmp_path).mkdir(parents=True)
    with pytest.warns(UserWarning, match="keeps no journal") as warned:
        _, result = fragile_fit(tmp_path)
    assert any(str(journal_of(tmp_path)) in str(warning.message) for warning in warned)
    assert without_times(result) == expected[1]
    journal_of(tmp_path).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(journal_of(tmp_path))
        _, result = fragile_fit(tmp_path)
        assert without_times(result) == expected[1]


def test_lines_that_nobody_could_have_written_are_as_good_as_absent(tmp_path, uninterrupted):
    expected = uninterrupted("random")
    stopped_fit(tmp_path, 5)
    header, *lines = journal_of(tmp_path).read_bytes().splitlines(keepends=True)
    first = json.loads(lines[1])
    odd = [
        b"\xff\xfe" + lines[1].decode().encode("utf-16-le"),
        b"\xef\xbb\xbf" + lines[1],
        b"[" * 10**6 + b"\n",
        b'"' + b"x" * 3 * 2**20 + b'"\n',
        b'{"kind": "trial", "removed": [' + b"9" * 5000 + b"]}\n",
        *(
            json.dumps({**first, **change}).encode() + b"\n"
            for change in (
                {"removed": [1.5, 2.5]},
                {"seconds": math.nan},
                {"metrics": {"val_loss": None}},
                {"metrics": {"val_loss": 10**400}},
                {"network": "\ud800"},
                {"metrics": []},
            )
        ),
    ]
    journal_of(tmp_path).write_bytes(header + lines[0] + b"".join(odd) + b"".join(lines[1:]))
    assert_ends_as(expected, tmp_path)


def test_metrics_that_are_never_the_same_do_not_put_a_journal_aside(tmp_path):
    path, times = tmp_path / "journal.jsonl", iter(range(9))

    def score():
        return {"loss": 0.5, "seconds": float(next(times))}

    def search(loss=0.5, tolerance=1e-6):
        journal = Journal(path, {"weights": "a"}, required=["loss"], verbose=False)
        journal.tolerance = tolerance
        held = journal.confirm(BASELINE, lambda: {**score(), "loss": loss})
        journal.scored(BASELINE, score)
        trial = counted({"loss": 1.0})
        journal.scored(Key("trial", (1,)), trial)
        journal.__exit__(Stopped, None, None)
        return held, trial.calls

    assert search() == (True, 1)
    assert search() == (True, 0)
    assert search(0.5 + 1e-9) == (True, 0)
    assert search(0.5001, tolerance=1e-3) == (True, 0)
    with pytest.warns(UserWarning, match=r"has loss=0.5001 and not loss=0.5,"):
        assert search(0.5001) == (False, 1)
    assert len(aside(tmp_path)) == 1


def test_a_journal_that_cannot_be_renamed_is_not_used_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    leave_with_a_trial(path)

    def refused(*_):
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "rename", refused)
    journal = Journal(path, {"weights": "a"}, verbose=False)
    with pytest.warns(UserWarning, match=r"journal\.jsonl is not used any more"):
        assert not journal.confirm(BASELINE, lambda: {"loss": 7.0})
    score = counted({"loss": 1.0})
    journal.scored(Key("trial", (1, 2), "net"), score)
    journal.__exit__(None, None, None)
    assert score.calls == 1
    assert not path.exists()


# ---------------------------------------------------------------------------------------------------------- the journal


FOUND = {"loss": 0.1, "nan": math.nan, "up": math.inf, "down": -math.inf, "third": 1 / 3}


def counted(metrics):
    def score():
        score.calls += 1
        return metrics

    score.calls = 0
    return score


def leave_with_a_trial(path, expected=None):
    journal = Journal(path, expected or {"weights": "a"})
    journal.scored(BASELINE, lambda: {"loss": 0.0})
    journal.scored(Key("trial", (1, 2), "net"), lambda: FOUND)
    journal.__exit__(Stopped, None, None)


def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path):
    path = tmp_path / "journal.jsonl"
    leave_with_a_trial(path)
    score = counted({})
    with Journal(path, {"weights": "a"}) as journal:
        found = journal.scored(Key("trial", (1, 2), "net"), score)
    assert score.calls == 0
    np.testing.assert_equal(found.metrics, FOUND)
    assert not path.exists()


@pytest.mark.parametrize(
    "key", [Key("trial", (2, 1), "net"), Key("trial", (1, 2), "other"), Key("refined", (1, 2), "net")]
)
def test_another_plan_network_or_kind_is_scored_anew(tmp_path, key):
    path, score = tmp_path / "journal.jsonl", counted({"loss": 1.0})
    leave_with_a_trial(path)
    with Journal(path, {"weights": "a"}) as journal:
        assert journal.scored(key, score) == journal.scored(key, score)
    assert score.calls == 1


def test_each_pass_is_on_disk_before_the_next_one_starts(tmp_path):
    path = tmp_path / "a" / "b" / "journal.jsonl"
    with Journal(path, {"weights": "a"}) as journal:
        assert not (tmp_path / "a").exists()
        for number in range(3):
            journal.scored(Key("trial", (number,)), lambda: {"loss": 0.0})
            assert len(path.read_text().splitlines()) == number + 2
    assert not (tmp_path / "a").exists()


def test_an_exception_of_a_pass_writes_nothing(tmp_path):
    def fails():
        raise Stopped

    path = tmp_path / "journal.jsonl"
    with Journal(path, {}) as journal:
        journal.scored(BASELINE, dict)
        with pytest.raises(Stopped):
            journal.scored(Key("trial"), fails)
        assert len(path.read_text().splitlines()) == 2


def test_two_runs_in_one_folder_never_mix_their_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"weights": "a"}) as first:
        first.scored(Key("trial", (1,)), lambda: {"loss": 1.0})
        second = Journal(path, {"weights": "b"}, verbose=False)
        second.scored(Key("trial", (1,)), lambda: {"loss": 2.0})
        first.scored(Key("trial", (2,)), lambda: {"loss": 3.0})
        second.__exit__(Stopped, None, None)
    assert path.exists(), "it is the second one's now; the first one does not remove it"
    with Journal(path, {"weights": "b"}) as third:
        assert third.scored(Key("trial", (1,)), counted({})).metrics == {"loss": 2.0}
        assert third.scored(Key("trial", (2,)), counted({"loss": 4.0})).metrics == {"loss": 4.0}


def test_the_leftover_of_a_run_killed_while_it_wrote_a_new_file_goes_too(tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / ".epoch=1.jsonl.123.tmp").write_text("{")
    with Journal(folder / "epoch=1.jsonl", {}, folders=1) as journal:
        journal.scored(BASELINE, dict)
    assert not folder.exists()
    assert tmp_path.exists()


def test_people_are_told_why_a_search_does_not_go_on(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    leave_with_a_trial(path, {"settings": "x", "weights": "a"})
    Journal(path, {"settings": "x", "weights": "b"})
    assert "not the same: weights" in caplog.text
    caplog.clear()
    Journal(path, {"settings": "x", "weights": "a"})
    assert "2 evaluations are taken over" in caplog.text
    caplog.clear()
    Journal(path, {"settings": "x", "weights": "b"}, verbose=False)
    assert caplog.text == ""


# ------------------------------------------------------------------------------------------------------ the fingerprint


@dataclasses.dataclass
class Record:
    x: object


def test_equal_values_have_equal_digests():
    def values():
        tensor = torch.arange(6.0).reshape(2, 3)
        return [
            None, 1, 1.0, True, "a", b"a", (1, "a"), [1], {"a": [1]}, {3, "b", 2.5}, np.arange(3), np.float32(2),
            tensor, tensor.bfloat16(), tensor[:, ::2], tensor.to(torch.complex64).conj(), torch.tensor(1),
            torch.zeros(0), tensor.to_sparse(), tensor.expand(4, 2, 3), torch.float32, Record(tensor), AutoEncoder,
            object(), np.array([1, "a"], dtype=object), np.array("2020", dtype="M8"), torch.zeros(2, device="meta"),
        ]  # fmt: skip

    one, other = [digest(value) for value in values()], [digest(value) for value in values()]
    assert one == other
    assert len(set(one)) == len(one)


def test_a_digest_sees_what_changes_deep_inside_and_ends_where_data_hold_themselves():
    circle = [1]
    circle.append(circle)
    assert digest(circle) == digest(circle)
    for one, other in [
        ([["a", "b"], "c"], [["a"], "b", "c"]),
        (["ab", "c"], ["a", "bc"]),
        (Record({"a": torch.zeros(2)}), Record({"a": torch.tensor([0.0, 1e-30])})),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(4), torch.zeros(2, dtype=torch.float64)),
        (np.zeros(2, dtype="datetime64[s]"), np.ones(2, dtype="datetime64[s]")),
        (torch.tensor([1j]), torch.tensor([1j]).conj()),
    ]:
        assert digest(one) != digest(other)


def test_each_part_of_the_fingerprint_tells_what_changed():
    def parts(change=lambda module: None, kind=AutoEncoder, configuration=None, data=()):
        module = made(kind)
        change(module)
        return fingerprint(module, configuration or {"seed": 0}, data)

    class Other(AutoEncoder):
        pass

    plain = parts()
    assert plain == parts()

    def differ(found):
        return [part for part in plain if plain[part] != found[part]]

    assert differ(parts(lambda m: m.encoder[0].bias.data.add_(1))) == ["weights"]
    assert differ(parts(lambda m: m.steps_seen.add_(1))) == ["weights"]
    assert differ(parts(lambda m: m.save_hyperparameters({"beta": 2}))) == ["hyperparameters"]
    assert differ(parts(lambda m: m.encoder.insert(1, torch.nn.ReLU()))) == ["weights", "module"]
    assert differ(parts(kind=Other)) == ["module"]
    assert differ(parts(configuration={"seed": 1})) == ["settings"]
    assert differ(parts(configuration={"seed": 0, "search": RandomSearch(3)})) == ["settings"]
    assert differ(parts(data=[[torch.zeros(1)]])) == ["data"]
    assert digest(RandomSearch(3)) == digest(RandomSearch(3)) != digest(RandomSearch(4))
