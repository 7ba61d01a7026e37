"""Reshapes, slices, products, buffers, norms and what is refused: as in `test_flow_rules`, one network each."""

import copy
import ctypes
import math

import numpy as np
import pytest
import torch
from torch import library, nn
from torch.nn import functional as F

from lightning_softprune import find_groups
from lightning_softprune.graph import Count
from support.masked import Net, check

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def between(operation, width, out=None, shape=(3, 5), buffers=None, **parts):
    """Linear -> operation -> Linear, and an input."""
    net = Net(
        lambda net, x: net.head(operation(net, net.body(x))),
        buffers,
        body=nn.Linear(shape[-1], width),
        head=nn.Linear(out or width, 2),
        **parts,
    )
    return net, torch.randn(shape)


def between_maps(operation, width, out=None, size=4, buffers=None, **parts):
    """Conv -> operation -> Conv, and an input."""
    net = Net(
        lambda net, x: net.head(operation(net, net.body(x).relu())),
        buffers,
        body=nn.Conv2d(2, width, 3, padding=1),
        head=nn.Conv2d(out or width, 2, 1),
        **parts,
    )
    return net, torch.randn(2, 2, size, size)


# ------------------------------------------------------------------------------------------------- splits and slices


@pytest.mark.parametrize("sizes", [(2, 6), (1, 7), (5, 3), (3, 3, 2), (4, 2, 1, 1)])
def test_a_split_by_the_widths_of_its_readers_hands_each_its_own(sizes):
    def forward(net, x):
        parts = net.body(x).split([reader.in_features for reader in net.readers], -1)
        return net.head(sum(reader(part.tanh()) for reader, part in zip(net.readers, parts, strict=True)))

    readers = nn.ModuleList(nn.Linear(size, 3) for size in sizes)
    net = Net(forward, body=nn.Linear(5, 8), readers=readers, head=nn.Linear(3, 2))
    check(net, torch.randn(4, 5), {"body": 8, "readers.0": 3})


@pytest.mark.parametrize("dim", [1, -1])
def test_a_split_by_constants_is_refused_where_it_does_not_run(dim):
    def forward(net, x):
        one, other = net.body(x).split([3, 5], dim)
        return net.one(one) + net.other(other)

    net = Net(forward, body=nn.Linear(5, 8), one=nn.Linear(3, 2), other=nn.Linear(5, 2))
    check(net, torch.randn(4, 5), {}, {"body": "fewer channels"})


def test_slices_by_constants_are_refused_where_readers_would_see_others():
    def forward(net, x):
        x = net.body(x)
        return net.one(x[:, :3]) + net.other(x[:, 3:])

    net = Net(forward, body=nn.Linear(5, 8), one=nn.Linear(3, 2), other=nn.Linear(5, 2))
    check(net, torch.randn(4, 5), {})


def test_a_constant_slice_of_raw_input_beside_channels_is_no_obstacle():
    def forward(net, x):
        h = torch.cat([x[..., 1:3], net.body(x[:, ::2]).relu(), x[:, -1:]], -1)
        return net.head(h)

    net = Net(forward, body=nn.Linear(3, 6), head=nn.Linear(9, 2))
    check(net, torch.randn(4, 6), {"body": 6})


@pytest.mark.parametrize("how", ["split", "slices"])
def test_parts_that_are_shares_of_the_width_shrink_alike(how):
    def operation(net, x):
        one = x.shape[-1] // 4
        first, rest = x.split([one, x.shape[-1] - one], -1) if how == "split" else (x[..., :one], x[..., one:])
        return torch.cat([net.inner(first), rest], -1)

    net, x = between(operation, 16, inner=nn.Linear(4, 4))
    check(net, x, {"body": 4, "inner": 4})


@pytest.mark.parametrize(
    "column",
    [
        lambda x: torch.ones_like(x[..., :1]),
        lambda x: torch.full_like(x[..., -1:], 0.3),
        lambda x: torch.empty_like(x.narrow(-1, 0, 1)).fill_(0.5),
        lambda x: x[..., :1] * 0 + 0.7,
        lambda x: x.new_ones(len(x), 1),
    ],
)
@pytest.mark.parametrize("width", [8, 12])
def test_a_column_in_the_shape_of_one_channel_is_no_channel(column, width):
    net, x = between(lambda net, x: torch.cat([x, column(x)], -1), width, width + 1)
    check(net, x, {"body": width})


def test_noise_in_the_shape_of_one_channel_is_no_channel():
    net, x = between(lambda net, x: torch.cat([x, torch.randn_like(x[..., :1])], -1), 8, 9)
    body, _ = find_groups(net, x)
    assert (body.num_channels, body.prunable) == (8, True)


@pytest.mark.parametrize("width", [8, 12])
def test_one_channel_that_is_read_is_refused(width):
    net, x = between(lambda net, x: torch.cat([x, x[..., :1].exp()], -1), width, width + 1)
    check(net, x, {}, {"body": "the model does not run with fewer channels"})


