"""Rankings against straightforward loops."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_softprune.calibration.elimination as elimination
import lightning_softprune.calibration.importance as calibration
from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.calibration.importance import IMPORTANCES, norms, rank
from lightning_softprune.graph import Member, PruningGroup
from support.zoo import PRUNABLE, prunable

pytestmark = pytest.mark.usefixtures("one_thread")


class Multiplied(nn.Module):
    """A depthwise convolution that gives two channels of each."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).tanh()).flatten(1)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).tanh())


class Conv(nn.Module):
    """A convolution, a normalisation, a grouped convolution, and a linear layer behind a flatten."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.c = nn.Linear(4 * 9, 2)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return self.c(self.b(x).tanh().flatten(1))


def make(kind, seed=0):
    torch.manual_seed(seed)
    model = kind().eval()
    batches = [torch.randn((n, 5) if kind is MLP else (n, 1, 5, 5)) for n in (4, 4, 3)]
    groups = prunable(model, batches[0])
    return model, batches, groups


def loss_of(model, x):
    return F.cross_entropy(model(x), torch.arange(len(x)) % 2)


def statistics_of(model, groups, batches):
    return collect_statistics(model, find_readers(model, groups), [lambda x=x: model(x) for x in batches])


def ranked(importance, model, groups, batches, seed=0, step=loss_of):
    statistics = statistics_of(model, groups, batches)
    steps = [lambda x=x: step(model, x) for x in batches]
    return rank(importance, model, groups, steps, statistics, np.random.default_rng(seed))


def order(scores):
    return [np.argsort(score, kind="stable").tolist() for score in scores]


def touched(kind, value):
    """Sum ``value(weight)`` over the weights of each channel, layer by layer and channel by channel."""
    if kind is MLP:
        return lambda m: [
            [value(m.a.weight)[i].sum() + value(m.b.weight)[:, i].sum() for i in range(6)],
            [value(m.b.weight)[i].sum() + value(m.c.weight)[:, i].sum() for i in range(4)],
        ]

    def of_multiplied(m):
        a, b, c = value(m.a.weight), value(m.b.weight), value(m.c.weight)
        return [[a[i].sum() + b[2 * i : 2 * i + 2].sum() + c[:, 2 * i : 2 * i + 2].sum() for i in range(4)]]

    def of_convolution(m):
        a, b, c = value(m.a.weight), value(m.b.weight), value(m.c.weight)
        # channel i of the first group is input i of the first part and input i of the second
        first = [a[i].sum() + a[i + 3].sum() + b[:2, i].sum() + b[2:, i].sum() for i in range(3)]
        # and of the second one: output i of either part, and 9 columns each behind the flatten
        second = []
        for i in range(2):
            columns = [c[:, 9 * j : 9 * j + 9].sum() for j in (i, i + 2)]
            second.append(b[i].sum() + b[i + 2].sum() + columns[0] + columns[1])
        return [first, second]

    return of_multiplied if kind is Multiplied else of_convolution


def numbers(nested):
    return [[float(item) for item in row] for row in nested]


@pytest.fixture(params=["whole", "in parts"])
def looked_at(request, monkeypatch):
    """Weights of these networks, which are small, whole and as large ones are looked at."""
    if request.param == "in parts":
        monkeypatch.setattr(calibration, "_PART", 8)


@pytest.mark.usefixtures("looked_at")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [MLP, Conv, Multiplied])
def test_magnitude_is_the_squared_norm_of_all_weights_of_a_channel(kind, seed):
    model, batches, groups = make(kind, seed)
    expected = numbers(touched(kind, lambda weight: weight.detach().double() ** 2)(model))
    assert [r.tolist() for r in ranked("magnitude", model, groups, batches)] == order(expected)
    assert norms(model, groups) == pytest.approx([np.mean(np.sqrt(row)) for row in expected])


@pytest.mark.usefixtures("looked_at")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [MLP, Conv, Multiplied])
def test_taylor_is_the_squared_first_order_change_summed_over_batches(kind, seed):
    model, batches, groups = make(kind, seed)
    expected = None
    for x in batches:
        other = copy.deepcopy(model).double()
        loss_of(other, x.double()).backward()
        change = numbers(touched(kind, lambda weight: (weight * weight.grad).detach())(other))
        squares = [np.square(row) for row in change]
        expected = squares if expected is None else [a + b for a, b in zip(expected, squares, strict=True)]
    model, batches = model.double(), [x.double() for x in batches]
    assert [r.tolist() for r in ranked("taylor", model, groups, batches)] == order(expected)


def test_taylor_ranks_by_sparse_gradients_as_by_others():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6, sparse=sparse), nn.Flatten(), nn.Linear(18, 4), nn.Linear(4, 2))
        batches = [torch.randint(0, 9, (4, 3)) for _ in range(3)]
        found.append([r.tolist() for r in ranked("taylor", model, prunable(model, batches[0]), batches)])
    assert found[0] == found[1]


def inputs_of(kind, model, batches):
    """What the two readers read: (observations, channels), and for the layer behind the flatten (.., channels, 9)."""
    with torch.no_grad():
        x = torch.cat(batches)
        if kind is MLP:
            first = model.a(x).relu()
            return first, model.b(first).tanh()
        first = model.norm(model.a(x)).relu()
        return first, model.b(first).tanh().flatten(2)


@pytest.mark.usefixtures("looked_at")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [MLP, Conv])
def test_activation_is_variance_times_the_squared_norm_of_the_reading_weights(kind, seed):
    model, batches, groups = make(kind, seed)
    first, second = (tensor.double().numpy() for tensor in inputs_of(kind, model, batches))
    b, c = model.b.weight.detach().double().numpy() ** 2, model.c.weight.detach().double().numpy() ** 2
    if kind is MLP:
        expected = [
            [first[:, i].var() * b[:, i].sum() for i in range(6)],
            [second[:, i].var() * c[:, i].sum() for i in range(4)],
        ]
    else:
        one = [first[:, i].var() * b[i // 3 * 2 : i // 3 * 2 + 2, i % 3].sum() for i in range(6)]
        # behind the flatten, the positions of a channel have their own means and share one variance
        two = [second[:, i].var(0).mean() * c[:, 9 * i : 9 * i + 9].sum() for i in range(4)]
        expected = [[one[i] + one[i + 3] for i in range(3)], [two[i] + two[i + 2] for i in range(2)]]
    assert [r.tolist() for r in ranked("activation", model, groups, batches)] == order(expected)


@pytest.mark.parametrize("seed", range(6))
def test_of_two_loud_channels_that_say_the_same_one_goes_early_and_the_other_last(seed):
    """Either costs next to nothing while the other is there; by variance both would stay."""
    model, _, groups = make(MLP, seed)
    batches = [torch.randn(60, 5)]
    with torch.no_grad():
        model.a.weight[1] *= 2.0
        model.a.weight[3], model.a.bias[3] = model.a.weight[1], model.a.bias[1]
        model.a.bias.add_(9.0)  # no ReLU is ever off: nothing else is a copy
    (ranking, _) = ranked("reconstruction", model, groups, batches)
    assert len({1, 3} & set(ranking[:2])) == 1 == len({1, 3} & set(ranking[-1:]))
    (ranking, _) = ranked("activation", model, groups, batches)
    assert {1, 3} <= set(ranking[3:])


class Stream(nn.Module):
    """Two layers add to what two read; inside one of them, channels are made and read once."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(self.up(x).relu()))


