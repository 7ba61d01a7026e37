"""Every operator carries channels where they go: small networks against the masked dense one and their code."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.masked import Net, check

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def dense(*sizes, **kwargs):
    return nn.Linear(*sizes, **kwargs)


def between(operation, width, out=None, shape=(3, 5), **parts):
    """Linear -> operation -> Linear, and an input."""
    net = Net(
        lambda net, x: net.head(operation(net, net.body(x))),
        body=nn.Linear(shape[-1], width),
        head=nn.Linear(out or width, 2),
        **parts,
    )
    return net, torch.randn(shape)


def between_maps(operation, width, out=None, size=4, **parts):
    """Conv -> operation -> Conv, and an input."""
    net = Net(
        lambda net, x: net.head(operation(net, net.body(x).relu())),
        body=nn.Conv2d(2, width, 3, padding=1),
        head=nn.Conv2d(out or width, 2, 1),
        **parts,
    )
    return net, torch.randn(2, 2, size, size)


# ----------------------------------------------------------------------------------------------------------- attention

B, T, C, H, D = 2, 5, 6, 4, 3  # batch, tokens, width outside, heads, width of a head
E = H * D


def softmax_by_hand(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) * D**-0.5
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def fused(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def heads_constant(net, x):
    return x.view(len(x), -1, H, D).transpose(1, 2)


def heads_inferred(net, x):
    return x.view(len(x), x.shape[1], -1, D).transpose(1, 2)


def heads_attribute(net, x):
    return x.view(len(x), x.shape[1], net.num_heads, D).transpose(1, 2)


def heads_both(net, x):
    return x.view(len(x), x.shape[1], net.num_heads, net.head_dim).transpose(1, 2)


def heads_of_width(net, x):
    return x.view(len(x), x.shape[1], net.num_heads, x.shape[-1] // net.num_heads).transpose(1, 2)


def heads_unflatten(net, x):
    return x.unflatten(-1, (-1, D)).transpose(1, 2)


def attention(split, attend=softmax_by_hand, merge=joined, **attributes):
    def forward(net, x):
        x = net.stem(x)
        q, k, v = (split(net, layer(x)) for layer in (net.q, net.k, net.v))
        return net.head(x + net.out(merge(attend(q, k, v))))

    net = Net(
        forward,
        stem=nn.Linear(3, C),
        **{name: nn.Linear(C, E) for name in "qkv"},
        out=nn.Linear(E, C),
        head=nn.Linear(C, 2),
        **attributes,
    )
    return net, torch.randn(B, T, 3)


@pytest.mark.parametrize("attend", [softmax_by_hand, fused])
@pytest.mark.parametrize("split", [heads_inferred, heads_attribute, heads_both, heads_unflatten])
def test_separate_projections_lose_whole_heads(split, attend):
    net, x = attention(split, attend, num_heads=H, head_dim=D)
    check(net, x, {"stem": C, "q": H})


def merged_by_attribute(net):
    return lambda x: x.transpose(1, 2).reshape(len(x), T, net.all_head_size)


def test_literal_attributes_of_all_kinds_follow_the_heads():
    net, x = attention(heads_both, num_heads=H, head_dim=D, all_head_size=E, unrelated=H)

    def forward(net, x):
        x = net.stem(x)
        q, k, v = (heads_both(net, layer(x)) for layer in (net.q, net.k, net.v))
        return net.head(x + net.out(merged_by_attribute(net)(softmax_by_hand(q, k, v))))

    net.function = forward
    check(net, x, {"stem": C, "q": H})


class Split(nn.Module):
    """Splits heads by numbers that it keeps as libraries of layers do: in a dictionary, its pairs, or a list."""

    def __init__(self, kept, **numbers):
        super().__init__()
        self.kept = kept
        self.numbers = {"dictionary": numbers, "pairs": (), "list": [2, *numbers.values()], "nested": {"of": numbers}}[
            kept
        ]
        self._numbers = tuple(numbers.items())

    def forward(self, x):
        numbers = self.numbers
        if self.kept == "pairs":
            numbers = dict(self._numbers)
        if self.kept == "list":
            numbers = {"heads": numbers[1]}
        numbers = numbers.get("of", numbers)
        return x.view(*x.shape[:2], numbers.get("heads", -1), numbers.get("width", D)).transpose(1, 2)


@pytest.mark.parametrize("kept", ["dictionary", "pairs", "list", "nested"])
def test_numbers_in_containers_follow_the_heads(kept):
    net, x = attention(lambda net, x: net.parts(x), parts=Split(kept, heads=H))
    before = {name: value for name, value in vars(net.parts).items() if "numbers" in name}
    groups = check(net, x, {"stem": C, "q": H})
    assert {count.per_channel for count in groups["q"].counts} == {1}
    assert all(vars(net.parts)[name] is value for name, value in before.items())


def test_attributes_in_the_innermost_modules_are_tried_first():
    """Many others have the same value by accident."""
    others = {f"a{number}": H for number in range(8)}
    net, x = attention(lambda net, x: net.parts(x), parts=Split("dictionary", heads=H), **others)
    groups = check(net, x, {"stem": C, "q": H})
    assert {count.module for count in groups["q"].counts} == {"parts"}


class Checked(nn.Module):
    """Convolves, and knows how many channels it is given."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x).tanh()


