"""Modules take the shape of a file."""

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_softprune import (
    find_groups,
    resize,
)
from lightning_softprune.checkpoint import ModelShapes, keep_record
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support import zoo
from support.checkpoints import mlp

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Wrapped(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net


def prune(net, x, remove=lambda n: range(0, n, 2)):
    """Remove every other channel of each group, or as told."""
    groups = [group for group in find_groups(net, x) if group.prunable]
    apply_plan(
        net, groups, Plan(tuple(tuple(remove(group.num_channels))[: group.num_channels - 1] for group in groups))
    )
    return net


def record_of(net, dense):
    """The record that a checkpoint of this network would have."""
    module = Wrapped(net)
    keep_record(module, ModelShapes.of(Wrapped(dense)), [])
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    return in_file(checkpoint["softprune"])


def in_file(value):
    """Through a file that is loaded with `weights_only=True`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def built(case, seed=5):
    return case.make(seed)[0]


def assert_like(loaded, saved, x):
    assert {name: p.shape for name, p in loaded.named_parameters()} == {n: p.shape for n, p in saved.named_parameters()}
    assert str(loaded) == str(saved)
    with torch.no_grad():
        for a, b in zip(flat(loaded(x)), flat(saved(x)), strict=True):
            assert torch.equal(a, b)


def flat(output):
    return output if isinstance(output, tuple) else (output,)


CASES = [pytest.param(case, id=f"{case.name}{len(case.shape)}") for case in zoo.PRUNABLE]


REMOVE = {
    "half": lambda n: range(0, n, 2),
    "to_one": lambda n: range(n),  # all but the last
}


@pytest.mark.slow
@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("case", CASES)
def test_a_fresh_network_takes_the_shape_and_the_weights_of_a_pruned_one(case, remove):
    net, x = case.make()
    prune(net, x, REMOVE[remove])
    fresh = Wrapped(built(case))
    resize(fresh, {"softprune": record_of(net, built(case))})
    fresh.load_state_dict(Wrapped(net).state_dict())
    assert_like(fresh.net, net, x)


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("case", CASES)
def test_a_pruned_network_grows_back(case, remove):
    dense, x = case.make()
    net = Wrapped(prune(built(case), x, REMOVE[remove]))
    resize(net, record_of(dense, dense))
    net.load_state_dict(Wrapped(dense).state_dict())
    assert_like(net.net, dense, x)


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_alone_is_enough_where_shapes_tell(case):
    dense, x = case.make()
    net = prune(copy.deepcopy(dense), x, lambda n: range(1, n, 3))
    shrunk, grown = built(case), prune(built(case), x, lambda n: range(0, n, 3))
    resize(shrunk, net.state_dict())
    shrunk.load_state_dict(net.state_dict())
    assert_like(shrunk, net, x)
    resize(grown, dense.state_dict())
    grown.load_state_dict(dense.state_dict())
    assert_like(grown, dense, x)


class Heads(nn.Module):
    """Reads some of its numbers where it lays tensors out, and others elsewhere or not at all."""

    def __init__(self, heads=4, width=32, repeats=2):
        super().__init__()
        self.heads, self.width, self.repeats, self.head_dim = heads, width, repeats, width // heads
        self.qkv, self.out = nn.Linear(6, 3 * width, bias=False), nn.Linear(width, 6)

    def split(self, x):
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x):
        for _ in range(self.repeats):
            x = self.out(nn.functional.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))
        return x


class Placed(nn.Module):
    """Buffers in the state dict: one as wide as the layers, and one that holds as much as was put into it."""

    def __init__(self, bare=False):
        super().__init__()
        self.register_buffer("positions", torch.randn(5, 8))
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)
        if bare:
            self.up, self.down = (nn.ParameterList([torch.randn(size)]) for size in ((3, 8), (8, 2)))
        self.register_buffer("seen", torch.zeros(0, 8))

    def _load_from_state_dict(self, state, prefix, *args):
        self.seen = state[f"{prefix}seen"].clone()
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x):
        up, down = (part if isinstance(part, nn.Linear) else part[0].__rmatmul__ for part in (self.up, self.down))
        return down(up(x) + self.positions)


@pytest.mark.parametrize("bare", [False, True])
def test_buffers_as_wide_as_pruned_layers_take_the_shape_that_a_state_dict_alone_tells(bare):
    x = torch.randn(5, 3)
    pruned, fresh = prune(Placed(bare), x), Placed(bare)
    pruned.seen = torch.ones(7, 8)
    expected = pruned(x)
    resize(fresh, pruned.state_dict())
    assert (fresh.positions.shape, fresh.seen.shape) == ((5, 4), (0, 8))
    fresh.load_state_dict(pruned.state_dict())
    assert fresh.seen.shape == (7, 8)
    assert torch.equal(fresh(x), expected)


def test_a_number_that_shapes_leave_in_doubt_is_named_in_a_warning():
    model, pruned = nn.Sequential(Heads()), nn.Sequential(Heads(3, 24)).state_dict()
    with pytest.warns(UserWarning, match=r"SoftPruning: 0\.heads \(4\): the shapes alone do not tell") as caught:
        resize(model, pruned)
    model.load_state_dict(pruned)
    assert (len(caught), model[0].heads) == (1, 4)
    for told in (Heads(4, 20), Heads()):  # no four wide heads less, and nothing that changes
        resize(nn.Sequential(Heads()), nn.Sequential(told).state_dict())
    record = {"format": 1, **ModelShapes.of(model).to_dict(), "created_biases": [], "results": []}
    resize(nn.Sequential(Heads()), {**record, "dense": ModelShapes.of(nn.Sequential(Heads())).to_dict()})


class NoAffine(nn.Module):
    """Normalisations that have no tensor of their own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.layer_norm = nn.LayerNorm(8, elementwise_affine=False)
        self.inner = nn.Linear(8, 6)
        self.group_norm = nn.GroupNorm(2, 6, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.group_norm(self.inner(self.layer_norm(self.body(x)).relu())).relu())


def test_layers_without_tensors_are_sized_by_the_record_and_refused_without():
    net, x = NoAffine(), torch.randn(3, 5)
    dense = copy.deepcopy(net)
    prune(net, x)
    assert (net.layer_norm.normalized_shape, net.group_norm.num_channels) == ((4,), 2)
    fresh = Wrapped(NoAffine())
    resize(fresh, record_of(net, dense))
    fresh.load_state_dict(Wrapped(net).state_dict())
    assert_like(fresh.net, net, x)

    other = NoAffine()
    before = copy.deepcopy(other.state_dict()), str(other)
    with pytest.raises(ValueError, match=r"^layer_norm: no tensor of this LayerNorm tells its size.*whole checkpoint"):
        resize(other, net.state_dict())
    assert str(other) == before[1]
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), before[0].values(), strict=True))
    resize(other, dense.state_dict())  # nothing to change, nothing to ask
    other.body, other.layer_norm = nn.Identity(), nn.Identity()
    partial = {k: v for k, v in net.state_dict().items() if not k.startswith("body")}
    with pytest.raises(ValueError, match=r"^group_norm: no tensor of this GroupNorm"):
        resize(other, partial)


