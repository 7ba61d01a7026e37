"""Oracles: the energy that explicit least squares leave at each step, and all pairs of the smallest problems."""

import itertools

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.calibration.elimination as elimination
from lightning_softprune import SoftPruning, UniformBaseline
from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.calibration.importance import rank
from lightning_softprune.compensation import Compensation
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support import zoo

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
]


def ranked(model, x, importance="reconstruction"):
    """The groups with their rankings, the first to go first."""
    model.eval()
    steps = [lambda: model(x)]
    groups = [group for group in trace_groups(model, steps) if group.prunable]
    statistics = collect_statistics(model, find_readers(model, groups), steps)
    rankings = rank(importance, model, groups, steps, statistics, np.random.default_rng(0))
    for group, ranking in zip(groups, rankings, strict=True):
        assert sorted(ranking) == list(range(group.num_channels))
    return groups, rankings


def inputs_of(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0].double().numpy()


def lost_energy(centred, weight, kept, ridge=0.0):
    """Energy of the reader's outputs that ridge regression from the kept inputs does not explain, penalty included."""
    penalty = np.eye(centred.shape[1]) * np.sqrt(ridge * len(centred) * (centred**2).mean())
    observed = np.vstack([centred, penalty])  # the penalty as observations: of each input alone
    targets, predictors = observed @ weight.T, observed[:, list(kept)]
    if predictors.shape[1]:
        targets = targets - predictors @ np.linalg.lstsq(predictors, targets, rcond=None)[0]
    return (targets**2).sum() / len(centred)


def slow_elimination(problems, channels):
    """Remove next the channel without which the least energy is lost, over all readers; returns the order.

    A problem is (inputs, weight, index or indices of each channel in them): inputs of no channel always stay.
    """
    gone: list[int] = []
    while len(gone) < channels:
        left = [c for c in range(channels) if c not in gone]
        losses = []
        for channel in left:
            lost = [np.hstack([index[c] for c in (*gone, channel)]) for _, _, index in problems]
            losses.append(
                sum(
                    lost_energy(x, w, np.setdiff1d(np.arange(x.shape[1]), without), elimination._RIDGE)
                    for (x, w, _), without in zip(problems, lost, strict=True)
                )
            )
        gone.append(left[int(np.argmin(losses))])
    return gone


class TwoReaders(nn.Module):
    def __init__(self, channels=7):
        super().__init__()
        self.body = nn.Linear(9, channels)
        self.left = nn.Linear(channels, 3)
        self.right = nn.Linear(channels, 2)

    def forward(self, x):
        z = self.body(x).relu()
        return self.left(z), self.right(z.square())


class Heads(nn.Module):
    def __init__(self, num_heads=5, head_dim=4):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(9, num_heads * head_dim) for _ in range(3))
        self.out = nn.Linear(num_heads * head_dim, 6)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("seed", range(8))
