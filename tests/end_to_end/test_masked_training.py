"""Oracle: a pruned network trains exactly as the dense network whose removed channels are held at zero."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.round.rehearsal as rehearsal
from lightning_softprune import RandomSearch
from support.modules import (
    AtEpochStart,
    AutoEncoder,
    Batches,
    Manual,
    fit,
    loaders,
    made,
    no_compensation,
    softpruning,
    trainer_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class AdamTwoGroups(AutoEncoder):
    def configure_optimizers(self):
        groups = [
            {"params": self.encoder.parameters(), "lr": 1e-2},
            {"params": self.decoder.parameters(), "lr": 3e-3, "weight_decay": 1e-2},
        ]
        return torch.optim.Adam(groups)


class FusedAdamW(AutoEncoder):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


class Momentum(AutoEncoder):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-3)


class PerStepScheduler(AutoEncoder):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=40)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def masks_of(dense, pruned):
    """Find out, from the weights alone, what is gone: parameter name -> ones where it was kept."""
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    masks = {}
    modules = dict(dense.named_modules())
    names = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    norms = {}
    ordered = [(name, m) for name, m in modules.items() if isinstance(m, (nn.Linear, nn.BatchNorm1d))]
    for (name, _), (following, layer) in itertools.pairwise(ordered):
        if isinstance(layer, nn.BatchNorm1d):
            norms[name] = following
    columns = torch.arange(before[f"{names[0]}.weight"].shape[1])
    for name in names:
        old, new = before[f"{name}.weight"].detach(), after[f"{name}.weight"].detach()
        matches = (old[:, columns][None] == new[:, None]).all(-1)  # (new rows, old rows)
        assert (matches.sum(1) == 1).all(), "every kept row is one of the dense rows, unchanged"
        rows = matches.int().argmax(1)
        mask = torch.zeros_like(old)
        mask[rows[:, None], columns] = 1.0
        masks[f"{name}.weight"] = mask
        for vector in [f"{name}.bias"] + [f"{norms[name]}.{p}" for p in ("weight", "bias") if name in norms]:
            masks[vector] = torch.zeros_like(before[vector])
            masks[vector][rows] = 1.0
            assert torch.equal(before[vector].detach()[rows], after[vector].detach())
        columns = rows
    return masks


def masked_losses(dense, saved, masks, batches, accumulate=1):
    """Train the dense network on the same batches, with what was removed held at zero.

    `accumulate`: batches per step; a list has one number per batch.
    """
    factors = accumulate if isinstance(accumulate, list) else [accumulate] * len(batches)
    configured = dense.configure_optimizers()
    [optimizer], schedulers = configured if isinstance(configured, tuple) else ([configured], [])
    optimizer.load_state_dict(saved["optimizer"])
    for config, state in zip(schedulers, saved["schedulers"], strict=True):
        config["scheduler"].load_state_dict(state)
    parameters = dict(dense.named_parameters())

    @torch.no_grad()
    def mask():
        for name, value in masks.items():
            parameters[name].mul_(value)

    mask()
    losses = []
    dense.train()
    for index, (batch, factor) in enumerate(zip(batches, factors, strict=True)):
        loss = dense.loss(batch)
        losses.append(loss.item())
        (loss / factor).backward()
        if (index + 1) % factor == 0:
            optimizer.step()
            optimizer.zero_grad()
            mask()
            for config in schedulers:
                config["scheduler"].step()
    return torch.tensor(losses)


def both(tmp_path, module, accumulate=1, epochs=1, others=(), **arguments):
    """Losses of a run that prunes in mid-fit, and of the masked dense network from the same point on."""
    last = epochs if isinstance(epochs, int) else epochs[-1]

    def save(trainer, pl_module):
        return {
            "module": copy.deepcopy(pl_module),
            "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
            "schedulers": [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
            "seen": len(pl_module.losses),
        }

    before, after = AtEpochStart(save, last), AtEpochStart(lambda _, m: copy.deepcopy(m), last)
    callback = softpruning(
        epochs=epochs,
        search=RandomSearch(num_candidates=3),  # different coefficients everywhere
        **{"target_sparsity": 0.5, **no_compensation(), **arguments},
    )
    batches = Batches(last)
    factor = accumulate if isinstance(accumulate, int) else 1
    callbacks = (before, callback, after, batches, *others)
    fit(tmp_path, module, *callbacks, max_epochs=last + 3, accumulate_grad_batches=factor)
    assert all(result.applied for result in callback.results)
    masks = masks_of(before.found["module"], after.found)
    assert min(mask.mean() for mask in masks.values()) < 0.8, "something was removed"
    pruned = torch.tensor(module.losses[before.found["seen"] :])
    masked = masked_losses(before.found["module"], before.found, masks, batches.batches, accumulate)
    assert len(pruned) == len(masked) == len(batches.batches) == 3 * 4
    return pruned, masked


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AdamTwoGroups, FusedAdamW, Momentum, PerStepScheduler])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_a_prune_training_goes_on_as_that_of_the_masked_dense_network(tmp_path, kind, accumulate):
    pruned, masked = both(tmp_path, made(kind), accumulate)
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)
    assert pruned[-4:].mean() < pruned[:4].mean(), "it trains"


def test_the_same_while_the_accumulation_factor_follows_its_schedule(tmp_path):
    factors = {}

    class Factors(Callback):
        def on_train_batch_end(self, trainer, *_):
            factors.setdefault(trainer.current_epoch, (trainer.accumulate_grad_batches, trainer.global_step))

    others = (GradientAccumulationScheduler({1: 2, 2: 4, 3: 1}), Factors())
    pruned, masked = both(tmp_path, made(AdamTwoGroups), [2] * 4 + [4] * 4 + [1] * 4, others=others)
    assert factors == {0: (1, 1), 1: (2, 4), 2: (4, 6), 3: (1, 8)}
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)


def test_the_same_with_batch_norm_whose_statistics_are_sliced(tmp_path):
    pruned, masked = both(tmp_path, made(AdamTwoGroups, norm=True))
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)


def test_the_same_after_a_second_round(tmp_path):
    pruned, masked = both(tmp_path, made(AdamTwoGroups), epochs=[1, 2], target_sparsity=[0.3, 0.6])
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------- two networks, stepped by hand


class Adversaries(LightningModule):
    """A GAN: two networks, two optimizers, manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 6))
        self.critic = nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(), nn.Linear(12, 8), nn.LeakyReLU(), nn.Linear(8, 1))
        self.losses = []

    def play(self, batch, optimizers, backward):
        """One step of each network."""
        (noise, real), found = batch, []
        for optimizer, turn in zip(optimizers, ("generator", "critic"), strict=True):
            fake = self.critic(self.generator(noise))
            loss = F.softplus(-fake) if turn == "generator" else F.softplus(-self.critic(real)) + F.softplus(fake)
            optimizer.zero_grad()
            backward(loss.mean())
            optimizer.step()
            found.append(loss.mean().item())
        self.losses.append(found)

    def training_step(self, batch, batch_idx):
        self.play(batch, self.optimizers(), self.manual_backward)

    def validation_step(self, batch, batch_idx):
        noise, real = batch
        self.log("val_loss", (self.critic(self.generator(noise)) - self.critic(real)).square().mean())

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
            torch.optim.RMSprop(self.critic.parameters(), lr=1e-3, momentum=0.5),
        )