def test_slices_with_steps_couple_what_they_step_over():
    net, x = between(lambda net, x: x[:, 1::3], 12, 4)
    groups = check(net, x, {"body": 4})
    assert groups["body"].members[0].owner.tolist() == [n // 3 for n in range(12)]


def test_a_shift_of_a_share_of_the_channels_over_time_never_differs_in_silence():
    """Temporal shift: an eighth goes forward, an eighth back."""

    def shift(net, x):
        fold = x.shape[-1] // 4
        ahead = F.pad(x[:, 1:, :fold], (0, 0, 0, 1))
        back = F.pad(x[:, :-1, fold : 2 * fold], (0, 0, 1, 0))
        return torch.cat([ahead, back, x[:, :, 2 * fold :]], -1)

    net, x = between(shift, 8, shape=(2, 4, 5))
    groups = check(net, x, {"body": 2})
    assert groups["body"].members[0].owner.tolist() == [0, 1] * 4


def test_chunks_that_change_places_and_repeat_stay_chunks():
    def swap(net, x):
        a, b, c = x.chunk(3, -1)
        return torch.cat([c, a * b, b, a], -1)

    net, x = between(swap, 9, 12)
    check(net, x, {"body": 3})


def test_unbind_select_and_python_loops_over_channels_are_refused():
    net, x = between(lambda net, x: torch.stack(x.unbind(-1)[:4], -1), 8, 4)
    check(net, x, {}, {"body": "channel"})
    net, x = between(lambda net, x: x[..., 2:3] * x, 8)
    check(net, x, {})
    net, x = between(lambda net, x: torch.cat([x[:, i, None] for i in range(x.shape[1])], 1), 8)
    check(net, x, {}, {"body": "by its number"})


# ---------------------------------------------------------------------------------------------------------- reshapes


@pytest.mark.parametrize("shuffle", [F.pixel_shuffle, nn.PixelShuffle(2)], ids=["function", "module"])
def test_pixel_shuffle_takes_what_becomes_a_pixel_together(shuffle):
    net, x = between_maps(lambda net, x: shuffle(x, 2) if shuffle is F.pixel_shuffle else shuffle(x), 12, 3)
    groups = check(net, x, {"body": 3})
    assert groups["body"].members[0].owner.tolist() == np.arange(3).repeat(4).tolist()


def test_pixel_unshuffle_makes_several_of_each_channel():
    net, x = between_maps(lambda net, x: F.pixel_unshuffle(x, 2), 5, 20)
    groups = check(net, x, {"body": 5})
    assert {str(m): m.owner.tolist() for m in groups["body"].members}["head (in)"] == np.arange(5).repeat(4).tolist()


def test_space_to_depth_by_hand_with_pixels_in_front():
    def fold(net, x):
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, -1, h // 2, w // 2)

    net, x = between_maps(fold, 5, 20)
    groups = check(net, x, {"body": 5})
    assert {str(m): m.owner.tolist() for m in groups["body"].members}["head (in)"] == list(range(5)) * 4


def test_depth_to_space_by_hand():
    def unfold(net, x):
        b, _, h, w = x.shape
        return x.reshape(b, -1, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, 2 * h, 2 * w)

    net, x = between_maps(unfold, 12, 3)
    check(net, x, {"body": 3})


def shuffled_function(net, x):
    return F.channel_shuffle(x, 2)


def shuffled_by_hand(net, x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)


def shuffled_unflatten(net, x):
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("shuffle", [shuffled_function, shuffled_by_hand, shuffled_unflatten])
def test_a_channel_shuffle_takes_one_of_every_part(shuffle):
    net, x = between_maps(shuffle, 12)
    groups = check(net, x, {"body": 6})
    owners = {str(member): member.owner.tolist() for member in groups["body"].members}
    assert owners == {"body (out)": list(range(6)) * 2, "head (in)": np.arange(6).repeat(2).tolist()}


def test_channel_shuffle_between_grouped_convolutions():
    def forward(net, x):
        return net.head(net.second(shuffled_by_hand(net, net.first(net.stem(x)).relu())))

    net = Net(
        forward,
        stem=nn.Conv2d(2, 4, 1),
        first=nn.Conv2d(4, 12, 1, groups=2),
        second=nn.Conv2d(12, 6, 3, padding=1, groups=2),
        head=nn.Conv2d(6, 2, 1),
    )
    check(net, torch.randn(2, 2, 4, 4), {"stem": 2, "first": 3, "second": 3})


RESHAPES = {
    "flatten": (lambda net, x: x.flatten(1), 6 * 16),
    "flatten channels last": (lambda net, x: x.permute(0, 2, 3, 1).flatten(1), 6 * 16),
    "reshape": (lambda net, x: x.reshape(len(x), -1), 6 * 16),
    "flatten rows": (lambda net, x: x.flatten(2).mean(-1), 6),
    "to tokens": (lambda net, x: x.flatten(2).transpose(1, 2), 6),
    "to tokens by permute": (lambda net, x: x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]), 6),
    "movedim": (lambda net, x: x.movedim(1, -1), 6),
    "moveaxis and flatten": (lambda net, x: torch.moveaxis(x, 1, -1).flatten(0, 2), 6),
    "columns into the batch": (lambda net, x: x.transpose(1, 3).reshape(-1, x.shape[1]), 6),
    "rows beside channels": (lambda net, x: x.permute(0, 3, 1, 2).flatten(2), 24),
    "unsqueeze and squeeze": (lambda net, x: x.mean((2, 3))[:, None, :, None].squeeze(-1).squeeze(1), 6),
    "einsum": (lambda net, x: torch.einsum("bchw->bwhc", x), 6),
    "negative dims": (lambda net, x: x.transpose(-3, -1).flatten(-3, -2), 6),
    "windows": (
        lambda net, x: x.view(len(x), x.shape[1], 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, x.shape[1]),
        6,
    ),
    "windows of pixels in a row": (
        lambda net, x: x.permute(0, 2, 3, 1).reshape(len(x), 2, 2, 2, 2, -1).transpose(2, 3).reshape(len(x) * 4, 4, -1),
        6,
    ),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_a_reshape_carries_channels_to_a_linear_layer(name):
    operation, width = RESHAPES[name]
    net = Net(
        lambda net, x: net.head(operation(net, net.body(x).relu())),
        body=nn.Conv2d(2, 6, 3, padding=1),
        head=nn.Linear(width, 2),
    )
    check(net, torch.randn(2, 2, 4, 4), {"body": 6})


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_linear_layer_works_at_any_rank(rank):
    shape = (2, 3, 2, 3)[: rank - 1]
    net, x = between(lambda net, x: x.flatten(0, -2).unflatten(0, shape).relu(), 6, shape=(*shape, 5))
    check(net, x, {"body": 6})


def test_a_vector_becomes_a_map():
    net = Net(
        lambda net, x: net.head(net.body(x).view(len(x), -1, 2, 2).relu()),
        body=nn.Linear(5, 24),
        head=nn.ConvTranspose2d(6, 2, 2),
    )
    groups = check(net, torch.randn(3, 5), {"body": 6})
    assert groups["body"].members[0].owner.tolist() == np.arange(6).repeat(4).tolist()


def test_patch_merging_joins_four_neighbours():
    def merge(net, x):
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return net.reduction(net.norm(torch.cat(parts, -1)))

    def forward(net, x):
        return net.head(merge(net, net.body(x)).relu())

    net = Net(
        forward, body=nn.Linear(3, 5), norm=nn.Identity(), reduction=nn.Linear(20, 6, bias=False), head=nn.Linear(6, 2)
    )
    groups = check(net, torch.randn(2, 4, 4, 3), {"body": 5, "reduction": 6})
    assert {str(m): m.owner.tolist() for m in groups["body"].members}["reduction (in)"] == list(range(5)) * 4
    net.norm = nn.LayerNorm(20)
    check(net, torch.randn(2, 4, 4, 3), {"body": 5, "reduction": 6}, masked=False)


def test_unfold_makes_several_of_each_channel_and_fold_takes_them_together():
    net, x = between_maps(lambda net, x: F.unfold(x, 2).transpose(1, 2), 5, 20)
    net.head = nn.Linear(20, 2)
    groups = check(net, x, {"body": 5})
    assert {str(m): m.owner.tolist() for m in groups["body"].members}["head (in)"] == np.arange(5).repeat(4).tolist()
    net, x = between_maps(lambda net, x: F.fold(x.flatten(2), (5, 5), 2), 12, 3)
    groups = check(net, x, {"body": 3})
    assert groups["body"].members[0].owner.tolist() == np.arange(3).repeat(4).tolist()


