"""Surgery against masked networks, against smaller networks built by hand, and against masked training."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import Transaction, apply_plan, probe_groups, repair_optimizers
from support import zoo
from support.zoo import BY_NAME, PRUNABLE, prunable

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = (0, 1, 2)
every_case = pytest.mark.parametrize("case", PRUNABLE, ids=lambda case: f"{case.name}-{len(case.shape)}d")


def random_plan(groups, seed, keep=1):
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(1, max(group.num_channels - keep, 1) + 1)) for group in groups]
    return Plan.from_counts(counts, [rng.permutation(group.num_channels) for group in groups])


def plan_for(groups, **removed):
    """A plan by group name (dots as underscores)."""
    return Plan(tuple(removed.get(group.name.replace(".", "_"), ()) for group in groups))


def outputs(result):
    return torch.cat([tensor.flatten() for tensor in (result if isinstance(result, tuple) else (result,))])


def close(one, other):
    torch.testing.assert_close(outputs(one), outputs(other), rtol=1e-5, atol=1e-5)


def snapshot(model):
    """Every object a module tree holds, and the values of its tensors."""
    held = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            held[name, key] = value if isinstance(value, (int, float, tuple, str, bool)) else id(value)
        for kind in (module._parameters, module._buffers, module._modules):
            for key, value in kind.items():
                held[name, "held", key] = id(value)
    tensors = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return held, tensors


def assert_same(model, before):
    held, tensors = snapshot(model)
    assert held == before[0]
    assert tensors.keys() == before[1].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name]), name


# ------------------------------------------------------------------------------------------- the network computed


def mask_readers(model, groups, plan):
    """Zero, on the dense network, the weights with which linear and convolution layers read removed channels."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for group, channels in zip(groups, plan.removed, strict=True):
            for member in group.members:
                module = modules.get(member.module)
                if member.slot != "in":
                    continue
                for index in np.flatnonzero(np.isin(member.owner, channels)).tolist():
                    if isinstance(module, _ConvTransposeNd):
                        module.weight[index] = 0
                    elif isinstance(module, _ConvNd):
                        width, height = module.in_channels // module.groups, module.out_channels // module.groups
                        part = index // width
                        module.weight[part * height : (part + 1) * height, index % width] = 0
                    else:
                        module.weight[:, index] = 0


@pytest.mark.parametrize(
    "case", [case for case in PRUNABLE if case.masked], ids=lambda case: f"{case.name}-{len(case.shape)}d"
)
def test_the_pruned_network_computes_what_the_masked_one_does(case):
    changed = False
    for seed in range(5):
        model, x = case.make(seed)
        groups = prunable(model, x)
        plan = random_plan(groups, seed)
        masked = copy.deepcopy(model)
        mask_readers(masked, groups, plan)
        expected = masked(x)
        changed = changed or not torch.equal(outputs(expected), outputs(model(x)))
        apply_plan(model, groups, plan)
        close(model(x), expected)
    assert changed


@pytest.mark.parametrize("seed", SEEDS)
@every_case
def test_all_groups_at_once_are_the_same_as_one_after_the_other(case, seed):
    """Sequentially, the groups are traced anew after every step."""
    model, x = case.make(seed)
    groups = prunable(model, x)
    plan = random_plan(groups, seed, keep=2)  # a grouped layer with one channel in each part is another kind of layer
    one_by_one = copy.deepcopy(model)
    for group, channels in zip(groups, plan.removed, strict=True):
        current = {g.name: g for g in zoo.find(one_by_one, x)}[group.name]
        apply_plan(one_by_one, [current], Plan((channels,)))
    apply_plan(model, groups, plan)
    assert model.state_dict().keys() == one_by_one.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, one_by_one.state_dict()[name]), name
    assert torch.equal(outputs(model(x)), outputs(one_by_one(x)))


def complement(removed, n):
    return [index for index in range(n) if index not in removed]


def load(module, **tensors):
    with torch.no_grad():
        for name, tensor in tensors.items():
            target = module.get_parameter(name.replace("__", "."))
            assert target.shape == tensor.shape, name
            target.copy_(tensor)
    return module.eval()