class Masking:
    """An optimizer of the dense network that holds what was removed at zero."""

    def __init__(self, optimizer, network, masks):
        self.optimizer, self.zero_grad = optimizer, optimizer.zero_grad
        self.masked = [(parameter, masks[name]) for name, parameter in network.named_parameters()]
        self.mask()

    @torch.no_grad()
    def mask(self):
        for parameter, mask in self.masked:
            parameter.mul_(mask)

    def step(self):
        self.optimizer.step()
        self.mask()


def games():
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(48, 3, generator=generator), torch.randn(48, 6, generator=generator) + 1.0)
    return {"train_dataloaders": DataLoader(data, batch_size=8), "val_dataloaders": DataLoader(data, batch_size=16)}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_two_networks_with_an_optimizer_each_go_on_as_masked_ones_and_are_resumed(tmp_path):
    def save(trainer, module):
        return copy.deepcopy((module, [optimizer.state_dict() for optimizer in trainer.optimizers]))

    def callback():
        return softpruning(**no_compensation())

    before, after = AtEpochStart(save), AtEpochStart(lambda _, m: copy.deepcopy(m))
    files, batches, module = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), Batches(), made(Adversaries)
    callbacks = (before, callback(), after, batches, files)
    trainer = fit(tmp_path, module, *callbacks, data=games(), max_epochs=4, enable_checkpointing=True)
    parts = (module.generator, module.critic)
    for optimizer, part in zip(trainer.optimizers, parts, strict=True):
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert held == [id(parameter) for parameter in part.parameters()]
        assert {id(parameter) for parameter in optimizer.state} == set(held)
        for parameter, state in optimizer.state.items():
            assert all(value.shape == parameter.shape for value in state.values() if value.ndim)

    dense, states = before.found
    masked = []
    names = ("generator", "critic")
    for optimizer, state, name in zip(dense.configure_optimizers(), states, names, strict=True):
        optimizer.load_state_dict(state)
        masks = masks_of(dense.get_submodule(name), after.found.get_submodule(name))
        assert min(mask.mean() for mask in masks.values()) < 0.8
        masked.append(Masking(optimizer, dense.get_submodule(name), masks))
    for batch in batches.batches:
        dense.play(batch, masked, torch.Tensor.backward)
    assert len(dense.losses) == len(module.losses) == 4 * 6
    difference = (torch.tensor(dense.losses) - torch.tensor(module.losses)).abs().max()
    assert difference <= 1e-5

    for epoch in (0, 1):
        again, resumed = made(Adversaries, seed=3), trainer_of(tmp_path, callback(), max_epochs=4)
        resumed.fit(again, **games(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        expected = torch.tensor(module.losses[6 * (epoch + 1) :])
        torch.testing.assert_close(torch.tensor(again.losses), expected, rtol=0, atol=1e-6)


class Pending(Manual):
    """Accumulates by hand over three batches, and so across the end of an epoch of four."""

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.manual_backward(self.loss(batch) / 3)
        if (len(self.losses) + 1) % 3 == 0:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.losses.append(0.0)

    def on_validation_model_zero_grad(self):
        """Validation would throw them away."""


def test_pending_gradients_survive_a_round_for_the_channels_that_do(tmp_path):
    def save(trainer, module):
        return copy.deepcopy(module), {name: p.grad.clone() for name, p in module.named_parameters()}

    before, after = AtEpochStart(save), AtEpochStart(save)
    fit(tmp_path, made(Pending), before, softpruning(**no_compensation()), after)
    (dense, wide), (pruned, narrow) = before.found, after.found
    masks = masks_of(dense, pruned)
    assert any(gradient.any() for gradient in wide.values())
    for name, gradient in narrow.items():
        assert torch.equal(gradient.flatten(), wide[name][masks[name].bool()])


# ----------------------------------------------------------------------------------------------- what the oracle sees


@pytest.mark.parametrize("kind", [AdamTwoGroups, FusedAdamW, Momentum, PerStepScheduler])
def test_without_the_optimizer_repair_the_comparison_fails(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(rehearsal, "repair_optimizers", lambda optimizers, surgery: None)
    pruned, masked = both(tmp_path, made(kind))
    assert (pruned - masked).abs().max() > 1e-3


def test_with_a_state_that_starts_afresh_the_comparison_fails(tmp_path, monkeypatch):
    def forget(optimizers, surgery):
        repair(optimizers, surgery)
        for optimizer in optimizers:
            optimizer.state.clear()

    repair = rehearsal.repair_optimizers
    monkeypatch.setattr(rehearsal, "repair_optimizers", forget)
    pruned, masked = both(tmp_path, made(AdamTwoGroups))
    assert (pruned - masked).abs().max() > 1e-3


def test_the_loaders_end_with_full_accumulation_windows():
    """What `masked_losses` relies on."""
    assert len(loaders(made())["train_dataloaders"]) % 2 == 0
