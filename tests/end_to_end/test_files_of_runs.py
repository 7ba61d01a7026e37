"""Runs beside each other: whose files lie where, and what they say once a fit is over."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_softprune import PruningResult, RandomSearch, prune
from support.modules import fit, loaders, made, softpruning, trainer_of

pytestmark = pytest.mark.slow


def searching(**arguments):
    return softpruning(report=True, search=RandomSearch(num_candidates=2), **arguments)


def result_in(folder):
    return PruningResult.from_dict(json.loads((folder / "result.json").read_text()))


def test_no_run_overwrites_anothers_files(tmp_path):
    for _ in range(2):
        fit(tmp_path, made(), searching(epochs=[1, 2]), max_epochs=3)
    dry = searching(epochs=[1, 2])
    for _ in range(2):
        trainer_of(tmp_path, dry).validate(made(), loaders(made())["val_dataloaders"], verbose=False)
    root = tmp_path / "softprune"
    found = sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("result.json"))
    runs = ["version_1/epoch=1", "version_1/epoch=2", "version_2/epoch=1", "version_3/epoch=1"]
    assert found == ["epoch=1", "epoch=2", *runs]
    assert [result_in(root / name).is_dry_run for name in found] == [False] * 4 + [True] * 2


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_a_fit_that_goes_on_keeps_its_own_files(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, made(), searching(), checkpoints, max_epochs=2, enable_checkpointing=True)
    again = trainer_of(tmp_path, searching(epochs=[1, 2]), max_epochs=3)
    again.fit(made(seed=3), **loaders(made()), ckpt_path=tmp_path / "epoch=1.ckpt")
    root = tmp_path / "softprune"
    assert sorted(path.parent.name for path in root.rglob("result.json")) == ["epoch=1", "epoch=2"]
    assert result_in(root / "epoch=1").origin.identity == result_in(root / "epoch=2").origin.identity


def test_one_shot_prunes_in_one_folder_leave_a_report_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        result = prune(made(), **loaders(made()), search=RandomSearch(num_candidates=1), verbose=False)
        folder = tmp_path / "softprune" / (f"version_{number}" if number else "") / "epoch=0"
        assert result_in(folder) == result
        assert result.score_finetuned is None  # nothing was trained
        assert (result.origin.model, result.device.split()[0]) == ("AutoEncoder", "cpu")


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_the_end_of_the_fit_tells_the_score_after_fine_tuning_everywhere(tmp_path, capsys):
    callback, module = searching(epochs=[1, 2], verbose=True), made()
    kept = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    logger = CSVLogger(tmp_path)
    trainer = fit(tmp_path, module, callback, kept, logger=logger, max_epochs=4, enable_checkpointing=True)
    first, last = callback.results
    score = float(trainer.callback_metrics["val_loss"])
    assert first.score_finetuned is None
    assert last.score_finetuned == pytest.approx(score, abs=1e-7)
    assert score != pytest.approx(last.score_after, abs=1e-7)
    printed = capsys.readouterr().out
    line = f"val_loss: dense {first.score_before:.4g}, pruned {last.score_after:.4g}, after fine-tuning {score:.4g}"
    assert line in printed
    folder = next(tmp_path.rglob("epoch=2"))
    assert (result_in(folder), result_in(folder).score_finetuned) == (last, last.score_finetuned)
    assert "After fine-tuning" in (folder / "report.html").read_text()
    rows = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    place = rows[0].split(",").index("softprune/score_finetuned")
    assert [row.split(",")[place] for row in rows[1:] if row.split(",")[place]] == [str(last.score_finetuned)]
    again = searching(epochs=[1, 2])
    path = tmp_path / "kept" / "epoch=3.ckpt"  # the last one, which was saved before the fit ended
    trainer_of(tmp_path, again).validate(made(), loaders(made())["val_dataloaders"], ckpt_path=path, verbose=False)
    assert [result.score_finetuned for result in again.results] == [None, last.score_finetuned]
    written = torch.load(path, weights_only=True)["softprune"]["results"]
    assert [result["score_finetuned"] for result in written] == [None, last.score_finetuned]


def test_without_training_after_the_round_there_is_no_score_after_fine_tuning(tmp_path):
    callback = searching(finetune_epochs=0)
    fit(tmp_path, made(), callback)
    assert callback.results[0].applied
    assert callback.results[0].score_finetuned is None


def test_latency_is_measured_with_the_batch_that_was_asked_for(tmp_path):
    callback = searching(latency_batch=7)
    fit(tmp_path, made(), callback)
    [result] = callback.results
    assert result.latency_batch == 7
    assert {layer.name for layer in result.layers} >= {"encoder.0", "decoder.2"}
    sizes = {name: tuple(parameter.shape) for name, parameter in made().named_parameters()}
    for layer in result.layers:
        assert layer.before == {name: sizes[f"{layer.name}.{name}"] for name in layer.before}