def test_chunks_of_a_sequence_that_are_cut_out_and_added_again_keep_its_channels():
    """As in dual-path networks: windows over time of a kernel as wide as one channel."""

    def chunked(net, x):
        batch, channels, length = x.shape
        cut = F.unfold(x[..., None], (4, 1), padding=(4, 0), stride=(2, 1)).reshape(batch, channels, 4, -1)
        cut = net.mix(cut.tanh().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.fold(cut.reshape(batch, channels * 4, -1), (length, 1), (4, 1), padding=(4, 0), stride=(2, 1))

    def forward(net, x):
        return net.head(chunked(net, net.body(x)).squeeze(-1))

    net = Net(forward, body=nn.Conv1d(2, 6, 3), mix=nn.Linear(6, 6), head=nn.Conv1d(6, 2, 1))
    groups = check(net, torch.randn(2, 2, 12), {"body": 6})
    assert {member.module for member in groups["body"].members} == {"body", "mix", "head"}  # the code has one width


def test_windows_over_a_dimension_leave_the_others_alone():
    net, x = between(lambda net, x: x.unfold(1, 3, 2).mean(-1), 6, shape=(2, 7, 5))
    check(net, x, {"body": 6})
    net, x = between(lambda net, x: x.unfold(-1, 3, 3).mean(-1), 6, 2)
    check(net, x, {}, {"body": "unfold"})


def test_unfold_gives_every_channel_once_for_each_place_of_the_kernel():
    net, x = between_maps(lambda net, x: F.unfold(x, (1, 2)).transpose(1, 2), 4, 8)
    net.head = nn.Linear(8, 2)
    groups = check(net, x, {"body": 4})
    assert {str(m): m.owner.tolist() for m in groups["body"].members}["head (in)"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_fold_adds_up_what_a_layer_makes_for_each_place_of_the_kernel():
    net, x = between_maps(lambda net, x: F.fold(net.places(F.unfold(x, 2).mT).mT, 4, 2), 4, 3, places=nn.Linear(16, 12))
    groups = check(net, x, {"body": 4, "places": 3})
    assert {str(m): m.owner.tolist() for m in groups["places"].members}["places (out)"] == np.repeat(
        range(3), 4
    ).tolist()


@pytest.mark.parametrize(
    ("move", "reads"), [(lambda x: F.unfold(x[:, None], 2), 60), (lambda x: F.fold(x, (2, 7), 2), 14)]
)
def test_what_is_unfolded_or_folded_along_its_channels_is_refused(move, reads):
    net = Net(lambda net, x: net.head(move(net.body(x)).flatten(1)), body=nn.Linear(3, 6), head=nn.Linear(reads, 2))
    check(net, torch.randn(2, 4, 3), {}, {"body": "tells its channels apart by their place"})


@pytest.mark.parametrize("function", [F.hardswish, F.logsigmoid, F.rrelu, nn.Hardswish(inplace=True)])
def test_activations_without_the_tag_of_their_kind_are_known(function):
    net, x = between_maps(lambda net, x: function(x + 0), 6)
    check(net, x, {"body": 6})


# ------------------------------------------------------------------------------------------- joining and broadcasting


def test_stacked_branches_share_their_channels():
    def forward(net, x):
        stacked = torch.stack([net.one(x), net.other(x), net.one(-x)], 1)
        return net.head((stacked * torch.tensor([1.0, 2.0, 3.0])[:, None]).sum(1))

    net = Net(forward, one=nn.Linear(5, 6), other=nn.Linear(5, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {"one": 6})


@pytest.mark.parametrize("dim", [-1, 2])
def test_stacked_in_the_last_dimension_and_flattened(dim):
    net = Net(
        lambda net, x: net.head(torch.stack([net.one(x), net.other(x)], dim).flatten(1)),
        one=nn.Linear(5, 4),
        other=nn.Linear(5, 4),
        head=nn.Linear(8, 2),
    )
    groups = check(net, torch.randn(3, 5), {"one": 4})
    assert {str(m): m.owner.tolist() for m in groups["one"].members}["head (in)"] == np.arange(4).repeat(2).tolist()


def test_channels_of_several_producers_are_joined_and_split_again():
    def forward(net, x):
        joined = torch.cat([net.a(x), x.mean(-1, keepdim=True), net.b(x), net.a(x)], -1)
        return net.head(joined.relu())

    net = Net(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 4), head=nn.Linear(11, 2))
    groups = check(net, torch.randn(3, 5), {"a": 3, "b": 4})
    assert {str(m): m.owner.tolist() for m in groups["a"].members}["head (in)"] == [0, 1, 2, *[-1] * 5, 0, 1, 2]


def test_joined_channels_meet_channels_of_one_producer():
    """cat(a, b) + c: c's channels go with a's or b's."""

    def forward(net, x):
        return net.head(torch.cat([net.a(x), net.b(x)], -1) * net.c(x))

    net = Net(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 4), c=nn.Linear(5, 7), head=nn.Linear(7, 2))
    check(net, torch.randn(3, 5), {"a": 3, "b": 4})


def test_channels_that_meet_raw_input_and_others_keep_what_meets_it():
    """cat(x, b) + c: only those of c that b meets can go."""

    def forward(net, x):
        return net.head((torch.cat([x[:, :2], net.b(x)], -1) + net.c(x)).relu())

    net = Net(forward, b=nn.Linear(5, 4), c=nn.Linear(5, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {"b": 4})


def test_one_channel_is_broadcast_over_many():
    def forward(net, x):
        h = net.body(x)
        return net.head(h * net.weight(x).softmax(1) + net.bias(x))

    net = Net(forward, body=nn.Linear(5, 6), weight=nn.Linear(5, 1), bias=nn.Linear(5, 1), head=nn.Linear(6, 2))
    check(net, torch.randn(2, 3, 5), {"body": 6})


def test_outer_products_keep_both_widths_apart_or_refuse():
    def forward(net, x):
        product = net.a(x)[:, :, None] * net.b(x)[:, None, :]
        return net.head(product.sum(-1) + 0 * product.amax((1, 2))[:, None]) + net.tail(
            product.mean(1) * net.b.out_features
        )

    net = Net(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 4), head=nn.Linear(3, 2), tail=nn.Linear(4, 2))
    check(net, torch.randn(3, 5), {"a": 3, "b": 4}, masked=False)


def test_an_outer_product_that_is_summed_by_matmul():
    def forward(net, x):
        return net.head((net.a(x)[:, :, None] @ net.b(x)[:, None, :]).relu() @ net.w)

    net = Net(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 4), w=nn.Parameter(torch.randn(4, 6)), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {"b": 4, "w": 6}, {"a": ""})


def product(net, x, *names, rule="bi,bj->bij"):
    return torch.einsum(rule, *(getattr(net, name)(x) for name in names)).flatten(1)


OUTER = {
    "einsum": (lambda net, x: product(net, x, "a", "b"), {"a": 3, "b": 4}, 12),
    "turned": (lambda net, x: product(net, x, "a", "b", rule="bi,bj->bji"), {"a": 3, "b": 4}, 12),
    "broadcast": (lambda net, x: (net.a(x)[:, :, None] * net.b(x)[:, None]).view(len(x), -1), {"a": 3, "b": 4}, 12),
    "row by row": (
        lambda net, x: torch.stack([torch.outer(a, b).flatten() for a, b in zip(net.a(x), net.b(x), strict=True)]),
        {"a": 3, "b": 4},
        12,
    ),
    "of one with itself": (lambda net, x: product(net, x, "a", "a"), {"a": 4}, 16),
    "of three": (
        lambda net, x: torch.einsum("bi,bj->bij", product(net, x, "a", "b"), net.c(x)).flatten(1),
        {"a": 3, "b": 4, "c": 2},
        24,
    ),
    "beside its factors": (
        lambda net, x: torch.cat([net.a(x), product(net, x, "a", "b"), net.b(x)], 1),
        {"a": 3, "b": 4},
        19,
    ),
    "sum of two": (
        lambda net, x: product(net, x, "a", "b") + product(net, x, "c", "d"),
        {"a": 3, "b": 4, "c": 3, "d": 4},
        12,
    ),
    "added to a layer's": (lambda net, x: net.c(x) + product(net, x, "a", "b"), {"c": 12, "a": 3, "b": 4}, 12),
    "unfolded again": (
        lambda net, x: product(net, x, "a", "b").unflatten(1, (net.a.out_features, -1)).sum(1),
        {"a": 3, "b": 4},
        4,
    ),
    "unlike ones": (
        lambda net, x: product(net, x, "a", "b") + product(net, x, "d", "e"),
        {"a": 3, "b": 4, "d": 4, "e": 3},
        12,
    ),
    "a part of it": (lambda net, x: product(net, x, "a", "b")[:, :7], {"a": 3, "b": 4}, 7),
    "of written size": (lambda net, x: product(net, x, "a", "b").view(-1, 12), {"a": 3, "b": 4}, 12),
}
REFUSED = {"unlike ones": "go together", "a part of it": "an outer product", "of written size": "written down"}
COUPLED = {"sum of two": {"a": 3, "b": 4}, "added to a layer's": {"a": 3, "b": 4}}


