"""A round says what it is about to do, and what its phases took."""

import re

from lightning_softprune import SensitivitySearch
from support.modules import fit, made, softpruning


def test_a_round_announces_groups_coefficients_evaluations_and_time(tmp_path, capsys):
    callback = softpruning(search=SensitivitySearch(), verbose=True, healing=2)
    fit(tmp_path, made(), callback)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "evaluations, about" in line]
    groups = len(callback.results[0].groups)
    assert line.startswith(f"SoftPruning: {groups} groups, {groups} coefficients, up to {3 * groups + 8} evaluations")
    assert re.search(r" s; then healing on 2 batches, about [\d.e-]+ s$", line)


def test_the_result_knows_what_the_phases_took(tmp_path):
    callback = softpruning()
    fit(tmp_path, made(), callback)
    result = callback.results[0]
    assert list(result.phases) == ["baseline", "tracing", "measuring", "searching", "timing", "refitting"]
    assert 0.5 * result.seconds < sum(result.phases.values()) <= result.seconds