def test_channels_go_in_the_order_of_the_slow_elimination_with_one_reader(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(200, 9)
    _, (ranking,) = ranked(model, x)
    z = inputs_of(model, "2", x)
    problem = (z - z.mean(0), model[2].weight.detach().double().numpy(), np.arange(8))
    assert ranking.tolist() == slow_elimination([problem], 8)


@pytest.mark.parametrize("seed", range(8))
def test_heads_go_in_the_order_of_the_slow_elimination_of_whole_heads(seed, monkeypatch):
    monkeypatch.setattr(elimination, "_WIDEST_WINDOW", 0)  # however wide they are
    torch.manual_seed(seed)
    model = Heads()
    with torch.no_grad():  # within the first head, dimensions say nearly the same: one of them is enough
        model.v.weight[:4] = model.v.weight[:1] + 0.1 * model.v.weight[:4]
    x = torch.randn(60, 5, 9) * 2.0
    _, (ranking, *_) = ranked(model, x)
    z = inputs_of(model, "out", x).reshape(-1, 20)
    problem = (z - z.mean(0), model.out.weight.detach().double().numpy(), np.arange(20).reshape(5, 4))
    assert ranking.tolist() == slow_elimination([problem], 5)


@pytest.mark.parametrize("seed", range(8))
def test_channels_go_in_the_order_of_the_slow_elimination_with_two_readers(seed):
    torch.manual_seed(seed)
    model, x = TwoReaders(), torch.randn(200, 9)
    _, (ranking,) = ranked(model, x)
    problems = []
    for name in ("left", "right"):
        z = inputs_of(model, name, x)
        problems.append((z - z.mean(0), model.get_submodule(name).weight.detach().double().numpy(), np.arange(7)))
    assert ranking.tolist() == slow_elimination(problems, 7)


@pytest.mark.parametrize("seed", range(5))
def test_channels_of_other_groups_that_a_reader_has_beside_them_stay(seed):
    torch.manual_seed(seed)
    model, x = zoo.Critic(), torch.randn(200, 6)
    groups, rankings = ranked(model, x)
    z = inputs_of(model, "q", x)
    places = next(m.owner for m in groups[0].members if (m.module, m.slot) == ("q", "in"))
    assert (places < 0).any()
    index = np.array([int(np.flatnonzero(places == channel)[0]) for channel in range(8)])
    problem = (z - z.mean(0), model.q.weight.detach().double().numpy(), index)
    assert rankings[0].tolist() == slow_elimination([problem], 8)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_grouped_reader_rebuilds_each_parts_outputs_from_that_part_alone(seed, transposed, size):
    torch.manual_seed(seed)
    layer = nn.ConvTranspose1d if transposed else nn.Conv1d
    model = nn.Sequential(nn.Conv1d(3, 10, 1), nn.ReLU(), layer(10, 4, size, groups=2), nn.Conv1d(4, 1, 1))
    x = torch.randn(100, 3, 4)
    _, (ranking, _) = ranked(model, x)
    z = np.moveaxis(inputs_of(model, "2", x), 1, -1).reshape(-1, 10)
    z = z - z.mean(0)
    weight = model[2].weight.detach().double().numpy()
    whole = np.zeros((size, 4, 10))  # each position of the kernel is an output of its own
    for position, part in itertools.product(range(size), range(2)):
        rows, columns, at = slice(2 * part, 2 * part + 2), slice(5 * part, 5 * part + 5), weight[:, :, position]
        whole[position, rows, columns] = at[columns].T if transposed else at[rows]
    apart = np.zeros((2 * len(z), 10))  # what one part says tells nothing of the other
    apart[: len(z), :5], apart[len(z) :, 5:] = z[:, :5], z[:, 5:]
    # channel c is index c of either part
    assert ranking.tolist() == slow_elimination([(apart, whole.reshape(-1, 10), np.arange(10).reshape(2, 5).T)], 5)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_a_channel_goes_with_all_positions_under_a_kernel(seed, padding, monkeypatch):
    if seed % 2:  # two candidates, of which one goes: all channels are looked at each time
        monkeypatch.setattr(elimination, "_CANDIDATES", 8)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=padding))
    x = torch.randn(30, 2, 6, 6)
    _, (ranking,) = ranked(model, x)
    z = F.unfold(torch.from_numpy(inputs_of(model, "2", x)), 3, padding=padding).mT.flatten(0, 1).numpy()
    weight = model[2].weight.detach().double().flatten(1).numpy()
    assert ranking.tolist() == slow_elimination([(z - z.mean(0), weight, np.arange(54).reshape(6, 9))], 6)


@pytest.mark.parametrize("seed", range(5))
def test_a_channel_goes_with_all_its_positions_behind_a_flatten(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(2, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(80, 2, 4)
    _, (ranking,) = ranked(model, x)
    z = inputs_of(model, "3", x)
    weight = model[3].weight.detach().double().numpy()
    assert ranking.tolist() == slow_elimination([(z - z.mean(0), weight, np.arange(24).reshape(6, 4))], 6)


@pytest.mark.parametrize("seed", range(5))
def test_where_a_kernel_reads_too_much_its_positions_are_outputs_of_their_own(seed, monkeypatch):
    monkeypatch.setattr(elimination, "_WIDEST_WINDOW", 53)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3))
    x = torch.randn(20, 2, 5, 5)
    _, (ranking,) = ranked(model, x)
    z = np.moveaxis(inputs_of(model, "2", x), 1, -1).reshape(-1, 6)
    weight = model[2].weight.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, 6)
    assert ranking.tolist() == slow_elimination([(z - z.mean(0), weight, np.arange(6))], 6)


