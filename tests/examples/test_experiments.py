import json
from pathlib import Path

import pytest
import torch

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


def test_autoencoders_are_pruned_by_what_a_case_says_and_judged_on_test_images(experiment, tmp_path, monkeypatch):
    script = experiment("mnist_autoencoders")
    images = experiment("shared.mnist").load_images(None, 100, 256)
    every = list(script.cases(["MLP", "convolutional"], [0, 1], script.SPARSITIES))
    # seven methods without compensation and nine with; an epoch more for all but one at the first seed's 70 %
    assert len(set(every)) == 2 * (2 * 4 + 1) * (7 + 9) - 4
    assert {case.target for case in every[:32]} == {0.7}
    first = every[0]._replace(method="uniform")
    none = first._replace(compensation="none")
    chosen = [first, none, none._replace(epochs=1), none._replace(method="random")]
    monkeypatch.setattr(script, "load_images", lambda *_: images)
    monkeypatch.setattr(script, "DRAWS", 2)
    monkeypatch.setattr(script, "METHODS", {name: script.METHODS[name] for name in ("uniform", "random")})
    monkeypatch.setattr(script, "cases", lambda *_: chosen)
    rows = ran(script, tmp_path)
    assert list(rows) == ["MLP, seed 0, dense", *(case.name for case in chosen)]
    for case in (first, none, chosen[3]):
        assert rows[case.name]["sparsity"] == pytest.approx(0.7, abs=script.TOLERANCE + 1e-6)
    drawn = rows[chosen[3].name]
    assert drawn["psnr"] == pytest.approx(sum(drawn["psnrs"]) / 2)

    model = torch.load(tmp_path / "cache" / f"{none.name}.pt", weights_only=False).eval()
    with torch.no_grad():
        error = (model(images.test[0]) - images.test[0]).square().mean()
    assert rows[none.name]["psnr"] == pytest.approx(-10 * error.log10().item(), abs=1e-4)
    assert rows[chosen[2].name]["psnr"] > rows[none.name]["psnr"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "table.md", "figure.png", "pictures.png", "latents.png"
    }  # fmt: skip


def test_latent_codes_are_drawn_on_their_principal_components_and_turned_alike(experiment):
    figures = experiment("autoencoder_figures")
    codes = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0])
    spread = figures.projected(torch.cat([codes, torch.zeros(50, 3)], dim=1))
    flat = codes - codes.mean(0)
    assert torch.allclose(spread @ spread.T, flat @ flat.T, atol=1e-4)  # the same distances and angles
    turned = figures.projected(codes @ torch.tensor([[0.0, -1.0], [1.0, 0.0]]), spread)
    assert torch.allclose(turned, spread, atol=1e-4)


def test_the_figures_of_the_readme_are_those_of_the_results(experiment):
    figures = experiment("autoencoder_figures")
    folder = Path(figures.__file__).parent
    rows = json.loads((folder / "results" / "mnist_autoencoders" / "results.json").read_text())["rows"]
    readme = (folder.parents[1] / "README.md").read_text(encoding="utf-8")
    for network in ("MLP", "convolutional"):
        at = {"network": network, "seed": 0}
        kinds = (
            {"method": "dense"},
            {"method": "uniform", "compensation": "none", "target": 0.7},
            {"method": "gradient from curves (default)", "compensation": "least_squares", "target": 0.7},
            {"method": "default, reconstruction, 64 batches", "target": 0.7},
        )
        values = [f"{figures.average(rows, 'psnr', **at, **kind):.2f} dB" for kind in kinds]
        assert f"| {network} autoencoder, PSNR | {' | '.join(values)} |" in readme


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
