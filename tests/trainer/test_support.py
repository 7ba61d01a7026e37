"""Strategies and optimizers that cannot be served are refused by name."""

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_softprune.trainer.support import UntrainedCopies, refuse_sharded_optimizers, refuse_sharding
from support.neighbours import Regressor, pruning

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_strategy_that_shards_is_refused_by_name(tmp_path):
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match=r"DDPStrategy.*consolidated checkpoint"):
        pruning().setup(trainer, Regressor(), "fit")


class OwnSharding(FSDPStrategy):
    pass


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, OwnSharding])
def test_strategies_that_shard_are_refused_with_their_subclasses(kind):
    trainer = SimpleNamespace(strategy=object.__new__(kind))  # here they cannot be started
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__}.*consolidated checkpoint"):
        refuse_sharding(trainer)


@pytest.mark.parametrize("how", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_fork_are_refused(how):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=how, logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match=r"DDPStrategy started by .*strategy=\"ddp\""):
        refuse_sharding(trainer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
def test_an_optimizer_that_is_spread_over_the_processes_is_refused():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    class Own(ZeroRedundancyOptimizer):
        pass

    for kind in (ZeroRedundancyOptimizer, Own):
        trainer = SimpleNamespace(optimizers=[object.__new__(kind)])  # without processes it cannot be made
        with pytest.raises(MisconfigurationException, match=rf"optimizer: {kind.__name__} .*plain optimizer"):
            refuse_sharded_optimizers(trainer)
    refuse_sharded_optimizers(SimpleNamespace(optimizers=[torch.optim.SGD([torch.zeros(1)])]))


class WithCopy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 3)
        self.second = copy.deepcopy(self.net)


def test_a_copy_is_judged_when_its_original_is_trained():
    module = WithCopy()
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(module.parameters(), 0.1)])
    copies = UntrainedCopies(trainer, module, {}, [])
    copies.note_gradients()
    copies.refuse(ends_epoch=True)  # something else was trained in this epoch
    module.net(torch.ones(1, 3)).sum().backward()
    copies.note_gradients()
    copies.refuse(ends_epoch=False)  # the next batch may train the copy
    with pytest.raises(MisconfigurationException, match=r"'second' is not trained.*twins=\{'second': 'net'\}"):
        copies.refuse(ends_epoch=True)


def test_a_copy_is_judged_in_the_middle_of_a_long_epoch():
    module = WithCopy()
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(module.parameters(), 0.1)])
    copies = UntrainedCopies(trainer, module, {}, [])
    module.net(torch.ones(1, 3)).sum().backward()
    for _ in range(49):
        copies.note_gradients()
        copies.refuse(ends_epoch=False)
    with pytest.raises(MisconfigurationException, match="'second' is not trained"):
        copies.refuse(ends_epoch=False)


def test_copies_that_are_both_trained_are_not_looked_at_again():
    module = WithCopy()
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(module.parameters(), 0.1)])
    copies = UntrainedCopies(trainer, module, {}, [])
    for part in (module.net, module.second):  # a step that goes back twice
        module.zero_grad()
        part(torch.ones(1, 3)).sum().backward()
        copies.note_gradients()
    copies.refuse(ends_epoch=True)
    module.second.zero_grad()
    copies.note_gradients()
    copies.refuse(ends_epoch=True)
