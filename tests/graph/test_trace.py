"""Tracing sees what steps run, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.graph.components import assign_components
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.surgery import probe_groups
from support.groups import by_name
from support.zoo import BY_NAME, CASES, find

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 tells its compiler to stay out")
def test_compiled_parts_run_as_they_were_written_while_groups_are_found():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    plain = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), body, nn.Linear(8, 2))
    x = torch.randn(3, 5)
    expected = find_groups(plain, x)
    plain[2] = torch.compile(body, backend=backend)
    found = find_groups(plain, x)
    assert not compiled
    assert [(g.name.replace("_orig_mod.", ""), g.num_channels, g.prunable) for g in found] == [
        (g.name, g.num_channels, g.prunable) for g in expected
    ]
    with torch.no_grad():
        plain(x)
    assert len(compiled) == 1


class Named(nn.Module):
    """Inputs by name, one of which need not be given."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, values, scale=None):
        return self.head(self.body(values) * (1.0 if scale is None else scale))


class OfADictionary(Named):
    """A dictionary as its one input."""

    def forward(self, inputs, **options):
        return super().forward(**inputs, **options)


@pytest.mark.parametrize("kind", [Named, OfADictionary])
def test_inputs_are_given_by_name_where_the_forward_has_these_names(kind):
    for inputs in ({"values": torch.randn(3, 4)}, {"scale": torch.tensor(2.0), "values": torch.randn(3, 4)}):
        groups = find_groups(kind(), inputs)
        assert [(group.name, group.prunable) for group in groups] == [("body", True), ("head", False)]


def test_a_mistake_in_the_models_own_code_is_told_as_it_is():
    with pytest.raises(TypeError, match="must be Tensor, not str"):
        find_groups(Named(), {"values": "text"})