@pytest.mark.parametrize("kind", OUTER)
def test_both_widths_of_a_flattened_outer_product_are_pruned_or_it_is_refused(kind):
    operation, widths, size = OUTER[kind]
    parts = {name: nn.Linear(5, width) for name, width in widths.items()}
    net = Net(lambda net, x: net.head(operation(net, x)), head=nn.Linear(size, 2), **parts)
    expected = {} if kind in REFUSED else COUPLED.get(kind, widths)
    check(net, torch.randn(3, 5), expected, {"a": REFUSED[kind]} if kind in REFUSED else None)


# ------------------------------------------------------------------------------------- buffers, attributes, in place


@pytest.mark.parametrize("kind", ["buffer", "temporary", "attribute", "parameter"])
def test_positions_and_scales_of_known_width_are_sliced(kind):
    def forward(net, x):
        h = net.body(x)
        return net.head(((h + net.position[:, : h.shape[1]]) * net.scale).relu())

    net = Net(forward, body=nn.Linear(5, 6), head=nn.Linear(6, 2))
    for name, tensor in {"position": torch.randn(1, 9, 6), "scale": torch.rand(6)}.items():
        if kind == "parameter":
            setattr(net, name, nn.Parameter(tensor))
        elif kind == "attribute":
            setattr(net, name, tensor)
        else:
            net.register_buffer(name, tensor, persistent=kind == "buffer")
    groups = check(net, torch.randn(2, 4, 5), {"body": 6})
    assert {"position (dim2)", "scale (dim0)"} <= {str(member) for member in groups["body"].members}


def test_a_boolean_mask_of_known_width_is_sliced():
    mask = torch.tensor([True, False, True, True, False, True])
    net, x = between(lambda net, x: x.masked_fill(~net.mask, 0.0) + x * net.mask, 6, buffers={"mask": mask})
    groups = check(net, x, {"body": 6})
    assert "mask (dim0)" in {str(member) for member in groups["body"].members}


def test_statistics_of_known_width_normalise_by_hand():
    buffers = {"mean": torch.randn(6, 1, 1), "std": torch.rand(1, 6, 1, 1) + 0.5}
    net, x = between_maps(lambda net, x: (x - net.mean) / net.std, 6, buffers=buffers)
    check(net, x, {"body": 6}, masked=False)
    net, x = between_maps(lambda net, x: (x - net.mean) * net.std, 6, buffers=buffers)
    check(net, x, {"body": 6})


def test_a_buffer_that_several_layers_read_couples_them():
    def forward(net, x):
        return net.head(net.a(x) * net.scale) + net.tail(net.b(x) * net.scale)

    net = Net(
        forward,
        {"scale": torch.rand(6)},
        a=nn.Linear(5, 6),
        b=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
        tail=nn.Linear(6, 2),
    )
    check(net, torch.randn(3, 5), {"a": 6})


def scaled_half(net, x):
    x = x.clone()
    half = x.shape[1] // 2
    x[:, :half].mul_(2.0)
    return x


def written_half(net, x):
    x = x.clone()
    half = x.shape[1] // 2
    x[:, half:] = x[:, :half].tanh() + 1
    return x


def added_in_place(net, x):
    flat = x.view(-1)
    flat.mul_(0.5).add_(1.0)
    return x


def half_in_place(net, x):
    x = x * 1.0
    half = x.shape[1] // 2
    one, other = x.narrow(1, 0, half), x.narrow(1, half, half)
    one.add_(other)
    return x


@pytest.mark.parametrize(
    ("operation", "channels"),
    [(scaled_half, 4), (written_half, 4), (added_in_place, 8), (half_in_place, 4)],
)
def test_what_is_written_in_place_through_a_view_is_followed(operation, channels):
    net, x = between(operation, 8)
    check(net, x, {"body": channels})


def many_in_place(net, x):
    pair = [x * 1.0, x.tanh()]
    torch._foreach_mul_(pair, 0.5)
    torch._foreach_add_(pair, [x.sin(), x.cos()], alpha=0.1)
    torch._foreach_lerp_(pair, [x, x], 0.3)
    return pair[0] + pair[1]


def many(net, x):
    pair = torch._foreach_sqrt(torch._foreach_exp([x, -x]))
    pair = torch._foreach_addcmul(pair, [x, x], [x, x], [0.5, 2.0])
    sizes = torch._foreach_norm(torch._foreach_mul(pair, torch.tensor(2.0)))
    return sum(torch._foreach_div(pair, 3.0)) + 0.0 * sizes[0]


def copied(net, x):
    pair = [torch.zeros_like(x), torch.zeros_like(x)]
    torch._foreach_copy_(pair, [x, x.tanh()])
    torch._foreach_zero_(pair[1:])
    return pair[0] - pair[1]


@pytest.mark.parametrize("operation", [many_in_place, many, copied])
def test_operators_on_lists_of_tensors_do_to_each_what_they_do_to_one(operation):
    net, x = between(operation, 8)
    check(net, x, {"body": 8})


def test_tensors_of_one_list_do_not_meet_each_other():
    def forward(net, x):
        one, other = torch._foreach_neg([net.body(x), net.other(x)])
        return net.head(one), net.tail(other)

    parts = {"body": nn.Linear(5, 8), "head": nn.Linear(8, 2), "other": nn.Linear(5, 8), "tail": nn.Linear(8, 2)}
    check(Net(forward, **parts), torch.randn(3, 5), {"body": 8, "other": 8})


def test_zeros_made_to_fit_and_filled_piece_by_piece():
    def fill(net, x):
        result = torch.zeros(len(x), x.shape[1] * 2)
        result[:, : x.shape[1]] = x
        result[:, x.shape[1] :] = -x
        return result

    net, x = between(fill, 6, 12)
    groups = check(net, x, {})
    assert groups["body"].reason


@pytest.mark.parametrize("kind", ["steps", "a part", "in place"])
def test_zeros_that_are_filled_along_another_dimension_have_the_widths_of_what_fills_them(kind):
    def fill(net, x):
        result = torch.zeros(len(x), 7, x.shape[-1])
        if kind == "steps":
            for step in range(5):
                result[:, step] = x[:, step]
        else:
            result[:, 1:6] = x
        if kind == "in place":
            result[:, 2:4].add_(net.other(torch.ones(5)))
        return result

    net, x = between(fill, 6, shape=(3, 5, 5), **({"other": nn.Linear(5, 6)} if kind == "in place" else {}))
    check(net, x, {"body": 6})


def test_complex_weights_of_a_spectral_convolution_go_with_the_channels_they_mix():
    def forward(net, x):
        x = net.body(x)
        spectrum = torch.fft.rfft(x)
        mixed = torch.zeros(len(x), net.weight.shape[1], spectrum.shape[-1], dtype=torch.cfloat)
        mixed[:, :, :3] = torch.einsum("bim,iom->bom", spectrum[:, :, :3], net.weight)
        return net.head(torch.fft.irfft(mixed, n=x.shape[-1]) + net.beside(x))

    weight = nn.Parameter(torch.randn(6, 5, 3, dtype=torch.cfloat))
    net = Net(forward, body=nn.Conv1d(2, 6, 1), weight=weight, beside=nn.Conv1d(6, 5, 1), head=nn.Conv1d(5, 2, 1))
    check(net, torch.randn(3, 2, 8), {"body": 6, "beside": 5})


