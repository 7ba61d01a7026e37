"""Surgery against masked networks, against smaller networks built by hand, and against masked training."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support import zoo
from support.plans import assert_same, outputs, plan_for, random_plan, snapshot
from support.zoo import BY_NAME, PRUNABLE, prunable

pytestmark = pytest.mark.usefixtures("one_thread")


SEEDS = (0, 1, 2)


every_case = pytest.mark.parametrize("case", PRUNABLE, ids=lambda case: f"{case.name}-{len(case.shape)}d")


def close(one, other):
    torch.testing.assert_close(outputs(one), outputs(other), rtol=1e-5, atol=1e-5)


def mask_readers(model, groups, plan):
    """Zero, on the dense network, the weights with which linear and convolution layers read removed channels."""
    modules = dict(model.named_modules())
    zoo.materialise(model)
    with torch.no_grad():
        for group, channels in zip(groups, plan.removed, strict=True):
            for member in group.members:
                module = modules.get(member.module)
                if isinstance(module, nn.RNNBase) and member.slot == "out":  # it reads its own units
                    module.weight_hh_l0[:, np.isin(member.owner, channels)] = 0
                if isinstance(module, nn.MultiheadAttention) and member.slot == "both":
                    module.in_proj_weight[:, np.isin(member.owner, channels)] = 0
                if member.slot != "in":
                    continue
                for index in np.flatnonzero(np.isin(member.owner, channels)).tolist():
                    if isinstance(module, _ConvTransposeNd):
                        module.weight[index] = 0
                    elif isinstance(module, nn.RNNBase):
                        module.weight_ih_l0[:, index] = 0
                    elif isinstance(module, _ConvNd):
                        width, height = module.in_channels // module.groups, module.out_channels // module.groups
                        part = index // width
                        module.weight[part * height : (part + 1) * height, index % width] = 0
                    else:
                        module.weight[:, index] = 0


@pytest.mark.slow
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


@pytest.mark.slow
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


def smaller_attention(dense, kept, heads):
    """Self-attention of the kept channels by the kept heads, head by head."""

    def attend(z):
        total = dense.out_proj.bias[kept]
        for head in heads:
            rows = [slice(k * dense.embed_dim + head * dense.head_dim, None) for k in range(3)]
            q, k, v = (
                F.linear(
                    z, dense.in_proj_weight[own][: dense.head_dim, kept], dense.in_proj_bias[own][: dense.head_dim]
                )
                for own in rows
            )
            own = slice(head * dense.head_dim, (head + 1) * dense.head_dim)
            if dense.bias_k is not None:
                k, v = (
                    torch.cat([x, more[..., own].expand(len(x), -1, -1)], 1)
                    for x, more in ((k, dense.bias_k), (v, dense.bias_v))
                )
            mixed = (q @ k.transpose(1, 2) / dense.head_dim**0.5).softmax(-1) @ v
            total = total + mixed @ dense.out_proj.weight[kept][:, own].t()
        return total

    return attend


@pytest.mark.parametrize(("removed", "lost"), [((1,), ()), ((), (1,)), ((0, 2, 7), (0, 2)), (tuple(range(11)), (2,))])
def test_attention_equals_a_network_built_by_hand(removed, lost):
    model, x = BY_NAME["Attention"].make()
    nn.init.normal_(model.attention.in_proj_bias)
    nn.init.normal_(model.attention.out_proj.bias)
    kept, heads = complement(removed, 12), complement(lost, 3)
    body = load(nn.Linear(5, len(kept)), weight=model.body.weight[kept], bias=model.body.bias[kept])
    attention = smaller_attention(model.attention, kept, heads)
    head = load(nn.Linear(len(kept), 2), weight=model.head.weight[:, kept], bias=model.head.bias)
    expected = head(attention(body(x))).detach()
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, body=removed, attention_heads=lost))
    close(model(x), expected)
    with torch.no_grad():  # the fast path would read the attributes
        close(model(x), expected)
    found = model.attention
    assert (found.embed_dim, found.num_heads, found.head_dim) == (len(kept), len(heads), 4)


@pytest.mark.parametrize(
    ("removed", "lost", "hidden"),
    [((), (), (0, 3)), ((1,), (), ()), ((), (1,), ()), ((0, 2, 3, 7), (0,), tuple(range(15)))],
)
def test_a_transformer_equals_a_network_built_by_hand(removed, lost, hidden):
    model, tokens = BY_NAME["Transformer"].make()
    kept = complement(removed, 8)
    inner = complement(hidden, 16)
    dense, n = model.layer, len(kept)
    layer = nn.TransformerEncoderLayer(n, 1, len(inner), batch_first=True, dropout=0.0)
    attention = smaller_attention(dense.self_attn, kept, complement(lost, 2))
    layer._sa_block = lambda z, *_, **__: attention(z)
    load(layer.linear1, weight=dense.linear1.weight[inner][:, kept], bias=dense.linear1.bias[inner])
    load(layer.linear2, weight=dense.linear2.weight[kept][:, inner], bias=dense.linear2.bias[kept])
    for small, large in ((layer.norm1, dense.norm1), (layer.norm2, dense.norm2)):
        load(small, weight=large.weight[kept], bias=large.bias[kept])
    norm = load(nn.LayerNorm(n), weight=model.norm.weight[kept], bias=model.norm.bias[kept])
    table = model.embedding.weight[:, kept]
    z = norm(layer.train()(F.embedding(tokens, table) + model.position[..., kept]))
    expected = (z @ table.t() + model.head.bias).detach()
    groups = prunable(model, tokens)
    apply_plan(model, groups, plan_for(groups, embedding=removed, layer_self_attn_heads=lost, layer_linear1=hidden))
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


def test_what_is_given_of_each_channel_goes_with_it():
    model, x = BY_NAME["DepthwiseMultiplier"].make()
    kernels, biases = model.multiplied.weight.detach().clone(), model.enlarged.bias.detach().clone()
    groups = prunable(model, x)
    apply_plan(model, groups, plan_for(groups, stem=(1,)))
    sizes = [(one.in_channels, one.out_channels, one.groups) for one in (model.multiplied, model.enlarged)]
    assert sizes == [(3, 6, 3), (6, 18, 6)]
    assert torch.equal(model.multiplied.weight, kernels[[0, 1, 4, 5, 6, 7]])
    assert torch.equal(model.enlarged.bias, torch.cat([biases[:6], biases[12:]]))
    assert model.norm.num_features == 6


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
        if name.endswith("original0"):
            continue  # a length, which is another one without some of the inputs
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
