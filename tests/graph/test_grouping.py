"""Groups of the zoo's networks against what their code says."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.graph.components import assign_components, match_modules
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.surgery import probe_groups
from support import zoo
from support.zoo import BY_NAME, CASES, PRUNABLE, find

pytestmark = pytest.mark.usefixtures("one_thread")


def by_name(groups):
    return {group.name: group for group in groups}


def groups_of(name, **kwargs):
    model, x = BY_NAME[name].make()
    return by_name(find(model, x, **kwargs))


def slots(group):
    return {str(member) for member in group.members}


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
        ("Attention", "body", {"body (out)", "attention (both)", "head (in)"}),
        ("SharedLayer", "body", {"body (out)", "shared (in)", "shared (out)", "head (in)"}),
        (
            "Transformer",
            "embedding",
            {"embedding (both)", "position (dim2)", "norm (both)", "head (in)", "layer.self_attn (both)"}
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


@pytest.mark.parametrize(
    ("pick", "width", "reason"),
    [
        (lambda y: y[:, ::3], 3, "a slice takes its channels in steps of 3"),
        (lambda y: y.chunk(2, 1)[0], 5, "are chunked into unequal parts"),
    ],
)
def test_picks_that_depend_on_the_number_of_channels_are_refused(pick, width, reason):
    found = by_name(find(Picking(pick, width), torch.randn(3, 5)))
    assert reason in found["body"].reason


def test_a_chunk_across_the_channels_of_two_layers_is_refused():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(5, 6)
            self.left, self.right = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            left, right = torch.cat([self.one(x), self.two(x).relu()], 1).chunk(2, 1)
            return self.left(left) + self.right(right)

    found = by_name(find(Joined(), torch.randn(3, 5)))
    assert found["one"].reason == found["two"].reason == "a chunk has 2 parts, which channels of several groups share"


def test_the_parts_of_grouped_layers_lose_the_same_channels():
    assert owners("GroupedConv", "stem")["grouped (in)"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert owners("GroupNormed", "body")["norm (both)"] == [0, 1, 2, 3] * 3
    assert owners("Attention", "body")["attention (both)"] == [0, 1, 2, 3] * 3


# --------------------------------------------------------------------------------------------------- components


def test_components_default_to_the_top_level_children():
    found = groups_of("Autoencoder")
    assert (found["encoder.0"].component, found["encoder.0"].kind) == ("encoder", "intra")
    assert (found["encoder.2"].component, found["encoder.2"].kind) == ("encoder+decoder+classifier", "inter")
    assert (found["decoder.0"].component, found["decoder.0"].kind) == ("decoder", "intra")


def test_a_single_wrapping_child_is_looked_through():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.Autoencoder()

        def forward(self, x):
            return self.net(x)

    found = by_name(find(Wrapped(), torch.randn(2, 12)))
    assert found["net.encoder.0"].component == "encoder"
    assert found["net.encoder.2"].kind == "inter"


def test_components_replace_the_default_children_where_they_match():
    found = groups_of("Autoencoder", components={"code": ["encoder.2", "decoder"], "rest": ["class*"]})
    assert found["encoder.0"].component == "encoder+code"  # encoder.0 keeps its default, encoder.2 reads it
    assert found["encoder.2"].component == "code+rest"
    assert (found["decoder.0"].component, found["decoder.0"].kind) == ("code", "intra")


@pytest.mark.parametrize("components", [{"all": ["*"]}, {"all": ["encoder", "decoder", "classifier"]}])
def test_one_component_makes_every_group_intra(components):
    assert {group.kind for group in groups_of("Autoencoder", components=components).values()} == {"intra"}


def test_a_component_pattern_without_a_match_names_near_modules():
    with pytest.raises(ValueError, match=r"components\['a'\]: the pattern 'encodr' matches no module.*'encoder'"):
        groups_of("Autoencoder", components={"a": ["encodr"]})


# ------------------------------------------------------------------------------------------------------- ignore


@pytest.mark.parametrize("pattern", ["decoder.0", "decoder", "dec*"])
def test_ignored_modules_keep_their_inputs_and_their_outputs(pattern):
    found = groups_of("Autoencoder", ignore=[pattern])
    assert found["encoder.0"].prunable
    assert not found["encoder.2"].prunable  # the input of decoder.0
    assert not found["decoder.0"].prunable
    assert repr(pattern) in found["decoder.0"].reason


def test_an_ignored_bare_parameter_is_kept():
    assert "position" in groups_of("Transformer", ignore=["position"])["embedding"].reason


def test_an_ignore_pattern_without_a_match_names_near_modules():
    with pytest.raises(ValueError, match=r"ignore: the pattern 'decoder\.9' matches no module; near names: 'decoder"):
        groups_of("Autoencoder", ignore=["decoder.9"])


def test_patterns_match_modules_and_bare_parameters():
    model, _ = BY_NAME["Transformer"].make()
    assert match_modules(model, ["layer.norm*", "pos*"], "ignore") == {
        "layer.norm*": ["layer.norm1", "layer.norm2"],
        "pos*": ["position"],
    }


# ------------------------------------------------------------------------------------------------- left alone


@pytest.mark.parametrize(
    ("network", "group", "reason"),
    [
        ("Autoencoder", "classifier", "classifier produces an output of the network"),
        ("Autoencoder", "decoder.2", "decoder.2 produces an output of the network"),
        ("Recurrent", "inner", "feeds gru: GRU layers cannot be sliced"),
        ("Recurrent", "gru", "GRU layers cannot be sliced"),
        ("WeightNormed", "body", "feeds normed: the weights of this Linear are computed"),
        ("WeightNormed", "normed", "the weights of this Linear are computed"),
        ("DepthwiseMultiplier", "stem", "feeds multiplied: a depthwise convolution with a channel multiplier"),
        ("DepthwiseMultiplier", "multiplied", "a depthwise convolution with a channel multiplier"),
        ("ConstantView", "body", "the model does not run with fewer channels: RuntimeError"),
        ("RawResidual", "back", "the model does not run with fewer channels: RuntimeError: The size of tensor"),
        ("Unused", "spare.0", "spare.0 was run by neither validation_step nor training_step"),
        ("Unused", "temperature", "temperature is a parameter of Unused"),
        ("TornWeights", "body", "other shares its weight with body"),
    ],
)
def test_what_is_left_alone_says_why(network, group, reason):
    found = groups_of(network)[group]
    assert not found.prunable
    assert found.reason.startswith(reason) or reason in found.reason


class Wide(nn.Module):
    """Any layer between two linear ones."""

    def __init__(self, between, width=8, out=8):
        super().__init__()
        self.body = nn.Linear(5, width)
        self.between = between
        self.head = nn.Linear(out, 2)

    def forward(self, x):
        x = self.between(self.body(x))
        return self.head(x[0] if isinstance(x, tuple) else x)


class TwoInputs(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


class OwnKernel(nn.Module):
    """A matrix of its own."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.kernel