def test_layers_without_tensors_elsewhere_are_no_obstacle():
    def build():
        return nn.Sequential(nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))

    net, fresh, x = build(), build(), torch.randn(3, 5)
    resize(fresh, prune(net, x).state_dict())
    fresh.load_state_dict(net.state_dict())
    assert_like(fresh, net, x)


def test_bias_created_by_compensation_is_made_and_removed():
    dense = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    net, x = copy.deepcopy(dense), torch.randn(3, 4)
    prune(net, x)
    net[2].bias = nn.Parameter(torch.randn(2))
    record = record_of(net, dense)
    assert record["created_biases"] == ["net.2.bias"]
    for source in (record, Wrapped(net).state_dict()):
        fresh = Wrapped(copy.deepcopy(dense)).double().requires_grad_(False)
        resize(fresh, source)
        assert (fresh.net[2].bias.dtype, fresh.net[2].bias.requires_grad) == (torch.float64, False)
        assert list(dict(fresh.named_parameters())) == ["net.0.weight", "net.2.weight", "net.2.bias"]
        fresh.float().load_state_dict(Wrapped(net).state_dict())
        assert_like(fresh.net, net, x)
    back = Wrapped(net)
    resize(back, record_of(dense, dense))
    back.load_state_dict(Wrapped(dense).state_dict())
    assert_like(back.net, dense, x)


def test_new_tensors_are_like_the_old_ones():
    def build():
        net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3, bias=False)).to(
            memory_format=torch.channels_last, dtype=torch.bfloat16
        )
        net[0].weight.note = "kept"
        net[0].requires_grad_(False)
        return net

    net = prune(build(), torch.randn(1, 2, 8, 8, dtype=torch.bfloat16))
    fresh = build()
    weight = fresh[0].weight.clone()
    resize(fresh, net.state_dict())
    first, second = fresh[0].weight, fresh[2].weight
    assert isinstance(first, nn.Parameter)
    assert first.dtype == torch.bfloat16
    assert first.note == "kept"
    assert (first.requires_grad, second.requires_grad) == (False, True)
    assert second.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, weight[:4])


def test_tied_weights_stay_one_tensor_also_when_the_file_names_them_once():
    case = zoo.BY_NAME["Transformer"]
    net, x = case.make()
    prune(net, x, lambda n: range(1, n, 3))
    for state in (net.state_dict(), {k: v for k, v in net.state_dict().items() if k != "head.weight"}):
        fresh = built(case)
        resize(fresh, state)
        assert fresh.head.weight is fresh.embedding.weight
        assert fresh.head.weight.shape == (11, 5)


