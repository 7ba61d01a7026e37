"""A reason names the place, the sizes, and what would help."""

import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.utilities.nested import attribute_at

pytestmark = pytest.mark.usefixtures("one_thread")


class Between(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between, width=8):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("order", torch.tensor([1, 0, 3, 2]))
        self.between = between

    def forward(self, x):
        return self.head(self.between(self, self.body(x), x))


def reason_of(between, width=8, name="body"):
    groups = {group.name: group for group in find_groups(Between(between, width), torch.randn(3, 5))}
    assert not groups[name].prunable
    return groups[name].reason


KINDS = {
    "constant view": (
        lambda m, h, x: h.view(-1, 4, 2).flatten(1),
        8,
        ("does not run with fewer channels", "(test_reasons.py:", "-1", "integer attribute"),
    ),
    "constant reshape in a list": (
        lambda m, h, x: torch.stack([row.reshape(8) for row in h]),
        8,
        ("does not run with fewer channels", "(test_reasons.py:", "-1", "integer attribute"),
    ),
    "picked": (lambda m, h, x: h[:, [0, 2, 5]], 3, ("of 8 channels by their numbers", "layer of its own")),
    "buffer picks": (lambda m, h, x: h[:, m.order], 4, ("of 8 channels by their numbers", "layer of its own")),
    "select": (lambda m, h, x: h + h[:, 3].mean(), 8, ("takes channel 3 of 8 by its number", "layer of its own")),
    "raw input": (
        lambda m, h, x: h + torch.cat([x, x], 1)[:, :8],
        8,
        ("meets a tensor whose width is fixed", "of shape (3, 8)", "layer between"),
    ),
    "unknown operator": (
        lambda m, h, x: torch.linalg.svd(h, full_matrices=False)[2],
        8,
        ("_linalg_svd in the module itself (test_reasons.py:", "not known here", "register_layer", "ignore"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reason_says_where_how_many_and_what_would_help(kind):
    between, width, words = KINDS[kind]
    reason = reason_of(between, width)
    for word in words:
        assert word in reason
    assert len(reason) < 250
    assert "\n" not in reason


def test_the_raw_input_is_called_an_input():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.back = nn.Linear(5, 8), nn.Linear(8, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.back(self.body(x)) + x)

    groups = {group.name: group for group in find_groups(Residual(), torch.randn(3, 5))}
    assert "an input of shape (3, 5)" in groups["back"].reason
    assert groups["body"].prunable


class Swapping(nn.Module):
    """Computes with other weights than its own, or fills a buffer."""

    def __init__(self, name):
        super().__init__()
        self.name, self.body, self.head = name, nn.Linear(5, 8), nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros(8))
        self.held = [torch.ones(8)]

    def forward(self, x):
        attribute_at(self, self.name).data.copy_(self.held[0])
        return self.head(self.body(x) + self.seen)


def test_weights_that_are_swapped_in_are_called_so():
    words = "writes a tensor of fixed width into body.bias of shape (8,); let Lightning's WeightAveraging"
    assert words in {g.name: g for g in find_groups(Swapping("body.bias"), torch.randn(3, 5))}["body"].reason
    assert "writes" not in {g.name: g for g in find_groups(Swapping("seen"), torch.randn(3, 5))}["body"].reason


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).view(-1, 2, 4).flatten(1))


def test_a_crash_names_the_innermost_module_that_ran():
    model = nn.Sequential(nn.Linear(5, 8), nn.Sequential(Inner()), nn.Linear(8, 2))
    groups = {group.name: group for group in find_groups(model, torch.randn(3, 5))}
    reason = groups["1.0.first"].reason
    assert "(test_reasons.py:" in reason
    assert " in 1.0" in reason


def test_a_long_message_of_an_exception_is_cut():
    def between(module, h, x):
        if h.shape[1] != 8:
            raise RuntimeError("too few " * 100)
        return h

    reason = reason_of(between)
    assert "RuntimeError: too few" in reason
    assert len(reason) < 250


@pytest.mark.parametrize("counts", [lambda m, w: len(m.experts), lambda m, w: w.shape[1]], ids=["list", "width"])
def test_a_gate_whose_channels_are_picked_by_number_says_so(counts):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Linear(5, 2), nn.Linear(8, 2)
            self.experts = nn.ModuleList([nn.Linear(5, 8), nn.Linear(5, 8)])

        def forward(self, x):
            weights = self.gate(x).softmax(1)
            return self.head(sum(weights[:, k : k + 1] * self.experts[k](x) for k in range(counts(self, weights))))

    torch.manual_seed(0)
    groups = {group.name: group for group in find_groups(Experts(), torch.randn(3, 5))}
    assert groups["experts.0"].prunable
    assert not groups["gate"].prunable
    assert groups["gate"].reason.endswith("; what is read by its number needs a layer of its own")


def test_computed_weights_name_what_removes_them():
    wrapped = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(5, 8), wrapped, nn.Linear(8, 2))
    groups = {group.name: group for group in find_groups(model, torch.randn(3, 5))}
    assert groups["0"].reason.startswith("feeds 1: the weights of this Linear are computed")
    assert "torch.nn.utils.parametrize.remove_parametrizations" in groups["0"].reason


def _with_hook(layer):
    layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", layer.kept * 2))
    layer.kept = layer._parameters.pop("weight")
    layer.weight = layer.kept * 2
    return layer


