"""Channels are followed through every operator: the pruned network computes what the masked dense network does."""

from contextlib import ExitStack

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import library, nn
from torch.nn import functional as F

from lightning_softprune import find_groups
from lightning_softprune.search import Plan
from lightning_softprune.surgery import apply_plan
from lightning_softprune.surgery.probing import mask_channels
from support.groups import by_name

pytestmark = pytest.mark.usefixtures("one_thread")


class Between(nn.Module):
    """Two layers, and code of a test's own between them."""

    def __init__(self, code, first, second, **parts):
        super().__init__()
        self.first, self.second, self.code = first, second, code
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.second(self.code(self, self.first(x)))


def tokens(code, width=12, reads=12, gives=12, **parts):
    torch.manual_seed(0)
    return Between(code, nn.Linear(5, gives), nn.Linear(reads, 3), **parts), torch.randn(4, 6, 5)


def maps(code, width=12, reads=12, **parts):
    torch.manual_seed(0)
    return Between(code, nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(reads, 2, 1), **parts), torch.randn(2, 3, 8, 8)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def in_place_after_a_view(m, h):
    rows = h.view(-1, h.shape[-1])
    rows.mul_(2).add_(m.scale)
    return h.relu_()


def choosing_between_two_kinds():
    """Split attention: two reshapes say that channels come in two kinds, and only one by their places looks like it."""

    def code(m, h):
        kinds = h.reshape(len(h), 2, h.shape[1] // 2, *h.shape[2:])
        gate = m.gate(kinds.sum(1).mean((2, 3), keepdim=True))
        gate = gate.view(len(h), 1, 2, -1).transpose(1, 2).softmax(1).reshape(len(h), -1)
        return (kinds * gate.reshape(len(h), 2, h.shape[1] // 2, 1, 1)).sum(1)

    return maps(code, reads=6, gate=nn.Conv2d(6, 12, 1))


CASES = {
    "glu": (tokens(lambda m, h: F.glu(h, -1), gives=24), 12),
    "glu of a map": (maps(lambda m, h: F.glu(h, 1), width=24), 12),
    "chunk": (tokens(lambda m, h: torch.mul(*h.chunk(2, -1)), gives=24), 12),
    "chunk into three": (tokens(lambda m, h: sum(h.chunk(3, -1)), gives=36), 12),
    "slice of one half": (tokens(lambda m, h: h[..., : h.shape[-1] // 2], gives=24), 12),
    "slice in steps": (tokens(lambda m, h: h[..., ::2] + h[..., 1::2], gives=24), 12),
    "pixel shuffle": (maps(lambda m, h: F.pixel_shuffle(h, 2), width=48), 12),
    "pixel unshuffle": (maps(lambda m, h: F.pixel_unshuffle(h, 2), width=12, reads=48), 12),
    "channel shuffle": (maps(lambda m, h: F.channel_shuffle(h, 3)), 4),
    "channel shuffle by hand": (
        maps(lambda m, h: h.view(h.shape[0], 2, -1, *h.shape[2:]).transpose(1, 2).reshape(h.shape)),
        6,
    ),
    "tokens of a map": (
        Between(lambda m, h: h.flatten(2).transpose(1, 2), nn.Conv2d(3, 12, 3), nn.Linear(12, 2)),
        12,
    ),
    "flatten": (Between(lambda m, h: h.flatten(1), nn.Conv2d(3, 12, 3), nn.Linear(12 * 36, 2)), 12),
    "stack": (tokens(lambda m, h: torch.stack([h, h.relu()], 0).sum(0)), 12),
    "einsum": (tokens(lambda m, h: torch.einsum("btc,cd->btd", h, m.weight), weight=parameter(12, 12)), 12),
    "experts": (
        tokens(lambda m, h: torch.einsum("btc,ecd->betd", h, m.experts).relu().sum(1), experts=parameter(3, 12, 12)),
        12,
    ),
    "a gate of one channel": (maps(lambda m, h: h * m.gate(h).sigmoid(), gate=nn.Conv2d(12, 1, 1)), 12),
    "a gate per channel": (
        maps(lambda m, h: h * m.gate(h.mean((2, 3)))[:, :, None, None].sigmoid(), gate=nn.Linear(12, 12)),
        12,
    ),
    "attention pooling": (tokens(lambda m, h: (h * m.score(h).softmax(1)).sum(1), score=nn.Linear(12, 1)), 12),
    "a scale per channel": (tokens(lambda m, h: h * m.scale, scale=parameter(12)), 12),
    "positions in a buffer": (tokens(lambda m, h: h + m.positions, positions=torch.randn(1, 6, 12)), 12),
    "in place after a view": (tokens(in_place_after_a_view, scale=parameter(12)), 12),
    "a low-rank adapter": (
        tokens(lambda m, h: h + h @ m.down.t() @ m.up.t(), down=parameter(4, 12), up=parameter(12, 4)),
        12,
    ),
    "padding beside a stream": (maps(lambda m, h: F.pad(h, (0, 0, 0, 0, 2, 2)), reads=16), 12),
    "patch merging": (
        maps(lambda m, h: torch.cat([h[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1), reads=48),
        12,
    ),
    "a functional layer": (
        tokens(lambda m, h: F.linear(h, m.weight, m.bias), weight=parameter(12, 12), bias=parameter(12)),
        12,
    ),
    "a functional convolution": (
        maps(lambda m, h: F.conv2d(h, m.kernel, padding=1), kernel=parameter(12, 12, 3, 3)),
        12,
    ),
    "a grouped functional convolution": (
        maps(lambda m, h: F.conv2d(h, m.kernel, groups=3), kernel=parameter(12, 4, 1, 1)),
        4,
    ),
    "a blur of each channel": (
        maps(lambda m, h: F.conv2d(h, m.blur, groups=m.channels), blur=torch.randn(12, 1, 3, 3), channels=12),
        12,
    ),
    "one blur of all channels": (
        maps(
            lambda m, h: F.conv2d(h, m.blur.expand(h.shape[1], -1, -1, -1), groups=h.shape[1]),
            blur=parameter(1, 1, 3, 3),
        ),
        12,
    ),
    "two filters of each channel": (
        maps(lambda m, h: F.conv2d(h, m.kernel, groups=h.shape[1]), reads=24, kernel=parameter(24, 1, 3, 3)),
        12,
    ),
    "each channel enlarged": (
        maps(
            lambda m, h: F.conv_transpose2d(h, m.kernel, None, 2, groups=len(m.kernel)), kernel=parameter(12, 1, 2, 2)
        ),
        12,
    ),
    "each channel enlarged to two": (
        maps(lambda m, h: F.conv_transpose2d(h, m.kernel, groups=h.shape[1]), reads=24, kernel=parameter(12, 2, 2, 2)),
        12,
    ),
    "a convolution over tokens": (tokens(lambda m, h: h + m.mix(h), mix=nn.Conv1d(6, 6, 1)), 12),
    "a convolution over neighbouring tokens": (
        tokens(lambda m, h: m.mix(h[:, None]).squeeze(1), mix=nn.Conv2d(1, 1, (3, 1), padding=(1, 0))),
        12,
    ),
    "channels in the batch of a convolution": (
        maps(lambda m, h: m.blur(h.flatten(0, 1)[:, None]).reshape(h.shape), blur=nn.Conv2d(1, 1, 3, padding=1)),
        12,
    ),
    "a choice between two kinds of channels": (choosing_between_two_kinds(), 6),
    "repeat": (tokens(lambda m, h: h.repeat(1, 1, 2), reads=24), 12),
    "interpolated": (maps(lambda m, h: F.interpolate(F.max_pool2d(h, 2), scale_factor=2.0)), 12),
    "what is dropped": (
        tokens(lambda m, h: (h[..., :5].argmax(-1), h.sort(-1), m.side(h), h)[-1], side=nn.Linear(12, 2)),
        12,
    ),
}


def input_of(model):
    return torch.randn(4, 6, 5) if isinstance(model.first, nn.Linear) else torch.randn(2, 3, 8, 8)


def losing(groups, pick):
    """A plan in which each group loses what `pick` says of its channels."""
    return Plan(tuple(tuple(int(n) for n in pick(group.num_channels)) for group in groups))


def assert_as_masked(model, x, groups, pick):
    """Pruning computes what masking does, and undoing leaves nothing."""
    plan = losing(groups, pick)
    dense = model(x)
    with ExitStack() as stack:
        for group, channels in zip(groups, plan.removed, strict=True):
            stack.enter_context(mask_channels(model, group, channels))
        masked = model(x)
    surgery = apply_plan(model, groups, plan)
    pruned = model(x)
    surgery.undo()
    torch.testing.assert_close(pruned, masked, rtol=1e-5, atol=1e-5)
    assert (masked - dense).abs().max() > 1e-4
    assert torch.equal(model(x), dense)


PICKS = (lambda n: [0], lambda n: [n - 1], lambda n: range(0, n - 1, 2), lambda n: range(1, n))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_pruned_is_masked_whatever_lies_between_two_layers(name):
    model, channels = CASES[name]
    model, x = model if isinstance(model, tuple) else (model, input_of(model))
    model.eval()
    found = by_name(find_groups(model, x))
    assert (found["first"].prunable, found["first"].num_channels) == (True, channels), found["first"].reason
    for pick in PICKS:
        assert_as_masked(model, x, [found["first"]], pick)


# ----------------------------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Four heads of eight, written in one way or another."""

    def __init__(self, spelling, keys=32):
        super().__init__()
        self.num_heads, self.head_dim, self.all_head_size = 4, 8, 32
        self.embed, self.q, self.kv = nn.Linear(5, 20), nn.Linear(20, 32), nn.Linear(20, 2 * keys)
        self.qkv, self.out, self.head = nn.Linear(20, 96), nn.Linear(32, 16), nn.Linear(16, 3)
        self.bias = nn.Parameter(torch.randn(4, 6, 6))
        self.spelling = spelling
        for unused in ("q", "kv") if "kv" not in spelling.__name__ else ("qkv",):
            delattr(self, unused)
        if "bias" not in spelling.__name__:
            del self.bias

    def forward(self, x):
        return self.head(self.out(self.spelling(self, self.embed(x).relu())).relu())


def heads_of(m, t):
    return t.view(*t.shape[:2], m.num_heads, m.head_dim).transpose(1, 2)


def joined(m, t):
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], m.all_head_size)


def three_at_once(m, h):
    q, k, v = m.qkv(h).reshape(*h.shape[:2], 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads_first(m, h):
    q, k, v = m.qkv(h).view(*h.shape[:2], m.num_heads, -1).transpose(1, 2).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads_with_three_last(m, h):
    q, k, v = m.qkv(h).view(*h.shape[:2], m.num_heads, -1, 3).permute(4, 0, 2, 1, 3)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def chunked(m, h):
    q, k, v = (heads_of(m, t) for t in m.qkv(h).chunk(3, -1))
    return joined(m, (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v)


def with_bias(m, h):
    q, k, v = (heads_of(m, t) for t in m.qkv(h).chunk(3, -1))
    return joined(m, (q @ k.transpose(-1, -2) + m.bias).softmax(-1) @ v)


def causal(m, h):
    q, k, v = (heads_of(m, t) for t in m.qkv(h).chunk(3, -1))
    return joined(m, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def rotary(m, h):
    angle = torch.arange(6)[:, None] / 10.0 ** torch.arange(0, 8, 2).repeat(2)[None] * 1.0

    def turned(t):
        return t * angle.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * angle.sin()

    q, k, v = (heads_of(m, t) for t in m.qkv(h).chunk(3, -1))
    return joined(m, F.scaled_dot_product_attention(turned(q), turned(k), v))


def by_einsum(m, h):
    q, k, v = (t.unflatten(-1, (m.num_heads, m.head_dim)) for t in m.qkv(h).chunk(3, -1))
    return torch.einsum("bhts,bshd->bthd", torch.einsum("bthd,bshd->bhts", q, k).softmax(-1), v).flatten(2)


def heads_in_the_batch(m, h):
    batch, length, _ = h.shape
    q, k, v = (heads_of(m, t).reshape(batch * m.num_heads, length, m.head_dim) for t in m.qkv(h).chunk(3, -1))
    mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return mixed.view(batch, m.num_heads, length, m.head_dim).transpose(1, 2).flatten(2)


def grouped_kv(m, h):
    k, v = (t.view(*t.shape[:2], -1, 8).transpose(1, 2) for t in m.kv(h).chunk(2, -1))
    q = m.q(h).view(*h.shape[:2], -1, 8).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def grouped_kv_by_repeating(m, h):
    k, v = (t.view(*t.shape[:2], -1, 8).transpose(1, 2).repeat_interleave(2, 1) for t in m.kv(h).chunk(2, -1))
    q = m.q(h).view(*h.shape[:2], -1, 8).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


SPELLINGS = {
    three_at_once: ("qkv", 32, 4),
    heads_first: ("qkv", 32, 4),
    heads_with_three_last: ("qkv", 32, 4),
    chunked: ("qkv", 32, 4),
    with_bias: ("qkv", 32, 4),
    causal: ("qkv", 32, 4),
    rotary: ("qkv", 32, 4),
    by_einsum: ("qkv", 32, 4),
    heads_in_the_batch: ("qkv", 32, 4),
    grouped_kv: ("q", 16, 2),
    grouped_kv_by_repeating: ("q", 16, 2),
}


@torch.no_grad()
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_heads_are_found_and_pruned_as_masked(spelling):
    name, keys, heads = SPELLINGS[spelling]
    torch.manual_seed(0)
    model, x = Attention(spelling, keys).eval(), torch.randn(4, 6, 5)
    found = by_name(find_groups(model, x))
    group = found.get(name) or found["kv"]
    assert (group.prunable, group.num_channels) == (True, heads), group.reason
    before = dict(vars(model))
    for pick in PICKS[:3]:
        assert_as_masked(model, x, [group], pick)
    assert {key: vars(model)[key] for key in ("num_heads", "head_dim", "all_head_size")} == {
        key: before[key] for key in ("num_heads", "head_dim", "all_head_size")
    }
    assert all(found[other].prunable for other in ("embed", "out"))


def test_attributes_that_count_heads_are_found():
    torch.manual_seed(0)
    model = Attention(chunked).eval()
    found = by_name(find_groups(model, torch.randn(4, 6, 5)))
    assert {(count.attribute, count.per_channel) for count in found["qkv"].counts} == {
        ("num_heads", 1),
        ("all_head_size", 8),
    }
    surgery = apply_plan(model, [found["qkv"]], Plan(((1,),)))
    assert (model.num_heads, model.head_dim, model.all_head_size) == (3, 8, 24)
    surgery.undo()
    assert (model.num_heads, model.head_dim, model.all_head_size) == (4, 8, 32)


def test_a_width_that_follows_the_stream_takes_the_heads_with_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.embed_dim = 4, 32
            self.embed, self.qkv, self.out, self.head = (
                nn.Linear(5, 32),
                nn.Linear(32, 96),
                nn.Linear(32, 32),
                nn.Linear(32, 3),
            )

        def forward(self, x):
            h = self.embed(x)
            b, t, c = h.shape
            parts = self.qkv(h).split(self.embed_dim, 2)
            q, k, v = (part.view(b, t, self.num_heads, c // self.num_heads).transpose(1, 2) for part in parts)
            mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
            return self.head(h + self.out(mixed.transpose(1, 2).reshape(b, t, c)))

    torch.manual_seed(0)
    model, x = Fixed().eval(), torch.randn(4, 6, 5)
    group = by_name(find_groups(model, x))["embed"]
    assert (group.prunable, group.num_channels) == (True, 4)
    with torch.no_grad():
        assert_as_masked(model, x, [group], lambda n: [1, 2])


def test_an_attribute_that_counts_the_heads_of_a_block_does_not_count_those_of_others():
    class Pool(nn.Module):
        """Attention of one query, as wide as what it reads."""

        def __init__(self):
            super().__init__()
            self.query, self.num_heads, self.head_dim = nn.Parameter(torch.randn(1, 1, 32)), 4, 8
            self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 3)

        def forward(self, x):
            b, t, c = x.shape
            q = self.q(self.query.expand(b, -1, -1)).reshape(b, 1, self.num_heads, self.head_dim).transpose(1, 2)
            k, v = self.kv(x).reshape(b, t, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 1, c))

    torch.manual_seed(0)
    block = Attention(chunked)
    block.embed, block.qkv, block.head = nn.Linear(32, 20), nn.Linear(20, 96), nn.Linear(16, 32)
    model, x = nn.Sequential(nn.Linear(5, 32), block, Pool()).eval(), torch.randn(4, 6, 5)
    found = by_name(find_groups(model, x))
    heads = found["1.qkv"]
    stream = next(group for group in found.values() if any(member.module == "2.q" for member in group.members))
    for group, place in ((heads, "1"), (stream, "2")):
        assert (group.prunable, group.num_channels) == (True, 4), group.reason
        assert {count.module for count in group.counts} == {place}
    with torch.no_grad():
        assert_as_masked(model, x, [heads, stream], lambda n: [1, 2])


def test_one_of_two_heads_goes_with_the_attribute_that_counts_them_where_the_code_runs_without_it():
    def with_widths_that_follow(m, h):
        q, k, v = m.qkv(h).reshape(*h.shape[:2], 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2) / 16**0.5 + m.bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model, x = Attention(with_widths_that_follow), torch.randn(4, 6, 5)
    model.num_heads, model.qkv = 2, nn.Linear(20, 96)
    model.bias = nn.Parameter(torch.randn(2, 6, 6))
    group = by_name(find_groups(model.eval(), x))["qkv"]
    assert (group.prunable, group.num_channels) == (True, 2), group.reason
    assert "num_heads" in {count.attribute for count in group.counts}
    with torch.no_grad():
        assert_as_masked(model, x, [group], lambda n: [0])


def test_a_width_that_is_chunked_and_laid_out_in_heads_loses_a_dimension_of_every_head():
    class Chunked(nn.Module):
        """A stream whose parts are convolved apart, in front of attention across channels that gives its shape back."""

        def __init__(self):
            super().__init__()
            self.first, self.qkv, self.out, self.second = (
                nn.Linear(5, 32),
                nn.Linear(32, 96),
                nn.Linear(32, 32),
                nn.Linear(32, 3),
            )

        def forward(self, x):
            h = torch.cat([t.tanh() * (i + 1) for i, t in enumerate(self.first(x).chunk(4, -1))], -1)
            b, t, c = h.shape
            q, k, v = self.qkv(h).reshape(b, t, 3, 4, -1).permute(2, 0, 3, 4, 1).unbind(0)
            mixed = ((q @ k.transpose(-1, -2)).tanh() @ v).permute(0, 3, 1, 2).reshape(b, t, c)
            return self.second(h + self.out(mixed))

    torch.manual_seed(0)
    model, x = Chunked().eval(), torch.randn(4, 6, 5)
    group = by_name(find_groups(model, x))["first"]
    assert (group.prunable, group.num_channels) == (True, 8), group.reason
    with torch.no_grad():
        assert_as_masked(model, x, [group], lambda n: [1, 2, 5])


def test_a_width_that_runs_only_beside_another_that_is_refused_is_read_otherwise():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mix, self.second = nn.Linear(5, 24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x):
            h = self.first(x)
            return self.second(self.mix(h).view(*h.shape[:2], 2, h.shape[-1] // 2).tanh().flatten(2))

    torch.manual_seed(0)
    model, x = Halved().eval(), torch.randn(4, 6, 5)
    found = by_name(find_groups(model, x))
    assert {name: group.num_channels for name, group in found.items() if group.prunable} == {"first": 2}
    assert {member.module for member in found["first"].members} == {"first", "mix", "second"}
    with torch.no_grad():
        assert_as_masked(model, x, [found["first"]], lambda n: [0])


def test_a_scale_that_depends_on_what_goes_is_no_reason_for_a_wrong_result():
    def scaled(m, h):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in m.qkv(h).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # four heads, written down

    torch.manual_seed(0)
    model, x = Attention(scaled).eval(), torch.randn(4, 6, 5)
    group = by_name(find_groups(model, x))["qkv"]
    if group.prunable:
        with torch.no_grad():
            assert_as_masked(model, x, [group], lambda n: [0])
    else:
        assert group.reason


# ------------------------------------------------------------------------------------------------------------ refusals


@library.custom_op("softprune_tests::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).clone()


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (lambda m, h: turned(h), "turned"),
        (lambda m, h: h * torch.randn(4, 6, 12).detach().clone().to(h), "the model does not run"),
        (lambda m, h: h.gather(-1, torch.arange(12).expand(4, 6, 12)), "by their numbers"),
        (lambda m, h: h[..., torch.arange(11, -1, -1)], "by their numbers"),
        (lambda m, h: h.cumsum(-1), "by their place"),
        (lambda m, h: torch.cat([h[..., 0:1], h[..., 1:]], -1) * h[..., 3:4], ""),
    ],
    ids=["operator", "fixed width", "gather", "index", "cumsum", "one channel"],
)
def test_what_tells_channels_apart_is_refused_by_name(code, word):
    torch.manual_seed(0)
    model, x = tokens(code)
    group = by_name(find_groups(model.eval(), x))["first"]
    assert not group.prunable
    assert word in group.reason


# ---------------------------------------------------------------------------------------------------------- properties


STEPS = {
    "relu": lambda m, h: h.relu(),
    "scale": lambda m, h: h * torch.linspace(0.5, 1.5, 6)[None, :, None],
    "glu": lambda m, h: F.glu(torch.cat([h, h.tanh()], -1), -1),
    "halves": lambda m, h: torch.cat([t.tanh() for t in h.chunk(2, -1)], -1),
    "swap": lambda m, h: torch.cat(h.chunk(2, -1)[::-1], -1),
    "pairs": lambda m, h: torch.stack([h[..., ::2], h[..., 1::2]], -1).flatten(-2),
    "blocks": lambda m, h: h.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2),
    "gate": lambda m, h: h * h.sum(-1, keepdim=True).sigmoid(),
    "residual": lambda m, h: h + h.relu(),
    "time": lambda m, h: h + h.mean(1, keepdim=True),
    "mask": lambda m, h: torch.where(h.sum(-1, keepdim=True) > 0, h, 0.1 * h),
    "layer": "layer",
    "parameter": "parameter",
    "buffer": "buffer",
    "flip": lambda m, h: h.flip(-1),
    "roll": lambda m, h: h.roll(1, -1),
    "cut": lambda m, h: torch.cat([h[..., :4], h[..., 4:]], -1),
}


class Chain(nn.Module):
    """Operators in a row, on tokens of twelve channels."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 3)
        for place, name in enumerate(names):
            if name == "layer":
                self.add_module(f"layer{place}", nn.Linear(12, 12))
            elif name == "parameter":
                self.register_parameter(f"parameter{place}", nn.Parameter(torch.randn(12, 12) / 4))
            elif name == "buffer":
                self.register_buffer(f"buffer{place}", torch.randn(12))

    def forward(self, x):
        h = self.first(x)
        for place, name in enumerate(self.names):
            if name == "layer":
                h = self.get_submodule(f"layer{place}")(h)
            elif name == "parameter":
                h = torch.tanh(h @ self.get_parameter(f"parameter{place}"))
            elif name == "buffer":
                h = h * self.get_buffer(f"buffer{place}")
            else:
                h = STEPS[name](self, h)
        return self.second(h)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), st.integers(0, 5))
def test_no_chain_of_operators_differs_from_masking(names, seed):
    torch.manual_seed(seed)
    model, x = Chain(names).eval(), torch.randn(3, 6, 5)
    groups = [group for group in find_groups(model, x) if group.prunable]
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        if groups:
            assert_as_masked(model, x, groups, lambda n: sorted(rng.choice(n, max(n // 3, 1), replace=False)))
