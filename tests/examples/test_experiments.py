import json

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib")


def ran(script, folder, *options):
    """The rows that a quick run has written, by name."""
    assert script.main(["--quick", "--output", str(folder / "out"), "--cache", str(folder / "cache"), *options]) == 0
    return json.loads((folder / "out" / "results.json").read_text())["rows"]


def test_the_agent_is_pruned_with_its_latent_and_its_targets_by_what_it_earns(experiment, tmp_path, monkeypatch):
    for needed in ("gymnasium", "pygame", "PIL"):
        pytest.importorskip(needed)
    script, agents = experiment("control_agent"), experiment("pendulum_agent")
    monkeypatch.setattr(agents, "STEPS", 12)
    quick = {"search": script.UniformBaseline(), "granularity": "component"}
    methods = {"uniform, no compensation": script.METHODS["uniform, no compensation"], "default": quick}
    monkeypatch.setattr(script, "METHODS", methods)
    rows = ran(script, tmp_path)
    assert list(rows) == ["dense", *(f"{name} 50%" for name in script.METHODS)]
    for row in list(rows.values())[1:]:
        assert row["applied"]
        assert row["sparsity"] == pytest.approx(0.5, abs=0.021)
        assert set(row["coefficients"]) == {"latent", *script.PARTS}
        assert row["coefficients"]["latent"] > 0
        assert row["environment"]["packages"]["gymnasium"]
    assert (tmp_path / "out" / "swing_up.gif").stat().st_size > 0
    monkeypatch.setattr(script, "pruned", None)
    assert ran(script, tmp_path) == rows  # nothing is computed again


def test_the_promise_is_measured_on_images_that_no_search_saw(experiment, tmp_path, monkeypatch):
    script = experiment("promise")
    monkeypatch.setattr(script, "load_images", lambda *_: experiment("shared.mnist").load_images(None, 100, 512))
    rows = ran(script, tmp_path, "--networks", "MLP", "U-Net")
    for row in rows.values():
        before, after = row["parameters"]
        assert 1 - after / before == pytest.approx(row["sparsity"], abs=1e-6)
        assert row["sparsity"] >= 0.7
        assert row["round_in_epochs"] == pytest.approx(row["round_seconds"] / row["epoch_seconds"])
    assert script.misses({"sparsity": 0.7, "lost": 0.01, "round_in_epochs": 0.5}) == []
    assert script.misses({"sparsity": 0.69, "lost": 0.011, "round_in_epochs": 0.6}) == [
        "69.0% removed",
        "1.1% lost",
        "0.60 epochs",
    ]
    assert "of 2 keep the whole promise" in (tmp_path / "out" / "table.md").read_text()


def test_the_baselines_reach_equal_counts_and_are_tested_on_what_no_search_saw(experiment, tmp_path, monkeypatch):
    for needed in ("torch_pruning", "sklearn"):
        pytest.importorskip(needed)
    script = experiment("baselines")
    monkeypatch.setattr(script, "load_images", lambda *_: experiment("shared.mnist").load_images(None, 100, 512))
    options = ["--networks", "residual", "--methods", "torch-pruning, global", "folding + REPAIR", "ours", "--finetune"]
    assert script.main(["--quick", "--output", str(tmp_path), "--cache", str(tmp_path), *options]) == 0
    rows = json.loads((tmp_path / "results-residual.json").read_text())["rows"]
    assert [row["method"] for row in rows.values() if row["epochs"] == 0] == ["dense", options[3], options[4], "ours"]
    for row in list(rows.values())[1:]:
        before, after = row["parameters"]
        assert 1 - after / before == row["sparsity"] == pytest.approx(0.36, abs=0.01)
        assert 0 <= row["accuracy"] <= 1
    assert "| ours | " in (tmp_path / "table.md").read_text()
