"""Oracle: NumPy's mean and covariance of all observations at once."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune.calibration import (
    InputStatistics,
    Reader,
    Wanted,
    collect_statistics,
    find_readers,
    watch_inputs,
)
from lightning_softprune.calibration.products import PRODUCT_ERROR, cross_products
from lightning_softprune.calibration.readers import reading_weight
from lightning_softprune.calibration.statistics import KernelCoverage, kernel_coverage
from lightning_softprune.graph import geometry_of, parts_called
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.graph.groups import Member, PruningGroup
from support import zoo
from support.processes import run_as_processes

pytestmark = pytest.mark.usefixtures("one_thread")


def observations(n=57, width=6, seed=0):
    """Correlated, far from zero, of very different scales."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) * np.logspace(-2, 2, width)
    return mixed + rng.normal(size=width) * 1e3


def streamed(rows, splits, stride=1, dtype=torch.float64, covariances=True):
    statistics = InputStatistics(stride, covariances=covariances)
    for part in np.split(rows, splits):
        statistics.add(torch.from_numpy(part).to(dtype))
    return statistics


def pooled_covariance(rows, stride):
    """Every position of a channel is an observation of it, about its own mean."""
    centred = (rows - rows.mean(0)).reshape(len(rows), -1, stride)
    by_channel = np.concatenate([centred[:, :, position] for position in range(stride)])
    return by_channel.T @ by_channel / len(by_channel)


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("splits", [[], [1], [1, 2, 3, 40], [0, 0, 20, 57]])
@pytest.mark.parametrize("stride", [1, 2, 3, 6])
def test_streamed_moments_are_those_of_all_observations_at_once(splits, stride):
    rows = observations()
    found = streamed(rows, splits, stride)
    expected = pooled_covariance(rows, stride)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.variance, np.repeat(np.diag(expected), stride), rtol=1e-8)
    if stride == 1:
        np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("splits", [[], [1, 2, 3, 40]])
@pytest.mark.parametrize("stride", [1, 2, 6])
def test_variances_alone_are_the_same_and_take_no_matrix(splits, stride):
    rows = observations()
    found = streamed(rows, splits, stride, covariances=False)
    expected = np.repeat(np.diag(pooled_covariance(rows, stride)), stride)
    np.testing.assert_allclose(found.variance, expected, rtol=1e-8)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    assert all(value.numel() <= rows.shape[1] for value in vars(found).values() if isinstance(value, torch.Tensor))
    with pytest.raises(RuntimeError, match="nobody wanted"):
        _ = found.covariance


def test_what_is_wanted_follows_from_the_ranking_and_the_compensation():
    for importance in ("magnitude", "taylor", "random", len):
        assert Wanted.by(importance, "none") is None
    for importance in ("magnitude", "activation"):
        assert Wanted.by(importance, "bias") == Wanted(unfolded=True, covariances=False)
        assert Wanted.by(importance, "least_squares") == Wanted(unfolded=True, covariances=True)
    assert Wanted.by("activation", "none") == Wanted(unfolded=False, covariances=False)
    assert Wanted.by("reconstruction", "none") == Wanted(unfolded=False, covariances=True)
    assert Wanted.by("reconstruction", "bias") == Wanted(unfolded=True, covariances=True)


def test_a_mean_that_dwarfs_the_variance_does_not_cancel_it():
    rows = np.random.default_rng(0).normal(size=(4000, 3)) + 1e6
    found = streamed(rows, [5, 1000, 3999])
    np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_of_observations_in_low_precision_are_within_the_bound_of_those_in_double(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9000, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    rows = (rows * torch.logspace(-3, 3, 6) + torch.tensor([3.0, -1.0, 40.0, 0.0, 1e3, 1e4])).to(dtype)
    found = InputStatistics()
    for part in rows.split(2500):
        found.add(part)
    exact = np.cov(rows.double().numpy().T, bias=True)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.mean, rows.double().mean(0), rtol=1e-9, atol=1e-12)
    deviation = np.sqrt(np.diag(exact))
    error = np.abs(found.covariance.numpy() - exact) / np.outer(deviation, deviation)
    assert error.max() < PRODUCT_ERROR / 4  # by how much depends on the order in which a processor adds up
    np.testing.assert_allclose(found.covariance, found.covariance.T, rtol=0)


def test_products_are_in_single_precision_whatever_the_user_allows():
    rows = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) + 100
    plain = streamed(rows.numpy(), [100], dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            allowed = streamed(rows.numpy(), [100], dtype=torch.float32)
            crossed = cross_products(rows, rows[:, :7])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain.covariance, allowed.covariance)
    np.testing.assert_allclose(crossed, rows.double().T @ rows.double()[:, :7], rtol=1e-5)  # bfloat16: 4e-3