def test_an_attribute_counts_the_inputs_of_one_module_and_the_outputs_of_another():
    """So what is named alike counts two groups, each in modules of one kind."""

    def forward(net, x):
        x = net.stem(x)
        y = net.down(x)
        return net.head(x + net.up(y))

    net = Net(forward, stem=nn.Conv2d(2, 6, 1), down=Checked(6), up=Checked(6), head=nn.Conv2d(6, 2, 1))
    groups = check(net, torch.randn(3, 2, 4, 4), {"stem": 6, "down.conv": 6})
    assert [count.module for count in groups["stem"].counts] == ["down"]
    assert [count.module for count in groups["down.conv"].counts] == ["up"]


def test_which_attention_of_pytorch_is_asked_for_does_not_matter():
    def chosen(q, k, v):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)

    net, x = attention(heads_attribute, chosen, num_heads=H)
    check(net, x, {"stem": C, "q": H})


def test_of_two_heads_one_can_go_where_the_number_of_heads_is_written_down_and_their_width_is_not():
    """It runs without the number following: as two heads of half the width, which is another network."""

    def split(net, x):
        return x.view(len(x), T, net.num_heads, -1).transpose(1, 2)

    net, x = attention(split, fused, num_heads=2)
    groups = check(net, x, {"stem": C, "q": 2})
    assert [count.attribute for count in groups["q"].counts] == ["num_heads"]


class InDouble(nn.LayerNorm):
    """Calculates in another type, in a forward of its own."""

    def forward(self, x):
        return super().forward(x.double()).to(x.dtype)


class Literal(nn.LayerNorm):
    def forward(self, x):
        weight = None if self.weight is None else self.weight.double()
        return F.layer_norm(x.double(), self.normalized_shape, weight, None, self.eps).to(x.dtype)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [InDouble, Literal])
def test_a_norm_with_a_forward_of_its_own_is_resized_also_without_weights(kind, affine):
    net, x = between(
        lambda net, x: net.norm(x.double()).float(), 6, norm=kind(6, elementwise_affine=affine, bias=False)
    )
    net.norm.double()
    groups = check(net, x, {"body": 6}, masked=False)
    assert "norm (both)" in {str(member) for member in groups["body"].members}


def quantized(x):
    return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)


@pytest.mark.parametrize(
    "function",
    [F.logsigmoid, F.hardswish, F.rrelu, quantized, lambda x: (x * 1).abs_(), lambda x: torch.rsub(x, x * x)],
)
def test_what_works_element_by_element_without_pytorch_saying_so_is_followed(function):
    check(*between(lambda net, x: function(x), 6), {"body": 6})


def test_a_width_per_head_that_is_divided_out_of_the_total_follows_the_heads():
    net, x = attention(heads_of_width, num_heads=H)
    check(net, x, {"stem": C, "q": H})


