"""A round says what it is about to do, and what its phases took."""

import re
import time

from lightning_softprune import SensitivitySearch
from support.modules import fit, made, softpruning


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


def _clock_of_steps(module, monkeypatch):
    """Let time pass by a second whenever a module looks at a validation batch, and not else."""
    steps, plain = [], module.validation_step

    def counted(batch, batch_idx):
        steps.append(batch_idx)
        return plain(batch, batch_idx)

    module.validation_step = counted
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: float(len(steps)))
    return steps