def test_products_of_wide_rows_are_those_of_all_columns():
    rows = torch.randn(1500, 1100, generator=torch.Generator().manual_seed(0))
    exact = rows.double().t() @ rows.double()
    size = exact.diagonal().sqrt()
    for found in (cross_products(rows), cross_products(rows, rows)):
        assert ((found - exact).abs() <= PRODUCT_ERROR / 4 * torch.outer(size, size)).all()


def test_memory_is_one_matrix_whatever_the_number_of_observations():
    found = InputStatistics(2)
    for seed in range(30):
        found.add(torch.from_numpy(observations(20, 8, seed)))
    held = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in held) == 8 + 4 * 4
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 8 for tensor in held)


def test_what_is_not_finite_counts_as_zero():
    rows = observations()
    broken = rows.copy()
    broken[3, 1], broken[5, 2], broken[7, 2], broken[9, 0] = np.nan, np.inf, -np.inf, 1e300
    zeroed = rows.copy()
    zeroed[3, 1] = zeroed[5, 2] = zeroed[7, 2] = zeroed[9, 0] = 0.0
    found = streamed(broken, [4, 6])
    np.testing.assert_allclose(found.mean, zeroed.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(zeroed.T, bias=True), rtol=1e-8, atol=1e-8)


def test_without_observations_there_is_nothing_and_nothing_fails():
    found = InputStatistics()
    found.add(torch.zeros(0, 5))
    assert found.count == 0
    assert found.covariance.shape == (0, 0)


def test_adding_observations_leaves_them_as_they_are():
    rows = torch.tensor([[1.0, float("nan")], [2.0, 3.0]], dtype=torch.float64)
    before = rows.clone()
    InputStatistics().add(rows)
    assert torch.equal(rows.nan_to_num(-1), before.nan_to_num(-1))


@pytest.mark.parametrize("covariances", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
def test_processes_with_shares_of_any_size_end_with_the_moments_of_all(stride, covariances, monkeypatch):
    rows = observations()
    shares = np.split(rows, [5, 31])
    found = [streamed(share, [2], stride, covariances=covariances) for share in shares]
    for statistics, coverage in zip(
        found, (KernelCoverage(0.5, 3.0), KernelCoverage(), KernelCoverage(0.25, 1.0)), strict=True
    ):
        statistics.coverage = coverage
    run_as_processes(monkeypatch, [statistics.all_reduce for statistics in found])
    for statistics in found:
        assert statistics.count == len(rows)
        coverage = np.average([[0.5, 3.0], [1.0, 0.0], [0.25, 1.0]], axis=0, weights=[len(share) for share in shares])
        np.testing.assert_allclose([statistics.coverage.share, statistics.coverage.unevenness], coverage)
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-12)
        expected = pooled_covariance(rows, stride)
        np.testing.assert_allclose(statistics.variance, np.repeat(np.diag(expected), stride), rtol=1e-8)
        if covariances:
            np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-8, atol=1e-8)


