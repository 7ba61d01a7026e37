import os
import re
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import PeakSignalNoiseRatio

ROOT = Path(__file__).parents[1]
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
    versions = [re.findall(r"torch==\S+", block) for block in code_blocks("bash") if "pip install" in block]
    assert len(versions) == 2
    assert versions[0] == versions[1]
    assert len(versions[0]) == 1


class TinyAutoencoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        self.decoder = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 12))
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, images):
        return self.decoder(self.encoder(images))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch, batch_idx):
        self.psnr.update(self(batch[0]), batch[0])
        self.log("val_psnr", self.psnr)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_every_code_block_is_run_by_a_test():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    of_the_cli = [block for _, block in blocks if "--trainer.callbacks" in block or "class_path" in block]
    assert len(of_the_cli) == 2  # tests/test_lightning_cli.py
    others = [(language, block) for language, block in blocks if block not in of_the_cli]
    # the setup, the command that CI runs and the snippet: the tests of this file
    assert sorted(language for language, _ in others) == ["bash", "bash", "python"]


def test_readme_snippet_prunes_the_model_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the Trainer of the snippet writes its logs where it runs
    torch.manual_seed(0)
    images = torch.rand(64, 12)
    datamodule = L.LightningDataModule()
    datamodule.train_dataloader = lambda: DataLoader(TensorDataset(images), batch_size=32)
    datamodule.val_dataloader = lambda: DataLoader(TensorDataset(images), batch_size=32)
    model = TinyAutoencoder()
    dense = sum(parameter.numel() for parameter in model.parameters())

    (snippet,) = code_blocks("python")
    namespace = {"model": model, "datamodule": datamodule}
    exec(snippet, namespace)

    pruned = sum(parameter.numel() for parameter in model.parameters())
    (result,) = namespace["pruning"].results
    assert result.costs_after.params == pruned
    assert abs(1 - pruned / dense - 0.7) <= 0.02 + 1e-9
    assert f"with {pruned:,} parameters" in capsys.readouterr().out
