"""Positions whose outputs the loss does not depend on are left out of what readers are fitted to."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.calibration import collect_statistics, find_read_positions, find_readers, rank
from lightning_softprune.compensation import Compensation, refit_readers, run_dense
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan

pytestmark = pytest.mark.usefixtures("one_thread")

READS = {
    "last": (lambda x: x[:, -1], [4]),
    "two of them": (lambda x: x[:, 1:4:2].mean(1), [1, 3]),
    "all": (lambda x: x.mean(1), [0, 1, 2, 3, 4]),
}


class Blocks(nn.Module):
    """A layer whose outputs all positions meet, and one behind it, from which `reads` takes what the head gets."""

    def __init__(self, reads, early=False):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.reads, self.early = reads, early

    def forward(self, x):
        x = self.first(x).tanh()
        x = x + x.cumsum(1)
        if self.early:  # the same network, which computes nothing in vain
            x = torch.stack([x[:, place] for place in self.early], 1)
            return self.head(self.second(x).tanh().mean(1))
        return self.head(self.reads(self.second(x).tanh()))


def networks(kind):
    reads, places = READS[kind]
    torch.manual_seed(0)
    whole, early = Blocks(reads), Blocks(reads, places)
    early.load_state_dict(whole.state_dict())
    return whole.double(), early.double(), places


def steps_of(model, count=3):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 5, 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [lambda x=x: {"loss": model(x).square().sum()} for x in batches]


def pruned(model):
    """Weights after half of the first layer's channels are gone, and are made up for."""
    steps = steps_of(model)
    groups = [g for g in find_groups(model, torch.randn(2, 5, 3, dtype=torch.float64)) if g.name == "first"]
    readers = find_readers(model, groups)
    positions = find_read_positions(model, [reader.name for reader in readers], steps)
    statistics = collect_statistics(model, readers, steps, positions=positions)
    rankings = rank("activation", model, groups, steps, statistics, np.random.default_rng(0))
    compensation = Compensation("least_squares", model, groups, rankings, statistics)
    compensation.positions = positions
    dense = run_dense(model, compensation, steps)
    surgery = apply_plan(model, groups, Plan.from_counts([4], rankings))
    compensation.apply(model, surgery)
    with torch.no_grad():
        refit_readers(model, surgery, compensation, dense)
    return model.state_dict()


@pytest.mark.parametrize("kind", READS)
def test_a_network_that_computes_in_vain_is_fitted_like_one_that_does_not(kind):
    whole, early, _ = networks(kind)
    expected = pruned(early)
    for name, tensor in pruned(whole).items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", READS)
def test_positions_count_where_a_gradient_comes_back_to_them(kind):
    whole, _, places = networks(kind)
    found = find_read_positions(whole, ["first", "second"], steps_of(whole))
    seen = torch.arange(5.0).expand(2, 5)[..., None]
    assert found.of("second", seen)[0, :, 0].tolist() == places
    assert found.of("first", seen)[0, :, 0].tolist() == list(range(max(places) + 1))
    assert found.of("second", torch.ones(2, 6, 1)).shape == (2, 6, 1)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in whole.parameters())


class _NoDerivative(torch.autograd.Function):
    asked, error = 0, RuntimeError

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        _NoDerivative.asked += 1
        raise _NoDerivative.error("none is known")


@pytest.mark.parametrize("error", [RuntimeError, TypeError])  # a reversible block has kept no state in eval mode
def test_all_positions_count_without_a_loss_and_one_batch_tells_where_they_do(monkeypatch, error):
    monkeypatch.setattr(_NoDerivative, "error", error)
    whole, _, _ = networks("last")
    x, runs = torch.randn(4, 5, 3, dtype=torch.float64), []
    assert not find_read_positions(whole, ["second"], [lambda: None, lambda: whole(x).detach()])
    _NoDerivative.asked = 0
    assert not find_read_positions(whole, ["second"], [lambda: _NoDerivative.apply(whole(x)).sum()])
    assert not find_read_positions(whole, ["head"], [lambda: _NoDerivative.apply(whole(x)).sum()])
    assert _NoDerivative.asked == 1  # what the head is given has no positions
    with pytest.raises(AttributeError, match="no_such_thing"):  # the user's own
        find_read_positions(whole, ["second"], [lambda: whole(x).no_such_thing])
    whole.reads = READS["all"][0]
    assert not find_read_positions(whole, ["second"], [lambda: runs.append(1) or whole(x).sum()] * 3)
    assert runs == [1]
    whole.requires_grad_(False)
    assert not find_read_positions(whole, ["second"], steps_of(whole))


def test_a_glance_is_enough_where_it_sees_that_all_positions_count_and_adds_to_what_batches_tell_elsewhere():
    runs = []

    def found(reads, glance):
        whole = networks("all")[0]
        whole.reads = reads
        x, few = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
        steps = [lambda: runs.append(1) or whole(x).sum()] * 2
        return find_read_positions(whole, ["second"], steps, lambda: lambda: glance(whole, few))

    assert not found(READS["all"][0], lambda whole, few: whole(few).sum())
    assert not runs
    masks = found(READS["last"][0], lambda whole, few: whole(few).sum() + whole.second(whole.first(few))[:, 1].sum())
    assert len(runs) == 2
    assert masks.of("second", torch.arange(5.0).reshape(1, 5, 1)).flatten().tolist() == [1, 4]


def test_a_sample_that_is_predicted_so_well_that_its_gradient_vanishes_counts():
    whole, _, _ = networks("all")
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    found = find_read_positions(whole, ["second"], [lambda: (whole(x) * torch.tensor([[0.0], [1], [0], [0]])).sum()])
    assert not found
