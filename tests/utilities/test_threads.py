"""Small networks are probed with one thread, and what looks at a model is no part of what it computes."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_softprune import find_groups
from lightning_softprune.graph import trace_model
from lightning_softprune.surgery import Transaction
from lightning_softprune.utilities.hooks import unwatched
from lightning_softprune.utilities.threads import one_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class TwoLayers(nn.Module):
    """Two layers."""

    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("width", "samples", "probing"), [(8, 3, 1), (8, 40_000, 2), (40_000, 2, 2)])
def test_groups_of_a_model_are_probed_with_one_thread_where_its_tensors_are_tiny(width, samples, probing):
    seen = []
    model = TwoLayers(width)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    assert [group.num_channels for group in find_groups(model, torch.zeros(samples, 4)) if group.prunable] == [width]
    assert seen[-1] == probing
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_as_many_threads_as_before_compute_again_after_an_exception():
    seen = []

    def fail():
        with one_thread():
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == 2
    with one_thread(False):
        assert torch.get_num_threads() == 2


class Functions(TorchFunctionMode):
    """Counts functions."""

    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_modes_see_nothing_of_what_is_done_unwatched_and_everything_after_it():
    x = torch.ones(3)
    with Functions() as functions, Operators() as outer, Operators() as inner:
        with unwatched():
            x.mul(2)
        assert (functions.seen, outer.seen, inner.seen) == (0, 0, 0)
        x.mul(2)
        assert (functions.seen, outer.seen, inner.seen) == (1, 1, 1)


def test_a_step_that_puts_the_model_back_is_traced_as_one_that_does_not():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)

    def put_back():
        with Transaction(model):
            return model(x)

    plain, other = (trace_model(model, [step]).tape for step in (lambda: model(x), put_back))
    assert [operation.name for operation in plain.operations] == [operation.name for operation in other.operations]