class Beside(nn.Module):
    """Channels that several layers make and one reads, or that one makes and several read."""

    def __init__(self, makers, readers):
        super().__init__()
        self.makers = nn.ModuleList(nn.Linear(5, 8) for _ in range(makers))
        self.readers = nn.ModuleList(nn.Linear(8, 2) for _ in range(readers))

    def forward(self, x):
        x = sum(make(x) for make in self.makers).relu()
        return sum(read(x) for read in self.readers)


def by_each_criterion(model, batches):
    groups = prunable(model, batches[0])
    found = {how: ranked(how, model, groups, batches) for how in (None, "activation", "reconstruction")}
    return [{how: rankings[number].tolist() for how, rankings in found.items()} for number in range(len(groups))]


def test_by_default_channels_are_eliminated_but_where_several_layers_add_and_several_read():
    torch.manual_seed(0)
    stream, inner = by_each_criterion(Stream().eval(), [torch.randn(40, 5)])
    assert stream[None] == stream["activation"] != stream["reconstruction"]
    assert inner[None] == inner["reconstruction"] != inner["activation"]


@pytest.mark.parametrize(("makers", "readers", "like"), [(2, 1, 0), (1, 2, 0), (2, 2, 1)])
def test_a_stream_has_several_layers_at_both_ends(makers, readers, like):
    torch.manual_seed(0)
    (found,) = by_each_criterion(Beside(makers, readers).eval(), [torch.randn(40, 5)])
    assert found["reconstruction"] != found["activation"]
    assert found[None] == found[("reconstruction", "activation")[like]]


