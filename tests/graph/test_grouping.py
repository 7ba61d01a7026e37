"""Groups of the zoo's networks against what their code says."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.graph import groups_of as grouped
from lightning_softprune.graph import trace_model
from support.groups import Attending, Wide, by_name, groups_of, slots
from support.zoo import CASES, PRUNABLE, find

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{len(case.shape)}d")
def test_prunable_groups_and_their_channels(case):
    model, x = case.make()
    found = {group.name: group.num_channels for group in find(model, x) if group.prunable}
    assert list(found.items()) == list(case.groups.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{len(case.shape)}d")
def test_everything_with_parameters_appears_and_names_are_unique(case):
    model, x = case.make()
    groups = find(model, x)
    assert len({group.name for group in groups}) == len(groups)
    said = [text for group in groups for text in (group.name, group.reason, *(m.module for m in group.members))]
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        parents = [".".join(layer.split(".")[:depth]) for depth in range(1, layer.count(".") + 2)] if layer else [name]
        assert any(place in text.replace(":", " ").split() for place in (name, *parents) for text in said), name
        assert parameter.grad is None
    for group in groups:
        assert bool(group.reason) == (not group.prunable)


@pytest.mark.parametrize("case", PRUNABLE, ids=lambda case: f"{case.name}-{len(case.shape)}d")
def test_every_channel_is_somewhere_in_every_member(case):
    model, x = case.make()
    for group in find(model, x):
        if group.prunable:
            for member in group.members:
                owned = set(member.owner[member.owner >= 0].tolist())
                assert owned <= set(range(group.num_channels))
                assert owned
            together = set().union(*(member.owner.tolist() for member in group.members))
            assert together - {-1} == set(range(group.num_channels))


@pytest.mark.parametrize(
    ("network", "group", "expected"),
    [
        ("Autoencoder", "encoder.2", {"encoder.2 (out)", "decoder.0 (in)", "classifier (in)"}),
        ("Residual", "stem", {"stem (out)", "norm (both)", "up (in)", "down (out)", "head (in)"}),
        ("Dense", "second", {"second (out)", "norm (both)", "third (in)", "head (in)"}),
        ("UnevenSplit", "body", {"body (out)", "left (in)", "right (in)"}),
        ("DepthwiseSeparable", "stem", {"stem (out)", "depthwise (both)", "pointwise (in)"}),
        ("ClassToken", "body", {"body (out)", "token (dim2)", "inner (in)"}),
        ("PReLUs", "body", {"body (out)", "many (both)", "inner (in)"}),
        ("RMSNormed", "body", {"body (out)", "norm (both)", "head (in)"}),
        ("InstanceNormed", "body", {"body (out)", "norm (both)", "head (in)"}),
        ("Attention", "body", {"body (out)", "attention (both)", "attention.out_proj (out)", "head (in)"}),
        ("Attention", "attention.heads", {"attention (heads)", "attention.out_proj (in)"}),
        ("SharedLayer", "body", {"body (out)", "shared (in)", "shared (out)", "head (in)"}),
        (
            "Transformer",
            "embedding",
            {"embedding (both)", "position (dim2)", "norm (both)", "head (in)", "layer.self_attn (both)"}
            | {"layer.self_attn.out_proj (out)"}
            | {"layer.norm1 (both)", "layer.norm2 (both)", "layer.linear1 (in)", "layer.linear2 (out)"},
        ),
    ],
)
def test_members(network, group, expected):
    assert slots(groups_of(network)[group]) == expected


def owners(network, group):
    return {str(member): member.owner.tolist() for member in groups_of(network)[group].members}


def test_a_flattened_channel_owns_its_positions():
    assert owners("Residual", "stem")["head (in)"] == np.repeat(np.arange(6), 4).tolist()


def test_concatenated_channels_own_their_own_places():
    other = [-1]
    assert owners("Dense", "first")["head (in)"] == [0, 1, 2, 3] + other * 14
    assert owners("Dense", "second")["norm (both)"] == other * 4 + [0, 1, 2, 3, 4, 5]
    assert owners("Dense", "third")["head (in)"] == other * 10 + list(range(8))


def test_channels_next_to_raw_inputs_own_the_right_places():
    assert owners("Critic", "encoder")["q (in)"] == [-1] * 3 + list(range(8)) + [-1] * 2


def test_an_uneven_split_hands_each_reader_its_part():
    found = owners("UnevenSplit", "body")
    assert found["left (in)"] == [0, 1, 2]
    assert found["right (in)"] == [3, 4, 5, 6, 7, 8, 9]


def test_a_gate_goes_with_the_channel_it_gates():
    assert owners("ChunkGate", "body")["body (out)"] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]


def test_the_halves_of_a_chunk_stay_halves():
    found = owners("ChunkSwap", "body")
    assert found["body (out)"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert found["head (in)"] == [0, 1, 2, 3, 0, 1, 2, 3]


class Picking(nn.Module):
    def __init__(self, pick, width):
        super().__init__()
        self.pick, self.body, self.head = pick, nn.Linear(5, 9), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.pick(self.body(x)))


def test_a_chunk_into_unequal_parts_is_refused():
    found = by_name(find(Picking(lambda y: y.chunk(2, 1)[0], 5), torch.randn(3, 5)))
    assert "chunks its channels into unequal parts" in found["body"].reason


def test_a_slice_in_steps_loses_whole_steps():
    found = by_name(find(Picking(lambda y: y[:, ::3], 3), torch.randn(3, 5)))
    assert found["body"].prunable
    assert [member.owner.tolist() for member in found["body"].members] == [[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2]]


def test_a_chunk_across_the_channels_of_two_layers_couples_them():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(5, 6)
            self.left, self.right = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            left, right = torch.cat([self.one(x), self.two(x).relu()], 1).chunk(2, 1)
            return self.left(left) + self.right(right)

    found = by_name(find(Joined(), torch.randn(3, 5)))
    assert slots(found["one"]) == {"one (out)", "two (out)", "left (in)", "right (in)"}
    assert found["one"].prunable


def test_the_parts_of_grouped_layers_lose_the_same_channels():
    assert owners("GroupedConv", "stem")["grouped (in)"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert owners("GroupNormed", "body")["norm (both)"] == [0, 1, 2, 3] * 3


def test_a_head_owns_its_dimensions_at_both_of_its_ends():
    found = owners("Attention", "attention.heads")
    assert found["attention (heads)"] == found["attention.out_proj (in)"] == [0] * 4 + [1] * 4 + [2] * 4


def test_attention_whose_weights_nobody_reads_is_prunable():
    found = by_name(find(Wide(Attending()).eval(), torch.randn(3, 3, 5)))
    assert found["body"].prunable
    assert found["body"].num_channels == 8
    assert found["between.attention.heads"].num_channels == 2


class _Reordered(nn.Module):
    """Something between two layers gives channels other numbers."""

    def __init__(self, reorder):
        super().__init__()
        self.body = nn.Linear(4, 9)
        self.inner = nn.Linear(9, 6)
        self.head = nn.Linear(6, 2)
        self.reorder = reorder

    def forward(self, x):
        return self.head(self.inner(self.reorder(self.body(x)).relu()).relu())


@pytest.mark.parametrize(
    ("reorder", "prunable"),
    [
        (lambda y: y, True),
        (lambda y: y + torch.randn_like(y), True),  # random outputs are no evidence
        (lambda y: y.softmax(1) - y.mean(1, keepdim=True), True),
        (lambda y: y.flip(1), False),
        (lambda y: y.roll(2, 1), False),
        (lambda y: y.reshape(-1, 3, y.shape[1] // 3).transpose(1, 2).flatten(1), True),
    ],
    ids=["nothing", "noise", "symmetric", "flip", "roll", "shuffle"],
)
def test_channels_that_are_reordered_on_the_way_to_their_reader_are_left_alone(reorder, prunable):
    torch.manual_seed(0)
    found = {group.name: group for group in find_groups(_Reordered(reorder), torch.randn(6, 4))}
    assert found["body"].prunable == prunable
    assert found["inner"].prunable
    if not prunable:
        assert "on the way to inner" in found["body"].reason or "by their place" in found["body"].reason


def test_groups_that_an_output_or_what_a_step_returns_pins_are_told_apart():
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.inner, self.head = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = self.body(x).relu()
            return self.head(self.inner(h)), h

    model, x = Returning(), torch.randn(4, 3)
    assert grouped(trace_model(model, [lambda: model(x)])).given == {"body", "head"}
