"""A fault at every step of a round: nothing has happened."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.round.commit as commit
import lightning_softprune.round.preparing.prepare as prepare
import lightning_softprune.round.preparing.problem as problem
import lightning_softprune.round.preparing.tracing as tracing
import lightning_softprune.round.rehearsal as rehearsal
import lightning_softprune.trainer.runner as runner
from lightning_softprune import SensitivitySearch, SoftPruning
from lightning_softprune.compensation import Compensation, DenseRun
from lightning_softprune.graph.costs import CostModel
from lightning_softprune.search import SearchLoop
from lightning_softprune.trainer import ModuleRunner

pytestmark = pytest.mark.slow

STEPS = [
    (tracing, "trace_model"),
    (tracing, "mirror_twins"),
    (tracing, "probe_with_counts"),
    (prepare, "collect_statistics"),
    (prepare, "rank"),
    (problem, "norms"),
    (prepare, "build_rounding"),
    (problem, "errors_of_readers"),
    (problem, "watch_outputs"),
    (problem, "build_space"),
    (SearchLoop, "run"),
    (runner, "time_validation_step"),
    (DenseRun, "finish"),
    (problem, "apply_plan"),
    (rehearsal, "repair_optimizers"),
    (rehearsal, "refit_readers"),
    (ModuleRunner, "rehearse"),
    (rehearsal, "teach"),
    (commit, "forget_compiled"),
    (commit, "wrap_again"),
    (Compensation, "apply"),
    (CostModel, "build"),
]


class Net(L.LightningModule):
    """BatchNorm, a scheduler, momentum and a list of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(12, 2)
        self.seen = []

    def training_step(self, batch):
        return nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch):
        loss = nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])
        self.seen.append(loss.item())
        self.log("val_loss", loss)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Snapshots(L.Callback):
    """What the run looked like just before the round; stands before SoftPruning in the list of callbacks."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.before = state(trainer, module)


def state(trainer, module):
    optimizer = trainer.optimizers[0]
    parameters = list(module.parameters())
    return {
        "ids": [id(p) for p in parameters],
        "held": [id(p) for p in optimizer.param_groups[0]["params"]],
        "tensors": copy.deepcopy(module.state_dict()),
        "momentum": [optimizer.state[p]["momentum_buffer"].clone() for p in parameters],
        "rates": [group["lr"] for group in optimizer.param_groups],
        "schedule": copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
        "rng": torch.get_rng_state(),
        "training": [m.training for m in module.modules()],
        "sizes": [module.body[0].out_features, module.body[1].num_features, module.head.in_features],
        "bias": module.body[0].bias,
        "seen": list(module.seen),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "stage": trainer.state.stage,
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()),
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def loaders():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, generator=generator)
    data = TensorDataset(x, x[:, :2].clone())
    return DataLoader(data, 8, shuffle=True), DataLoader(data, 16)


FAULTS = [
    *((owner, name, RuntimeError) for owner, name in STEPS),
    (SearchLoop, "run", KeyboardInterrupt),
    (ModuleRunner, "rehearse", KeyboardInterrupt),
    *(
        (owner, name, torch.OutOfMemoryError)
        for owner, name in ((tracing, "probe_with_counts"), (rehearsal, "refit_readers"))
    ),
]


@pytest.mark.parametrize(
    ("owner", "name", "fault"), FAULTS, ids=[f"{name}-{fault.__name__}" for _, name, fault in FAULTS]
)
def test_a_fault_at_any_step_of_a_round_leaves_everything_as_it_was(tmp_path, monkeypatch, owner, name, fault):
    original = getattr(owner, name)
    calls = []

    def failing(*args, **kwargs):
        if not calls or name != "apply_plan":  # the first call has done its work when the fault strikes
            original(*args, **kwargs)
        calls.append(name)
        raise fault("injected")

    monkeypatch.setattr(owner, name, staticmethod(failing) if name == "build" else failing)
    L.seed_everything(0, verbose=False)
    module, snapshots = Net(), Snapshots()
    pruning = SoftPruning(epochs=1, tolerance=0.1, search=SensitivitySearch(), healing=2, verbose=False, report=False)
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[snapshots, pruning],
    )  # fmt: skip
    after = {}

    class Catch(L.Callback):
        def on_exception(self, trainer, module, exception):
            after.update(state(trainer, module), exception=exception)

    trainer.callbacks.append(Catch())
    with pytest.raises((fault, SystemExit)) if fault is KeyboardInterrupt else pytest.raises(fault, match="injected"):
        trainer.fit(module, *loaders())
    assert calls
    assert isinstance(after.pop("exception"), fault)
    different = [key for key in snapshots.before if not same(snapshots.before[key], after[key])]
    assert different == []
    assert pruning.results == []
    monkeypatch.undo()
    again = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[pruning],
    )  # fmt: skip
    again.fit(module, *loaders())
    assert pruning.results[0].applied
    assert module.head.in_features < 12