@pytest.mark.parametrize(("widest", "like"), [(6, "reconstruction"), (5, "activation")])
def test_by_default_channels_that_a_wide_layer_reads_are_not_eliminated(monkeypatch, widest, like):
    monkeypatch.setattr(elimination, "_WIDEST", widest)
    model, _, _ = make(MLP)
    first, _ = by_each_criterion(model, [torch.randn(60, 5)])
    assert first["reconstruction"] != first["activation"]
    assert first[None] == first[like]


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("case", PRUNABLE, ids=lambda case: f"{case.name}-{len(case.shape)}d")
def test_rankings_are_permutations_on_every_network(case, importance):
    model, x = case.make()
    groups = prunable(model, x)

    def step(m, x):
        result = m(x)
        return (result[0] if isinstance(result, tuple) else result).square().mean()

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rankings = ranked(importance, model, groups, [x], step=step)
    assert [sorted(r.tolist()) for r in rankings] == [list(range(g.num_channels)) for g in groups]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------------- bad channels


@pytest.mark.parametrize("importance", ["magnitude", "activation", "taylor", "reconstruction"])
@pytest.mark.parametrize("kind", [MLP, Conv])
def test_a_dead_channel_goes_first(kind, importance):
    model, batches, groups = make(kind)
    with torch.no_grad():
        for i in (2,) if kind is MLP else (2, 5):  # nothing produces it, nothing reads it
            model.a.weight[i] = 0
            model.a.bias[i] = 0
            if kind is Conv:
                model.norm.bias[i] = 0
        model.b.weight[:, 2] = 0
    assert ranked(importance, model, groups, batches)[0][0] == 2


@pytest.mark.parametrize("importance", ["activation", "reconstruction"])
def test_a_constant_channel_goes_first_where_its_mean_replaces_it(importance):
    model, batches, groups = make(MLP)
    with torch.no_grad():
        model.a.weight[4] = 0
        model.a.bias[4] = 100.0
        model.a.bias[:4].add_(3.0)
    assert ranked(importance, model, groups, batches)[0][0] == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", [MLP, Conv])
def test_channels_that_are_not_finite_do_not_break_a_ranking(kind, importance, bad):
    model, batches, groups = make(kind)
    with torch.no_grad():
        model.a.weight[1] = bad
    rankings = ranked(importance, model, groups, batches)
    assert [sorted(r.tolist()) for r in rankings] == [list(range(g.num_channels)) for g in groups]
    assert np.isfinite(norms(model, groups)).all() or bad == float("inf")


def test_nothing_calibrated_ranks_by_weights():
    model, batches, groups = make(MLP)
    by_weights = ranked("magnitude", model, groups, batches)
    for importance in ("activation", "reconstruction"):
        found = rank(importance, model, groups, [], {}, np.random.default_rng(0))
        assert [r.tolist() for r in found] == [r.tolist() for r in by_weights]


