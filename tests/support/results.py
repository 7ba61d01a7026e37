"""Results of rounds that never were: one to begin with, and some that are hard to show."""

from __future__ import annotations

import csv
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_softprune.results import Costs, GroupResult, Healing, LeftOut, PruningResult, Sensitivity, Trial

INFINITE = (math.inf, 1e300, -1e300, 1e-300)
EVIL = "<script>alert(\"x\")</script> & 'q' é漢字 \x00\ud800 </title></style></svg> " + "x" * 200


def make_trial(sparsity: float = 0.7, score: float = 19.7, **changes: Any) -> Trial:
    """An ordinary trial."""
    values = {"coefficients": (0.7, 0.25), "metrics": {"val_psnr": score}, "feasible": True, "seconds": 0.08}
    return Trial(**{**values, "sparsity": sparsity, "score": score, **changes})


def make_result(**changes: Any) -> PruningResult:
    """An ordinary round; what is given replaces its fields."""
    values: dict[str, Any] = {
        "epoch": 10,
        "sparsity": 0.7016,
        "target_sparsity": 0.7,
        "score_before": 19.9712,
        "score_after": 19.7089,
        "metrics_before": {"val_psnr": 19.9712, "val_loss": 0.0101},
        "metrics_after": {"val_psnr": 19.7089, "val_loss": 0.0107},
        "costs_before": Costs(params=1_079_344, macs=1_076_224),
        "costs_after": Costs(params=322_102, macs=320_000),
        "groups": (
            GroupResult("encoder.0", "encoder", "intra", 512, 154, 0.7),
            GroupResult("encoder.4", "encoder", "inter", 32, 24, 0.25),
        ),
        "evaluations": 41,
        "seconds": 3.21,
        "strategy": "GradientSearch",
        "stop_reason": "patience",
        "applied": True,
        "trials": (make_trial(), make_trial(0.68, 19.6, feasible=False)),
        "monitor": "val_psnr",
        "mode": "max",
        "sensitivity": (Sensitivity("encoder.0", (0.0, 0.5), (19.97, 19.9)),),
    }
    return PruningResult(**{**values, **changes})


def full_result(**changes: Any) -> PruningResult:
    """A round in which every field says something."""
    trials = (
        Trial((0.0, 0.0), 0.35, 19.9, {"val_psnr": 19.9, "val_loss": 0.111}, False, 0.5),
        Trial((0.7, 0.25), 0.7, 19.7, {"val_psnr": 19.7, "val_loss": 0.123}, True, 0.5),
        Trial((0.1, 1 / 3), 0.69, 19.5, {"val_psnr": 19.5}, True, 0.25),
        Trial((0.9, 0.0), 0.8, math.nan, {"val_psnr": math.nan, "val_loss": math.inf}, False, 0.125),
    )
    values: dict[str, Any] = {
        "epoch": 4,
        "sparsity": 0.7016,
        "target_sparsity": 0.7,
        "tolerance": 0.0125,
        "score_before": 19.9712,
        "score_after": 19.7089,
        "metrics_before": {"val_psnr": 19.9712, "val_loss": 0.0101},
        "metrics_after": {"val_psnr": 19.7089, "val_loss": 0.0107},
        "costs_before": Costs(1_079_344, 2_076_224),
        "costs_after": Costs(322_102, 720_000),
        "groups": (
            GroupResult("encoder.0", "encoder", "intra", 512, 154, 0.6993, 0.05, 0.85, 4321, 8642),
            GroupResult("encoder.4", "encoder+decoder", "inter", 32, 24, 0.25),
        ),
        "evaluations": 41,
        "seconds": 3.21,
        "strategy": "GradientSearch",
        "stop_reason": "patience",
        "applied": True,
        "trials": trials,
        "monitor": "val_psnr",
        "mode": "max",
        "sensitivity": (
            Sensitivity("encoder.0", (0.1, 0.5, 0.9), (19.95, 19.91, 4.5)),
            Sensitivity("encoder.4", (0.1, 0.5), (19.6, math.nan)),
        ),
        "chosen": 1,
        "limits": {"macs": 0.5, "latency": 0.75},
        "shares": {"params": 0.298, "macs": 0.3214, "latency": 0.8},
        "constraints": ("val_psnr >= 19.5", "val_loss < 0.001"),
        "latency_before": 0.00123,
        "latency_after": 0.00071,
        "left_out": (LeftOut("decoder.4", "decoder", 64, "its outputs are the module's outputs"),),
        "configuration": {"monitor": "val_psnr", "round_to": "8"},
        "versions": {"torch": "2.13.0"},
    }
    return make_result(**{**values, **changes})


def evil_result() -> PruningResult:
    result = full_result()
    names = [f"{EVIL}{number}" for number in range(2)]
    return replace(
        result,
        groups=tuple(replace(g, name=n, component=n, kind=n) for g, n in zip(result.groups, names, strict=True)),
        trials=tuple(replace(trial, metrics={EVIL: 1.0}) for trial in result.trials),
        metrics_before={EVIL: 1.0},
        metrics_after={EVIL: math.nan},
        strategy=EVIL,
        stop_reason=EVIL,
        reason=EVIL,
        applied=False,
        outcome="",
        monitor=EVIL,
        cost=EVIL,
        sensitivity=(Sensitivity(names[0], (0.0, 1.0), (1.0, math.nan)),),
        limits={EVIL: 0.5},
        constraints=(EVIL, f"{EVIL} >= 3"),
        left_out=(LeftOut(EVIL, EVIL, 1, EVIL),),
        configuration={EVIL: EVIL},
        versions={EVIL: EVIL},
    )


