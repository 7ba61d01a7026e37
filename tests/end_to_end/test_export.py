"""A pruned network is an ordinary module: what exports and compiles modules takes it."""

import copy

import pytest
import torch

from support.architectures import measure
from support.architectures.table import BY_NAME

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NAMES = ("MLP", "residual CNN with BatchNorm", "nn.TransformerEncoder")


@pytest.fixture(scope="module", params=NAMES)
def pruned(request):
    """A pruned network, its input, and its outputs."""
    architecture = BY_NAME[request.param]
    task, sparsity = measure.pruned(architecture)
    assert sparsity > 0.4
    x = architecture.example(3)
    return task, x, measure.outputs_of(task, x)


def test_torch_export(pruned):
    task, x, expected = pruned
    torch.testing.assert_close(measure.exported(task, x), expected)


def test_onnx(pruned):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    task, x, expected = pruned
    torch.testing.assert_close(measure.through_onnx(task, x), expected, rtol=1e-3, atol=1e-4)


def test_torch_compile(pruned):
    task, x, expected = pruned
    torch.testing.assert_close(measure.compiled(task, x), expected)


def test_torch_compile_trains(pruned):
    task, x, _ = pruned
    net = copy.deepcopy(task.net)
    torch._dynamo.reset()
    torch.compile(net, backend="aot_eager")(*x).square().mean().backward()
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    net(*x).square().mean().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
