"""Costs against what physical pruning yields, against PyTorch's own counter and against formulas by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_softprune.graph.costs import CostModel, record_macs
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.costs import count_macs, count_parameters
from support.zoo import BY_NAME, PRUNABLE, prunable

pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize("case", PRUNABLE, ids=lambda case: f"{case.name}-{len(case.shape)}d")


def macs_of(model, x, samples=1.0):
    with record_macs(model) as seen, torch.no_grad():
        model(x)
    return count_macs(model, seen, samples)


def cost_model(model, x, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    groups = prunable(model, x)
    rankings = [rng.permutation(group.num_channels) for group in groups]
    with record_macs(model) as seen, torch.no_grad():
        model(x)
    return CostModel.build(model, groups, rankings, seen, **kwargs), groups, rankings


@every_case
def test_counts_equal_those_of_the_pruned_network(case):
    model, x = case.make()
    costs, groups, rankings = cost_model(model, x)
    rng = np.random.default_rng(1)
    channels = [group.num_channels for group in groups]
    some = [[int(rng.integers(n)) for n in channels] for _ in range(8)]
    for counts in ([0] * len(groups), [n - 1 for n in channels], *some):
        surgery = apply_plan(model, groups, Plan.from_counts(counts, rankings))
        assert costs.count("params", np.array(counts)).tolist() == [count_parameters(model)]
        assert costs.count("macs", np.array(counts)).tolist() == [macs_of(model, x)]
        surgery.undo()


@every_case
@pytest.mark.parametrize("what", ["params", "macs"])
def test_many_plans_at_once_are_counted_like_single_ones(case, what):
    model, x = case.make()
    costs, groups, _ = cost_model(model, x)
    rng = np.random.default_rng(2)
    plans = np.stack([rng.integers(0, group.num_channels, 30) for group in groups], axis=1)
    together = costs.count(what, plans)
    assert together.shape == (30,)
    assert np.issubdtype(together.dtype, np.integer)
    assert together.tolist() == [int(costs.count(what, row)[0]) for row in plans]


@every_case
def test_counts_do_not_touch_the_model_and_fall_with_every_channel(case):
    model, x = case.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs, groups, _ = cost_model(model, x)
    for number, group in enumerate(groups):
        plans = np.zeros((group.num_channels, len(groups)), dtype=np.int64)
        plans[:, number] = np.arange(group.num_channels)
        assert (np.diff(costs.count("params", plans)) < 0).all()
        assert (np.diff(costs.count("macs", plans)) <= 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Uneven(nn.Module):
    """Some channels are read twice, by a large layer."""

    def __init__(self):
        super().__init__()
        self.body, self.all, self.some = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(2, 50)

    def forward(self, x):
        x = self.body(x)
        first = self.some.in_features
        return self.all(x), self.some(x.split([first, x.shape[1] - first], 1)[0])


@pytest.mark.parametrize("ranking", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (2, 0, 3, 1, 5, 4), (4, 2, 5, 3, 1, 0)])
def test_the_ranking_decides_where_channels_weigh_differently(ranking):
    model, x = Uneven(), torch.randn(2, 3)
    (group,) = prunable(model, x)
    costs = CostModel.build(model, [group], [np.array(ranking)], {})
    gone = np.cumsum([0] + [3 + 1 + 2 + 50 * (channel < 2) for channel in ranking[:-1]])
    assert costs.count("params", np.arange(6)[:, None]).tolist() == (count_parameters(model) - gone).tolist()


def test_frozen_and_unused_parameters_count_and_tied_ones_count_once():
    model, _ = BY_NAME["Frozen"].make()
    assert count_parameters(model) == 5 * 8 + 8 + 8 * 6 + 6 + 6 * 2 + 2
    model, _ = BY_NAME["Unused"].make()
    assert count_parameters(model) == 4 * 6 + 6 + 6 * 2 + 2 + 3 * 4 + 4 + 4 * 3 + 3 + 1
    model, _ = BY_NAME["Transformer"].make()
    assert count_parameters(model) == sum(p.numel() for p in set(model.parameters()))
    costs, *_ = cost_model(*BY_NAME["Transformer"].make())
    assert costs.count("params", np.zeros(3)).tolist() == [count_parameters(model)]


def test_biases_to_come_are_counted_with_the_first_removed_channel():
    model, x = BY_NAME["Residual"].make()
    costs, groups, rankings = cost_model(model, x, new_biases=["up"])
    assert [group.name for group in groups] == ["stem", "up"]
    for counts in ([0, 0], [0, 4], [1, 0], [3, 4]):
        surgery = apply_plan(model, groups, Plan.from_counts(counts, rankings))
        bias = model.up.out_channels if counts[0] else 0
        assert costs.count("params", np.array(counts)).tolist() == [count_parameters(model) + bias]
        surgery.undo()


# -------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.Linear(5, 7), (2, 4, 5), 2 * 4 * 5 * 7),
        (nn.Conv2d(2, 6, 3, padding=1), (2, 2, 4, 5), 2 * (4 * 5) * (3 * 3) * 2 * 6),
        (nn.Conv2d(2, 6, 3, stride=2), (1, 2, 7, 9), (3 * 4) * (3 * 3) * 2 * 6),
        (nn.Conv2d(4, 6, (1, 3), groups=2), (1, 4, 5, 5), (5 * 3) * 3 * 2 * 6),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 5, 5), 25 * 9 * 4),
        (nn.Conv1d(3, 5, 3), (2, 3, 10), 2 * 8 * 3 * 3 * 5),
        (nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3), 8 * 8 * 2),
        (nn.ConvTranspose2d(3, 4, 4, 2, 1), (2, 3, 5, 5), 2 * 25 * 16 * 3 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 25 * 9 * 4 * 3),
        (nn.ConvTranspose1d(2, 3, 4), (2, 2, 7), 2 * 7 * 4 * 2 * 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_of_layers(layer, shape, expected):
    model, x = nn.Sequential(layer), torch.randn(shape)
    assert macs_of(model, x) == expected
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * expected
    assert macs_of(model, x, samples=shape[0]) == expected // shape[0]


class Across(nn.Module):
    """Attention of one sequence to another."""

    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)

    def forward(self, query, memory):
        return self.attention(query, key=memory, value=memory)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_macs_of_attention(batch, batch_first):
    width, queries, keys = 12, 5, 7
    projections = 2 * queries * width * width + 2 * keys * width * width
    expected = batch * (projections + 2 * queries * keys * width)
    query, memory = torch.randn(batch, queries, width), torch.randn(batch, keys, width)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    model = Across(batch_first).train()
    with record_macs(model) as seen:
        model(query, memory)
    assert count_macs(model, seen) == expected
    with FlopCounterMode(display=False) as counter:
        model(query, memory)
    assert counter.get_total_flops() == 2 * expected


def test_macs_of_attention_without_a_batch():
    model = Across(True)
    with record_macs(model) as seen:
        model(torch.randn(5, 12), torch.randn(7, 12))
    assert count_macs(model, seen) == (2 * 5 + 2 * 7) * 144 + 2 * 5 * 7 * 12


@pytest.mark.parametrize(
    "case", [c for c in PRUNABLE if c.name not in ("Attention", "Recurrent")], ids=lambda c: f"{c.name}-{len(c.shape)}d"
)
def test_macs_equal_the_count_of_pytorch(case):
    """Its counter takes attention's biases of keys and values for one more key, and does not know the fused kernel."""
    model, x = case.make()
    model.train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x)
    assert 2 * macs_of(model, x) == counter.get_total_flops()


def test_a_layer_that_runs_twice_counts_twice():
    model, x = BY_NAME["SharedLayer"].make()
    assert macs_of(model, x) == 3 * (4 * 6 + 2 * 6 * 6 + 6 * 2)


def test_the_record_leaves_no_hooks_when_the_model_raises():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), record_macs(model):
        model(torch.zeros(1, 3))
    assert not any(module._forward_hooks for module in model.modules())