@pytest.mark.parametrize("removed", [(0,), (2, 5, 7), tuple(range(7))])
@pytest.mark.parametrize("name", ["LayerNormed", "RMSNormed"])
def test_layer_norm_and_rms_norm_equal_a_network_built_by_hand(name, removed):
    model, x = BY_NAME[name].make()
    kept = complement(removed, 8)
    norm = load(type(model.norm)(len(kept)), weight=model.norm.weight[kept])
    if name == "LayerNormed":
        load(norm, bias=model.norm.bias[kept])
    expected = nn.Sequential(
        load(nn.Linear(5, len(kept)), weight=model.body.weight[kept], bias=model.body.bias[kept]),
        norm,
        nn.ReLU(),
        load(nn.Linear(len(kept), 3), weight=model.head.weight[:, kept], bias=model.head.bias),
    )(x)
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, body=removed))
    close(model(x), expected)
    assert model.norm.normalized_shape == (len(kept),)


@pytest.mark.parametrize("removed", [(1,), (0, 2, 3)])
def test_group_norm_equals_a_network_built_by_hand(removed):
    model, x = BY_NAME["GroupNormed"].make()
    kept = [4 * part + channel for part in range(3) for channel in complement(removed, 4)]
    n = len(kept)
    expected = nn.Sequential(
        load(nn.Conv2d(2, n, 3, padding=1), weight=model.body.weight[kept], bias=model.body.bias[kept]),
        load(nn.GroupNorm(3, n), weight=model.norm.weight[kept], bias=model.norm.bias[kept]),
        nn.ReLU(),
        load(nn.Conv2d(n, 2, 1), weight=model.head.weight[:, kept], bias=model.head.bias),
    )(x)
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, body=removed))
    close(model(x), expected)


def smaller_attention(dense, kept):
    """Attention over the kept dimensions of every head."""
    width = dense.embed_dim
    thrice = [copy_ * width + index for copy_ in range(3) for index in kept]
    small = nn.MultiheadAttention(
        len(kept), dense.num_heads, batch_first=dense.batch_first, add_bias_kv=dense.bias_k is not None
    )
    load(
        small,
        in_proj_weight=dense.in_proj_weight[thrice][:, kept],
        in_proj_bias=dense.in_proj_bias[thrice],
        out_proj__weight=dense.out_proj.weight[kept][:, kept],
        out_proj__bias=dense.out_proj.bias[kept],
    )
    if dense.bias_k is not None:
        load(small, bias_k=dense.bias_k[..., kept], bias_v=dense.bias_v[..., kept])
    return small


@pytest.mark.parametrize("removed", [(1,), (0, 2), (0, 1, 3)])
def test_attention_equals_a_network_built_by_hand(removed):
    model, x = BY_NAME["Attention"].make()
    nn.init.normal_(model.attention.in_proj_bias)
    nn.init.normal_(model.attention.out_proj.bias)
    kept = [4 * head + channel for head in range(3) for channel in complement(removed, 4)]
    body = load(nn.Linear(5, len(kept)), weight=model.body.weight[kept], bias=model.body.bias[kept])
    attention = smaller_attention(model.attention, kept)
    head = load(nn.Linear(len(kept), 2), weight=model.head.weight[:, kept], bias=model.head.bias)
    z = body(x)
    expected = head(attention(z, z, z)[0])
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, body=removed))
    close(model(x), expected)
    with torch.no_grad():  # the fast path reads the attributes
        close(model(x), expected)
    assert (model.attention.embed_dim, model.attention.head_dim) == (len(kept), len(kept) // 3)


@pytest.mark.parametrize(("removed", "hidden"), [((), (0, 3)), ((1,), ()), ((0, 2), tuple(range(15)))])
def test_a_transformer_equals_a_network_built_by_hand(removed, hidden):
    model, tokens = BY_NAME["Transformer"].make()
    kept = [4 * head + channel for head in range(2) for channel in complement(removed, 4)]
    inner = complement(hidden, 16)
    dense, n = model.layer, len(kept)
    layer = nn.TransformerEncoderLayer(n, 2, len(inner), batch_first=True, dropout=0.0)
    layer.self_attn = smaller_attention(dense.self_attn, kept)
    load(layer.linear1, weight=dense.linear1.weight[inner][:, kept], bias=dense.linear1.bias[inner])
    load(layer.linear2, weight=dense.linear2.weight[kept][:, inner], bias=dense.linear2.bias[kept])
    for small, large in ((layer.norm1, dense.norm1), (layer.norm2, dense.norm2)):
        load(small, weight=large.weight[kept], bias=large.bias[kept])
    norm = load(nn.LayerNorm(n), weight=model.norm.weight[kept], bias=model.norm.bias[kept])
    table = model.embedding.weight[:, kept]
    z = norm(layer.eval()(F.embedding(tokens, table) + model.position[..., kept]))
    expected = z @ table.t() + model.head.bias
    groups = prunable(model, tokens)
    apply_plan(model, groups, plan_for(groups, embedding=removed, layer_linear1=hidden))
    close(model(tokens), expected)
    with torch.no_grad():
        close(model(tokens), expected)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.num_embeddings == 11


@every_case
def test_the_pruned_network_trains(case):
    model, x = case.make()
    groups = prunable(model, x)
    apply_plan(model, groups, random_plan(groups, 0))
    model.train()
    outputs(model(x)).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    for group in groups:
        for member in group.members:
            owner = member.module if member.module in dict(model.named_parameters()) else f"{member.module}."
            found = [p for name, p in model.named_parameters() if name.startswith(owner) and p.requires_grad]
            assert all(p.grad is not None for p in found)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.isfinite(outputs(model(x))).all()


def test_dropout_survives_and_attributes_speak_of_the_new_sizes():
    model, x = BY_NAME["DepthwiseSeparable"].make()
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, stem=(0, 4), pointwise=(1,)))
    assert (model.stem.out_channels, model.pointwise.in_channels, model.pointwise.out_channels) == (4, 4, 7)
    assert (model.depthwise.in_channels, model.depthwise.out_channels, model.depthwise.groups) == (4, 4, 4)
    assert model.head.in_features == 7
    assert "4, 4, kernel_size=(3, 3)" in repr(model.depthwise)


