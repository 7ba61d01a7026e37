import os
import re
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_softprune import SensitivitySearch, SoftPruning, UniformBaseline
from support.snippets import SnippetAutoencoder, taken_for_granted

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_ci_runs_the_readme_test_command():
    (command,) = (block for block in code_blocks("bash") if "pytest" in block)
    steps = [line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if line]
    assert command.count("\n") == 1  # one line to paste
    assert steps[-1] == command.strip()  # last, so that its exit status is the script's
    assert "set -euo pipefail" in steps
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_readme_commands_install_the_same_torch():
    versions = [re.findall(r"torch==\S+", block) for block in code_blocks("bash") if "-m venv" in block]
    assert len(versions) == 2
    assert versions[0] == versions[1]
    assert len(versions[0]) == 1


def test_every_code_block_is_run_by_a_test():
    languages = re.findall(r"^```(\w+)\n.*?^```$", README, flags=re.MULTILINE | re.DOTALL)
    # the setup, the command that CI runs and the snippets: the tests of this file; the reference: tests/examples
    assert sorted(languages) == ["bash", "bash", "bash", "bibtex", *["python"] * 4]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets take for granted; they write where they run."""
    monkeypatch.chdir(tmp_path)
    return taken_for_granted()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_first_snippet_prunes_the_model_it_is_given_and_the_last_one_loads_it(names, capsys):
    first, *_, last = code_blocks("python")
    dense = count(names["model"])
    exec(first, names)
    pruned = count(names["model"])
    (result,) = names["pruning"].results
    assert result.costs_after.params == pruned
    assert abs(1 - pruned / dense - 0.7) <= 0.02 + 1e-9
    assert f"with {pruned:,} parameters" in capsys.readouterr().out

    names.update(Autoencoder=SnippetAutoencoder, example=torch.rand(2, 12))
    exec(last, names)
    assert count(names["pruned"]) == pruned
    expected = names["model"].cpu().eval()(names["example"])
    torch.testing.assert_close(names["exported"].module()(names["example"]), expected)


def test_each_callback_of_the_second_snippet_prunes(names):
    _, second, *_ = code_blocks("python")
    made = []

    class Kept(SoftPruning):
        def __init__(self, **arguments):
            super().__init__(**{"monitor": "val_psnr", "mode": "max", **arguments})
            made.append(self)

    class_line = "from lightning_softprune import SensitivitySearch, SoftPruning"
    assert class_line in second
    exec(second.replace(class_line, ""), {"SensitivitySearch": SensitivitySearch, "SoftPruning": Kept})
    assert len(made) == 4
    smallest, budgets, components, rounds = made
    for callback in (smallest, budgets, components, rounds):
        callback.report = callback.verbose = False
        callback.tolerance = 0.05  # tiny layers
        if callback is not smallest:
            callback.search, callback.on_violation = UniformBaseline(), "prune"  # latency is noise at this size
        model, epochs = SnippetAutoencoder(), max(callback.epochs) + 1
        trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "SoftPruning: the model is .*")
            trainer.fit(model, datamodule=names["datamodule"])
    assert budgets.results[0].costs_after.macs <= 0.5 * budgets.results[0].costs_before.macs
    decoder = [group for group in components.results[0].groups if group.component == "decoder"]
    assert all(group.channels_after >= 0.7 * group.channels_before for group in decoder)
    assert [result.applied for result in rounds.results] == [True] * 3
    assert smallest.results[0].constraints == ("val_psnr >= 12",)


def test_the_third_snippet_tries_then_lists_then_prunes(names, capsys):
    _, _, third, *_ = code_blocks("python")
    dense = count(names["model"])
    exec(third, names)
    assert names["plan"].results[0].is_dry_run
    printed = capsys.readouterr().out
    assert "encoder.0 16 prunable" in printed
    assert "not applied (this was a dry run)" in printed
    assert names["result"].applied
    assert f"{dense:,} -> {count(names['model']):,} parameters" in printed
