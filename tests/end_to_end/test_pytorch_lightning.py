"""`pytorch_lightning` in place of `lightning.pytorch`: the oracle is the same script with the other library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("pytorch_lightning_script.py")
LIBRARIES = ("lightning.pytorch", "pytorch_lightning")
PARTS = ("fit", "dry_run", "without_training", "averaged", "displays", "mistakes", "command_line")


def begin(folder, library, *first, parts=()):
    folder.mkdir()
    environment = {**os.environ, "PARTS": " ".join(parts), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), library, str(folder), *first]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, folder):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script says with each library, that library being all of Lightning that the user imports."""
    root = tmp_path_factory.mktemp("libraries")
    running = {name: begin(root / name, name, name) for name in LIBRARIES}
    return {name: finish(process, root / name) for name, process in running.items()}


def shapes(state):
    return {name: shape for name, (shape, _) in state.items()}


@pytest.mark.parametrize("part", PARTS)
def test_both_libraries_do_the_same(found, part):
    ours, other = (found[name][part] for name in LIBRARIES)
    assert len(ours) == len(other) > 0
    for one, same in zip(ours, other, strict=True):
        assert one == same


def test_a_fit_prunes_the_module_and_its_average_and_resets_the_monitors(found):
    rounds, monitors, loggers, files, *_ = found["pytorch_lightning"]["fit"]
    facts, model, average = rounds
    assert facts[-1] is True
    assert shapes(model)["head.0.weight"][0] == facts[0]["head.0"][1] < facts[0]["head.0"][0]
    assert shapes(average) == shapes(model)
    assert monitors[-1] == ["epoch=3-step=12.ckpt"]  # better ones of the dense model are forgotten
    assert loggers[1:] == [True, ["table/version_0"]]  # the module sees its logger's folder in every trial
    assert files == ["report.html", "result.json", "trials.csv"]


def test_checkpoints_of_pruned_modules_are_resumed_tested_and_loaded(found):
    (_, model, _), _, _, _, resumed, tested, loaded, by_mixin, resized, recorded = found["pytorch_lightning"]["fit"]
    assert shapes(resumed[1]) == shapes(model)
    assert resumed[2:] == [5, 15]
    assert tested[0]["test_loss"] > 0
    assert loaded == by_mixin == model
    assert shapes(resized) == shapes(model)
    assert recorded


def test_the_librarys_own_exception_catches_mistakes(found):
    too_late, no_data, too_small, unknown, masking, is_callback, count = found["pytorch_lightning"]["mistakes"]
    assert too_late.startswith("epochs=9")
    assert no_data.startswith("train_dataloaders: None")
    assert too_small.startswith("target_sparsity=0.999")
    assert "'val_los'" in unknown
    assert masking.startswith("callbacks: ModelPruning")
    assert is_callback
    assert count == 1


def test_the_command_line_prunes_and_answers_what_was_meant(found):
    for facts, targets, seeds in (found["pytorch_lightning"]["command_line"][i : i + 3] for i in (0, 3)):
        assert facts[0][-1] is True
        assert targets == [[0.3]]
        assert seeds == [3]
    typo, refused = found["pytorch_lightning"]["command_line"][-2:]
    assert typo.endswith("did you mean '--softprune.target_sparsity'?")
    assert refused.startswith("lightning_class: <class 'torch.nn.modules.linear.Linear'> is not")


def test_classes_of_both_libraries_in_one_call_are_told_apart(found):
    trainer, datamodule, lightnings_own = found["pytorch_lightning"]["mixed"]
    assert trainer.startswith("trainer: Trainer comes from lightning.pytorch, and Classifier from pytorch_lightning")
    assert datamodule.startswith("datamodule: LightningDataModule comes from lightning.pytorch")
    assert "must be a `LightningModule`" in lightnings_own


def test_a_library_that_the_user_does_not_import_is_not_imported(found):
    assert found["lightning.pytorch"]["loaded"] == []
    assert found["pytorch_lightning"]["loaded"] == ["lightning_fabric", "pytorch_lightning"]


@pytest.mark.parametrize(
    ("library", "first"),
    [
        ("pytorch_lightning", ["pytorch_lightning", "lightning.pytorch"]),
        ("lightning.pytorch", ["lightning_softprune", "pytorch_lightning"]),
    ],
)
def test_the_order_of_imports_does_not_matter(found, tmp_path, library, first):
    parts = ("mistakes", "command_line")
    folder = tmp_path / "run"
    same = finish(begin(folder, library, *first, parts=parts), folder)
    assert {part: same[part] for part in parts} == {part: found[library][part] for part in parts}
