"""Run by test_pytorch_lightning.py as a script: what a user does with one of Lightning's two libraries, as JSON.

Arguments: the library, an empty folder, and the modules to import before anything else, in this order.
"""

import importlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LIBRARY, FOLDER, *FIRST = sys.argv[1:] if __name__ == "__main__" else ("lightning.pytorch", "")
FOLDER = Path(FOLDER)
for name in FIRST:
    importlib.import_module(name)

import lightning_softprune  # noqa: E402
from lightning_softprune import (  # noqa: E402
    PrunedCheckpointMixin,
    SoftPruning,
    UniformBaseline,
    find_groups,
    prune,
    resize,
)

warnings.simplefilter("ignore")
torch.set_num_threads(1)
pl, callbacks, loggers, cli, exceptions = (
    importlib.import_module(f"{LIBRARY}{below}")
    for below in ("", ".callbacks", ".loggers", ".cli", ".utilities.exceptions")
)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}


class Classifier(pl.LightningModule):
    """A convolutional classifier with the hooks, metrics and schedulers that people write."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(width * 4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.places = set()

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        if self._trainer is not None:  # `find_groups` has none
            self.places.add(str(self.trainer.log_dir))
        out = self(batch[0])
        self.accuracy(out, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", F.cross_entropy(out, batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Recorded(PrunedCheckpointMixin, Classifier):
    """Knows how to load itself."""


class Images(pl.LightningDataModule):
    """Random images of three classes."""

    def loader(self, seed, shuffle=False):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(48, 1, 4, 4, generator=generator)
        return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) * 4).long().clamp(-1, 1) + 1), 16, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(0, shuffle=True)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)


def classifier(kind=Classifier):
    torch.manual_seed(0)
    return kind()


def softpruning(**arguments):
    return SoftPruning(**{"epochs": 1, "verbose": False, "search": UniformBaseline(), "tolerance": 0.05, **arguments})


def trainer(*given, **arguments):
    plain = {"logger": False, "enable_checkpointing": False, "default_root_dir": FOLDER}
    return pl.Trainer(callbacks=[*given], **{**QUIET, **plain, **arguments})


def facts(result):
    """What does not depend on folders and clocks."""
    kept = {group.name: (group.channels_before, group.channels_after) for group in result.groups}
    return [kept, result.sparsity, result.score_before, result.score_after, result.evaluations, result.applied]


def state(model):
    return {name: [list(value.shape), value.double().sum().item()] for name, value in model.state_dict().items()}


def refusal(function, error=exceptions.MisconfigurationException):
    try:
        function()
    except error as caught:
        return str(caught)
    return None


# ------------------------------------------------------------------------------------------------------ what is done


def fit():
    """A round between monitors and an average, and all that is done with its checkpoints."""
    average, stopping = callbacks.WeightAveraging(), callbacks.EarlyStopping("val_loss", patience=1)
    saved = callbacks.ModelCheckpoint(FOLDER / "saved", monitor="val_loss", save_last=True)
    pruning, model = softpruning(epochs=2, report=True), classifier()
    table = loggers.CSVLogger(FOLDER, name="table")
    run = trainer(average, stopping, saved, pruning, max_epochs=4, enable_checkpointing=True, logger=table)
    run.fit(model, datamodule=Images())
    rows = (FOLDER / "table" / "version_0" / "metrics.csv").read_text().splitlines()
    yield [facts(pruning.results[0]), state(model), state(average._average_model.module)]
    yield [stopping.wait_count, float(stopping.best_score), sorted(Path(path).name for path in saved.best_k_models)]
    yield [
        len(rows),
        "softprune/sparsity" in rows[0],
        sorted(Path(place).relative_to(FOLDER) for place in model.places),
    ]
    yield sorted(path.name for path in FOLDER.rglob("softprune/epoch=2/*"))
    last = saved.last_model_path

    again, resumed = softpruning(epochs=2, report=False), classifier()
    run = trainer(again, max_epochs=5)
    run.fit(resumed, datamodule=Images(), ckpt_path=last)
    yield [facts(again.results[0]), state(resumed), run.current_epoch, run.global_step]
    yield trainer(softpruning(epochs=2)).test(classifier(), datamodule=Images(), ckpt_path=saved.best_model_path)

    yield state(lightning_softprune.load_from_checkpoint(Classifier, last))
    yield state(Recorded.load_from_checkpoint(last))
    resized = classifier()
    resize(resized, torch.load(last, weights_only=True))
    yield state(resized)
    yield lightning_softprune.load_from_checkpoint(Classifier, last).__dict__.keys() >= {"on_save_checkpoint"}


def dry_run():
    model, pruning = classifier(), softpruning(report=False)
    before = state(model)
    metrics = trainer(pruning).validate(model, datamodule=Images(), verbose=False)
    yield [metrics, facts(pruning.results[0]), state(model) == before]


def without_training():
    """`prune` with a trainer of its own, with the user's, and in several places of Lightning's machinery."""
    groups = find_groups(classifier(), next(iter(Images().val_dataloader())))
    yield [[group.name, group.num_channels, group.reason] for group in groups]
    arguments = {"search": UniformBaseline(), "tolerance": 0.05, "report": False, "verbose": False}
    for given in ({}, {"precision": "bf16-mixed"}, {"strategy": "ddp"}):
        model = classifier()
        result = prune(model, Images(), trainer=trainer(max_epochs=1, **given) if given else None, **arguments)
        yield [facts(result), state(model)]
    torch.distributed.destroy_process_group()
    loader = Images().val_dataloader()
    yield facts(prune(classifier(), train_dataloaders=loader, val_dataloaders=loader, **arguments))


def averaged():
    average = callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    model, pruning = classifier(), softpruning(epochs=2, report=False)
    trainer(average, pruning, max_epochs=4).fit(model, datamodule=Images())
    yield [facts(pruning.results[0]), state(model), state(average._average_model)]


def displays():
    from lightning_softprune.report.progress import progress_style

    for bar in (callbacks.RichProgressBar(), callbacks.TQDMProgressBar()):
        yield progress_style(trainer(bar, enable_progress_bar=True))


def mistakes():
    """Errors that this library's own exceptions catch."""
    yield refusal(lambda: trainer(softpruning(epochs=9), max_epochs=2).fit(classifier(), datamodule=Images()))
    yield refusal(lambda: prune(classifier()))
    yield refusal(lambda: prune(classifier(), Images(), target_sparsity=0.999, verbose=False, report=False))
    pruning = softpruning(monitor="val_los", report=False)
    yield refusal(lambda: trainer(pruning, max_epochs=2).fit(classifier(), datamodule=Images()))
    masking = callbacks.ModelPruning("l1_unstructured", amount=0.2)
    yield refusal(lambda: trainer(softpruning(), masking, max_epochs=2).fit(classifier(), datamodule=Images()))
    yield isinstance(softpruning(), pl.Callback)
    yield len([one for one in pl.Trainer(callbacks=softpruning(), **QUIET).callbacks if type(one) is SoftPruning])