@pytest.mark.parametrize("pad", [(0, 2), (1, 0), (2, 3)])
def test_padded_channels_keep_their_zeros_at_their_place(pad):
    net, x = between(lambda net, x: F.pad(x, pad), 6, 6 + sum(pad))
    groups = check(net, x, {"body": 6})
    expected = [-1] * pad[0] + list(range(6)) + [-1] * pad[1]
    assert {str(m): m.owner.tolist() for m in groups["body"].members}["head (in)"] == expected


def test_a_shortcut_that_pads_missing_channels():
    """ResNets of CIFAR: zeros beside the channels of before; what was there can go, what is new keeps its place."""

    def forward(net, x):
        x = net.stem(x).relu()
        y = net.down(x.relu())
        return net.head(y + F.pad(x, (0, 0, 0, 0, 2, 2)))

    net = Net(forward, stem=nn.Conv2d(2, 4, 1), down=nn.Conv2d(4, 8, 1), head=nn.Conv2d(8, 2, 1))
    groups = check(net, torch.randn(2, 2, 4, 4), {"stem": 4})
    assert {str(m): m.owner.tolist() for m in groups["stem"].members}["down (out)"] == [-1, -1, 0, 1, 2, 3, -1, -1]


@pytest.mark.parametrize("fit", [False, True])
def test_zeros_beside_channels_go_with_what_is_added_to_them_where_their_number_follows(fit):
    def forward(net, x):
        x = net.stem(x).relu()
        y, z = net.down(x), net.inner(x)
        zeros = x.new_zeros(len(x), y.shape[1] - z.shape[1] if fit else 3)
        return net.head((torch.cat([z, zeros], 1) + y).relu())

    parts = {"stem": nn.Linear(2, 6), "down": nn.Linear(6, 7), "inner": nn.Linear(6, 4), "head": nn.Linear(7, 2)}
    groups = check(Net(forward, **parts), torch.randn(3, 2), {"stem": 6, "down": 7 if fit else 4})
    owner = [0, 1, 2, 3, *((4, 5, 6) if fit else (-1, -1, -1))]
    assert {str(m): m.owner.tolist() for m in groups["down"].members}["down (out)"] == owner


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_pixels_padded_by_reflection_are_no_obstacle(mode):
    net, x = between_maps(lambda net, x: F.pad(x, (1, 1, 2, 0), mode=mode), 6)
    check(net, x, {"body": 6})


# ---------------------------------------------------------------------------------------------- parameters and products


def test_a_parameter_scales_or_shifts_along_any_dimension():
    net, x = between_maps(
        lambda net, x: x * net.gamma[:, None, None] + net.beta + net.rows,
        6,
        gamma=nn.Parameter(torch.randn(6)),
        beta=nn.Parameter(torch.randn(1, 6, 1, 1)),
        rows=nn.Parameter(torch.randn(4, 1)),
    )
    groups = check(net, x, {"body": 6})
    assert {"gamma (dim0)", "beta (dim1)"} <= {str(member) for member in groups["body"].members}


def test_experts_of_stacked_parameters_lose_experts_and_their_inner_widths():
    def forward(net, x):
        h = net.stem(x)
        weights = net.router(h).sigmoid()
        inner = torch.einsum("bc,ecf->bef", h, net.up).relu()
        return net.head(torch.einsum("bef,efc,be->bc", inner, net.down, weights))

    net = Net(
        forward,
        stem=nn.Linear(5, 6),
        router=nn.Linear(6, 3),
        up=nn.Parameter(torch.randn(3, 6, 7)),
        down=nn.Parameter(torch.randn(3, 7, 4)),
        head=nn.Linear(4, 2),
    )
    check(net, torch.randn(4, 5), {"stem": 6, "router": 3, "up": 7, "down": 4})


def test_experts_by_bmm_lose_their_inner_widths():
    def forward(net, x):
        h = net.stem(x)
        tokens = h.expand(3, -1, -1)
        inner = (torch.bmm(tokens, net.up) + net.bias[:, None]).relu()
        return net.head(torch.bmm(inner, net.down).sum(0))

    net = Net(
        forward,
        stem=nn.Linear(5, 6),
        up=nn.Parameter(torch.randn(3, 6, 7)),
        bias=nn.Parameter(torch.randn(3, 7)),
        down=nn.Parameter(torch.randn(3, 7, 4)),
        head=nn.Linear(4, 2),
    )
    check(net, torch.randn(4, 5), {"stem": 6, "up#2": 7, "down": 4}, {"up": "fewer channels"})


def test_low_rank_adapters_lose_their_rank_beside_the_weight():
    def forward(net, x):
        h = net.body(x) + net.b(net.a(x)) * 0.5
        return net.head(h.relu())

    net = Net(
        forward,
        body=nn.Linear(5, 6),
        a=nn.Linear(5, 3, bias=False),
        b=nn.Linear(3, 6, bias=False),
        head=nn.Linear(6, 2),
    )
    check(net, torch.randn(4, 5), {"body": 6, "a": 3})


def test_low_rank_adapters_of_bare_parameters():
    def forward(net, x):
        weight = net.body.weight + net.b @ net.a
        return net.head(F.linear(x, weight, net.body.bias).relu())

    net = Net(
        forward,
        body=nn.Linear(5, 6),
        a=nn.Parameter(torch.randn(3, 5)),
        b=nn.Parameter(torch.randn(6, 3)),
        head=nn.Linear(6, 2),
    )
    check(net, torch.randn(4, 5), {"b": 6, "b#2": 3})


def test_a_layer_of_bare_parameters():
    def forward(net, x):
        h = (x @ net.w.T + net.b).relu()
        return net.head(torch.addmm(net.c, h, net.v).relu())

    net = Net(
        forward,
        w=nn.Parameter(torch.randn(6, 5)),
        b=nn.Parameter(torch.randn(6)),
        v=nn.Parameter(torch.randn(6, 4)),
        c=nn.Parameter(torch.randn(4)),
        head=nn.Linear(4, 2),
    )
    net_groups = check(net, torch.randn(3, 5), {"w": 6, "v": 4})
    assert {str(m) for m in net_groups["w"].members} == {"w (dim0)", "b (dim0)", "v (dim0)"}


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_of_another_layer_is_used_transposed(bias):
    """A tied autoencoder: the decoder is the transposed weight; without a bias, nothing else has parameters."""

    def forward(net, x):
        return F.linear(net.encoder(x).relu(), net.encoder.weight.t(), net.bias)

    net = Net(forward, encoder=nn.Linear(5, 6), bias=nn.Parameter(torch.randn(5)) if bias else None)
    check(net, torch.randn(3, 5), {"encoder": 6})


def test_one_weight_in_two_layers():
    def forward(net, x):
        return net.head(net.a(x).relu()) + net.tail(net.b(x).tanh())

    net = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 6), head=nn.Linear(6, 2), tail=nn.Linear(6, 2))
    net.b.weight = net.a.weight
    check(net, torch.randn(3, 5), {"a": 6})


def test_a_bias_shared_by_two_layers():
    net = Net(
        lambda net, x: net.head(net.a(x).relu()) + net.tail(net.b(x).tanh()),
        a=nn.Linear(5, 6),
        b=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
        tail=nn.Linear(6, 2),
    )
    net.b.bias = net.a.bias
    check(net, torch.randn(3, 5), {"a": 6})


def test_bilinear_and_distances_contract_both_sides():
    def forward(net, x):
        a, b = net.a(x), net.b(x)
        return torch.cat([net.head((a * b).sum(-1, keepdim=True)), torch.cdist(a, b)], -1)

    net = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 6), head=nn.Linear(1, 2))
    check(net, torch.randn(3, 5), {"a": 6})


