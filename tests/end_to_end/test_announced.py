"""A round says what it is about to do, and what its phases took."""

import re
import time

import pytest
from torch.utils.data import DataLoader

from lightning_softprune import RandomSearch, SensitivitySearch
from support.modules import fit, loaders, made, softpruning, vectors


def test_a_round_announces_groups_coefficients_evaluations_and_time(tmp_path, capsys):
    callback = softpruning(search=SensitivitySearch(), verbose=True, healing=2)
    fit(tmp_path, made(), callback)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "evaluations, about" in line]
    groups = len(callback.results[0].groups)
    assert line.startswith(f"SoftPruning: {groups} groups, {groups} coefficients, up to {groups + 8} evaluations")
    assert re.search(r" s; then healing on 2 batches, about [\d.e-]+ s$", line)


def test_the_result_knows_what_the_phases_took(tmp_path, monkeypatch):
    callback, module = softpruning(), made()
    steps = _clock_of_steps(module, monkeypatch)
    fit(tmp_path, module, callback)
    result = callback.results[0]
    assert list(result.phases) == ["baseline", "tracing", "measuring", "searching", "timing", "refitting"]
    assert result.phases["baseline"] == result.phases["searching"] == 3.0  # the batches of a validation pass
    assert sum(result.phases.values()) == result.seconds < len(steps)


def test_choosing_a_part_and_finalists_are_announced_and_phases_of_their_own(tmp_path, monkeypatch, capsys):
    data = loaders(made())
    data["val_dataloaders"] = DataLoader(vectors(4000, 2), 50)
    arguments = {"search": SensitivitySearch(), "search_batches": 20, "limits": {"latency": 1.0}}
    callback, module = softpruning(**arguments, verbose=True), made()
    steps = _clock_of_steps(module, monkeypatch)
    fit(tmp_path, module, callback, data=data)
    result = callback.results[0]
    names = ["baseline", "tracing", "measuring", "choosing a part", "searching", "finalists", "timing", "refitting"]
    assert list(result.phases) == names
    finals = [trial for trial in result.trials if trial.share == 1.0]
    assert result.phases["baseline"] == 80.0
    assert result.phases["finalists"] == 80.0 * (len(finals) - 1)  # one is the plan as it is committed
    assert result.phases["searching"] == 20.0 * (len(result.trials) - len(finals))
    assert result.phases["choosing a part"] == 20.0
    assert sum(result.phases.values()) == result.seconds < len(steps)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "evaluations and " in line]
    planned = int(re.search(r"up to (\d+) evaluations and 5 finalists on all data, about ", line)[1])
    assert float(re.search(r"about ([\d.e+]+) s", line)[1]) == pytest.approx(20.0 * planned + 80.0 * 6 + 4, rel=0.05)


def test_a_log_hears_every_half_minute_of_the_phases_and_how_long_the_rest_may_take(tmp_path, monkeypatch, capsys):
    data = loaders(made())
    data["val_dataloaders"] = DataLoader(vectors(80, 2), 8)
    callback, module = softpruning(search=RandomSearch(num_candidates=9), verbose=True), made()
    steps = _clock_of_steps(module, monkeypatch, seconds=10.0)
    fit(tmp_path, module, callback, data=data)
    result, lines = callback.results[0], capsys.readouterr().out.splitlines()
    said = [re.fullmatch(r"SoftPruning, ([a-z ]+): (\d+) s since the round began", line) for line in lines]
    said = [(match[1], int(match[2])) for match in said if match]
    assert {name for name, _ in said} == {"baseline", "tracing", "timing", "refitting"}
    assert [passed for name, passed in said if name == "baseline"] == [30, 60, 90]
    announced = next(line for line in lines if "9 evaluations, about" in line)
    rest = sum(result.phases[name] for name in ("searching", "timing", "refitting"))
    assert float(re.search(r"about ([\d.e+]+) s", announced)[1]) == pytest.approx(rest, rel=0.05)
    assert len(steps) * 10 > result.seconds


def _clock_of_steps(module, monkeypatch, seconds=1.0):
    """Let time pass by so many seconds whenever a module looks at a validation batch, and not else."""
    steps, plain = [], module.validation_step

    def counted(batch, batch_idx):
        steps.append(batch_idx)
        return plain(batch, batch_idx)

    module.validation_step = counted
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: seconds * len(steps))
    return steps
