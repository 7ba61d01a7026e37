"""Two processes, gloo, on the CPU: one plan, one set of weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed"
)
SCRIPT = Path(__file__).with_name("ddp_script.py")


def run(folder, **options):
    folder.mkdir()
    options = {"out": str(folder), "sync_dist": True, "monitor": "val_loss", "compensation": "least_squares", **options}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(options)],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sync_dist": False, "compensation": "bias"},
        {"monitor": "val_acc", "ddp": {"gradient_as_bucket_view": True}},
        {"unused": True, "ddp": {"find_unused_parameters": True}},
        {"ddp": {"static_graph": True}},
    ],
    ids=["plain", "unsynchronised metric", "bucket views", "unused parameters", "static graph"],
)
def test_both_ranks_have_one_plan_and_the_same_weights_after_every_step(tmp_path, options):
    first, second = run(tmp_path / "run", **options)
    assert first["applied"] == second["applied"] == [True]
    assert first["removed"] == second["removed"]
    assert first["shapes"] == second["shapes"]
    assert first["shapes"][0][0] < 16
    assert first["scores"] == second["scores"]
    assert first["digests"] == second["digests"]
    assert len(first["digests"]) == 18


def test_a_search_with_optuna_is_the_same_on_both_ranks_and_recorded_once(tmp_path):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/studies.db"
    first, second = run(tmp_path / "run", storage=storage)
    assert first["applied"] == second["applied"] == [True]
    assert first["digests"] == second["digests"]
    [study] = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert [trial.value for trial in trials] == first["scores"][:4] == second["scores"][:4]  # the fifth is the refit
    assert len(trials) == 4


def test_pruning_equals_a_masked_run_on_the_same_two_ranks(tmp_path):
    pruned = run(tmp_path / "pruned", compensation="none")
    masked = run(tmp_path / "masked", removed=pruned[0]["removed"])
    for rank in (0, 1):
        assert len(pruned[rank]["losses"]) == len(masked[rank]["losses"]) == 18
        assert pruned[rank]["losses"] == pytest.approx(masked[rank]["losses"], abs=1e-5)
    assert pruned[0]["validation"]["val_loss"] == pytest.approx(masked[0]["validation"]["val_loss"], abs=1e-5)
