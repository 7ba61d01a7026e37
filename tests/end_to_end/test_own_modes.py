"""Modules that do more than set flags when they are told to train or to evaluate: merged adapters, tables kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune import RandomSearch, find_groups
from support.modules import FEATURES, AtEpochStart, AutoEncoder, fit, loaders, made, plain_validate, softpruning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Adapted(nn.Linear):
    """A layer with an adapter of low rank, which is merged into its weight to evaluate, as loralib does."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode):  # as PyTorch calls it
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.detach() @ self.down.detach()
            self.merged = not mode
        return self

    def forward(self, x):
        made = F.linear(x, self.weight, self.bias)
        return made if self.merged else made + F.linear(F.linear(x, self.down), self.up)


class NeverMerged(Adapted):
    train = nn.Linear.train


class WithAdapter(AutoEncoder):
    def __init__(self, layer):
        super().__init__()
        self.encoder[2] = layer(16, 8)


def candidates(**arguments):
    return softpruning(search=RandomSearch(num_candidates=4), tolerance=0.1, **arguments)


def in_order(_, group):
    """The first channels go first, whatever state the weights are in."""
    return torch.arange(group.num_channels)


def pruned(tmp_path, layer, epoch, **arguments):
    """The result of a round, and its monitor as an independent validation finds it then."""
    module, callback = made(WithAdapter, layer=layer), candidates(epochs=epoch)
    if epoch < 2:
        nn.init.normal_(module.encoder[2].up)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e-2 * (epoch == 2))
    oracle = AtEpochStart(lambda _, m: plain_validate(tmp_path, m, loaders(m)), epoch)
    fit(tmp_path, module, callback, oracle, max_epochs=epoch + 1, num_sanity_val_steps=0, **arguments)
    (result,) = callback.results
    assert result.applied
    return result, oracle.found[result.monitor]


@pytest.mark.parametrize("epoch", [0, 2])
def test_adapters_that_are_merged_to_evaluate_are_pruned_as_others(tmp_path, epoch):
    """Also those that are zero at first, and trained before the round."""
    plain, _ = pruned(tmp_path, NeverMerged, epoch, check_val_every_n_epoch=3)
    merging, score = pruned(tmp_path, Adapted, epoch, check_val_every_n_epoch=3)
    assert merging.score_before == pytest.approx(plain.score_before, abs=1e-4)
    scores = [[trial.score for trial in result.trials[:4]] for result in (plain, merging)]  # before the final refit
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert merging.score_after == pytest.approx(score, abs=1e-4)


def test_adapters_that_a_validation_has_merged_are_pruned_so(tmp_path):
    """Lightning sets flags behind a validation, and leaves them merged: the rank of an adapter is ranked otherwise."""
    plain, _ = pruned(tmp_path, NeverMerged, 1)
    merging, score = pruned(tmp_path, Adapted, 1)
    assert merging.score_before == pytest.approx(plain.score_before, abs=1e-4)
    assert merging.score_after == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("validated", [False, True])  # as Lightning has left them merged
def test_the_dense_network_that_heals_is_merged_once_a_batch(tmp_path, validated):
    """With adapters that do not learn, both kinds learn the same."""

    def healed(layer):
        module = made(WithAdapter, layer=layer)
        for parameter in (module.encoder[2].down, module.encoder[2].up):
            nn.init.normal_(parameter.requires_grad_(False), std=0.3)
        callback = candidates(
            epochs=9, healing=4, importance=in_order, compensation="none", bounds={"encoder.2#2": (0, 0)}
        )
        every = 9 if validated else 10
        fit(tmp_path, module, callback, max_epochs=10, num_sanity_val_steps=0, check_val_every_n_epoch=every)
        return callback.results[0].healing

    plain, merging = healed(NeverMerged), healed(Adapted)
    assert len(plain.errors) == 4
    assert merging.errors == pytest.approx(plain.errors, rel=1e-2)
    assert merging.score == pytest.approx(plain.score, rel=1e-2)


def test_adapters_that_come_after_a_first_fit_are_found(tmp_path):
    """In a network that had modes of its own before, as those of transformers have."""

    class Eager(WithAdapter):
        def train(self, mode):
            return super().train(mode)

    scores = []
    for layer in (NeverMerged, Adapted):
        module = made(Eager, layer=nn.Linear)
        fit(tmp_path, module, candidates(target_sparsity=0.1, epochs=0), max_epochs=1)
        torch.manual_seed(0)
        module.encoder[2] = layer(module.encoder[0].out_features, module.encoder[2].out_features)
        nn.init.normal_(module.encoder[2].up)
        again = candidates(target_sparsity=0.4, epochs=0, compensation="none", importance=in_order)
        fit(tmp_path, module, again, max_epochs=1, num_sanity_val_steps=0)
        scores.append([trial.score for trial in again.results[0].trials])
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


def test_looking_for_groups_leaves_merged_weights_as_they_were(tmp_path):
    module = made(WithAdapter, layer=Adapted)
    before = copy.deepcopy(module.state_dict())
    find_groups(module, next(iter(loaders(module)["val_dataloaders"])))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Attention(nn.Module):
    """Attention with a bias by head and distance, of which a table is kept to evaluate, as LeViT does."""

    def __init__(self, width, heads, places):
        super().__init__()
        self.heads, self.table = heads, None
        self.fused, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.biases = nn.Parameter(torch.randn(heads, places))
        self.register_buffer("distances", (torch.arange(places)[:, None] - torch.arange(places)).abs())
        self.pairs = torch.arange(width * width).view(width, width)  # of the shape of a weight, and no part of it

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.table = None
        return self

    def forward(self, x):
        q, k, v = self.fused(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.training:
            biases = self.biases[:, self.distances]
        else:
            self.table = biases = self.biases[:, self.distances] if self.table is None else self.table
        weights = (q @ k.mT / 2 + biases).softmax(-1)
        return x + self.mixed((weights @ v).transpose(1, 2).flatten(2))


class WithAttention(AutoEncoder):
    """The features are places of one channel each."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 12), Attention(12, 3, FEATURES), nn.Linear(12, 2))
        self.decoder = nn.Linear(2, 1)

    def forward(self, x):
        return self.decoder(self.encoder(x[..., None])).squeeze(-1)


def test_tables_that_are_kept_to_evaluate_lose_their_heads(tmp_path):
    module, callback = made(WithAttention), candidates(epochs=1, bounds={"encoder.1*": (0.3, 0.4)})
    oracle = AtEpochStart(lambda _, m: plain_validate(tmp_path, m, loaders(m)), 1)
    fit(tmp_path, module, callback, oracle, max_epochs=2)
    (result,) = callback.results
    assert result.applied
    assert module.encoder[1].biases.shape == (2, FEATURES)
    assert module.encoder[1].heads == 2
    assert result.score_after == pytest.approx(oracle.found[result.monitor], abs=1e-4)
