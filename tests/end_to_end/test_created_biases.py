"""Biases that compensation would create: in front of a BatchNorm, for optimizers of matrices, and in resumed runs."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import SoftPruning, UniformBaseline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
]


class Net(pl.LightningModule):
    """A backbone and a head without biases; norms are optional, and so is what trains which parameters."""

    def __init__(self, norm=False, optimizers="adam"):
        super().__init__()
        norms = [nn.BatchNorm1d(20), nn.BatchNorm1d(16)] if norm else [nn.Identity(), nn.Identity()]
        self.backbone = nn.Sequential(
            *(nn.Linear(8, 20, bias=False), norms[0], nn.ReLU()), *(nn.Linear(20, 16, bias=False), norms[1], nn.ReLU())
        )
        self.head = nn.Linear(16, 3, bias=False)
        self.kind = optimizers
        self.automatic_optimization = optimizers != "muon and adam"
        self.losses = []

    def loss(self, batch):
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    def training_step(self, batch):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(self, batch):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.kind == "adam":
            return torch.optim.Adam(trained, 1e-2)
        muon = torch.optim.Muon([p for p in trained if p.ndim == 2], 1e-2)
        return muon if self.kind == "muon" else [muon, torch.optim.Adam([p for p in trained if p.ndim < 2], 1e-2)]


def loader(n=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator) + 0.5
    return DataLoader(TensorDataset(x, x[:, :3].abs()), 16)


def fit(module, folder, *callbacks, epochs=3, ckpt_path=None):
    files = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=files,
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def made(seed=0, **arguments):
    pl.seed_everything(seed, verbose=False)
    return Net(**arguments)


def pruning(**arguments):
    return SoftPruning(search=UniformBaseline(), tolerance=0.05, verbose=False, report=False, **arguments)


@pytest.mark.filterwarnings("ignore:.*ends with averaged weights.*")
@pytest.mark.parametrize("compensation", ["bias", "least_squares"])
def test_in_front_of_norms_the_pruned_network_has_the_names_of_the_dense_one(tmp_path, compensation):
    module, callback = made(norm=True), pruning(compensation=compensation, finetune_epochs=0)
    trainer = fit(module, tmp_path, callback, EMAWeightAveraging(decay=0.9))
    assert module.backbone[3].bias is None
    assert module.backbone[0].out_features < 20
    result = callback.results[0]
    assert result.costs_after.params == sum(parameter.numel() for parameter in module.parameters())
    assert set(Net(norm=True).state_dict()) | {"head.bias"} == set(module.state_dict())
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    assert checkpoint["softprune"]["created_biases"] == ["head.bias"]


def test_an_averaged_copy_takes_it_as_the_module_does(tmp_path):
    module, averaging = made(norm=True), EMAWeightAveraging(decay=0.0)  # the copy is the module as it was last
    seen = []

    class AfterTheRound(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                copy = averaging._average_model.module
                seen.append([{k: v.clone() for k, v in net.state_dict().items()} for net in (pl_module, copy)])

    fit(module, tmp_path, pruning(compensation="bias"), averaging, AfterTheRound(), epochs=2)
    ((one, other),) = seen
    assert one.keys() == other.keys()
    assert torch.allclose(one["backbone.4.running_mean"], other["backbone.4.running_mean"], atol=1e-6)


@pytest.mark.parametrize("compensation", ["bias", "least_squares"])
def test_muon_trains_on_after_the_round(tmp_path, compensation):
    module, callback = made(optimizers="muon"), pruning(compensation=compensation)
    trainer = fit(module, tmp_path, callback, ModelCheckpoint(tmp_path, save_last=True))
    assert callback.results[0].applied
    assert all(parameter.ndim == 2 for parameter in module.parameters())
    again = made(seed=1, optimizers="muon")
    fit(again, tmp_path, pruning(compensation=compensation), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.current_epoch == 3


def test_beside_muon_the_optimizer_of_vectors_trains_the_bias(tmp_path):
    module = made(norm=True, optimizers="muon and adam")
    trainer = fit(module, tmp_path, pruning(), ModelCheckpoint(tmp_path, save_last=True))
    _, adam = trainer.optimizers
    (group,) = adam.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters() if p.ndim == 1]
    assert group["params"][-1] is module.head.bias
    assert adam.state[module.head.bias]["step"] == 8
    again = made(seed=1, norm=True, optimizers="muon and adam")
    fit(again, tmp_path, pruning(), epochs=4, ckpt_path=tmp_path / "last.ckpt")


class AdamWithHook(torch.optim.Adam):
    """One that looks at its state before it is loaded, by a hook that it registers for that long."""

    def load_state_dict(self, state_dict):
        seen = []
        handle = self.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
        super().load_state_dict(state_dict)
        handle.remove()
        self.seen = seen


def test_a_run_goes_on_whose_optimizer_has_a_hook_on_its_loading(tmp_path):
    class Hooked(Net):
        def configure_optimizers(self):
            return AdamWithHook(self.parameters(), 1e-2)

    fit(Hooked(), tmp_path, pruning(), ModelCheckpoint(tmp_path, save_last=True))
    trainer = fit(Hooked(), tmp_path, pruning(), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.optimizers[0].seen == [len(list(trainer.lightning_module.parameters()))]
    assert trainer.current_epoch == 4


class Thawing(BaseFinetuning):
    """Freezes the backbone and trains it from an epoch on, also in a resumed run."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=5e-3)

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        for group in trainer.optimizers[0].param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_()


@pytest.mark.parametrize("first", ["pruning", "finetuning"])
@pytest.mark.parametrize(("thaw", "round_at"), [(1, 2), (2, 1), (2, 2)])
def test_a_resumed_run_with_parameter_groups_that_came_later_equals_the_uninterrupted_one(
    tmp_path, thaw, round_at, first
):
    def callbacks():
        pair = [pruning(epochs=round_at), Thawing(thaw)]
        return pair if first == "pruning" else pair[::-1]

    whole = made()
    fit(whole, tmp_path, *callbacks(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), epochs=5)
    assert {"backbone.3.bias", "head.bias"} <= dict(whole.named_parameters()).keys()
    for epoch in range(4):
        again = made(seed=1)
        trainer = fit(again, tmp_path, *callbacks(), epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.losses == whole.losses[4 * (epoch + 1) :]
        held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert sorted(held) == sorted(map(id, again.parameters()))


def test_backbone_finetuning_resumes_without_pruning_too(tmp_path):
    def callbacks():
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1)

    fit(made(), tmp_path, pruning(epochs=2), callbacks(), ModelCheckpoint(tmp_path, save_last=True), epochs=4)
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["softprune"]["optimizers"][0]
    assert names[1] == ["backbone.0.weight", "backbone.3.weight", "backbone.3.bias"]
    trainer = fit(made(1), tmp_path, pruning(epochs=2), callbacks(), epochs=5, ckpt_path=tmp_path / "last.ckpt")
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 3]


def test_a_round_that_fails_in_its_commit_leaves_the_recorded_groups(tmp_path, monkeypatch):
    import lightning_softprune.round.commit as commit

    def fail(*_):
        raise ZeroDivisionError("the wrapper")

    finetuning = Thawing(1)
    monkeypatch.setattr(commit, "wrap_again", fail)
    with pytest.raises(ZeroDivisionError):
        fit(made(), tmp_path, pruning(epochs=2), finetuning, epochs=4)
    assert [group["params"] for group in finetuning._internal_optimizer_metadata[0]] == [
        ["head.weight"],
        ["backbone.0.weight", "backbone.3.weight"],
    ]