class Branches(nn.Module):
    """Runs its second layer where it is told to."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)
        self.never = nn.Conv2d(4, 2, 3)

    def forward(self, x, both):
        y = self.always(x)
        return self.sometimes(y) if both else y


def test_a_layer_that_ran_in_some_processes_has_their_statistics_in_all(monkeypatch):
    model, x = Branches(), torch.randn(3, 2, 7, 7)
    readers = [Reader(name, "in", 1) for name in ("sometimes", "never", "always")]

    def process(both):
        own = copy.deepcopy(model)
        return lambda: collect_statistics(own, readers, [lambda: own(x, both)])

    alone = process(both=True)()
    for found in run_as_processes(monkeypatch, [process(both) for both in (False, True, False)]):
        assert list(found) == ["sometimes", "always"]
        assert found["always"].count == 3 * alone["always"].count
        one, other = found["sometimes"], alone["sometimes"]
        assert one.count == other.count
        for mine, expected in ((one, other), (one.unfolded, other.unfolded)):
            np.testing.assert_allclose(mine.mean, expected.mean)
            np.testing.assert_allclose(mine.covariance, expected.covariance)
        assert one.coverage == other.coverage


# --------------------------------------------------------------------------------------------------------- readers


def examined(model, *inputs):
    model.eval()
    steps = [lambda x=x: model(x) for x in inputs]
    groups = [group for group in trace_groups(model, steps) if group.prunable]
    return groups, find_readers(model, groups), steps


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("Autoencoder", {"encoder.2": 1, "decoder.0": 1, "decoder.2": 1, "classifier": 1}),
        ("Residual", {"up": 1, "down": 1, "head": 4}),
        ("Sequence", {"inner": 1, "head": 7}),
        ("DepthwiseSeparable", {"pointwise": 1, "head": 1}),
        ("Attention", {"attention": 1, "attention.out_proj": 4, "head": 1}),
    ],
)
def test_readers_are_the_layers_that_mix_a_groups_channels_with_the_positions_behind_a_flatten(name, readers):
    model, x = zoo.BY_NAME[name].make()
    _, found, _ = examined(model, x)
    assert {reader.name: reader.stride for reader in found} == readers
    assert len(found) == len(readers)


@pytest.mark.parametrize(
    ("slot", "stride"),
    [
        ("aaaabbbb", 4),
        ("aaaabb", 2),  # maps of two sizes
        ("aaaab", 1),  # a map beside a vector
        ("abab", 1),  # channels last
        ("aaaa..", 2),  # what no prunable group owns
        ("aa....bbbb", 2),
        ("ab", 1),
    ],
)
def test_positions_of_a_channel_are_the_longest_blocks_that_tile_the_slot(slot, stride):
    owner = np.array([".ab".index(letter) - 1 for letter in slot])
    first = PruningGroup("a", "", "intra", 2, (Member("0", "in", owner),))
    assert find_readers(nn.Sequential(nn.Linear(len(slot), 2)), [first]) == [Reader("0", "in", stride)]
    one = PruningGroup("a", "", "intra", 1, (Member("0", "in", np.where(owner == 0, 0, -1)),))
    other = PruningGroup("b", "", "intra", 1, (Member("0", "in", np.where(owner == 1, 0, -1)),))
    assert find_readers(nn.Sequential(nn.Linear(len(slot), 2)), [one, other]) == [Reader("0", "in", stride)]


@pytest.mark.parametrize("case", zoo.PRUNABLE, ids=lambda case: case.name)
def test_collected_moments_are_those_of_what_the_reader_is_given(case):
    model, x = case.make()
    y = case.input()
    _, readers, steps = examined(model, x, y)
    seen: dict[str, list[np.ndarray]] = {}
    handles = [
        model.get_submodule(reader.name).register_forward_pre_hook(
            lambda module, args, name=reader.name: seen.setdefault(name, []).append(args[0].detach().double().numpy())
        )
        for reader in readers
    ]
    with torch.no_grad(), parts_called(model):
        model(x)
        model(y)
    for handle in handles:
        handle.remove()
    found = collect_statistics(model, readers, steps)
    assert found.keys() == seen.keys()
    for reader in readers:
        layer = model.get_submodule(reader.name)
        inputs = [np.moveaxis(a, 1, -1) if hasattr(layer, "kernel_size") else a for a in seen[reader.name]]
        rows = np.concatenate([a.reshape(-1, a.shape[-1]) for a in inputs])
        assert found[reader.name].count == len(rows)
        np.testing.assert_allclose(found[reader.name].mean, rows.mean(0), atol=1e-9)
        covariance = pooled_covariance(rows, reader.stride)
        bound = PRODUCT_ERROR * np.diag(covariance).max()
        np.testing.assert_allclose(found[reader.name].covariance, covariance, atol=bound / 20)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.MultiheadAttention(6, 2),
    ],
    ids=str,
)
def test_the_reading_weights_of_a_channel_are_those_whose_loss_it_feels(layer):
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    found = reading_weight(layer)
    for channel in range(6):
        x = torch.zeros(2, 6) if isinstance(layer, (nn.Linear, nn.MultiheadAttention)) else torch.zeros(2, 6, 5, 5)
        x[:, channel] = 1.0
        out = nn.functional.linear(x, weight) if isinstance(layer, nn.MultiheadAttention) else layer(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), weight)
        assert found[channel].square().sum().item() == pytest.approx(weight[gradient != 0].square().sum().item())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 2, 3, padding=1), (5,)),
        (nn.Conv2d(4, 2, 3, padding=1, stride=2, groups=2), (5, 7)),
        (nn.Conv2d(4, 2, (1, 4), padding="same", dilation=2), (6, 6)),
        (nn.Conv3d(4, 2, 2), (3, 3, 3)),
        (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), (5, 5)),
        (nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), (4,)),
        (nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1), (4, 5)),
        (nn.ConvTranspose3d(4, 2, 2, dilation=2), (3, 2, 3)),
        (nn.ConvTranspose2d(4, 2, 2, stride=3), (2, 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel.*")
def test_taps_that_fall_on_the_input_are_what_a_layer_of_ones_adds_up(layer, shape):
    for batch in ((2,), ()):
        x = torch.ones(*batch, 4, *shape)
        found = kernel_coverage(geometry_of(layer).kernel, x)
        ones = copy.deepcopy(layer)
        nn.init.ones_(ones.weight)
        nn.init.zeros_(ones.bias)
        n = ones(x).detach().double().numpy() / (4 // layer.groups)
        assert found.share == pytest.approx(n.mean() / np.prod(layer.kernel_size))
        assert found.unevenness == pytest.approx(n.var() / n.mean(), abs=1e-6)


def test_the_taps_of_inputs_of_several_sizes_are_averaged_by_their_observations():
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1))
    short, long = torch.ones(4, 2, 2), torch.ones(1, 2, 6)
    steps = [lambda: model(short), lambda: model(long)]
    found = collect_statistics(model, [Reader("0", "in", 1)], steps)["0"].coverage
    first, second = (kernel_coverage(geometry_of(model[0]).kernel, x) for x in (short, long))
    assert first.share == pytest.approx(2 / 3)
    assert found.share == pytest.approx((8 * first.share + 6 * second.share) / 14)
    assert found.unevenness == pytest.approx((8 * first.unevenness + 6 * second.unevenness) / 14)


def test_other_layers_meet_their_input_everywhere():
    assert kernel_coverage(geometry_of(nn.Linear(3, 2)).kernel, torch.ones(4, 3)) == KernelCoverage(1.0, 0.0)


# -------------------------------------------------------------------------------------------------- leaving no trace


def test_calibration_leaves_model_batches_hooks_and_random_state_alone():
    model, x = zoo.BY_NAME["Residual"].make()
    _, readers, steps = examined(model, x)
    weights, batch, random = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    first = collect_statistics(model, readers, steps)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, batch)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(statistics.mean.requires_grad for statistics in first.values())
    second = collect_statistics(model, readers, steps)
    for name, statistics in first.items():
        assert torch.equal(statistics.covariance, second[name].covariance)


def test_hooks_go_when_the_users_code_fails():
    model = nn.Sequential(nn.Linear(2, 2))

    def fail():
        raise ZeroDivisionError("the user's own")

    with pytest.raises(ZeroDivisionError, match="the user's own"):
        collect_statistics(model, [Reader("0", "in", 1)], [fail])
    assert not model[0]._forward_pre_hooks


def test_inputs_given_by_keyword_are_seen():
    layer, seen = nn.Linear(3, 2), []
    with watch_inputs(nn.Sequential(layer), ["0"], lambda name, source: seen.append((name, source))):
        layer(input=torch.ones(4, 3))
    assert [(name, source.shape) for name, source in seen] == [("0", (4, 3))]


def test_a_reader_that_did_not_run_has_no_statistics():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    readers = [Reader("0", "in", 1), Reader("1", "in", 1)]
    assert list(collect_statistics(model, readers, [lambda: model[1](torch.ones(3, 2))])) == ["1"]


class Attending(nn.Module):
    """Queries, keys and values of one tensor; with `apart`, the keys are those of another from the second call on."""

    def __init__(self, apart=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 3) for _ in range(3))
        self.apart, self.calls = apart, 0

    def forward(self, x):
        self.calls += 1
        other = x + 1 if self.apart and self.calls % 2 == 0 else x
        return self.q(x) + self.k(other) + self.v(x)


def test_layers_that_read_the_same_tensors_share_their_statistics():
    model, x = Attending(), torch.randn(20, 5)
    readers = [Reader(name, "in", 1) for name in "qkv"]
    found = collect_statistics(model, readers, [lambda: model(x), lambda: model(x + 1)])
    assert found.keys() == {"q", "k", "v"}
    assert found["q"] is found["k"] is found["v"]
    assert found["q"].count == 40


def test_layers_that_read_the_same_tensor_only_at_first_do_not_share():
    model, x = Attending(apart=True), torch.randn(20, 5)
    readers = [Reader(name, "in", 1) for name in "qkv"]
    found = collect_statistics(model, readers, [lambda: model(x), lambda: model(x)])
    torch.testing.assert_close(found["q"].mean, x.double().mean(0))
    torch.testing.assert_close(found["k"].mean, x.double().mean(0) + 0.5)
    torch.testing.assert_close(found["v"].mean, x.double().mean(0))
    assert [found[name].count for name in "qkv"] == [40] * 3


def test_a_tensor_that_was_changed_in_place_is_another_one():
    model, x = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]), torch.randn(20, 5)

    def step():
        y = x.clone()
        model[0](y)
        model[1](y.add_(1))

    found = collect_statistics(model, [Reader("0", "in", 1), Reader("1", "in", 1)], [step])
    torch.testing.assert_close(found["1"].mean, found["0"].mean + 1)