def test_distances_of_many_rows_are_another_operator_that_contracts_both_sides_too():
    net = Net(lambda net, x: torch.cdist(net.a(x), net.b(x)), a=nn.Linear(5, 6), b=nn.Linear(5, 6))
    check(net, torch.randn(30, 5), {"a": 6})  # from 26 rows on it is not computed in one


# ------------------------------------------------------------------------------------------------------- norms, pooling


def test_norms_by_function_with_bare_parameters():
    def batch(net, x):
        return F.batch_norm(x, net.mean, net.var, net.weight, net.bias, training=False)

    parts = {"weight": nn.Parameter(torch.rand(6) + 0.5), "bias": nn.Parameter(torch.randn(6))}
    net, x = between_maps(batch, 6, buffers={"mean": torch.randn(6), "var": torch.rand(6) + 0.5}, **parts)
    check(net, x, {"body": 6})
    net, x = between(lambda net, x: F.layer_norm(x, x.shape[-1:], net.weight, net.bias), 6, **parts)
    check(net, x, {"body": 6}, masked=False)
    net, x = between_maps(lambda net, x: F.group_norm(x, 2, net.weight, net.bias), 6, **parts)
    groups = check(net, x, {"body": 3}, masked=False)
    assert groups["body"].members[0].owner.tolist() == [0, 1, 2, 0, 1, 2]
    net, x = between_maps(lambda net, x: F.instance_norm(x, weight=net.weight, bias=net.bias), 6, **parts)
    check(net, x, {"body": 6})


def test_a_layer_norm_whose_shape_is_a_constant_is_refused():
    parts = {"weight": nn.Parameter(torch.rand(6)), "bias": nn.Parameter(torch.randn(6))}
    net, x = between(lambda net, x: F.layer_norm(x, (6,), net.weight, net.bias), 6, **parts)
    check(net, x, {}, {"body": "fewer channels"})


def test_a_norm_by_hand_is_over_what_is_left():
    def norm(net, x):
        return (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt() * net.gamma

    net, x = between(norm, 6, gamma=nn.Parameter(torch.rand(6)))
    check(net, x, {"body": 6}, masked=False)


POOLS = {
    "max": lambda net, x: F.max_pool2d(x, 2),
    "average": lambda net, x: F.avg_pool2d(x, 2),
    "adaptive": lambda net, x: F.adaptive_avg_pool2d(x, 2),
    "adaptive max": lambda net, x: F.adaptive_max_pool2d(x, 2),
    "nearest": lambda net, x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda net, x: F.interpolate(x, size=(3, 5), mode="bilinear", align_corners=False),
    "bicubic": lambda net, x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "lp": lambda net, x: F.lp_pool2d(x, 2, 2),
    "grid": lambda net, x: F.grid_sample(x, torch.zeros(len(x), 2, 2, 2), align_corners=False),
    "dropout": lambda net, x: F.dropout2d(x, 0.5, training=False),
    "cumulative rows": lambda net, x: x.cumsum(2),
    "rolled rows": lambda net, x: x.roll((1, 2), (2, 3)) + x.flip(-1),
    "sorted rows": lambda net, x: x.sort(dim=-1).values,
    "local": lambda net, x: x - F.avg_pool2d(x, 3, 1, 1),
    "softmax of pixels": lambda net, x: x.flatten(2).softmax(-1).view_as(x),
    "rows by number": lambda net, x: x[:, :, [0, 2]] + x.index_select(2, torch.tensor([1, 3])),
    "fourier": lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[-2:]),
}


@pytest.mark.parametrize("name", POOLS)
def test_what_works_on_pixels_leaves_channels_free(name):
    net, x = between_maps(POOLS[name], 6)
    check(net, x, {"body": 6})


POOLED_TOKENS = {
    "mean": lambda net, x: F.avg_pool2d(x[:, None], (2, 1), ceil_mode=True)[:, 0],
    "max": lambda net, x: F.max_pool2d(x[:, None], (3, 1), stride=(2, 1), padding=(1, 0))[:, 0],
    "blurred": lambda net, x: F.avg_pool2d(x[:, None], (3, 1), stride=1, padding=(1, 0))[:, 0],
}
ALONG_CHANNELS = {
    "windows": lambda net, x: F.avg_pool2d(x[:, None], 2)[:, 0].repeat(1, 1, 2),
    "steps": lambda net, x: F.max_pool2d(x[:, None], 1, stride=(1, 2))[:, 0].repeat(1, 1, 2),
    "padding": lambda net, x: F.avg_pool2d(x[:, None], (1, 3), stride=1, padding=(0, 1))[:, 0],
}


@pytest.mark.parametrize("name", POOLED_TOKENS)
def test_pooling_beside_channels_leaves_them_free(name):
    net, x = between(POOLED_TOKENS[name], 6, shape=(2, 4, 5))
    check(net, x, {"body": 6})


@pytest.mark.parametrize("name", ALONG_CHANNELS)
def test_pooling_along_channels_is_refused(name):
    net, x = between(ALONG_CHANNELS[name], 6, shape=(2, 4, 5))
    check(net, x, {}, {"body": "pools or resizes along its channels"})


def test_heads_whose_values_are_sampled_at_places_of_their_own_are_lost_with_their_places():
    """As in deformable attention: the batch is multiplied by the heads, of the values and of the places."""

    def forward(net, x):
        values = net.values(x).view(len(x), 4, 4, net.num_heads, 3).permute(0, 3, 4, 1, 2).flatten(0, 1)
        places = net.places(x).view(len(x), 16, net.num_heads, 2, 2).transpose(1, 2).flatten(0, 1).tanh()
        found = F.grid_sample(values, places, align_corners=False).mean(-1)
        return net.head(found.view(len(x), -1, 16).transpose(1, 2))

    parts = {"values": nn.Linear(5, 12), "places": nn.Linear(5, 16), "head": nn.Linear(12, 2), "num_heads": 4}
    groups = check(Net(forward, **parts), torch.randn(2, 16, 5), {"values": 4})
    assert {str(member) for member in groups["values"].members} == {"values (out)", "places (out)", "head (in)"}


