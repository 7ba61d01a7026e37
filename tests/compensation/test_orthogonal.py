"""Steps along orthogonalized momentum, against singular value decompositions."""

import pytest
import torch
from torch import nn

from lightning_softprune.compensation.healing.orthogonal import (
    MOMENTUM,
    WIDEST,
    OrthogonalSteps,
    is_matrix,
    orthogonalized,
)
from lightning_softprune.compensation.healing.pupil import RATE, Lesson, Pupil

pytestmark = pytest.mark.usefixtures("one_thread")


def of_values(rows, columns, values):
    """A random matrix with the given singular values, and its singular vectors."""
    count = len(values)
    left, right = (torch.linalg.qr(torch.randn(size, count, dtype=values.dtype))[0] for size in (rows, columns))
    return left @ torch.diag(values) @ right.T, left, right


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 30), (30, 4), (64, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_vectors_stay_and_singular_values_become_about_one(rows, columns, dtype):
    values = torch.logspace(0, -2.5, min(rows, columns), dtype=dtype) * 7.0
    matrix, left, right = of_values(rows, columns, values)
    turned = left.T @ orthogonalized(matrix) @ right
    assert turned.dtype == dtype
    assert 0.5 < turned.diagonal().min() < turned.diagonal().max() < 1.25
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-3
    beside = orthogonalized(matrix) - left @ turned @ right.T
    assert beside.abs().max() < 1e-3


def test_directions_that_a_matrix_does_not_have_are_not_made_up():
    matrix, left, right = of_values(20, 12, torch.tensor([3.0, 1.0]))
    turned = orthogonalized(matrix)
    assert torch.linalg.svdvals(turned)[2:].max() < 1e-2
    assert ((left.T @ turned @ right).diagonal() - 0.9).abs().max() < 0.3
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 5, 5), (WIDEST, WIDEST + 1), (WIDEST + 1, 4)])
def test_what_a_matrix_is(shape):
    assert is_matrix(torch.empty(shape))


@pytest.mark.parametrize("shape", [(), (3,), (1, 7), (7, 1), (7, 1, 3, 3), (1, 7, 4), (0, 3), (WIDEST + 1, WIDEST + 1)])
def test_what_a_matrix_is_not(shape):
    assert not is_matrix(torch.empty(shape))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_steps_are_those_of_the_formula_in_the_layout_that_a_weight_has(layout):
    weight = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=layout))
    wanted, average = weight.detach().clone().reshape(6, 36), torch.zeros(6, 36)
    optimizer = OrthogonalSteps([{"params": [weight]}])
    for rate in (0.1, 0.03):
        gradient = torch.randn(6, 4, 3, 3)
        weight.grad = gradient.to(memory_format=layout)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        flat = gradient.reshape(6, 36)
        average = MOMENTUM * average + (1 - MOMENTUM) * flat
        step = orthogonalized(MOMENTUM * average + (1 - MOMENTUM) * flat) * 36**0.5
        assert step.square().mean().sqrt() == pytest.approx(1.0, abs=0.2), "the rate is the size of a step"
        wanted = wanted - rate * step
        torch.testing.assert_close(weight.detach().reshape(6, 36), wanted)
    assert weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pupil_turns_matrices_and_leaves_look_ups_and_vectors_to_adam(dtype):
    matrix, look_up, vector = (nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (5, 3), (5,)))
    before = [parameter.detach().clone().float() for parameter in (matrix, look_up, vector)]
    gradients = [torch.randn(shape) for shape in ((5, 3), (5, 3), (5,))]
    pupil = Pupil([matrix, look_up, vector], 1, look_ups=[look_up])
    pupil.learn(Lesson(1.0, gradients), 0)
    rates = [RATE * float(value.square().mean().sqrt()) for value in before]
    turned = orthogonalized((1.0 - MOMENTUM**2) * gradients[0]) * 5**0.5  # the average started at nothing
    steps = [turned, gradients[1].sign(), gradients[2].sign()]  # Adam's first step
    for parameter, value, rate, step in zip((matrix, look_up, vector), before, rates, steps, strict=True):
        expected = (value - rate * step).to(dtype)
        torch.testing.assert_close(
            parameter.detach(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
        )