OLDER = {
    "spectral": (nn.utils.spectral_norm, "SpectralNorm: slices of them", ": torch.nn.utils.remove_spectral_norm"),
    "masked": (
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        "code of its own",
        ": torch.nn.utils.prune.remove",
    ),
    "own": (_with_hook, "code of its own", "; remove it before pruning"),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
@pytest.mark.parametrize("kind", OLDER)
def test_hooks_that_compute_weights_name_what_removes_them(kind):
    wrap, by, ending = OLDER[kind]
    model = nn.Sequential(nn.Linear(5, 8), wrap(nn.Linear(8, 8)), nn.Linear(8, 2))
    groups = {group.name: group for group in find_groups(model, torch.randn(3, 5))}
    assert by in groups["0"].reason
    assert groups["0"].reason.endswith(ending)


def masked(layer, *tensors):
    for tensor in tensors:
        nn.utils.prune.l1_unstructured(layer, tensor, 0.3)
    return layer


@pytest.mark.parametrize("tensors", [["weight"], ["weight", "bias"]], ids=str)
def test_what_a_masked_layer_is_computed_from_is_left_alone_with_it_and_listed_once(tensors):
    layers = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    model = nn.Sequential(masked(layers[0], *tensors), nn.ReLU(), masked(layers[1], *tensors), *layers[2:])
    model(torch.randn(3, 5))
    groups = find_groups(model, torch.randn(3, 5))
    assert [group.name for group in groups] == ["3", "4", "0", "2"]
    assert {group.name for group in groups if group.prunable} == {"3"}
    for group in groups[2:]:
        assert group.reason.startswith("the weights of this Linear are computed by code of its own")
        assert group.reason.endswith("torch.nn.utils.prune.remove")


def test_what_meets_the_tensors_of_a_masked_layer_is_left_alone_too():
    class Met(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.aside = nn.Linear(5, 8), nn.Linear(8, 2), masked(nn.Linear(3, 8), "weight")

        def forward(self, x):
            return self.head(self.first(x) * self.aside.weight_orig.sum(1)) + self.aside(x[:, :3]).sum()

    groups = {group.name: group for group in find_groups(Met(), torch.randn(3, 5))}
    assert groups["first"].reason.startswith("the weights of this Linear are computed by code of its own")


def test_a_layer_of_which_the_bias_alone_is_masked_is_pruned():
    model = nn.Sequential(masked(nn.Linear(5, 8), "bias"), nn.Linear(8, 2))
    assert {group.name: group.prunable for group in find_groups(model, torch.randn(3, 5))} == {"0": True, "1": False}


def test_a_layer_that_takes_channels_as_time_names_the_tensor_its_shape_and_the_dimension():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 6), nn.GRU(5, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.second(self.first(x).transpose(1, 2))[0][:, -1])

    groups = {group.name: group for group in find_groups(Turned(), torch.randn(2, 5, 4))}
    said = "second takes the output of first of shape (2, 6, 5) where it expects no channels (dimension 1)"
    assert said in groups["first"].reason


@pytest.mark.parametrize("settings", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "padding": 1}])
def test_a_convolution_that_moves_along_channels_takes_them_where_it_expects_none(settings):
    class Along(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mix, self.head = nn.Linear(4, 6), nn.Conv1d(5, 5, **settings), nn.LazyLinear(2)

        def forward(self, x):
            return self.head(self.mix(self.first(x)))

    model, x = Along(), torch.randn(2, 5, 4)
    model(x)
    groups = {group.name: group for group in find_groups(model, x)}
    said = "mix takes the output of first of shape (2, 5, 6) where it expects no channels (dimension 2)"
    assert said in groups["first"].reason


HINTS = {
    "argmax": (lambda m, h, x: h * h.argmax(1, keepdim=True), "which of its channels is the largest"),
    "steps": (lambda m, h, x: h * h[:, ::3].mean(1, keepdim=True), "in steps of 3"),
    "spectrum": (lambda m, h, x: torch.fft.fft(h, dim=1).real, "transforms along its channels"),
    "order": (lambda m, h, x: h.flip(1), "apart by their place"),
    "kept": (lambda m, h, x: h + h.detach().tolist()[0][0], "of shape (3, 8) is what a step returns"),
}


@pytest.mark.parametrize("kind", HINTS)
def test_every_reason_ends_with_what_would_help(kind):
    between, words = HINTS[kind]
    said, _, hint = reason_of(between).partition("; ")
    assert words in said
    assert "layer" in hint


def test_a_table_that_a_layer_shares_says_how_many_rows_it_needs_and_what_would_help():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False), nn.Linear(8, 2)
            self.body.weight = self.table.weight

        def forward(self, x):
            return self.head(self.body(self.table(x)).relu())

    groups = {group.name: group for group in find_groups(Tied(), torch.tensor([1, 2, 5]))}
    assert groups["body"].reason == (
        "body shares its weight with table, which needs all 8 of it; give each a tensor of its own to prune them apart"
    )


def test_an_output_that_shares_its_channels_with_other_layers_says_what_would_free_them():
    class Stream(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(5, 8), nn.Linear(8, 8), head

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.block(x.relu()))

    def groups_of(head):
        return {group.name: group for group in find_groups(Stream(head), torch.randn(3, 5))}

    said = "block produces an output of the network; put a layer behind it, which keeps its width, to prune what shares"
    assert groups_of(nn.Identity())["stem"].reason == f"{said} its channels: stem"
    mended = groups_of(nn.Linear(8, 8))
    assert mended["stem"].prunable
    assert mended["head"].reason == "head produces an output of the network"
