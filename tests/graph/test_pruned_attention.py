"""`nn.MultiheadAttention` without some of its heads, beside the dense one whose `out_proj` reads zeros of them."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.checkpoint import ModelShapes, resize
from lightning_softprune.graph.layer_types.pruned_attention import PrunedMultiheadAttention
from lightning_softprune.search import Plan
from lightning_softprune.surgery import Transaction, apply_plan
from support.groups import by_name
from support.zoo import BY_NAME, find

WIDTH, HEADS, DIM, BATCH, QUERIES, KEYS = 12, 3, 4, 2, 5, 7
GONE, KEPT = 1, [0, 2]


class Attend(nn.Module):
    """Attention by itself, with whatever it is called with."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


class Own(nn.MultiheadAttention):
    """A subclass of the user's own."""

    def twice(self):
        return 2 * self.num_heads


class Doubling(nn.MultiheadAttention):
    """One with a forward of its own."""

    def forward(self, query, key, value, **kwargs):
        output, weights = super().forward(query, key, value, **kwargs)
        return 2 * output, weights


def dense_attention(kind=nn.MultiheadAttention, **arguments):
    attention = kind(WIDTH, HEADS, **arguments).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def without_a_head(attention, *inputs):
    """The pruned layer, and its masked twin."""
    masked = copy.deepcopy(attention)
    masked.out_proj.weight.data[:, GONE * DIM : (GONE + 1) * DIM] = 0
    model = Attend(attention)
    group = by_name(find(Called(model, inputs), inputs[0]))["model.attention.heads"]
    apply_plan(Called(model, inputs), [group], Plan(((GONE,),)))
    return model.attention, masked


