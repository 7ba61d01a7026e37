"""Lightning's private names that the folder trainer/ relies on: a release that moves one fails here, by name."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loops import evaluation_loop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call as _call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_softprune import trainer
from lightning_softprune.trainer import end_epoch_at_this_batch
from support.fits import ORDINARY_FITS, Polite, Tiny, loader, trainer_of

pytestmark = ORDINARY_FITS


PRIVATE = {
    "lightning.fabric.utilities.data": ["_set_sampler_epoch"],
    "lightning.pytorch.loops.evaluation_loop": ["_EvaluationLoop", "call"],
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop": ["run", "setup_data"],
    "lightning.pytorch.trainer.call": ["_call_callback_hooks"],
    "lightning.pytorch.trainer.connectors.data_connector": ["_request_dataloader"],
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector": ["_LoggerConnector"],
    "lightning.pytorch.trainer.connectors.logger_connector.result": ["_ResultCollection"],
    "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric": ["to"],
    "lightning.pytorch.utilities.data": ["_extract_batch_size"],
    "lightning.pytorch.utilities.model_helpers": ["is_overridden"],
    "lightning.pytorch.LightningModule": ["_on_before_batch_transfer"],
    "trainer": ["_loggers", "_logger_connector", "fit_loop", "validate_loop"],
    "trainer.strategy": ["_model"],
    "trainer._logger_connector": ["_callback_metrics"],
    "trainer.fit_loop": [
        "_combined_loader",
        "_data_source",
        "epoch_loop",
        "epoch_progress",
        "max_epochs",
        "min_epochs",
    ],
    "trainer.fit_loop.epoch_loop": ["val_loop", "batch_progress", "_batches_that_stepped", "max_steps", "min_steps"],
    "trainer.fit_loop._data_source": ["instance", "is_defined"],
    "trainer.validate_loop": ["_combined_loader", "_data_source", "_max_batches", "_results", "_trainer_fn"],
    "module": ["_compiler_ctx", "_current_fx_name"],
    "combined": ["_iterator", "_mode", "flattened"],
    "ddp": ["_start_method", "configure_ddp"],
    "averaging": ["_average_model"],
    "stochastic averaging": ["_average_model"],
    "checkpoint": [
        "_every_n_train_steps",
        "_last_global_step_saved",
        "_monitor_candidates",
        "_save_last_checkpoint",
        "_save_topk_checkpoint",
        "_should_skip_saving_checkpoint",
        "_train_time_interval",
        "best_k_models",
        "best_model_score",
        "kth_best_model_path",
        "kth_value",
    ],
    "stopping": ["wait_count", "best_score"],
    "finetuning": ["_internal_optimizer_metadata"],
    "plateau": ["_reset"],
}
ROOTS = {
    "trainer": trainer_of,
    "module": lambda _: Tiny(),
    "combined": lambda _: CombinedLoader([[1]], "sequential"),
    "ddp": lambda _: DDPStrategy(),
    "averaging": lambda _: WeightAveraging(),
    "stochastic averaging": lambda _: StochasticWeightAveraging(0.1),
    "checkpoint": lambda _: ModelCheckpoint(),
    "stopping": lambda _: EarlyStopping("val_loss"),
    "finetuning": lambda _: BackboneFinetuning(),
    "plateau": lambda _: ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1, requires_grad=True)])),
}


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in PRIVATE.items() for name in names])
def test_lightning_still_has(tmp_path, owner, name):
    first, *rest = owner.split(".")
    if first in ROOTS:
        value = ROOTS[first](tmp_path)
    else:
        try:
            value, rest = importlib.import_module(owner), []
        except ModuleNotFoundError:
            path, last = owner.rsplit(".", 1)
            value, rest = importlib.import_module(path), [last]
    for part in rest:
        value = getattr(value, part)
    assert hasattr(value, name), f"Lightning {pl.__version__} has no {owner}.{name}, which trainer/ relies on"


def test_the_contract_lists_every_private_name_that_is_imported():
    files = [
        importlib.import_module(f"{trainer.__name__}.{file.name}") for file in pkgutil.iter_modules(trainer.__path__)
    ]
    imported = {name: value for file in files for name, value in vars(file).items() if re.match("_[^_]", name)}
    foreign = {name for name, value in imported.items() if getattr(value, "__module__", "").startswith("lightning.")}
    assert foreign <= {name for names in PRIVATE.values() for name in names}


FOREIGN = {"trainer", "strategy", "callback", "loop", "pl_module", "connector", "combined", "beside", "scheduler"}


def test_the_contract_lists_every_private_attribute_that_is_used():
    used = set()
    for file in pkgutil.iter_modules(trainer.__path__):
        source = Path(importlib.import_module(f"{trainer.__name__}.{file.name}").__file__).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                base = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                if base.strip("_") in FOREIGN:
                    used.add(node.attr)
    assert used
    assert used <= {name for names in PRIVATE.values() for name in names}


@pytest.mark.slow
def test_pytorch_lightning_has_the_same_names():
    """What is looked up in the trainer's own library: `counterpart` goes by module and name."""
    packages = [("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric")]
    owners = {owner: names for owner, names in PRIVATE.items() if owner.startswith("lightning.")}
    for ours, other in packages:
        owners = {re.sub(f"^{re.escape(ours)}", other, owner): names for owner, names in owners.items()}
    code = f"import pkgutil\nfor owner, names in {owners}.items():\n"
    code += "    for name in names: getattr(pkgutil.resolve_name(owner), name)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


LOOKED_UP = [_call, evaluation_loop, evaluation_loop._EvaluationLoop, _LoggerConnector, _request_dataloader]
LOOKED_UP += [_ResultCollection, CombinedLoader, RunningStage, is_overridden, pl.Trainer]


@pytest.mark.parametrize("value", LOOKED_UP, ids=lambda value: value.__name__)
def test_what_is_looked_up_is_found_under_its_own_module_and_name(value):
    if inspect.ismodule(value):
        assert importlib.import_module(value.__name__) is value
    else:
        assert getattr(importlib.import_module(value.__module__), value.__name__) is value
        assert value.__module__.startswith("lightning.pytorch.")


def test_stop_iteration_before_a_batch_ends_the_epoch_without_training_on_it(tmp_path):
    class Ends(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 1:
                end_epoch_at_this_batch()

    class Counts(Callback):
        batches, epochs = (), ()

        def on_train_batch_end(self, trainer, *_):
            self.batches += (trainer.current_epoch,)

        def on_train_epoch_end(self, trainer, pl_module):
            self.epochs += (trainer.current_epoch,)

    counts = Counts()
    trainer_of(tmp_path, Ends(), counts, max_epochs=3).fit(Polite(), loader(12, batch_size=4), loader(8))
    assert counts.epochs == (0, 1, 2)
    assert counts.batches == (0, 0, 0, 1, 2, 2, 2)