def test_a_width_that_becomes_coordinates_or_the_batch_of_a_fixed_grid_is_refused():
    def coordinates(net, x):
        return F.grid_sample(x.new_ones(len(x), 6, 3, 3), net.body(x).tanh(), align_corners=False).permute(0, 2, 3, 1)

    net = Net(lambda net, x: net.head(coordinates(net, x)), body=nn.Linear(5, 2), head=nn.Linear(6, 2))
    check(net, torch.randn(2, 4, 4, 5), {}, {"body": "picks by an index that has its width"})

    def batch(net, x):
        return F.grid_sample(net.body(x).T[:, None, None], torch.zeros(6, 1, 3, 2), align_corners=False)[:, 0, 0].T

    net = Net(lambda net, x: net.head(batch(net, x)), body=nn.Linear(5, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {}, {"body": "fewer channels"})


PICKS = {
    "gather": lambda net, x: x.gather(-1, net.index.expand(len(x), -1)),
    "index_select": lambda net, x: x.index_select(1, net.index),
    "fancy index": lambda net, x: x[:, net.index],
    "topk": lambda net, x: x.topk(6, -1).values,
    "sort": lambda net, x: x.sort(-1).values,
    "flip": lambda net, x: x.flip(-1) + x,
    "roll": lambda net, x: x.roll(1, -1) * x,
    "cumsum": lambda net, x: x.cumsum(-1),
    "argmax": lambda net, x: x + x.argmax(-1, keepdim=True),
    "arange": lambda net, x: x * torch.arange(x.shape[-1]),
    "triangle": lambda net, x: torch.tril(x),
}


@pytest.mark.parametrize("name", PICKS)
def test_channels_that_are_told_apart_by_their_number_are_refused(name):
    net, x = between(PICKS[name], 6, buffers={"index": torch.tensor([5, 1, 3, 0, 2, 4])}, shape=(7, 5))
    check(net, x, {})


def test_the_largest_channel_and_a_mean_over_channels_leave_them_free():
    net, x = between(lambda net, x: x - x.mean(-1, keepdim=True) + x.amax(-1, keepdim=True), 6)
    check(net, x, {"body": 6}, masked=False)
    net, x = between(lambda net, x: x * x.sum(-1, keepdim=True) + x.norm(dim=-1, keepdim=True), 6)
    check(net, x, {"body": 6})


SUMMARIES = {
    "max": lambda net, x: x.max(-1, keepdim=True).values,
    "min": lambda net, x: x.min(-1, keepdim=True)[0].detach(),
    "median": lambda net, x: x.median(-1, keepdim=True).values,
    "nanmedian": lambda net, x: x.nanmedian(-1, keepdim=True).values,
    "mode": lambda net, x: x.mode(-1, keepdim=True).values,
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_value_over_channels_whose_place_nobody_reads_leaves_them_free(name):
    net, x = between(lambda net, x: (x - SUMMARIES[name](net, x)).exp(), 6)
    check(net, x, {"body": 6}, masked=False)


@pytest.mark.parametrize("kind", ["max", "min", "median", "nanmedian", "mode"])
def test_the_place_of_a_value_over_channels_is_their_number(kind):
    net, x = between(lambda net, x: x + sum(getattr(x, kind)(-1, keepdim=True)), 6)
    check(net, x, {}, {"body": "by number"})


@pytest.mark.parametrize("checked", [True, False])
def test_a_distribution_that_checks_its_arguments_leaves_its_channels_free(checked):
    def sampled(net, x):
        found = torch.distributions.Normal(x, net.scale(x).exp(), validate_args=checked)
        return found.loc * found.scale

    net, x = between(sampled, 6, scale=nn.Linear(6, 6))
    check(net, x, {"body": 6}, masked=False)


# ------------------------------------------------------------------------------------------------------------- layers


def adjacency(size):
    return (torch.rand(size, size) > 0.5).float().to_sparse()


@pytest.mark.parametrize("name", ["sparse", "plain"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_multiplied_by_a_sparse_matrix_over_rows_keeps_its_channels_free(layout, name):
    multiply = torch.sparse.mm if name == "sparse" else torch.matmul

    def forward(net, x):
        h = multiply(neighbours, net.body(x)).relu()
        return net.head(multiply(neighbours, net.inner(h)).relu())

    neighbours = adjacency(4) if layout == "coo" else adjacency(4).to_sparse_csr()
    parts = {"body": nn.Linear(5, 6), "inner": nn.Linear(6, 7), "head": nn.Linear(7, 2)}
    check(Net(forward, **parts), torch.randn(4, 5), {"body": 6, "inner": 7})


def test_channels_that_a_sparse_matrix_mixes_are_refused():
    net, x = between(lambda net, x: torch.sparse.mm(net.mixing, x.t()).t(), 6, buffers={"mixing": adjacency(6)})
    check(net, x, {}, {"body": "multiplies it by a sparse matrix"})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_lose_inputs_and_hidden_channels(kind):
    def forward(net, x):
        return net.head(net.core(net.body(x))[0])

    net = Net(forward, body=nn.Linear(5, 6), core=kind(6, 7, batch_first=True), head=nn.Linear(7, 2))
    check(net, torch.randn(2, 4, 5), {"body": 6, "core": 7})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_with_a_forward_of_its_own_around_the_known_one_loses_the_same(kind):
    class Own(kind):
        def forward(self, x):
            return super().forward(x)[0]

    net = Net(
        lambda net, x: net.head(net.core(net.body(x))),
        body=nn.Linear(5, 6),
        core=Own(6, 7, num_layers=2, batch_first=True),
        head=nn.Linear(7, 2),
    )
    before = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    check(net, torch.randn(2, 4, 5), {"body": 6, "core": 7})
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == before


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_packed_sequences_hand_their_channels_on(first, both, in_order):
    def forward(net, x):
        lengths = torch.tensor([4, 3, 1] if in_order else [3, 1, 4])
        x = net.body(x if first else x.transpose(0, 1)).relu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=in_order)
        steps, (_, cell) = net.core(packed)
        steps, _ = nn.utils.rnn.pad_packed_sequence(steps, batch_first=first)
        return net.head(steps).sum((0, 1)) + net.last(cell[-1])

    core = nn.LSTM(6, 7, batch_first=first, bidirectional=both)
    heads = {"head": nn.Linear(14 if both else 7, 2), "last": nn.Linear(7, 2)}
    check(Net(forward, body=nn.Linear(5, 6), core=core, **heads), torch.randn(3, 4, 5), {"body": 6, "core": 7})


def test_sequences_that_are_packed_along_channels_are_refused():
    def forward(net, x):
        x = net.body(x).transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 6, 6]), batch_first=True)
        return net.head(net.core(packed)[1][-1])

    net = Net(forward, body=nn.Linear(5, 6), core=nn.GRU(4, 7, batch_first=True), head=nn.Linear(7, 2))
    check(net, torch.randn(3, 4, 5), {"core": 7}, {"body": "packs sequences along its channels"})


def test_a_cell_in_a_loop_loses_its_state():
    def forward(net, x):
        state = torch.zeros(len(x), net.cell.hidden_size)
        for t in range(x.shape[1]):
            state = net.cell(net.body(x[:, t]), state)
        return net.head(state)

    net = Net(forward, body=nn.Linear(5, 6), cell=nn.GRUCell(6, 7), head=nn.Linear(7, 2))
    check(net, torch.randn(2, 3, 5), {"body": 6, "cell": 7})