class Attending(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **kwargs)

    def forward(self, x):
        return self.attention(x, x, x[..., : self.attention.vdim])[0]


@pytest.mark.parametrize(
    "between",
    [
        nn.RNN(8, 8),
        nn.LSTM(8, 8),
        nn.LSTM(8, 8, num_layers=2, bidirectional=False),
        nn.GRUCell(8, 8),
        TwoInputs(nn.Bilinear(8, 8, 8)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
        nn.LayerNorm((3, 8)),
        nn.RMSNorm(8, elementwise_affine=False),
        OwnKernel(),
        Attending(kdim=8, vdim=6),
        nn.Sequential(nn.Unflatten(-1, (2, 4)), nn.Flatten(-2)),
        nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Dropout()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_no_layer_type_crashes(between):
    model = Wide(between).eval()
    x = torch.randn(3, 5) if isinstance(between, nn.GRUCell) else torch.randn(3, 3, 5)
    groups = find(model, x)
    assert all(group.reason for group in groups if not group.prunable)
    names = " ".join(f"{g.name} {g.reason} {' '.join(map(str, g.members))}" for g in groups)
    for name, _ in between.named_parameters(prefix="between"):
        layer = name.split(".parametrizations")[0].removesuffix(".out_proj.weight").removesuffix(".out_proj.bias")
        assert layer.rsplit(".", 1)[0] in names
    prunable = [group for group in groups if group.prunable]
    assert len(probe_groups(model, prunable, lambda: model(x))) == len(prunable)


def test_attention_whose_weights_nobody_reads_is_prunable():
    found = by_name(find(Wide(Attending()).eval(), torch.randn(3, 3, 5)))
    assert found["body"].prunable
    assert found["body"].num_channels == 4


def test_old_weight_norm_is_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(8, 8))
    found = by_name(find(Wide(layer), torch.randn(3, 5)))
    assert "weight norm" in found["between"].reason
    assert "feeds between" in found["body"].reason


def test_tied_weights_that_two_groups_would_tear_are_refused():
    found = groups_of("TornWeights")
    assert not found["body"].prunable
    assert not found["other"].prunable


def test_tied_embeddings_are_one_group_and_lose_no_tokens():
    found = groups_of("Transformer")
    assert "head (in)" in slots(found["embedding"])
    assert not found["head"].prunable  # its outputs are the tokens


def test_a_model_without_layers_has_no_groups():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    (group,) = find(Scale(), torch.randn(2, 3))
    assert (group.name, group.prunable) == ("scale", False)


def test_a_submodule_that_only_a_second_step_runs_is_seen():
    model, x = BY_NAME["Unused"].make()
    y = torch.randn(2, 3)
    groups = by_name(trace_groups(model, [lambda: model(x), lambda: model.spare(y)]))
    assert groups["spare.0"].prunable
    assert groups["spare.0"].num_channels == 4


def test_two_steps_over_the_same_layers_find_the_same_groups():
    for case in CASES:
        model, x = case.make()
        once = trace_groups(model, [lambda model=model, x=x: model(x)])
        twice = trace_groups(model, [lambda model=model, x=x: model(x)] * 2)
        assert once == twice, case.name


# ----------------------------------------------------------------------------------------- nothing is left behind


def test_frozen_layers_are_found_and_stay_frozen():
    model, x = BY_NAME["Frozen"].make()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert by_name(find(model, x))["backbone.0"].prunable
    assert [parameter.requires_grad for parameter in model.parameters()] == flags == [False] * 4 + [True] * 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{len(case.shape)}d")
def test_modes_flags_hooks_and_values_are_those_of_before(case):
    model, x = case.make()
    model.train()
    for number, module in enumerate(model.modules()):
        module.training = bool(number % 2)
    modes = [module.training for module in model.modules()]
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    buffers = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_buffers()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def step():
        model.eval()
        return model(x)

    groups = assign_components(model, trace_groups(model, [step]), None)
    assert [module.training for module in model.modules()] == modes
    probe_groups(model, groups, lambda: model.eval()(x))
    assert {n: id(t) for n, t in model.named_parameters()} == {n: key for n, (key, _) in tensors.items()}
    assert {n: id(t) for n, t in model.named_buffers()} == {n: key for n, (key, _) in buffers.items()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, {**tensors, **buffers}[name][1]), name
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_a_step_that_raises_leaves_the_model_as_it_was():
    model, x = BY_NAME["Frozen"].make()
    model.train()

    def step():
        model(x)
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        trace_groups(model, [step])
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ["Autoencoder", "Residual", "Transformer"])
def test_tracing_works_whatever_the_callers_grad_mode(mode, name):
    model, x = BY_NAME[name].make()
    with mode():
        groups = find(model, x)
        assert not torch.is_grad_enabled()
    assert groups == find(model, x)


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
        (lambda y: y.reshape(-1, 3, y.shape[1] // 3).transpose(1, 2).flatten(1), False),
    ],
    ids=["nothing", "noise", "symmetric", "flip", "roll", "shuffle"],
)
def test_channels_that_are_reordered_on_the_way_to_their_reader_are_left_alone(reorder, prunable):
    torch.manual_seed(0)
    found = {group.name: group for group in find_groups(_Reordered(reorder), torch.randn(6, 4))}
    assert found["body"].prunable == prunable
    assert found["inner"].prunable
    if not prunable:
        assert "on the way to inner" in found["body"].reason