def large_result(trials: int, groups: int) -> PruningResult:
    """As many as asked for, some of them without a score."""
    numbers = random.Random(0)
    return full_result(
        trials=tuple(
            Trial(
                tuple(numbers.random() for _ in range(groups)),
                numbers.random(),
                math.nan if index % 97 == 0 else numbers.gauss(20, 1),
                {"val_psnr": 20.0, "val_loss": numbers.random()},
                index % 3 == 0,
                numbers.random(),
            )
            for index in range(trials)
        ),
        groups=tuple(
            GroupResult(f"backbone.{index}.conv", f"stage{index % 9}", "intra", 512, 100, 0.8)
            for index in range(groups)
        ),
        sensitivity=tuple(
            Sensitivity(f"backbone.{index}.conv", tuple(k / 10 for k in range(11)), tuple(20.0 - k for k in range(11)))
            for index in range(groups)
        ),
    )


RESULTS = {
    "ordinary": full_result(),
    "not applied": full_result(applied=False, reason="no trial is feasible"),
    "no target": full_result(target_sparsity=None),
    "mode min": full_result(mode="min"),
    "no trials": full_result(trials=(), chosen=None),
    "one trial": full_result(trials=full_result().trials[1:2], chosen=0),
    "nothing": full_result(
        trials=(), groups=(), sensitivity=(), left_out=(), limits={}, constraints=(), configuration={}, versions={},
        metrics_before={}, metrics_after={}, chosen=None, latency_before=None, latency_after=None,
    ),
    "nan everywhere": full_result(
        score_before=math.nan, score_after=math.nan, sparsity=math.nan, metrics_after={"val_psnr": math.nan},
        trials=tuple(replace(t, score=math.nan, sparsity=math.nan) for t in full_result().trials),
        sensitivity=(Sensitivity("encoder.0", (0.0, 1.0), (math.nan, math.nan)),),
    ),
    "infinite": full_result(
        score_before=math.inf,
        score_after=-math.inf,
        trials=tuple(replace(t, score=s) for t, s in zip(full_result().trials, INFINITE, strict=True)),
    ),
    "all scores the same": full_result(
        score_before=1.0, score_after=1.0, trials=tuple(replace(t, score=1.0) for t in full_result().trials)
    ),
    "all scores zero": full_result(
        score_before=0.0, score_after=0.0, trials=tuple(replace(t, score=0.0) for t in full_result().trials)
    ),
    "absurd": full_result(
        target_sparsity=math.nan,
        trials=tuple(replace(t, sparsity=0.7 + k * 1e-16, score=1e149 * k) for k, t in enumerate(full_result().trials)),
        sensitivity=(Sensitivity("encoder.0", (0.0, math.nan, 1.0), (1.0, 2.0, -1e149)),),
    ),
    "chosen out of range": full_result(chosen=99),
    "sensitivity of an unknown group": full_result(sensitivity=(Sensitivity("gone", (0.5,), (1.0,)),)),
    "healed": full_result(score_compensated=19.4, healing=Healing(19.7089, True, (0.5, 0.25, 0.3, 0.125))),
    "healed for nothing": full_result(score_compensated=19.7089, healing=Healing(19.3, False, (math.nan,))),
    "no channels": full_result(groups=(GroupResult("a", "b", "intra", 0, 0, math.nan), full_result().groups[1])),
    "evil": evil_result(),
    "many trials": large_result(5000, 5),
    "many groups": large_result(300, 200),
}  # fmt: skip


def recorded_result(names: tuple[str, str] = ("encoder.0", "encoder.4"), **changes: Any) -> PruningResult:
    """A round whose trials lack a metric here and there; no target."""
    trials = (
        Trial((0.7, 0.25), 0.7, 19.7, {"val_psnr": 19.7, "val_loss": 0.1}, True, 0.5),
        Trial((0.1, 1 / 3), 0.6, 19.5, {"val_psnr": 19.5}, False, 0.25),
        Trial((0.9, 0.0), 0.8, math.nan, {"val_psnr": math.nan, "val_loss": math.inf}, False, 0.125),
    )
    values: dict[str, Any] = {
        "epoch": 4,
        "sparsity": 0.7,
        "target_sparsity": None,
        "score_before": 20.0,
        "score_after": 19.7,
        "metrics_before": {"val_psnr": 20.0},
        "metrics_after": {"val_psnr": 19.7},
        "costs_before": Costs(1000, 2000),
        "costs_after": Costs(300, 700),
        "groups": (
            GroupResult(names[0], "encoder", "intra", 512, 154, 0.7),
            GroupResult(names[1], "encoder", "inter", 32, 24, 0.25),
        ),
        "evaluations": 4,
        "seconds": 1.0,
        "strategy": "RandomSearch",
        "stop_reason": "exhausted",
        "trials": trials,
        "sensitivity": (),
    }
    return make_result(**{**values, **changes})


def printed_result(**changes: Any) -> PruningResult:
    """A round for the terminal: markup in a name, a group left whole, no trials."""
    values: dict[str, Any] = {
        "score_before": 19.97,
        "score_after": 19.71,
        "metrics_before": {},
        "metrics_after": {},
        "costs_before": Costs(params=1_079_344, macs=2_000_000),
        "costs_after": Costs(params=322_102, macs=500_000),
        "groups": (
            GroupResult("encoder[red].0", "encoder", "intra", 512, 154, 0.6993),
            GroupResult("encoder.4", "encoder", "inter", 32, 32, 0.0),
        ),
        "seconds": 3.2,
        "trials": (),
        "sensitivity": (),
    }
    return make_result(**{**values, **changes})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, by column."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