# --------------------------------------------------------------------------------------------------- nothing is left


@pytest.mark.parametrize("fails", [False, True])
def test_taylor_leaves_gradients_and_flags_as_they_were(fails):
    model, batches, groups = make(MLP)
    model.a.requires_grad_(False)
    loss_of(model, batches[0]).backward()
    before = [(p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()]
    count = 0

    def step(model, x):
        nonlocal count
        count += 1
        if fails and count == 2:
            raise KeyError("the user's own")
        return loss_of(model, x)

    if fails:
        with pytest.raises(KeyError, match="the user's own"):
            ranked("taylor", model, groups, batches, step=step)
    else:
        ranked("taylor", model, groups, batches, step=step)
    for parameter, (grad, value, flag) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad
        assert parameter.requires_grad == flag
        assert grad is None or torch.equal(grad, value)


def test_taylor_works_within_no_grad_and_reads_lightnings_dictionaries():
    model, batches, groups = make(MLP)
    expected = ranked("taylor", model, groups, batches)
    with torch.no_grad():
        found = ranked("taylor", model, groups, batches, step=lambda m, x: {"loss": loss_of(m, x), "other": 1})
    assert [r.tolist() for r in found] == [r.tolist() for r in expected]


@pytest.mark.parametrize(
    "step",
    [
        lambda model, x: None,
        lambda model, x: {"accuracy": torch.tensor(1.0)},
        lambda model, x: loss_of(model, x).detach(),
        lambda model, x: 0.3,
    ],
)
def test_taylor_without_a_loss_says_so(step):
    model, batches, groups = make(MLP)
    with pytest.raises(ValueError, match="importance: 'taylor' needs a step that returns a loss with a gradient"):
        ranked("taylor", model, groups, batches, step=step)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_depends_on_its_seed_alone():
    model, batches, groups = make(MLP)
    one, two = (ranked("random", model, groups, batches, seed=3) for _ in range(2))
    other = ranked("random", model, groups, batches, seed=4)
    assert [r.tolist() for r in one] == [r.tolist() for r in two]
    assert [r.tolist() for r in one] != [r.tolist() for r in other]


def test_channels_of_infinite_scores_of_ones_own_go_first_and_last():
    model, batches, groups = make(MLP)

    def scores(model, group):
        return [float("inf"), *range(group.num_channels - 2), -float("inf")]

    for order, group in zip(ranked(scores, model, groups, batches), groups, strict=True):
        assert order.tolist() == [group.num_channels - 1, *range(1, group.num_channels - 1), 0]


def test_an_unknown_importance_names_the_known_ones():
    model, batches, groups = make(MLP)
    with pytest.raises(ValueError, match=r"importance: 'size' is not one of .*'magnitude'"):
        ranked("size", model, groups, batches)


def test_the_magnitude_of_a_hidden_unit_is_that_of_all_its_gates_and_of_all_that_reads_it():
    """Directions lie side by side in what the layer above reads, gates one upon another."""
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True).requires_grad_(False)
    group = PruningGroup("0", "", "intra", 5, (Member("0", "out", np.arange(5)),))
    expected = np.zeros(5)
    for name, weight in lstm.named_parameters():
        for unit in range(5):
            if weight.ndim == 2:
                expected[unit] += sum(float(weight[gate * 5 + unit].square().sum()) for gate in range(4))
            if name.startswith("weight_hh"):
                expected[unit] += float(weight[:, unit].square().sum())
            if name.startswith("weight_ih_l1"):
                expected[unit] += float(weight[:, unit].square().sum() + weight[:, 5 + unit].square().sum())
    model = nn.Sequential(lstm)
    found = rank("magnitude", model, [group], [], {}, np.random.default_rng(0))
    assert [ranking.tolist() for ranking in found] == order([expected])
    np.testing.assert_allclose(norms(model, [group]), np.sqrt(expected).mean(), rtol=1e-6)
