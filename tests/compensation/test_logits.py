"""Queries that make up for lost dimensions of heads, against brute-force least squares over logits."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import UniformBaseline, prune
from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.compensation import Compensation, find_logit_fits
from lightning_softprune.compensation.logits import logit_map
from lightning_softprune.graph.grouping import groups_of
from lightning_softprune.graph.trace import trace_model
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, DIM, WIDTH = 2, 6, 10


class Attention(nn.Module):
    """Attention that can lose a dimension of every head; `read` is done to queries before they meet keys."""

    def __init__(self, form="sdpa", read=lambda q: q, bias=True):
        super().__init__()
        self.form, self.read, self.scale = form, read, DIM**-0.5
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM, bias=bias) for _ in range(3))
        self.out = nn.Linear(HEADS * DIM, 3)

    def heads(self, x):
        return tuple(layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def logits(self, x):
        q, k, _ = self.heads(x)
        return self.read(q) @ k.transpose(-1, -2)

    def forward(self, x):
        q, k, v = self.heads(x)
        q = self.read(q)
        if self.form == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        elif self.form == "matmul":
            mixed = torch.matmul(q * self.scale, k.mT).softmax(-1) @ v
        else:
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
            mixed = (torch.bmm(q, k.permute(0, 2, 1)) * self.scale).softmax(-1) @ v
            mixed = mixed.unflatten(0, (-1, HEADS))
        return self.out(mixed.transpose(1, 2).flatten(2))


FORMS = ("sdpa", "matmul", "bmm")


def by_dimension(model, steps):
    """Groups that hold one dimension of every head."""
    trace = trace_model(model, steps)
    sites = {split.site for split in trace.couplings().splits}
    groups = groups_of(trace, (), dict.fromkeys(sites, 1)).groups
    return [group for group in groups if group.prunable]


def pruned(model, x, lost=(1, 4), mode="least_squares"):
    """The dense model, the surgery, and the layers that were fitted; the model has lost these dimensions of q and k."""
    dense, steps = copy.deepcopy(model), [lambda part=part: model(part) for part in x.chunk(2)]
    groups = by_dimension(model, steps)
    assert [(g.name, g.num_channels) for g in groups][:1] == [("q", DIM)]
    rankings = [np.array([*lost, *(d for d in range(DIM) if d not in lost)])] + [np.arange(DIM)] * (len(groups) - 1)
    statistics = collect_statistics(model, find_readers(model, groups), steps)
    found = Compensation(mode, model, groups, rankings, statistics)
    if mode == "least_squares":
        found.logits = find_logit_fits(model, groups, steps)
    surgery = apply_plan(model, groups, Plan.from_counts([len(lost)] + [0] * (len(groups) - 1), rankings))
    found.apply(model, surgery)
    return dense, surgery, found.logits.fitted(model, surgery)


def data(seed=0):
    torch.manual_seed(seed)
    return torch.randn(8, 5, WIDTH) @ torch.randn(WIDTH, WIDTH) + torch.randn(WIDTH)


@pytest.mark.parametrize("form", FORMS)
def test_the_map_of_each_head_is_that_of_brute_force_least_squares_over_all_pairs_of_queries_and_keys(form):
    x = data()
    model = Attention(form).double()
    x = x.double()
    dense, _, fitted = pruned(model, x)
    assert fitted == {"q"}
    stays = [0, 2, 3, 5]
    q, k, _ = dense.heads(x)
    now, keys, _ = model.heads(x)
    torch.testing.assert_close(keys, k[..., stays])  # not bit-equal: some processors add up fewer columns otherwise
    for head in range(HEADS):
        queries, others = q[:, head].flatten(0, 1), k[:, head].flatten(0, 1)
        rows = torch.einsum("ia,jb->ijab", queries[:, stays], others[:, stays]).reshape(-1, 16)
        best = torch.linalg.lstsq(rows, (queries @ others.t()).reshape(-1, 1)).solution.reshape(4, 4)
        assert torch.allclose(now[:, head].flatten(0, 1), queries[:, stays] @ best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_nearer_to_the_dense_ones_than_without(bias):
    x, errors = data() * torch.linspace(2.0, 0.1, WIDTH), {}
    torch.manual_seed(1)
    model = Attention(bias=bias)
    for mode in ("none", "least_squares"):
        smaller = copy.deepcopy(model)
        pruned(smaller, x, mode=mode)
        errors[mode] = (smaller.logits(x) - model.logits(x)).square().mean().item()
    assert errors["least_squares"] < 0.8 * errors["none"]


@pytest.mark.parametrize("form", FORMS)
def test_outputs_stay_where_lost_dimensions_are_combinations_of_kept_ones(form):
    x = data().double()
    torch.manual_seed(2)
    model = Attention(form).double()
    with torch.no_grad():
        for layer in (model.q, model.k):
            for head in range(HEADS):
                first = head * DIM
                for parameter in (layer.weight, layer.bias):
                    parameter[first + 1] = 0.7 * parameter[first] - parameter[first + 2]
                    parameter[first + 4] = parameter[first + 3] + 0.5 * parameter[first + 5]
    dense, _, _ = pruned(model, x)
    without = copy.deepcopy(dense)
    pruned(without, x, mode="none")
    wanted = dense(x)
    assert (without(x) - wanted).abs().max() > 1e-2
    assert (model(x) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "read",
    [
        lambda q: q * torch.linspace(0.5, 1.5, q.shape[-2])[:, None],  # as a rotary embedding does
        lambda q: q + 1.0,
        torch.tanh,
    ],
)
def test_queries_that_something_is_done_to_before_the_product_are_left_alone(read):
    torch.manual_seed(3)
    model = Attention(read=read)
    dense, _, fitted = pruned(model, data())
    assert fitted == set()
    rows = [head * DIM + d for head in range(HEADS) for d in (0, 2, 3, 5)]
    assert torch.equal(model.q.weight, dense.q.weight[rows])


def test_queries_that_are_read_elsewhere_too_are_left_alone():
    class Gated(Attention):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(DIM, 1)

        def forward(self, x):
            return super().forward(x) * self.gate(self.q(x).unflatten(-1, (HEADS, -1))).mean(-2)

    torch.manual_seed(4)
    _, _, fitted = pruned(Gated(), data())
    assert fitted == set()


def test_undone_surgery_leaves_the_dense_query_projection():
    torch.manual_seed(5)
    model, x = Attention(), data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, surgery, fitted = pruned(model, x)
    assert fitted == {"q"}
    surgery.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_map_leaves_kept_dimensions_as_they_are_where_lost_ones_say_nothing():
    moments = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    stays = torch.tensor([True, False, True])
    assert torch.allclose(logit_map(moments, moments, stays), torch.eye(2, dtype=torch.float64))


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.attention = Attention("matmul")

    def training_step(self, batch, _):
        return F.mse_loss(self.attention(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", self.training_step(batch, _))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.slow
def test_a_round_keeps_the_outputs_where_lost_dimensions_are_combinations_of_kept_ones():
    x = data()
    torch.manual_seed(6)
    module = Net()
    q, k = module.attention.q, module.attention.k
    with torch.no_grad():
        for layer in (q, k):
            for parameter in (layer.weight, layer.bias):
                heads = parameter.unflatten(0, (HEADS, DIM))
                heads[:, 1], heads[:, 4] = 0.3 * heads[:, 0] - 0.3 * heads[:, 2], 0.3 * heads[:, 3]
    wanted = module.attention(x).detach()
    loader = DataLoader(TensorDataset(x, wanted), 4)
    result = prune(
        module,
        train_dataloaders=loader,
        val_dataloaders=loader,
        bounds={"attention.q": [1 / 3, 1 / 3], "attention.v": [0.0, 0.0]},
        target_sparsity=0.2,
        tolerance=0.2,
        importance="magnitude",
        search=UniformBaseline(),
        report=False,
        verbose=False,
    )
    assert result.applied
    assert q.weight.shape == k.weight.shape == (HEADS * 4, WIDTH)
    assert (module.attention(x) - wanted).abs().max() < 1e-3