# ------------------------------------------------------------------------------------------------- undo and kept


@pytest.mark.parametrize("seed", SEEDS)
@every_case
def test_undo_brings_back_the_same_objects_bit_by_bit(case, seed):
    model, x = case.make(seed)
    outputs(model(x)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    before, expected = snapshot(model), outputs(model(x))
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, random_plan(groups, seed))
    model(x)
    surgery.undo()
    assert_same(model, before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(outputs(model(x)), expected)
    surgery.undo()
    assert_same(model, before)


@every_case
def test_an_empty_plan_changes_nothing(case):
    model, x = case.make()
    before = snapshot(model)
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, Plan(((),) * len(groups)))
    assert_same(model, before)
    assert surgery.parameters == []


@every_case
def test_the_record_says_which_elements_survived(case):
    model, x = case.make()
    dense = {name: tensor.clone() for name, tensor in (*named_tensors(model),)}
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, random_plan(groups, 0))
    for name, tensor in named_tensors(model):
        expected = dense[name]
        for dim, kept in surgery.kept.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        assert torch.equal(tensor, expected), name
    live = {id(p) for p in model.parameters()}
    assert all(id(new) in live and id(old) not in live for old, new, _ in surgery.parameters)


def named_tensors(model):
    for kind in (model.named_parameters, model.named_buffers):
        yield from kind(remove_duplicate=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Autoencoder", "Residual", "Transformer"])
def test_dtype_is_kept(name, dtype):
    model, x = BY_NAME[name].make()
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    groups = prunable(model, x)
    apply_plan(model, groups, random_plan(groups, 0))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(outputs(model(x))).all()


def test_frozen_parameters_stay_frozen():
    model, x = BY_NAME["Frozen"].make()
    groups = prunable(model, x)
    apply_plan(model, groups, random_plan(groups, 0))
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2


def test_attributes_of_parameters_are_kept():
    model, x = BY_NAME["Autoencoder"].make()
    weight = model.encoder[0].weight
    weight.no_decay, weight.tags = True, ["a"]
    groups = prunable(model, x)
    apply_plan(model, groups, random_plan(groups, 0))
    new = model.encoder[0].weight
    assert new is not weight
    assert (new.no_decay, new.tags) == (True, ["a"])
    assert isinstance(new, nn.Parameter)
    assert new.is_leaf


def test_channels_last_is_kept():
    model, x = BY_NAME["Residual"].make()
    model.to(memory_format=torch.channels_last)
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, stem=(0,), up=(3, 4)))
    assert model.up.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.up.weight.is_contiguous()