def windows_repeated(scores, masks):
    return scores + masks.repeat(len(scores) // len(masks), 1, 1).unsqueeze(1)


def windows_expanded(scores, masks):
    return scores + masks.unsqueeze(1).repeat(len(scores) // len(masks), 1, 1, 1)


def windows_apart(scores, masks):
    several = scores.view(-1, len(masks), *scores.shape[1:]) + masks[None, :, None]
    return several.view(-1, *several.shape[2:])


@pytest.mark.parametrize("masked", [windows_repeated, windows_expanded, windows_apart])
def test_masks_of_windows_that_lie_in_the_batch_do_not_cross_heads_that_follow_the_stream(masked):
    def forward(net, x):
        x = net.stem(x)
        batch, length, width = x.shape
        parts = net.qkv(x).reshape(batch, length, 3, net.num_heads, width // net.num_heads).permute(2, 0, 3, 1, 4)
        scores = masked(parts[0] @ parts[1].transpose(-2, -1) * D**-0.5, net.masks).softmax(-1)
        return net.head(x + net.out((scores @ parts[2]).transpose(1, 2).reshape(batch, length, width)))

    net = Net(
        forward,
        {"masks": torch.randn(2, T, T)},
        stem=nn.Linear(3, E),
        qkv=nn.Linear(E, 3 * E),
        out=nn.Linear(E, E),
        head=nn.Linear(E, 2),
        num_heads=H,
    )
    check(net, torch.randn(4, T, 3), {"stem": H})


def test_heads_that_are_a_constant_lose_dimensions_of_every_head_or_are_refused():
    """The width of a head is free in `view(B, T, H, -1)`; with a fixed scale this is what masking says."""

    def split(net, x):
        return x.view(len(x), T, H, -1).transpose(1, 2)

    net, x = attention(split)
    check(net, x, {"stem": C, "q": D, "v": D})


def test_both_heads_and_widths_as_constants_are_refused():
    net, x = attention(heads_constant)
    check(net, x, {"stem": C}, {"q": "does not run with fewer channels"})


def qkv_chunk(net, x):
    return (heads_inferred(net, part) for part in net.qkv(x).chunk(3, -1))


def qkv_split(net, x):
    qkv = net.qkv(x)
    return (heads_inferred(net, part) for part in qkv.split(qkv.shape[-1] // 3, dim=2))


def qkv_three_first(net, x):
    return net.qkv(x).reshape(len(x), T, 3, -1, D).permute(2, 0, 3, 1, 4)


def qkv_three_first_attribute(net, x):
    return net.qkv(x).reshape(len(x), T, 3, net.num_heads, net.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def qkv_three_first_indexed(net, x):
    qkv = net.qkv(x).reshape(len(x), T, 3, net.num_heads, D).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def qkv_heads_first(net, x):
    return net.qkv(x).view(len(x), T, -1, 3 * D).transpose(1, 2).chunk(3, -1)


def qkv_heads_then_three(net, x):
    return net.qkv(x).reshape(len(x), T, net.num_heads, 3, D).permute(3, 0, 2, 1, 4)


def qkv_heads_first_split(net, x):
    return net.qkv(x).view(len(x), T, -1, 3 * D).transpose(1, 2).split([D, D, D], -1)


def qkv_three_by_hand(net, x):
    qkv = net.qkv(x)
    width = qkv.shape[-1] // 3
    return (heads_inferred(net, part) for part in (qkv[..., :width], qkv[..., width : 2 * width], qkv[..., -width:]))


FUSED = [
    *(qkv_chunk, qkv_split, qkv_three_first, qkv_three_first_attribute, qkv_three_first_indexed, qkv_heads_first),
    *(qkv_heads_then_three, qkv_heads_first_split, qkv_three_by_hand),
]


@pytest.mark.parametrize("attend", [softmax_by_hand, fused])
@pytest.mark.parametrize("spelling", FUSED)
def test_a_fused_projection_loses_whole_heads(spelling, attend):
    def forward(net, x):
        x = net.stem(x)
        q, k, v = spelling(net, x)
        return net.head(x + net.out(joined(attend(q, k, v))))

    net = Net(
        forward,
        stem=nn.Linear(3, C),
        qkv=nn.Linear(C, 3 * E),
        out=nn.Linear(E, C),
        head=nn.Linear(C, 2),
        num_heads=H,
        head_dim=D,
    )
    groups = check(net, torch.randn(B, T, 3), {"stem": C, "qkv": H})
    owner = groups["qkv"].members[0].owner
    heads = torch.arange(H).repeat_interleave(D).tolist()
    interleaved = torch.arange(H).repeat_interleave(3 * D).tolist()
    assert owner.tolist() == (interleaved if "heads" in spelling.__name__ else heads * 3)


class HeadsInTheBatch(nn.Module):
    """Attention as in guided diffusion: each head is a row of the batch."""

    def __init__(self, heads, halves_first):
        super().__init__()
        self.n_heads, self.halves_first = heads, halves_first

    def forward(self, qkv):
        rows, width, length = qkv.shape
        inner = width // (3 * self.n_heads)
        if self.halves_first:
            q, k, v = (part.reshape(rows * self.n_heads, inner, length) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(rows * self.n_heads, inner * 3, length).split(inner, dim=1)
        weight = torch.einsum("bct,bcs->bts", q * inner**-0.25, k * inner**-0.25).softmax(-1)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(rows, -1, length)


@pytest.mark.parametrize("halves_first", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_heads_that_are_folded_into_the_batch_are_counted_where_they_are_laid_out(halves_first, inside):
    def forward(net, x):
        x = net.stem(x)
        return net.head(x + net.out(net.attend(net.qkv(x))))

    attend = HeadsInTheBatch(H, halves_first)
    layers = {"stem": nn.Conv1d(3, C, 1), "qkv": nn.Conv1d(C, 3 * E, 1), "out": nn.Conv1d(E, C, 1)}
    net = Net(forward, **layers, head=nn.Conv1d(C, 2, 1), attend=nn.Sequential(attend) if inside else attend)
    groups = check(net, torch.randn(B, 3, T), {"stem": C, "qkv": H})
    (count,) = groups["qkv"].counts
    assert (count.module, count.attribute, count.per_channel) == ("attend.0" if inside else "attend", "n_heads", 1)


def grouped_net(repeat, kv=2):
    """`kv` heads of keys and values, each for some queries."""

    def forward(net, x):
        x = net.stem(x)
        q, k, v = (heads_inferred(net, layer(x)) for layer in (net.q, net.k, net.v))
        return net.head(x + net.out(joined(softmax_by_hand(q, repeat(net, k), repeat(net, v)))))

    net = Net(
        forward,
        stem=nn.Linear(3, C),
        q=nn.Linear(C, E),
        k=nn.Linear(C, kv * D),
        v=nn.Linear(C, kv * D),
        out=nn.Linear(E, C),
        head=nn.Linear(C, 2),
    )
    return net, torch.randn(B, T, 3)


def by_interleave(net, x):
    return x.repeat_interleave(2, dim=1)


def by_expand(net, x):
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), -1, T, D)


def by_stack(net, x):
    return torch.stack([x, x], 2).flatten(1, 2)


@pytest.mark.parametrize("repeat", [by_interleave, by_expand, by_stack])
def test_grouped_queries_go_with_their_key_and_value(repeat):
    net, x = grouped_net(repeat)
    groups = check(net, x, {"stem": C, "q": 2})
    owners = {str(member): member.owner.tolist() for member in groups["q"].members}
    assert owners["q (out)"] == owners["out (in)"] == [0] * 6 + [1] * 6
    assert owners["k (out)"] == owners["v (out)"] == [0] * 3 + [1] * 3


def by_repeat(net, x):
    return x.repeat(1, 2, 1, 1)


def test_queries_that_take_turns_at_the_keys_go_with_their_key():
    net, x = grouped_net(by_repeat)
    groups = check(net, x, {"stem": C, "q": 2})
    owners = {str(member): member.owner.tolist() for member in groups["q"].members}
    assert owners["q (out)"] == ([0] * 3 + [1] * 3) * 2


def test_grouped_queries_of_the_fused_operator():
    def forward(net, x):
        x = net.stem(x)
        q, k, v = (heads_inferred(net, layer(x)) for layer in (net.q, net.k, net.v))
        return net.head(x + net.out(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))))

    net, x = grouped_net(by_interleave)
    net.function = forward
    check(net, x, {"stem": C, "q": 2})


@pytest.mark.parametrize("spelling", ["broadcast", "expand"])
def test_multi_query_attention_loses_heads_of_queries(spelling):

    def forward(net, x):
        x = net.stem(x)
        q = heads_inferred(net, net.q(x))
        k, v = net.k(x)[:, None], net.v(x)[:, None]
        if spelling == "expand":
            k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
        return net.head(x + net.out(joined(softmax_by_hand(q, k, v))))

    net = Net(
        forward,
        stem=nn.Linear(3, C),
        q=nn.Linear(C, E),
        k=nn.Linear(C, D),
        v=nn.Linear(C, D),
        out=nn.Linear(E, C),
        head=nn.Linear(C, 2),
    )
    check(net, torch.randn(B, T, 3), {"stem": C, "q": H, "v": D}, {"k": "width is fixed"})


def test_cross_attention_couples_queries_of_one_stream_with_keys_of_another():
    def forward(net, x, y):
        x, y = net.stem(x), net.other(y)
        q, k, v = heads_inferred(net, net.q(x)), heads_inferred(net, net.k(y)), heads_inferred(net, net.v(y))
        return net.head(x + net.out(joined(softmax_by_hand(q, k, v))))

    net = Net(
        forward,
        stem=nn.Linear(3, C),
        other=nn.Linear(4, 7),
        q=nn.Linear(C, E),
        k=nn.Linear(7, E),
        v=nn.Linear(7, E),
        out=nn.Linear(E, C),
        head=nn.Linear(C, 2),
    )
    check(net, (torch.randn(B, T, 3), torch.randn(B, 7, 4)), {"stem": C, "other": 7, "q": H})


def rotated_halves(x):
    one, other = x.chunk(2, -1)
    return torch.cat([-other, one], -1)


def rotated_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


@pytest.mark.parametrize("rotated", [rotated_halves, rotated_pairs])
def test_rotary_embeddings_leave_heads_free(rotated):
    width = 4
    angles = torch.outer(torch.arange(T).float(), torch.rand(width))

    def split(net, x):
        return x.view(len(x), T, -1, width).transpose(1, 2)

    def forward(net, x):
        x = net.stem(x)
        q, k, v = (split(net, layer(x)) for layer in (net.q, net.k, net.v))
        q, k = (t * net.cos + rotated(t) * net.sin for t in (q, k))
        return net.head(x + net.out(joined(softmax_by_hand(q, k, v))))

    net = Net(
        forward,
        {"cos": angles.cos(), "sin": angles.sin()},
        stem=nn.Linear(3, C),
        **{name: nn.Linear(C, H * width) for name in "qkv"},
        out=nn.Linear(H * width, C),
        head=nn.Linear(C, 2),
    )
    check(net, torch.randn(B, T, 3), {"stem": C, "q": H})


def test_a_table_of_relative_positions_loses_the_biases_of_a_head():
    index = (torch.arange(T)[:, None] - torch.arange(T)[None] + T - 1).flatten()

    def forward(net, x):
        x = net.stem(x)
        q, k, v = (heads_inferred(net, layer(x)) for layer in (net.q, net.k, net.v))
        bias = net.table[net.index].view(T, T, -1).permute(2, 0, 1).contiguous()
        return net.head(x + net.out(joined(softmax_by_hand(q, k, v, bias[None]))))

    net, x = attention(heads_inferred)
    net.function, net.table = forward, nn.Parameter(torch.randn(2 * T - 1, H))
    net.register_buffer("index", index)
    groups = check(net, x, {"stem": C, "q": H})
    assert "table (dim1)" in {str(member) for member in groups["q"].members}


def test_an_embedding_as_relative_position_bias_loses_the_biases_of_a_head():
    def forward(net, x):
        x = net.stem(x)
        q, k, v = (heads_inferred(net, layer(x)) for layer in (net.q, net.k, net.v))
        index = torch.arange(T)[:, None] - torch.arange(T)[None] + T - 1
        return net.head(x + net.out(joined(softmax_by_hand(q, k, v, net.bias(index).permute(2, 0, 1)[None]))))

    net, x = attention(heads_inferred)
    net.function, net.bias = forward, nn.Embedding(2 * T - 1, H)
    groups = check(net, x, {"stem": C, "q": H})
    assert "bias (both)" in {str(member) for member in groups["q"].members}


@pytest.mark.parametrize("kind", ["filled", "added", "bool of the fused operator", "causal"])
def test_causal_masks_of_fixed_length_leave_heads_free(kind):
    def attend(net, q, k, v):
        if kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if kind == "bool of the fused operator":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=net.mask[:T, :T])
        scores = q @ k.transpose(-2, -1) * D**-0.5
        if kind == "filled":
            scores = scores.masked_fill(~net.mask[:T, :T], -math.inf)
        else:
            scores = scores + torch.zeros(T, T).masked_fill(~net.mask[:T, :T], -1e9)
        return scores.softmax(-1) @ v

    def forward(net, x):
        x = net.stem(x)
        q, k, v = (heads_inferred(net, layer(x)) for layer in (net.q, net.k, net.v))
        return net.head(x + net.out(joined(attend(net, q, k, v))))

    net, x = attention(heads_inferred)
    net.function = forward
    net.register_buffer("mask", torch.ones(9, 9).tril().bool())
    check(net, x, {"stem": C, "q": H})


def test_attention_spelled_with_einsum():
    def forward(net, x):
        x = net.stem(x)
        q, k, v = (layer(x).view(len(x), T, -1, D) for layer in (net.q, net.k, net.v))
        scores = torch.einsum("bthd,bshd->bhts", q, k).mul(D**-0.5).softmax(-1)
        return net.head(x + net.out(torch.einsum("bhts,bshd->bthd", scores, v).reshape(len(x), T, -1)))

    net, x = attention(heads_inferred)
    net.function = forward
    check(net, x, {"stem": C, "q": H})


def test_projections_that_are_parameters_of_three_dimensions_lose_heads_and_dimensions():
    """Heads of their own dimension, as in `einsum("btc,hcd->bhtd")`: both dimensions are laid out as one in between."""

    def forward(net, x):
        x = net.stem(x)
        q, k, v = (torch.einsum("btc,hcd->bhtd", x, w) for w in (net.q, net.k, net.v))
        mixed = softmax_by_hand(q, k, v)
        return net.head(x + torch.einsum("bhtd,hdc->btc", mixed, net.out))

    parts = {name: nn.Parameter(torch.randn(H, C, D)) for name in "qkv"}
    net = Net(forward, stem=nn.Linear(3, C), **parts, out=nn.Parameter(torch.randn(H, D, C) / 4), head=nn.Linear(C, 2))
    groups = check(net, torch.randn(B, T, 3), {"stem": C, "q": H, "q#2": D, "v": D})
    assert {str(member) for member in groups["q"].members} == {"q (dim0)", "k (dim0)", "v (dim0)", "out (dim0)"}
    assert {str(member) for member in groups["v"].members} == {"v (dim2)", "out (dim1)"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_attention_layer_of_torch_loses_heads_and_channels(batch_first):
    def forward(net, x):
        x = net.stem(x)
        return net.head(x + net.attend(x, x, x)[0])

    net = Net(
        forward,
        stem=nn.Linear(3, 12),
        attend=nn.MultiheadAttention(12, 3, batch_first=batch_first),
        head=nn.Linear(12, 2),
    )
    check(net, torch.randn(B, T, 3), {"stem": 12, "attend.heads": 3})


def test_attention_over_channels_is_refused_or_right():
    """`softmax(q.T @ k)`: the channels take the place of tokens, and a softmax runs over them."""

    def forward(net, x):
        x = net.stem(x)
        q, k, v = net.q(x), net.k(x), net.v(x)
        weights = (q.transpose(1, 2) @ k * T**-0.5).softmax(-1)
        return net.head(x + net.out((weights @ v.transpose(1, 2)).transpose(1, 2)))

    net, x = attention(heads_inferred)
    net.function = forward
    check(net, x, {"stem": C, "q": E, "k": E}, masked=False)


# --------------------------------------------------------------------------------------------------------------- gates


def gate_chunk(net, x):
    value, gate = x.chunk(2, -1)
    return value * gate.sigmoid()


def gate_glu(net, x):
    return F.glu(x)


def gate_split(net, x):
    value, gate = x.split(x.shape[-1] // 2, dim=-1)
    return F.silu(gate) * value


def gate_split_constant(net, x):
    value, gate = torch.split(x, 6, dim=1)
    return value * gate


def gate_slices(net, x):
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:].tanh()


def gate_negative(net, x):
    half = x.size(-1) // 2
    return x[..., -half:].relu() * x[..., :-half]


def gate_tensor_split(net, x):
    one, other = torch.tensor_split(x, 2, -1)
    return one + other


def gate_narrow(net, x):
    half = x.shape[1] // 2
    return x.narrow(1, 0, half) * torch.sigmoid(x.narrow(-1, half, half))


def gate_unflatten(net, x):
    return x.unflatten(-1, (2, -1)).prod(-2)


def gate_view_index(net, x):
    x = x.view(len(x), 2, -1)
    return x[:, 0] * x[:, 1].sigmoid()


def gate_unbind(net, x):
    value, gate = x.reshape(len(x), 2, -1).unbind(1)
    return value * gate.sigmoid()


def gate_maxout(net, x):
    return x.view(len(x), 2, -1).amax(1)


@pytest.mark.parametrize(
    "gate",
    [
        *(gate_chunk, gate_glu, gate_split, gate_slices, gate_negative, gate_tensor_split, gate_narrow),
        *(gate_unflatten, gate_view_index, gate_unbind, gate_maxout),
    ],
)
def test_a_gate_goes_with_what_it_gates(gate):
    net, x = between(gate, 12, 6)
    groups = check(net, x, {"body": 6})
    assert groups["body"].members[0].owner.tolist() == list(range(6)) * 2


def test_a_gate_of_constant_width_is_refused():
    net, x = between(gate_split_constant, 12, 6)
    check(net, x, {}, {"body": "fewer channels"})


def pairs_view(net, x):
    return x.view(len(x), -1, 2).prod(-1)


def pairs_steps(net, x):
    return x[:, ::2] * x[:, 1::2].sigmoid()


def pairs_unflatten(net, x):
    return x.unflatten(1, (-1, 2)).amax(2)


@pytest.mark.parametrize("gate", [pairs_view, pairs_steps, pairs_unflatten])
def test_neighbours_that_meet_go_together(gate):
    net, x = between(gate, 12, 6)
    groups = check(net, x, {"body": 6})
    assert groups["body"].members[0].owner.tolist() == [n // 2 for n in range(12)]


def test_three_gates_of_a_cell_by_hand_go_together():
    def forward(net, x, h):
        h = net.state(h)
        ri, zi, ni = net.inner(x).chunk(3, -1)
        rh, zh, nh = net.outer(h).chunk(3, -1)
        reset, update = (ri + rh).sigmoid(), (zi + zh).sigmoid()
        new = (ni + reset * nh).tanh()
        return net.head((1 - update) * new + update * h)

    net = Net(forward, state=nn.Linear(3, 5), inner=nn.Linear(4, 15), outer=nn.Linear(5, 15), head=nn.Linear(5, 2))
    check(net, (torch.randn(3, 4), torch.randn(3, 3)), {"state": 5})


def test_a_gate_over_maps_and_a_gate_of_one_channel():
    net, x = between_maps(lambda net, x: F.glu(x, 1), 12, 6)
    check(net, x, {"body": 6})
    net, x = between_maps(lambda net, x: x * net.gate(x).sigmoid(), 6, gate=nn.Conv2d(6, 1, 1))
    check(net, x, {"body": 6})


def test_squeeze_and_excitation_scales_its_own_channels():
    def excite(net, x):
        scale = net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return x * scale

    net, x = between_maps(excite, 6, down=nn.Conv2d(6, 4, 1), up=nn.Conv2d(4, 6, 1))
    check(net, x, {"body": 6, "down": 4})