class Called(nn.Module):
    """A module with the inputs that it is called with."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, _):
        return self.model(*self.inputs, need_weights=False)[0].square().mean()


def masks(batch):
    """Arguments beside queries, keys and values: of the dense layer, and of the pruned one."""
    padding = torch.zeros(batch, KEYS, dtype=torch.bool)
    padding[0, -2:] = True
    random = torch.rand(batch, HEADS, QUERIES, KEYS) > 0.7
    random[..., 0] = False
    per_head = random.flatten(0, 1), random[:, KEPT].flatten(0, 1)
    later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    for both in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(QUERIES, KEYS)},
        {"attn_mask": later, "is_causal": True},
        {"attn_mask": later, "is_causal": True, "key_padding_mask": padding},
    ):
        yield both, both
    yield {"attn_mask": per_head[0]}, {"attn_mask": per_head[1]}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 8, "add_bias_kv": True}],
    ids=str,
)
def test_attention_without_a_head_is_the_masked_one(arguments, batch_first, batched):
    torch.manual_seed(0)
    dense = dense_attention(batch_first=batch_first, **arguments)
    shapes = (QUERIES, WIDTH), (KEYS, dense.kdim), (KEYS, dense.vdim)
    inputs = [torch.randn(BATCH, *shape) for shape in shapes]
    inputs = [x[0] if not batched else x if batch_first else x.transpose(0, 1) for x in inputs]
    pruned, masked = without_a_head(dense, *inputs)
    assert type(pruned) is PrunedMultiheadAttention
    assert (pruned.embed_dim, pruned.num_heads, pruned.head_dim) == (WIDTH, 2, DIM)
    options = itertools.product(masks(BATCH if batched else 1), [(False, True), (True, True), (True, False)])
    for (theirs, ours), (need, average) in options:
        if not batched and "key_padding_mask" in theirs:
            theirs = ours = {**theirs, "key_padding_mask": theirs["key_padding_mask"][0]}
        expected, weights = masked(*inputs, need_weights=need, average_attn_weights=False, **theirs)
        output, found = pruned(*inputs, need_weights=need, average_attn_weights=average, **ours)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        if need:
            weights = weights[..., KEPT, :, :]
            torch.testing.assert_close(found, weights.mean(-3) if average else weights, rtol=1e-5, atol=1e-5)
        assert need or found is None


def test_a_mask_for_the_heads_of_before_is_refused_by_its_shape():
    x = torch.randn(BATCH, QUERIES, WIDTH)
    pruned, _ = without_a_head(dense_attention(batch_first=True), x, x, x)
    with pytest.raises(ValueError, match=r"attn_mask: its shape is \(6, 5, 5\).* or \(4, 5, keys\).*3 heads before"):
        pruned(x, x, x, attn_mask=torch.zeros(BATCH * HEADS, QUERIES, QUERIES))


def test_dropout_thins_the_weights_in_training_alone():
    x = torch.randn(BATCH, QUERIES, WIDTH)
    pruned, masked = without_a_head(dense_attention(batch_first=True, dropout=0.5), x, x, x)
    torch.testing.assert_close(pruned(x, x, x)[0], masked(x, x, x)[0], rtol=1e-5, atol=1e-5)
    pruned.train()
    weights = pruned(x, x, x, average_attn_weights=False)[1]
    assert 0.2 < (weights == 0).float().mean() < 0.8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the dense encoder says it too
@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_with_a_pruned_layer_is_right_in_eval_mode_with_padding(nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(3, QUERIES, WIDTH)
    masked = copy.deepcopy(encoder)
    masked.layers[1].self_attn.out_proj.weight.data[:, 3:9] = 0
    groups = by_name(find(encoder.requires_grad_(True), x))
    group = groups["layers.1.self_attn.heads"]
    apply_plan(encoder, [group], Plan(((1, 2),)))
    padding = torch.arange(QUERIES)[None] >= torch.tensor([5, 3, 4])[:, None]
    for arguments in ({}, {"src_key_padding_mask": padding}):
        expected = masked.train(False)(x, **arguments)  # with gradients: the slow path
        with torch.no_grad():
            found = encoder(x, **arguments)
        there = ~padding if arguments else torch.ones_like(padding)
        torch.testing.assert_close(found[there], expected[there], rtol=1e-5, atol=1e-5)


def test_undo_and_rollback_give_the_class_back():
    x = torch.randn(BATCH, QUERIES, WIDTH)
    model = Called(Attend(dense_attention(batch_first=True)), (x, x, x))
    group = by_name(find(model, x))["model.attention.heads"]
    attention = model.model.attention
    before, attributes = model(x), dict(vars(attention))
    surgery = apply_plan(model, [group], Plan(((0, 1),)))
    assert type(attention) is PrunedMultiheadAttention
    surgery.undo()
    assert type(attention) is nn.MultiheadAttention
    assert vars(attention) == attributes
    with Transaction(model):
        apply_plan(model, [group], Plan(((0, 1),)))
    assert type(attention) is nn.MultiheadAttention
    assert vars(attention) == attributes
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Own])
def test_a_pruned_layer_is_copied_pickled_and_of_its_users_class(kind):
    x = torch.randn(BATCH, QUERIES, WIDTH)
    pruned, _ = without_a_head(dense_attention(kind, batch_first=True), x, x, x)
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    for copied in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), torch.load(file, weights_only=False)):
        assert type(copied) is type(pruned)
        assert isinstance(copied, kind)
        assert torch.equal(copied(x, x, x)[0], pruned(x, x, x)[0])
    assert kind is not Own or pruned.twice() == 4


def test_a_subclass_with_a_forward_of_its_own_keeps_its_class():
    torch.manual_seed(0)
    x = torch.randn(BATCH, QUERIES, 5)
    model = BY_NAME["Attention"].make()[0]
    model.attention = Doubling(12, 3, batch_first=True)
    found = by_name(find(model, x))
    assert "attention.heads" not in found
    assert "body" in found
    apply_plan(model, [found["body"]], Plan(((0,),)))
    assert type(model.attention) is Doubling


def test_two_rounds_are_loaded_and_taken_back_by_their_shapes():
    case = BY_NAME["Attention"]
    dense, x = case.make()
    pruned = copy.deepcopy(dense)
    for plan in ({"attention.heads": (0,)}, {"attention.heads": (1,), "body": (3, 4)}):
        groups = by_name(find(pruned, x))
        apply_plan(pruned, [groups[name] for name in plan], Plan(tuple(plan.values())))
    assert (pruned.attention.num_heads, pruned.attention.embed_dim) == (1, 10)
    fresh = copy.deepcopy(dense)
    resize(fresh, pruned.state_dict())
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(x), pruned(x))
    assert ModelShapes.of(fresh) == ModelShapes.of(pruned)
    resize(fresh, dense.state_dict())
    fresh.load_state_dict(dense.state_dict())
    assert type(fresh.attention) is nn.MultiheadAttention
    assert torch.equal(fresh(x), dense(x))


def test_shapes_that_leave_the_number_of_heads_open_are_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="0: the tensors' shapes do not tell how many heads it has"):
        resize(model, nn.Sequential(nn.MultiheadAttention(4, 1)).state_dict())


def test_what_the_output_projection_is_given_is_seen_in_the_dense_layer_too():
    x = torch.randn(BATCH, QUERIES, WIDTH)
    attention = dense_attention(batch_first=True)
    model = Called(Attend(attention), (x, x, x))
    groups = [group for group in find(model, x) if group.prunable]
    readers = find_readers(model, groups)
    assert [(reader.name, reader.stride) for reader in readers] == [("model.attention.out_proj", DIM)]
    found = collect_statistics(model, readers, [lambda: model(x)])["model.attention.out_proj"]
    q, k, v = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in (q, k, v))
    mixed = ((q @ k.transpose(-1, -2) / DIM**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2).flatten(0, 1).double()
    torch.testing.assert_close(found.mean, mixed.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.unfolded.covariance, mixed.t().cov(correction=0), rtol=1e-3, atol=1e-5)
    assert type(attention) is nn.MultiheadAttention
