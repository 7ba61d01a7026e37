"""Run by test_ddp.py as a script, once per process: fits under DDP, and what each rank saw of them in a file.

The first argument is a list of fits, as JSON; they run one after the other.
"""

import gc
import itertools
import json
import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import OptunaSearch, RandomSearch, SoftPruning
from lightning_softprune.round.preparing import PruningProblem


class Classifier(L.LightningModule):
    """Three layers; logs a loss with or without `sync_dist` and a torchmetrics accuracy."""

    def __init__(self, sync_dist, unused, convolutions=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)
        if convolutions:
            first = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 16, 3, padding=1, bias=False))
            second = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU())
            self.body, self.head = nn.Sequential(*first, *second, nn.Flatten()), nn.Linear(48, 3)
        self.spare = nn.Linear(2, 2) if unused else None
        self.sync_dist = sync_dist
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.losses = []
        self.pass_file, self.killed_in = None, None  # while a round runs; the pass in which to end

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        if self.pass_file and self.killed_in and batch_idx == 1:
            finished = self.pass_file.read_text().count("pass") if self.pass_file.exists() else 0
            if finished == self.killed_in - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), sync_dist=self.sync_dist)

    def on_validation_epoch_end(self):
        if self.pass_file:
            with self.pass_file.open("a") as file:
                file.write("pass\n")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Masks(L.Callback):
    """Instead of pruning: the same plan as masks on the dense network, enforced after every step."""

    def __init__(self, epoch, removed):
        self.epoch, self.removed = epoch, removed

    def enforce(self, trainer, module):
        if trainer.current_epoch < self.epoch:
            return
        layers = [module.body[0], module.body[2], module.head]
        state = trainer.optimizers[0].state
        for (producer, reader), gone in zip(itertools.pairwise(layers), self.removed, strict=True):
            for parameter, rows in ((producer.weight, 0), (producer.bias, 0), (reader.weight, 1)):
                for tensor in (parameter.data, *(t for t in state[parameter].values() if t.ndim)):
                    tensor.index_fill_(rows, torch.tensor(gone, dtype=torch.long), 0.0)

    def on_train_epoch_start(self, trainer, module):
        self.enforce(trainer, module)

    def on_train_batch_end(self, trainer, module, *_):
        self.enforce(trainer, module)


class Digests(L.Callback):
    """A digest of the parameters after every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, *_):
        self.values.append(float(sum(p.detach().double().abs().sum() for p in module.parameters())))


class Passes(L.Callback):
    """Counts the validation passes of the round into a file, one line each: nothing can take them back."""

    def __init__(self, file, running):
        self.file, self.running = file, running

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            module.pass_file = self.file if self.running else None


def run(options):
    out = Path(options["out"])
    L.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 8, generator=generator)
    y = (x @ torch.randn(8, 3, generator=generator)).argmax(1)
    train = DataLoader(TensorDataset(x, y), 8, shuffle=True)
    val = DataLoader(TensorDataset(x[:40], y[:40]), 8)
    module = Classifier(options["sync_dist"], options.get("unused", False), options.get("convolutions", False))
    module.killed_in = options.get("killed_in")
    plans = []
    original = PruningProblem.prune

    def prune(self, module, plan):
        plans.append(plan)
        return original(self, module, plan)

    PruningProblem.prune = prune
    digests = Digests()
    search = OptunaSearch(4, storage=options["storage"]) if "storage" in options else RandomSearch(num_candidates=4)
    pruning = SoftPruning(
        monitor=options["monitor"], mode="max" if "acc" in options["monitor"] else "min", epochs=1,
        tolerance=0.05, search=search,
        compensation=options["compensation"], verbose=False, report=options.get("report", False),
        **options.get("pruning", {"target_sparsity": 0.5}),
    )  # fmt: skip
    rank = int(os.environ.get("LOCAL_RANK", 0))
    own = [pruning]
    if "mask" in options:  # what an earlier fit has removed
        own = [Masks(1, json.loads(Path(options["mask"], f"rank{rank}.json").read_text())["removed"])]
    file = out / f"passes{rank}"
    callbacks = [Passes(file, True), *own, Passes(file, False), digests]
    if options.get("files"):
        callbacks.append(ModelCheckpoint(options["files"], "{epoch}", save_top_k=-1))
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=2, enable_progress_bar=False, log_every_n_steps=1,
        logger=CSVLogger(out, "logs") if options.get("report") else False,
        enable_model_summary=False, enable_checkpointing=bool(options.get("files")), default_root_dir=out,
        callbacks=callbacks,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **options.get("ddp", {})),
    )  # fmt: skip
    trainer.fit(module, train, val, ckpt_path=options.get("resume"))
    PruningProblem.prune = original
    assert trainer.global_rank == rank
    record = {
        "digests": digests.values,
        "losses": module.losses,
        "shapes": [list(p.shape) for p in module.parameters()],
        "removed": [list(gone) for gone in plans[-1].removed] if plans else [],
        "healed": [result.healing is not None and result.healing.kept for result in pruning.results],
        "applied": [result.applied for result in pruning.results],
        "groups": [group.channels_after for result in pruning.results for group in result.groups],
        "scores": [trial.score for result in pruning.results for trial in result.trials],
        "passes": file.read_text().count("pass") if file.exists() else 0,
        "validation": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    (out / f"rank{rank}.json").write_text(json.dumps(record))


def main():
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what fails is read from the end of stderr
    for options in json.loads(sys.argv[1]):
        run(options)
    gc.collect()  # the last trainer and its wrapper hold the group, too
    torch.distributed.destroy_process_group()  # else gloo's threads may outlive the interpreter, which aborts


if __name__ == "__main__":
    os.environ.setdefault("PL_DISABLE_FORK", "1")
    main()