def test_channels_last_is_kept_in_three_dimensions():
    model = nn.Sequential(nn.Conv3d(2, 6, 3), nn.Conv3d(6, 4, 3), nn.Conv3d(4, 2, 1))
    model = model.to(memory_format=torch.channels_last_3d)
    groups = prunable(model, torch.randn(1, 2, 5, 5, 5))
    apply_plan(model, groups, Plan(((0, 5), (1,))))
    assert not model[1].weight.is_contiguous()
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last_3d)


@every_case
def test_pending_gradients_are_sliced_like_their_parameters(case):
    model, x = case.make()
    outputs(model(x)).square().sum().backward()
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, random_plan(groups, 0))
    assert surgery.parameters
    for old, new, by_dim in surgery.parameters:
        assert (old.grad is None) == (new.grad is None)
        if old.grad is not None:
            expected = old.grad
            for dim, kept in by_dim.items():
                expected = expected.index_select(dim, kept)
            assert torch.equal(new.grad, expected)


def test_pending_sparse_gradients_are_sliced():
    model = nn.Sequential(nn.Embedding(7, 6, sparse=True), nn.Linear(6, 2))
    tokens = torch.tensor([[1, 2, 2]])
    model(tokens).sum().backward()
    grad = model[0].weight.grad.to_dense()
    groups = prunable(model, tokens)
    apply_plan(model, groups, Plan(((0, 4),)))
    assert torch.equal(model[0].weight.grad.to_dense(), grad[:, [1, 2, 3, 5]])


def test_tied_weights_stay_one_tensor_also_under_names_that_no_group_knows():
    model, x = BY_NAME["Transformer"].make()
    model.spare = nn.Linear(8, 11)
    model.spare.weight = model.embedding.weight  # never run
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, embedding=(1,)))
    assert model.spare.weight is model.embedding.weight is model.head.weight


def test_surgery_works_within_inference_mode_and_leaves_trainable_parameters():
    model, x = BY_NAME["Autoencoder"].make()
    groups = prunable(model, x)
    with torch.inference_mode():
        apply_plan(model, groups, random_plan(groups, 0))
    assert not any(p.is_inference() for p in model.parameters())
    outputs(model(x)).sum().backward()