def test_meta_and_lazy_modules_are_no_obstacle():
    net = prune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    resize(fresh, net.state_dict())
    assert fresh[0].weight.is_meta
    fresh.load_state_dict(net.state_dict(), assign=True)
    assert_like(fresh, net, torch.randn(2, 4))
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    resize(lazy, net.state_dict())
    lazy.load_state_dict(net.state_dict())
    assert torch.equal(lazy(torch.ones(1, 4)), net(torch.ones(1, 4)))


OTHERS = {
    "another kind of layer": (mlp(4, 8, 2), nn.Sequential(nn.Conv1d(4, 8, 1), nn.ReLU(), nn.Linear(8, 2)), "0"),
    "deeper": (mlp(4, 8, 2), mlp(4, 8, 8, 2), "4"),
    "shallower": (mlp(4, 8, 8, 2), mlp(4, 8, 2), "4"),
    "other names": (mlp(4, 8, 2), nn.Sequential(nn.Sequential(mlp(4, 8, 2))), "0.0.0"),
    "kernel": (nn.Sequential(nn.Conv2d(1, 8, 3)), nn.Sequential(nn.Conv2d(1, 6, 5)), "0"),
    "vocabulary": (nn.Sequential(nn.Embedding(9, 8)), nn.Sequential(nn.Embedding(7, 6)), "0"),
    "heads": (
        nn.Sequential(nn.Linear(4, 12), nn.MultiheadAttention(12, 3)),
        nn.Sequential(nn.Linear(4, 10), nn.MultiheadAttention(10, 2)),
        "1",
    ),
    "groups": (nn.Sequential(nn.GroupNorm(4, 8)), nn.Sequential(nn.GroupNorm(3, 6)), "0"),
    "recurrent": (nn.Sequential(nn.LSTM(4, 8)), nn.Sequential(nn.GRU(4, 6)), "0"),
    "projections": (nn.Sequential(nn.LSTM(4, 8, proj_size=3)), nn.Sequential(nn.LSTM(4, 8)), "0"),
    "computed weight": (
        nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8))),
        nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))),
        "0",
    ),
    "two axes": (nn.Sequential(nn.LayerNorm((2, 8))), nn.Sequential(nn.LayerNorm(8)), "0"),
}


@pytest.mark.parametrize("with_record", [True, False], ids=["record", "state_dict"])
@pytest.mark.parametrize("what", OTHERS)
def test_another_architecture_is_refused_by_the_modules_name_and_nothing_changes(what, with_record):
    model, saved, name = OTHERS[what]
    if with_record:
        saved, model, name = Wrapped(saved), Wrapped(model), f"net.{name}"
        source = {"state_dict": saved.state_dict(), "softprune": record_of(saved.net, saved.net)}
    else:
        source = saved.state_dict()
    tensors, text, attributes = dict(model.named_parameters()), str(model), set(vars(model))
    with pytest.raises(ValueError, match=rf"^{name.replace('.', '[.]')}: "):
        resize(model, source)
    assert str(model) == text
    assert set(vars(model)) == attributes
    assert all(tensors[name] is parameter for name, parameter in model.named_parameters())


def test_a_tied_tensor_cannot_have_two_shapes():
    model = mlp(4, 4, 4)
    model[2].weight = model[0].weight
    saved = mlp(4, 4, 2)
    with pytest.raises(ValueError, match=r"^2: 2.weight is one tensor with 0.weight"):
        resize(model, saved.state_dict())


@pytest.mark.parametrize("source", [[1, 2], {}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": [1]}, None, "x.ckpt"])
def test_what_is_no_checkpoint_is_refused(source):
    with pytest.raises(ValueError, match=r"neither a checkpoint, nor its .softprune. record, nor a state dict"):
        resize(mlp(4, 8, 2), source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99; this version of lightning-softprune reads formats up to 2"),
        ({"format": None}, "it has no format version"),
        ({"layers": None}, "record is damaged"),
        ({"shapes": {"0.weight": "wide"}}, "record is damaged"),
    ],
)
def test_a_damaged_or_newer_record_is_refused(change, message):
    record = record_of(mlp(4, 8, 2), mlp(4, 8, 2)) | change
    with pytest.raises(ValueError, match=message):
        resize(Wrapped(mlp(4, 8, 2)), {"softprune": record})


@pytest.mark.parametrize(("layer", "last"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)])
def test_resized_weights_stay_in_channels_last(layer, last):
    model = nn.Sequential(layer(3, 8, 3), layer(8, 4, 3)).to(memory_format=last)
    smaller = nn.Sequential(layer(3, 6, 3), layer(6, 4, 3))
    resize(model, smaller.state_dict())
    assert model[1].weight.shape == smaller[1].weight.shape
    assert model[1].weight.is_contiguous(memory_format=last)
    assert not model[1].weight.is_contiguous()