def command_line():
    """A list of callbacks in YAML, arguments of one callback, and a parser that answers typing errors."""
    from lightning_softprune.parser import SuggestingParser

    config = FOLDER / "settings.yaml"
    arguments = "target_sparsity: 0.4, tolerance: 0.05, report: false, verbose: false"
    search = "search: {class_path: lightning_softprune.UniformBaseline}"
    config.write_text(
        "seed_everything: 0\n"
        f"trainer: {{max_epochs: 2, default_root_dir: {FOLDER}, logger: false, enable_progress_bar: false,\n"
        "  enable_checkpointing: false, enable_model_summary: false, accelerator: cpu,\n"
        f"  callbacks: [{{class_path: lightning_softprune.SoftPruning, init_args: {{{arguments}, {search}}}}}]}}\n"
        "model: {width: 6}\n"
    )

    class Linked(cli.LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(SoftPruning, "softprune")

    for parser in (cli.LightningArgumentParser, SuggestingParser):
        again = {"save_config_kwargs": {"overwrite": True}, "parser_class": parser}
        run = cli.LightningCLI(Classifier, Images, args=["fit", f"--config={config}"], **again)
        pruning = next(one for one in run.trainer.callbacks if isinstance(one, SoftPruning))
        yield [facts(pruning.results[0]), state(run.model)]
        options = ["--softprune.target_sparsity=0.3", "--trainer.logger=false"]
        linked = Linked(Classifier, Images, args=options, run=False, parser_class=parser)
        yield [one.targets for one in linked.trainer.callbacks if isinstance(one, SoftPruning)]
        named = ["--trainer.callbacks+=SoftPruning", "--trainer.callbacks.seed=3", "--trainer.logger=false"]
        short = cli.LightningCLI(Classifier, Images, args=named, run=False, parser_class=parser)
        yield [one.seed for one in short.trainer.callbacks if isinstance(one, SoftPruning)]
    parser = {"parser_class": SuggestingParser, "parser_kwargs": {"exit_on_error": False}}
    wrong = ["--softprune.target_sparisty=0.3"]
    yield refusal(lambda: Linked(Classifier, Images, args=wrong, run=False, **parser), Exception)
    yield refusal(lambda: SuggestingParser().add_lightning_class_args(nn.Linear, "layer"))


def mixed():
    """Classes of the two libraries in one call: nothing to compare, but something to be told."""
    other = importlib.import_module({"lightning.pytorch": "pytorch_lightning"}.get(LIBRARY, "lightning.pytorch"))
    foreign = other.Trainer(logger=False, enable_checkpointing=False, **QUIET)
    yield refusal(lambda: prune(classifier(), Images(), trainer=foreign), TypeError)
    yield refusal(lambda: prune(classifier(), other.LightningDataModule()), TypeError)
    yield refusal(lambda: foreign.fit(classifier(), datamodule=Images()), TypeError)


PARTS = (fit, dry_run, without_training, averaged, displays, mistakes, command_line, mixed)

if __name__ == "__main__":
    os.chdir(FOLDER)
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"pytorch_lightning", "lightning_fabric"})
    wanted = os.environ.get("PARTS", "").split() or [part.__name__ for part in PARTS]
    found = {part.__name__: list(part()) for part in PARTS if part.__name__ in wanted}
    (FOLDER / "found.json").write_text(json.dumps({**found, "loaded": loaded}, default=str))