@pytest.mark.parametrize("gates", [1, 4])
@pytest.mark.parametrize("written_down", [False, True])
def test_a_cell_by_hand_that_reads_its_input_beside_its_state_loses_both(gates, written_down):
    def forward(net, x):
        x = net.body(x).relu()
        h = c = x.new_zeros(len(x), net.units if written_down else net.cell.out_features // gates)
        for t in range(x.shape[1]):
            new = net.cell(torch.cat([x[:, t], h], 1))
            if gates == 1:
                h = new.tanh()
                continue
            i, f, o, g = new.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return net.head(h)

    net = Net(forward, body=nn.Linear(5, 6), cell=nn.Linear(13, 7 * gates), head=nn.Linear(7, 2), units=7)
    groups = check(net, torch.randn(2, 3, 5), {"body": 6, "cell": 7})
    assert groups["cell"].counts == ((Count("", "units", 1),) if written_down else ())


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("made", [torch.zeros, torch.randn])
def test_a_layer_that_takes_a_constant_of_a_groups_width_goes_with_the_group(made, state):
    def forward(net, x):
        x = net.body(x)
        batch, _, width = x.shape
        inner = (net.inner(x) + net.context(made(batch, width)).unsqueeze(1)).relu()
        first = made(1, batch, width)
        return net.head(net.core(inner, first if state else None)[0])

    parts = {"body": nn.Linear(5, 6), "inner": nn.Linear(6, 7), "core": nn.GRU(7, 6, batch_first=True)}
    net = Net(forward, **parts, context=nn.Linear(6, 7), head=nn.Linear(6, 2))
    x, steady = torch.randn(2, 3, 5), made is torch.zeros
    groups = {g.name: g.slots() for g in find_groups(net, x) if g.prunable}
    assert ("context", "in") in groups["body"]
    assert groups.keys() == ({"body", "inner"} if state else {"body", "inner", "core"})
    if steady:
        check(net, x, {"body": 6, "inner": 7} if state else {"body": 6, "inner": 7, "core": 6})


@pytest.mark.parametrize("width", [6, 24])
def test_groups_whose_widths_code_takes_for_equal_go_together(width):
    def forward(net, x):
        first = torch.zeros(1, len(x), net.body(x).shape[-1])
        return net.head(net.core(net.inner(net.body(x)), first)[0])

    parts = {"body": nn.Linear(5, width), "inner": nn.Linear(width, 7)}
    net = Net(forward, **parts, core=nn.GRU(7, width, batch_first=True), head=nn.Linear(width, 2))
    check(net, torch.randn(2, 3, 5), {"body": width, "inner": 7})
    assert ("core", "out") in {g.name: g.slots() for g in find_groups(net, torch.randn(2, 3, 5))}["body"]


def test_a_layer_that_takes_a_constant_of_a_width_that_is_written_down_keeps_it():
    def forward(net, x):
        x = net.body(x)
        return net.head(x.view(-1, 6) + net.context(torch.zeros(6)))

    net = Net(forward, body=nn.Linear(5, 6), context=nn.Linear(6, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {}, {"body": "does not run with fewer channels"})


def test_a_cell_by_hand_whose_first_state_has_a_constant_width_is_listed_with_that_reason():
    def forward(net, x):
        x, h = net.body(x).relu(), x.new_zeros(len(x), 7)
        for t in range(x.shape[1]):
            h = net.cell(torch.cat([x[:, t], h], 1)).tanh()
        return net.head(h)

    net = Net(forward, body=nn.Linear(5, 6), cell=nn.Linear(13, 7), head=nn.Linear(7, 2))
    check(net, torch.randn(2, 3, 5), {"body": 6}, {"cell": "does not run with fewer channels"})


# ------------------------------------------------------------------------------------------- what is refused, and not


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Filled(Doubled):
    """What it returns is filled step by step."""

    @staticmethod
    def forward(ctx, x):
        result = torch.empty(2, *x.shape)
        for place in range(2):
            result[place] = x * (place + 1)
        return result


class Unseen(Doubled):
    """As kernels do that are no operators of PyTorch."""

    @staticmethod
    def forward(ctx, x):
        result = torch.empty_like(x)
        ctypes.memmove(result.data_ptr(), x.contiguous().data_ptr(), 4 * x.numel())
        return result


def test_an_autograd_function_of_the_users_own_is_looked_into():
    net, x = between(lambda net, x: Doubled.apply(x), 6)
    check(net, x, {"body": 6})
    net, x = between(lambda net, x: Filled.apply(x).sum(0), 6)
    check(net, x, {"body": 6})


def test_one_that_fills_memory_unseen_is_refused_by_its_name():
    net, x = between(lambda net, x: Unseen.apply(x), 6)
    check(net, x, {}, {"body": "Unseen"})


def derivative(net, x):
    value, slope = torch.func.jvp(net.inner, (x,), (torch.ones_like(x),))
    return value + slope


def of_all_members(net, x):
    """The same layers with several sets of parameters, at once."""
    stacked, _ = torch.func.stack_module_state([net.inner, net.other])
    run = torch.func.vmap(lambda params, x: torch.func.functional_call(net.inner, params, (x,)), (0, None))
    return run(stacked, x).mean(0)


def gradient_of_each(net, x):
    return torch.func.vmap(torch.func.grad(lambda row: net.inner(row).sum()))(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, for forward derivatives
@pytest.mark.parametrize("transformed", [derivative, of_all_members, gradient_of_each])
def test_layers_inside_of_torch_func_are_refused_and_the_others_are_pruned(transformed):
    def forward(net, x):
        return net.head(transformed(net, net.body(x).relu()) + net.beside(x).relu().matmul(net.back))

    inner = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
    parts = {"body": nn.Linear(5, 6), "beside": nn.Linear(5, 8), "back": nn.Parameter(torch.randn(8, 6))}
    net = Net(forward, inner=inner, head=nn.Linear(6, 2), **parts)
    if transformed is of_all_members:
        net.other = copy.deepcopy(inner)
    said = "inside of torch.func"
    check(net, torch.randn(3, 5), {"beside": 8}, {"body": said, "inner.0": said})


def test_what_torch_func_computes_without_layers_is_followed():
    def forward(net, x):
        h = net.body(x)
        return net.head(h.relu()) + torch.func.vmap(lambda row: (row * row).sum())(h)[:, None]

    net = Net(forward, body=nn.Linear(5, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {"body": 6})


@pytest.mark.parametrize("early", [True, False])
def test_layers_on_nested_tensors_are_refused_and_the_others_are_pruned(early):
    def forward(net, x):
        h = net.beside(x).relu() @ net.back
        ends = torch.tensor([0, 1, 3])
        if early:
            rows = net.body(torch.nested.nested_tensor_from_jagged(h, ends)).relu()
        else:
            rows = torch.nested.nested_tensor_from_jagged(net.body(h).relu(), ends)
        return net.head(net.inner(rows).values())

    parts = {"body": nn.Linear(6, 7), "beside": nn.Linear(5, 8), "back": nn.Parameter(torch.randn(8, 6))}
    net = Net(forward, inner=nn.Linear(7, 9), head=nn.Linear(9, 2), **parts)
    said = "runs on nested tensors"
    refused = {"inner": said, "body": said if early else "_nested_view_from_jagged"}
    check(net, torch.randn(3, 5), {"beside": 8} if early else {"beside": 8, "back": 6}, refused)


def test_an_output_that_nobody_uses_pins_nothing():
    def forward(net, x):
        h = net.body(x)
        h.topk(1, -1)
        net.head(h)[:, 0].sum()
        h[:, 0] * 2
        return net.head(h.relu())

    net = Net(forward, body=nn.Linear(5, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {"body": 6})


def test_a_value_that_python_reads_is_an_output():
    def forward(net, x):
        h = net.body(x)
        return net.head(h) * (1.0 + h[:, 0].sum().item())

    net = Net(forward, body=nn.Linear(5, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {})


@pytest.fixture(scope="module")
def custom():
    twisted = library.Library("softprune_tests", "DEF")
    twisted.define("twisted(Tensor x) -> Tensor")
    twisted.impl("twisted", lambda x: x * torch.linspace(1, 2, x.shape[-1]), "CompositeExplicitAutograd")
    yield torch.ops.softprune_tests.twisted
    twisted._destroy()


def test_an_operator_that_is_not_known_is_refused_by_its_name(custom):
    net, x = between(lambda net, x: custom(x), 6)
    check(net, x, {}, {"body": "softprune_tests::twisted"})


def test_unknown_operators_on_something_else_pin_nothing(custom):
    def forward(net, x):
        return net.head(net.body(custom(x)).relu())

    net = Net(forward, body=nn.Linear(5, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(3, 5), {"body": 6})


def test_a_scale_by_the_number_of_channels_is_not_followed_in_silence():
    """`x / sqrt(C)`: the pruned network divides by the root of what is left, as the code says."""
    net, x = between(lambda net, x: x / math.sqrt(x.shape[-1]), 6)
    check(net, x, {"body": 6}, masked=False)
