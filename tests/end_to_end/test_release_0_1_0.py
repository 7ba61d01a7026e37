"""What release 0.1.0 has left on disk is understood: a checkpoint of a pruned network, a journal of a killed search."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lightning_softprune import load_from_checkpoint

FIXTURES = Path(__file__).parent / "fixtures" / "release_0_1_0"


@pytest.fixture
def release():
    """The module that wrote the files, under the name that the journal knows."""
    spec = importlib.util.spec_from_file_location("writer", FIXTURES / "network.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    yield writer.load()
    del sys.modules["softprune_release_0_1_0"]


def test_a_pruned_checkpoint_of_0_1_0_loads_with_its_weights(release):
    saved = torch.load(release.CHECKPOINT, weights_only=True)
    loaded = load_from_checkpoint(release.Net, release.CHECKPOINT)
    assert loaded.state_dict().keys() == saved["state_dict"].keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name]), name
    assert saved["softprune"]["created_biases"] == ["head.bias"]
    assert sum(p.numel() for p in loaded.parameters()) < 0.7 * sum(p.numel() for p in release.Net().parameters())


def test_a_fit_goes_on_from_a_checkpoint_of_0_1_0_with_its_rounds(release, tmp_path):
    module, callback = release.Net(), release.pruning()
    trainer = release.trainer(tmp_path, callback, epochs=3)
    trainer.fit(module, release.loader(), release.loader(), ckpt_path=release.CHECKPOINT)
    saved = torch.load(release.CHECKPOINT, weights_only=True)
    assert trainer.current_epoch == 3
    assert [result.epoch for result in callback.results] == [1]
    assert [result.to_dict()["score_after"] for result in callback.results] == [
        result["score_after"] for result in saved["softprune"]["results"]
    ]
    for name, value in module.state_dict().items():  # the learning rate is 0
        assert torch.equal(value, saved["state_dict"][name]), name


def test_a_search_that_0_1_0_began_goes_on_from_its_journal(release, tmp_path):
    def passes_of_a_fit(root):
        release.Net.passes = 0
        callback = release.pruning()
        release.trainer(root, callback).fit(release.Net(), release.loader(), release.loader())
        return release.Net.passes, callback.results[0]

    passes, whole = passes_of_a_fit(tmp_path / "afresh")
    journal = tmp_path / "killed" / "softprune" / "journal" / "epoch=1.jsonl"
    journal.parent.mkdir(parents=True)
    shutil.copy(release.JOURNAL, journal)
    left, continued = passes_of_a_fit(tmp_path / "killed")
    assert passes - left == release.TRIALS  # the baseline is scored once more, to see that the journal holds
    assert [trial.score for trial in continued.trials] == pytest.approx([trial.score for trial in whole.trials])
    assert [group.channels_after for group in continued.groups] == [group.channels_after for group in whole.groups]
    assert not journal.exists()