def test_groups_that_do_not_fit_are_refused_and_nothing_is_written():
    model, x = BY_NAME["Autoencoder"].make()
    groups = prunable(model, x)
    apply_plan(model, groups[:1], Plan(((0, 1),)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"encoder\.2: the group expects 10 channels, there are 8"):
        apply_plan(model, groups[1:] + groups[:1], Plan(((0,), (0,), (3,))))
    with pytest.raises(ValueError, match="2 groups planned for 3 groups"):
        apply_plan(model, groups, Plan(((), ())))
    for channels in ((4,), (-1,)):
        with pytest.raises(ValueError, match=r"encoder\.2 has 4 channels"):
            apply_plan(model, groups[1:2], Plan((channels,)))
    assert_same(model, before)


def test_the_probe_finds_what_only_running_shows_and_undoes_its_cuts():
    model, x = BY_NAME["ConstantView"].make()
    groups = zoo.trace_groups(model, [lambda: model(x)])
    before = snapshot(model)
    traced = {group.name: group.prunable for group in groups}
    probed = {group.name: group for group in probe_groups(model, groups, lambda: model(x))}
    assert traced["body"]
    assert not probed["body"].prunable
    assert probed["body"].reason.startswith("the model does not run with fewer channels: RuntimeError")
    assert probed["inner"].prunable
    assert_same(model, before)


# ---------------------------------------------------------------------------------------------------- transaction


class Stateful(zoo.Residual):
    """Holds what modules hold: lists, dicts, plain tensors, buffers that are not saved."""

    def __init__(self):
        super().__init__()
        self.history, self.nested, self.seen = [1], {"a": [1, {"b": {2}}]}, {"x"}
        self.plain = torch.zeros(3)
        self.register_buffer("hidden", torch.ones(2), persistent=False)


def test_a_transaction_puts_everything_back():
    model, x = Stateful(), torch.randn(3, 1, 4, 4)
    outputs(model(x)).sum().backward()
    model.eval()
    held = dict(vars(model))
    before = snapshot(model)
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    groups = prunable(model, x)

    def ruin():
        model.train()
        model(x)  # running statistics
        apply_plan(model, groups, random_plan(groups, 0))
        model.history.append(2)
        model.nested["a"][1]["b"].clear()
        model.nested["c"] = 1
        model.seen.add("y")
        model.plain += 1
        model.hidden.zero_()
        model.extra, model.history = 3, [5]
        model.add_module("more", nn.Linear(1, 1))
        del model.plain
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.data.mul_(2)
            parameter.grad = None
        grads[0][0].zero_()

    def check():
        assert_same(model, before)
        assert all(vars(model)[key] is value for key, value in held.items() if key != "training")
        assert (model.history, model.nested, model.seen) == ([1], {"a": [1, {"b": {2}}]}, {"x"})
        assert torch.equal(model.plain, torch.zeros(3))
        assert torch.equal(model.hidden, torch.ones(2))
        assert not hasattr(model, "extra")
        assert not model.training
        for parameter, (grad, value) in zip(model.parameters(), grads, strict=True):
            assert parameter.requires_grad
            assert parameter.grad is grad
            assert torch.equal(grad, value)

    with Transaction(model):
        ruin()
    check()

    def fail():
        with Transaction(model):
            ruin()
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        fail()
    check()
    with Transaction(model) as transaction:
        ruin()
        transaction.rollback()
        check()
        model.history.append(7)
        transaction.rollback()
        check()


def test_a_committed_transaction_keeps_what_was_done():
    model, x = BY_NAME["Autoencoder"].make()
    groups = prunable(model, x)
    with Transaction(model) as transaction:
        apply_plan(model, groups, random_plan(groups, 0))
        transaction.commit()
    assert model.encoder[0].out_features < 10


# ----------------------------------------------------------------------------------------------------- optimizers

MLP = {"encoder_0": (1, 4, 9), "encoder_2": (2,), "decoder_0": (0, 3)}
RESIDUAL = {"stem": (0, 3), "up": (2, 5, 8)}


def spread(channels, stride):
    return [channel * stride + place for channel in channels for place in range(stride)]


# What removing these channels removes from each tensor: (tensor, dimension, indices), written down by hand.
REMOVED = {
    "Autoencoder": [
        *(("encoder.0.weight", 0, (1, 4, 9)), ("encoder.0.bias", 0, (1, 4, 9)), ("encoder.2.weight", 1, (1, 4, 9))),
        *(("encoder.2.weight", 0, (2,)), ("encoder.2.bias", 0, (2,))),
        *(("decoder.0.weight", 1, (2,)), ("classifier.weight", 1, (2,))),
        *(("decoder.0.weight", 0, (0, 3)), ("decoder.0.bias", 0, (0, 3)), ("decoder.2.weight", 1, (0, 3))),
    ],
    "Residual": [
        *((name, 0, (0, 3)) for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias")),
        *(("up.weight", 1, (0, 3)), ("down.weight", 0, (0, 3)), ("down.bias", 0, (0, 3))),
        ("head.weight", 1, spread((0, 3), 4)),
        *((name, 0, (2, 5, 8)) for name in ("up.weight", "inner_norm.weight", "inner_norm.bias")),
        ("down.weight", 1, (2, 5, 8)),
    ],
}


def masks(model, name):
    found = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    for tensor, dim, indices in REMOVED[name]:
        found[tensor].index_fill_(dim, torch.tensor(indices), 0.0)
    return found


def batches(name, count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shape = (16, 12) if name == "Autoencoder" else (16, 1, 4, 4)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def loss_of(model, x):
    result = model(x)
    if isinstance(result, tuple):
        target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return F.mse_loss(result[0], x.sigmoid()) + F.cross_entropy(result[1], target)
    return F.cross_entropy(result, (x.sum((1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long())


def step(model, optimizer, x, mask=None):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        if mask:
            for name, parameter in model.named_parameters():
                parameter.grad.mul_(mask[name])
        return loss

    loss = optimizer.step(closure)
    if mask:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(mask[name])
    return loss.item()


def two_groups(model):
    """Parameters with and without weight decay."""
    large = [p for p in model.parameters() if p.ndim > 1]
    small = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": large, "weight_decay": 0.05}, {"params": small}]


ELEMENTWISE = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}
OTHERS = {"SparseAdam", "LBFGS", "Adafactor", "Muon", "Optimizer"}


def test_every_optimizer_of_torch_is_tested():
    known = {name.split()[0] for name in ELEMENTWISE} | OTHERS
    found = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    assert found <= known


def pruned_pair(name, build):
    """A masked dense network and a pruned one in the middle of the same training."""
    dense, _ = BY_NAME[name].make()
    dense.train().double()  # Rprop and the first steps of Adam follow the signs of gradients: rounding would decide
    optimizer = build(two_groups(dense))
    for x in batches(name, 3):
        step(dense, optimizer, x)
    dense.zero_grad(set_to_none=True)  # deepcopy keeps no gradients
    pruned, pruned_optimizer = copy.deepcopy((dense, optimizer))
    groups = prunable(pruned, batches(name, 1)[0])
    removed = MLP if name == "Autoencoder" else RESIDUAL
    surgery = apply_plan(pruned, groups, plan_for(groups, **removed))
    mask = masks(dense, name)
    with torch.no_grad():
        for n, parameter in dense.named_parameters():
            parameter.mul_(mask[n])
    return dense, optimizer, mask, pruned, pruned_optimizer, surgery


@pytest.mark.parametrize("network", ["Autoencoder", "Residual"])
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_training_goes_on_as_masked_training_would(kind, network):
    dense, optimizer, mask, pruned, pruned_optimizer, surgery = pruned_pair(network, ELEMENTWISE[kind])
    repair_optimizers([pruned_optimizer], surgery)
    for x in batches(network, 12)[3:]:
        expected = step(dense, optimizer, x, mask)
        assert step(pruned, pruned_optimizer, x) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum", "ASGD"])
def test_without_the_repair_training_would_not_go_on(kind):
    dense, optimizer, mask, pruned, pruned_optimizer, _ = pruned_pair("Autoencoder", ELEMENTWISE[kind])
    losses = []
    for x in batches("Autoencoder", 12)[3:]:
        step(dense, optimizer, x, mask)
        losses.append(abs(step(dense, optimizer, x, mask) - step(pruned, pruned_optimizer, x)))
    assert max(losses) > 1e-3


def live(optimizer):
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("kind", ["Adam", "LBFGS", "Adafactor", "Muon", "SparseAdam"])
def test_optimizers_hold_exactly_the_live_parameters_and_train_on(kind):
    model, _ = BY_NAME["Autoencoder"].make()
    if kind == "Muon":
        for parameter in model.parameters():  # it takes matrices only
            parameter.requires_grad_(parameter.ndim == 2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "SparseAdam":
        model = nn.Sequential(nn.Embedding(12, 6, sparse=True), nn.Flatten(), nn.Linear(72, 2))
        trained = [model[0].weight]
    settings = {"line_search_fn": "strong_wolfe", "max_iter": 2} if kind == "LBFGS" else {}
    optimizer = getattr(torch.optim, kind)(trained, lr=0.01, **settings)

    def loss():
        if kind == "SparseAdam":
            return model(torch.arange(12)[None].expand(4, -1)).square().mean()
        return loss_of(model, batches("Autoencoder", 1, torch.float32)[0])

    def train():
        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        return optimizer.step(closure).item()

    for _ in range(3):
        train()
    x = torch.zeros(1, 12, dtype=torch.long) if kind == "SparseAdam" else torch.zeros(2, 12)
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, random_plan(groups, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repair_optimizers([optimizer], surgery)
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    assert live(optimizer) == (wanted[:1] if kind == "SparseAdam" else wanted)
    by_id = {id(p): p for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert id(parameter) in by_id
        for value in state.values():
            if kind != "LBFGS" and torch.is_tensor(value) and value.ndim == parameter.ndim:
                assert all(v in (1, p) for v, p in zip(value.shape, parameter.shape, strict=True))
    assert bool(optimizer.state) == (kind != "LBFGS")
    losses = [train() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_sparse_adam_goes_on_as_masked_training_would():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(18, 2))
        return model, torch.optim.SparseAdam([model[0].weight], lr=0.05), torch.optim.SGD(model[2].parameters(), 0.1)

    def train(model, optimizers, mask=None):
        losses = []
        for seed in range(3):
            tokens = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(seed))
            loss = model(tokens).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            if mask is not None:
                with torch.no_grad():
                    model[0].weight[:, mask] = 0
                    model[2].weight[:, [6 * place + index for place in range(3) for index in mask]] = 0
            losses.append(loss.item())
        return losses

    model, *optimizers = build()
    train(model, optimizers)
    x = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        dense, dense_optimizers = copy.deepcopy((model, optimizers))
        dense[2].weight[:, [6 * place + index for place in range(3) for index in (1, 4)]] = 0
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, Plan(((1, 4),)))
    repair_optimizers(optimizers, surgery)
    assert train(model, optimizers) == pytest.approx(train(dense, dense_optimizers, [1, 4]), abs=1e-5)


def test_parameter_groups_lists_and_schedulers_stay_the_same_objects():
    model, _ = BY_NAME["Autoencoder"].make()
    optimizer = torch.optim.AdamW(two_groups(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer, batches("Autoencoder", 1, torch.float32)[0])
    scheduler.step()
    groups_before, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    order = [[n for n, p in model.named_parameters() if any(p is q for q in params)] for params in lists]
    groups = prunable(model, torch.zeros(2, 12))
    repair_optimizers([optimizer], apply_plan(model, groups, random_plan(groups, 0)))
    assert all(now is then for now, then in zip(optimizer.param_groups, groups_before, strict=True))
    assert all(group["params"] is params for group, params in zip(optimizer.param_groups, lists, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    names = {id(p): n for n, p in model.named_parameters()}
    assert [sorted(names[id(p)] for p in params) for params in lists] == [sorted(found) for found in order]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_two_optimizers_over_two_parts_are_both_repaired():
    model, _ = BY_NAME["Autoencoder"].make()
    one = torch.optim.Adam(model.encoder.parameters())
    other = torch.optim.SGD([*model.decoder.parameters(), *model.classifier.parameters()], 0.1, momentum=0.9)
    groups = prunable(model, torch.zeros(2, 12))
    repair_optimizers([one, other], apply_plan(model, groups, random_plan(groups, 0)))
    assert set(live(one)) | set(live(other)) == {id(p) for p in model.parameters()}


class Strange(torch.optim.SGD):
    """Keeps a state whose shape has nothing to do with the parameter's."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sketch"] = torch.zeros(3, 7)
                self.state[parameter]["count"] = torch.tensor(4.0)
                self.state[parameter]["note"] = "kept"
        return super().step(closure)


def test_state_that_cannot_be_sliced_warns_and_starts_afresh():
    model, _ = BY_NAME["Autoencoder"].make()
    optimizer = Strange(model.parameters(), 0.1)
    step(model, optimizer, batches("Autoencoder", 1, torch.float32)[0])
    groups = prunable(model, torch.zeros(2, 12))
    surgery = apply_plan(model, groups, plan_for(groups, encoder_0=(0,)))
    with pytest.warns(UserWarning, match="Strange: the state 'sketch'") as caught:
        repair_optimizers([optimizer], surgery)
    assert len(caught) == len(surgery.parameters)
    assert optimizer.state[model.encoder[0].weight] == {"count": torch.tensor(4.0), "note": "kept"}
    assert "sketch" in optimizer.state[model.decoder[0].weight]  # untouched


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum", "LBFGS"])
def test_an_optimizer_transaction_puts_everything_back(kind):
    build = ELEMENTWISE.get(kind, lambda p: torch.optim.LBFGS(itertools.chain(*(group["params"] for group in p))))
    model, _ = BY_NAME["Autoencoder"].make()
    optimizer = build(two_groups(model))
    for x in batches("Autoencoder", 2, torch.float32):
        step(model, optimizer, x)
    parameters = live(optimizer)
    containers = [(group, group["params"]) for group in optimizer.param_groups]
    settings = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    state = {p: dict(value) for p, value in optimizer.state.items()}
    transaction = Transaction(model, optimizers=[optimizer])
    groups = prunable(model, torch.zeros(2, 12))
    for _ in range(2):
        repair_optimizers([optimizer], apply_plan(model, groups, random_plan(groups, 0)))
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.param_groups[0]["new"] = 1
        transaction.rollback()
        assert live(optimizer) == parameters == live(optimizer)
        for group, (dictionary, params) in zip(optimizer.param_groups, containers, strict=True):
            assert group is dictionary
            assert group["params"] is params
        now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        assert now == settings
        assert list(optimizer.state) == list(state)
        for parameter, value in state.items():
            assert optimizer.state[parameter].keys() == value.keys()
            assert all(optimizer.state[parameter][key] is item for key, item in value.items())
    step(model, optimizer, batches("Autoencoder", 1, torch.float32)[0])
