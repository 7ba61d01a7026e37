"""Lightning's private names that the folder trainer/ relies on: a release that moves one fails here, by name."""

import importlib
import pkgutil
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_softprune import trainer
from support.fits import Tiny, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: more threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PRIVATE = {
    "lightning.fabric.utilities.data": ["_set_sampler_epoch"],
    "lightning.pytorch.loops.evaluation_loop": ["_EvaluationLoop", "call"],
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop": ["run", "setup_data"],
    "lightning.pytorch.trainer.call": ["_call_callback_hooks"],
    "lightning.pytorch.trainer.connectors.data_connector": ["_request_dataloader"],
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector": ["_LoggerConnector"],
    "lightning.pytorch.utilities.data": ["_extract_batch_size"],
    "lightning.pytorch.LightningModule": ["_on_before_batch_transfer"],
    "trainer": ["_loggers", "_logger_connector", "fit_loop", "validate_loop"],
    "trainer.strategy": ["_model"],
    "trainer._logger_connector": ["_callback_metrics"],
    "trainer.fit_loop": ["_combined_loader", "_data_source", "epoch_loop", "epoch_progress"],
    "trainer.fit_loop.epoch_loop": ["val_loop", "batch_progress", "_batches_that_stepped"],
    "trainer.fit_loop._data_source": ["instance", "is_defined"],
    "trainer.validate_loop": ["_combined_loader", "_data_source", "_max_batches", "_trainer_fn"],
    "module": ["_current_fx_name"],
    "combined": ["_iterator", "_mode", "flattened"],
}


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in PRIVATE.items() for name in names])
def test_lightning_still_has(tmp_path, owner, name):
    roots = {"trainer": trainer_of(tmp_path), "module": Tiny(), "combined": CombinedLoader([[1]], "sequential")}
    first, *rest = owner.split(".")
    value = roots.get(first)
    if value is None:
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