@pytest.mark.parametrize("seed", range(5))
def test_where_a_flattened_map_is_too_wide_its_positions_are_outputs_of_their_own(seed, monkeypatch):
    monkeypatch.setattr(elimination, "_WIDEST_WINDOW", 23)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(2, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(80, 2, 4)
    _, (ranking,) = ranked(model, x)
    z = inputs_of(model, "3", x)
    pooled = (z - z.mean(0)).reshape(-1, 6, 4).transpose(0, 2, 1).reshape(-1, 6)
    weight = model[3].weight.detach().double().numpy().reshape(3, 6, 4).transpose(0, 2, 1).reshape(-1, 6)
    assert ranking.tolist() == slow_elimination([(pooled, weight, np.arange(6))], 6)


@pytest.mark.parametrize("seed", range(3))
def test_among_many_channels_those_that_cost_most_are_not_looked_at_every_time(seed, monkeypatch):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 24), nn.ReLU(), nn.Linear(24, 5))
    x = torch.randn(400, 9)
    _, (exact,) = ranked(model, x)
    monkeypatch.setattr(elimination, "_CANDIDATES", 6)
    looks = []
    cheapest = elimination._cheapest
    monkeypatch.setattr(
        elimination, "_cheapest", lambda readers, left: looks.append(len(left)) or cheapest(readers, left)
    )
    _, (found,) = ranked(model, x)
    assert len(looks) == 24 + 7  # one for each channel among few, and of all: seven times, where six are left the last
    z = inputs_of(model, "2", x)
    z, weight = z - z.mean(0), model[2].weight.detach().double().numpy()
    for kept in (6, 12, 18):  # nearly as good a set as if all were looked at every time, and better than by variance
        lost = [lost_energy(z, weight, order[-kept:]) for order in (exact, found)]
        _, (by_variance,) = ranked(model, x, "activation")
        assert lost[1] <= 1.1 * lost[0] < lost_energy(z, weight, by_variance[-kept:])


@pytest.mark.parametrize("seed", range(10))
def test_the_first_channel_to_go_costs_least_and_pairs_hardly_more_than_the_cheapest_pair(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2))
    x = torch.randn(200, 9)
    _, (ranking,) = ranked(model, x)
    z = inputs_of(model, "2", x)
    z, weight = z - z.mean(0), model[2].weight.detach().double().numpy()

    def lost(gone):
        return lost_energy(z, weight, np.setdiff1d(np.arange(7), gone), elimination._RIDGE)

    assert ranking[0] == min(range(7), key=lambda c: lost([c]))
    assert lost(ranking[:2]) <= 1.5 * min(map(lost, itertools.combinations(range(7), 2)))


# --------------------------------------------------------------------------------------------- what goes first


@pytest.mark.parametrize("seed", range(5))
def test_one_of_each_is_kept_before_any_duplicate(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 6))
    order = torch.randperm(15)
    with torch.no_grad():
        for i in range(15):
            model[0].weight[order[i]] = model[0].weight[order[i % 5]]
            model[0].bias[order[i]] = model[0].bias[order[i % 5]]
    kind = np.empty(15, int)
    kind[order.numpy()] = np.arange(15) % 5
    _, (ranking,) = ranked(model, torch.randn(300, 8))
    assert len(set(kind[ranking[-5:]])) == 5


def test_channels_that_carry_nothing_go_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].bias[3] = -100.0  # dead
        model[0].weight[5] = 0.0  # constant
        model[2].weight[:, 7] = 0.0  # nobody reads it, and it predicts little
        model[0].weight[9] = float("nan")
        model[0].bias[10] = float("inf")
    with torch.no_grad():
        model[0].weight[7] *= 1e-3
    _, (ranking,) = ranked(model, torch.randn(200, 6))
    assert set(ranking[:5]) == {3, 5, 7, 9, 10}


