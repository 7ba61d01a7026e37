"""Two processes, gloo, on the CPU: one plan, one set of weights."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed"
    ),
]
SCRIPT = Path(__file__).with_name("ddp_script.py")


def start(fits):
    """Run the script; its exit status and what it said."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(fits)],
        capture_output=True, text=True, timeout=200, env=environment, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr[-3000:]


def fit_in(folder, **options):
    folder.mkdir(exist_ok=True)
    return {"out": str(folder), "sync_dist": True, "monitor": "val_loss", "compensation": "least_squares", **options}


def run(*fits):
    """What each rank saw of each fit."""
    code, errors = start(fits)
    assert code == 0, errors
    return [[json.loads(Path(fit["out"], f"rank{rank}.json").read_text()) for rank in (0, 1)] for fit in fits]


FITS = {
    "plain": {},
    "unsynchronised metric": {"sync_dist": False, "compensation": "bias"},
    "bucket views": {"monitor": "val_acc", "ddp": {"gradient_as_bucket_view": True}},
    "unused parameters": {"unused": True, "ddp": {"find_unused_parameters": True}},
    "static graph": {"ddp": {"static_graph": True}},
    "convolutions": {"convolutions": True},
    "healing": {"convolutions": True, "compensation": "none", "pruning": {"target_sparsity": 0.5, "healing": 24}},
    "report and logger": {"report": True},
    "highest sparsity": {"pruning": {"target_sparsity": None, "constraints": ["val_loss <= 1.1", "val_acc >= 0.2"]}},
    "budgets": {
        "sync_dist": False,
        "pruning": {"cost": "macs", "limits": {"params": 0.6, "latency": 0.9}, "on_violation": "prune"},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fits")


@pytest.fixture(scope="module")
def fits(folder):
    """Kind of fit -> what each rank saw. One start for all: it takes longer than they do."""
    kinds = {**FITS, "optuna": {"storage": f"sqlite:///{folder}/studies.db"}}
    return dict(zip(kinds, run(*(fit_in(folder / kind, **options) for kind, options in kinds.items())), strict=True))


@pytest.mark.parametrize("kind", FITS)
def test_both_ranks_have_one_plan_and_the_same_weights_after_every_step(fits, kind):
    first, second = fits[kind]
    assert first["applied"] == second["applied"] == [True]
    assert first["healed"] == second["healed"] == [kind == "healing"]
    assert first["removed"] == second["removed"]
    assert first["shapes"] == second["shapes"]
    assert first["shapes"][0][0] < 16
    assert first["scores"] == second["scores"]
    assert first["digests"] == second["digests"]
    assert len(first["digests"]) == 18


def test_a_search_with_optuna_is_the_same_on_both_ranks_and_recorded_once(fits, folder):
    storage = f"sqlite:///{folder}/studies.db"
    first, second = fits["optuna"]
    assert first["applied"] == second["applied"] == [True]
    assert first["digests"] == second["digests"]
    [study] = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert [trial.value for trial in trials] == first["scores"][:4] == second["scores"][:4]  # the fifth is the refit
    assert len(trials) == 4


def test_rank_zero_alone_logs_and_writes_the_report(fits, folder):
    kind = "report and logger"
    assert fits[kind][0]["applied"] == [True]
    (version,) = (folder / kind / "logs").iterdir()
    assert (version / "softprune" / "epoch=1" / "result.json").is_file()
    assert len(list((folder / kind).rglob("result.json"))) == 1
    with open(version / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["softprune/sparsity"]]
    assert [row["step"] for row in rows] == ["6"]


def test_pruning_equals_a_masked_run_on_the_same_two_ranks(tmp_path):
    pruned, masked = run(
        fit_in(tmp_path / "pruned", compensation="none"), fit_in(tmp_path / "masked", mask=str(tmp_path / "pruned"))
    )
    for rank in (0, 1):
        assert pruned[rank]["applied"] == [True]
        assert masked[rank]["applied"] == []
        assert len(pruned[rank]["losses"]) == len(masked[rank]["losses"]) == 18
        assert pruned[rank]["losses"] == pytest.approx(masked[rank]["losses"], abs=1e-5)
    assert pruned[0]["validation"]["val_loss"] == pytest.approx(masked[0]["validation"]["val_loss"], abs=1e-5)


def test_a_run_resumed_before_or_after_the_round_equals_the_uninterrupted_one(tmp_path):
    files = tmp_path / "files"
    whole, before, after = run(
        fit_in(tmp_path / "whole", files=str(files)),
        fit_in(tmp_path / "before", resume=str(files / "epoch=0.ckpt")),
        fit_in(tmp_path / "after", resume=str(files / "epoch=1.ckpt")),
    )
    for rank in (0, 1):
        for resumed, steps in ((before, 12), (after, 6)):
            assert len(whole[rank]["losses"]) == 18
            assert resumed[rank]["losses"] == pytest.approx(whole[rank]["losses"][-steps:], abs=1e-6)
            assert resumed[rank]["digests"] == pytest.approx(whole[rank]["digests"][-steps:], abs=1e-4)
            for name in ("shapes", "groups", "scores", "applied"):
                assert resumed[rank][name] == whole[rank][name]
        assert before[rank]["removed"] == whole[rank]["removed"]
        assert before[rank]["passes"] == whole[rank]["passes"] > 4
        assert after[rank]["passes"] == 0, "the round is not repeated"
    assert before[0]["digests"] == before[1]["digests"]
    assert after[0]["digests"] == after[1]["digests"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_search_killed_on_both_ranks_goes_on_and_ends_as_one_that_was_not(tmp_path):
    code, errors = start([fit_in(tmp_path / "killed", killed_in=4)])
    assert code == -signal.SIGKILL, errors
    assert [(tmp_path / "killed" / f"passes{rank}").read_text().count("pass") for rank in (0, 1)] == [3, 3]
    assert list((tmp_path / "killed").rglob("epoch=1.jsonl"))
    continued, whole = run(fit_in(tmp_path / "killed"), fit_in(tmp_path / "whole"))
    for rank in (0, 1):
        for name in ("removed", "shapes", "scores", "losses", "digests"):
            assert continued[rank][name] == whole[rank][name]
        again = "the baseline is scored once more, and so is the chosen plan, whose score was read"
        assert continued[rank]["passes"] == whole[rank]["passes"] + 2, again
    assert not list((tmp_path / "killed").rglob("*.jsonl"))
