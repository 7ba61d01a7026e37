"""Oracle: a pruned network trains exactly as the dense network whose removed channels are held at zero."""

import copy
import itertools

import pytest
import torch
from modules import AtEpochStart, AutoEncoder, Batches, fit, loaders, made, no_compensation, softpruning
from torch import nn

import lightning_softprune.round as round_module
from lightning_softprune import RandomSearch

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
    """Train the dense network on the same batches, with what was removed held at zero."""
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
    for index, batch in enumerate(batches):
        loss = dense.loss(batch)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            mask()
            for config in schedulers:
                config["scheduler"].step()
    return torch.tensor(losses)


def both(tmp_path, module, accumulate=1, epochs=1, **arguments):
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
    fit(tmp_path, module, before, callback, after, batches, max_epochs=last + 3, accumulate_grad_batches=accumulate)
    assert all(result.applied for result in callback.results)
    masks = masks_of(before.found["module"], after.found)
    assert min(mask.mean() for mask in masks.values()) < 0.8, "something was removed"
    pruned = torch.tensor(module.losses[before.found["seen"] :])
    masked = masked_losses(before.found["module"], before.found, masks, batches.batches, accumulate)
    assert len(pruned) == len(masked) == len(batches.batches) == 3 * 4
    return pruned, masked


@pytest.mark.parametrize("kind", [AdamTwoGroups, FusedAdamW, Momentum, PerStepScheduler])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_a_prune_training_goes_on_as_that_of_the_masked_dense_network(tmp_path, kind, accumulate):
    pruned, masked = both(tmp_path, made(kind), accumulate)
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)
    assert pruned[-4:].mean() < pruned[:4].mean(), "it trains"


def test_the_same_with_batch_norm_whose_statistics_are_sliced(tmp_path):
    pruned, masked = both(tmp_path, made(AdamTwoGroups, norm=True))
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)


def test_the_same_after_a_second_round(tmp_path):
    pruned, masked = both(tmp_path, made(AdamTwoGroups), epochs=[1, 2], target_sparsity=[0.3, 0.6])
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [AdamTwoGroups, FusedAdamW, Momentum, PerStepScheduler])
def test_without_the_optimizer_repair_the_comparison_fails(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(round_module, "repair_optimizers", lambda optimizers, surgery: None)
    pruned, masked = both(tmp_path, made(kind))
    assert (pruned - masked).abs().max() > 1e-3


def test_with_a_state_that_starts_afresh_the_comparison_fails(tmp_path, monkeypatch):
    def forget(optimizers, surgery):
        repair(optimizers, surgery)
        for optimizer in optimizers:
            optimizer.state.clear()

    repair = round_module.repair_optimizers
    monkeypatch.setattr(round_module, "repair_optimizers", forget)
    pruned, masked = both(tmp_path, made(AdamTwoGroups))
    assert (pruned - masked).abs().max() > 1e-3


def test_the_loaders_end_with_full_accumulation_windows():
    """What `masked_losses` relies on."""
    assert len(loaders(made())["train_dataloaders"]) % 2 == 0