@pytest.mark.parametrize("broken", ["weights", "samples", "single", "dead"])
def test_broken_numbers_still_give_a_ranking(broken):
    torch.manual_seed(0)
    model, x = TwoReaders(12), torch.randn(100, 9)
    with torch.no_grad():
        if broken == "weights":
            model.left.weight[1, 3] = float("nan")
            model.right.weight[0, 4] = float("inf")
        elif broken == "samples":
            x[7] = float("nan")
        elif broken == "single":
            x = x[:1]
        else:
            model.body.bias.fill_(-100.0)
    ranked(model, x)


@pytest.mark.parametrize("case", zoo.PRUNABLE, ids=lambda case: case.name)
def test_every_network_is_ranked_and_the_same_each_time(case):
    model, x = case.make()
    _, rankings = ranked(model, x)
    _, again = ranked(model, x)
    assert all(np.array_equal(a, b) for a, b in zip(rankings, again, strict=True))


# ------------------------------------------------------------------------------------- activation, for comparison


@pytest.mark.parametrize("seed", range(3))
def test_activation_removes_first_what_changes_the_readers_outputs_least_when_replaced_by_its_mean(seed):
    torch.manual_seed(seed)
    model, x = TwoReaders(), torch.randn(200, 9)
    _, (ranking,) = ranked(model, x, "activation")
    changes = np.zeros(7)
    for name in ("left", "right"):
        z = torch.from_numpy(inputs_of(model, name, x)).float()
        reader = model.get_submodule(name)
        for channel in range(7):
            other = z.clone()
            other[:, channel] = z[:, channel].mean()
            changes[channel] += (reader(z) - reader(other)).square().sum(1).mean().item()
    assert ranking.tolist() == np.argsort(changes).tolist()


@pytest.mark.parametrize("transposed", [False, True])
def test_activation_weighs_a_grouped_readers_channels_with_its_own_weights(transposed):
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d if transposed else nn.Conv1d
    model = nn.Sequential(nn.Conv1d(3, 10, 1), nn.ReLU(), layer(10, 4, 1, groups=2), nn.Conv1d(4, 1, 1))
    x = torch.randn(100, 3, 4)
    _, (ranking, _) = ranked(model, x, "activation")
    z = torch.from_numpy(inputs_of(model, "2", x)).float()
    changes = np.zeros(5)
    for index in range(10):
        other = z.clone()
        other[:, index] = z[:, index].mean()
        changes[index % 5] += (model[2](z) - model[2](other)).square().sum(1).mean().item()
    assert ranking.tolist() == np.argsort(changes).tolist()


def test_with_least_squares_it_rebuilds_the_output_better_than_activation_where_channels_repeat_each_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        model[0].weight[8:], model[0].bias[8:] = model[0].weight[:8], model[0].bias[:8]
        model[0].weight[[0, 1, 8, 9]] *= 3.0  # loud twins: activation keeps both
    x = torch.randn(300, 8)
    dense = model(x).detach()
    errors = {}
    for importance in ("activation", "reconstruction"):
        groups, rankings = ranked(model, x, importance)
        statistics = collect_statistics(model, find_readers(model, groups), [lambda: model(x)])
        surgery = apply_plan(model, groups, Plan.from_counts([8], rankings))
        Compensation("least_squares", model, groups, rankings, statistics).apply(model, surgery)
        errors[importance] = (model(x) - dense).square().mean().item()
        surgery.undo()
    assert errors["reconstruction"] < 1e-6 < 1e-4 < errors["activation"]


# ---------------------------------------------------------------------------------------------------- the callback


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.head = nn.Linear(6 * 16, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.head(self.encoder(x).relu().flatten(1)), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def test_a_round_ranks_by_reconstruction():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 1, 4, 4, generator=generator)
    loader = DataLoader(TensorDataset(x, x.amax((2, 3))), batch_size=16)
    callback = SoftPruning(
        importance="reconstruction",
        search=UniformBaseline(),
        tolerance=0.1,
        finetune_epochs=0,
        report=False,
        verbose=False,
    )
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    model = Net()
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback], logger=False, accelerator="cpu", **settings)
    trainer.fit(model, loader, loader)
    (result,) = callback.results
    assert result.applied
    found = pl.Trainer(logger=False, accelerator="cpu", **settings).validate(model, loader, verbose=False)
    assert result.score_after == pytest.approx(found[0]["val_loss"], abs=1e-6)
