"""Components, patterns, and what is ignored."""

import copy

import pytest
import torch
from torch import nn

from lightning_softprune.graph import groups_of as grouped
from lightning_softprune.graph import trace_model
from lightning_softprune.graph.components import equal_parts, match_modules, mirror_twins, undeclared_twins
from support import zoo
from support.groups import by_name, groups_of, slots
from support.zoo import BY_NAME, find

pytestmark = pytest.mark.usefixtures("one_thread")


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


class Targets(nn.Module):
    """A network and its copy, which are held together; either may run first."""

    def __init__(self, first, reads="nothing"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
        self.target = copy.deepcopy(self.net)
        self.first, self.reads, self.other = first, reads, nn.Linear(8, 2)

    def forward(self, x):
        own, target = (self.net, self.target) if self.first == "net" else (self.target, self.net)
        if self.reads == "nothing":
            self.target.load_state_dict(self.net.state_dict())
            return own(x) - target(x)
        return own(x) - target(x) + self.other(self.target[:2](x))


def mirrored(model):
    trace = trace_model(model, [lambda: model(torch.randn(3, 5))])
    twins = {"target": "net"}
    return by_name(mirror_twins(model, grouped(trace, twins=tuple(twins)).groups, twins))


@pytest.mark.parametrize("first", ["net", "target"])
def test_a_group_of_a_module_and_its_twin_is_named_after_the_module_whichever_runs_first(first):
    found = mirrored(Targets(first))
    assert found["net.0"].prunable
    assert slots(found["net.0"]) == {f"{part}.{side}" for part in ("net", "target") for side in ("0 (out)", "2 (in)")}


def test_what_reads_channels_of_a_twin_alone_is_listed():
    found = mirrored(Targets("net", reads="the twin"))
    assert found["net.0"].prunable
    assert "target.0 (out)" in slots(found["net.0"])
    reason = found["target.0"].reason
    assert reason.startswith("other reads channels that only target.0 makes, which twins names; ")


def copies():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    return nn.ModuleDict({"net": net, "teacher": copy.deepcopy(net), "other": other})


def test_parts_of_equal_values_are_found_once_in_both_orders():
    model = copies()
    trained = {id(parameter) for parameter in model.parameters()}
    assert equal_parts(model, trained) == [("net", "teacher"), ("teacher", "net")]
    assert equal_parts(model, trained, known=["teacher"]) == equal_parts(model, trained, ignored=["tea*"]) == []
    assert equal_parts(model, {id(parameter) for parameter in model["net"].parameters()}) == []


def test_blocks_that_have_begun_alike_are_no_pair():
    model = nn.ModuleDict({"experts0": copies()["net"], "experts1": copies()["net"]})
    assert equal_parts(model, {id(parameter) for parameter in model.parameters()}) == []


@pytest.mark.parametrize("trained", [False, True])
def test_values_that_fresh_layers_begin_with_make_no_pair(trained):
    model = nn.ModuleDict({"main": nn.BatchNorm1d(4), "aux": nn.BatchNorm1d(4)})
    if trained:
        with torch.no_grad():
            for norm in model.values():
                norm.weight.copy_(torch.arange(4.0))
    parameters = {id(parameter) for parameter in model.parameters()}
    assert bool(equal_parts(model, parameters)) == trained
    assert bool(undeclared_twins(model, {id(parameter) for parameter in model["main"].parameters()})) == trained
