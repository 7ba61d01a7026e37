"""Groups are probed on a few samples where that shows as much as whole batches do."""

from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.round.prepare as network
from lightning_softprune import UniformBaseline, prune
from lightning_softprune.round.prepare import PROBE_SAMPLES
from lightning_softprune.trainer import ModuleRunner
from lightning_softprune.trainer.module_steps import StepsOfAllKinds, head_of_batch, run_steps
from support.modules import AutoEncoder, loaders, made

pytestmark = pytest.mark.usefixtures("one_thread")
Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(8.0),
        (torch.ones(8, 3), torch.ones(8)),
        [torch.ones(8, 3), {"a": (torch.ones(8, 2, 2),)}],
        OrderedDict(x=torch.ones(8)),
        defaultdict(list, x=torch.ones(8)),
        Pair(torch.ones(8, 1), torch.ones(8)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_tensors_of_one_length_are_cut_and_keep_their_type(batch):
    shorter = head_of_batch(batch, 5)
    assert type(shorter) is type(batch)
    whole, cut = (torch.utils._pytree.tree_flatten(value) for value in (batch, shorter))
    assert whole[1] == cut[1]
    assert all(torch.equal(a[:5], b) for a, b in zip(whole[0], cut[0], strict=True))
    assert torch.utils._pytree.tree_flatten(head_of_batch(batch, 50))[0][0].shape == whole[0][0].shape


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(7, 8), torch.ones(8)),
        {"x": torch.ones(8), "names": list("abcdefgh")},
        (torch.ones(8), torch.tensor(1.0)),
        (torch.ones(8), None),
        (torch.ones(8), 0.5),
        "abc",
        (),
    ],
    ids=str,
)
def test_any_other_batch_stays_whole(batch):
    assert head_of_batch(batch, 5) is batch


def test_no_number_cuts_nothing():
    batch = torch.ones(8)
    assert head_of_batch(batch, None) is batch


GIVEN: list[int] = []


class Counting(AutoEncoder):
    """Its training step notes how many samples it is given; it may insist on whole batches, or do more with them."""

    validated = 0

    def __init__(self, whole=False, more=False):
        super().__init__()
        self.whole, self.more = whole, more

    def validation_step(self, batch, batch_idx):
        Counting.validated += 1
        super().validation_step(batch, batch_idx)

    def loss(self, batch):
        size = len(batch[0])
        GIVEN.append(size)
        if self.whole and size < 48:
            raise ValueError("give me all of them")
        if self.more and size >= 48:
            self.encoder[1](batch[0])
        return super().loss(batch)


def round_of(module, **more):
    x = torch.randn(96, next(iter(loaders(module)["val_dataloaders"]))[0].shape[1], generator=torch.manual_seed(0))
    data = DataLoader(TensorDataset(x), batch_size=48)
    result = prune(
        module, train_dataloaders=data, val_dataloaders=data, search=UniformBaseline(), tolerance=0.05,
        verbose=False, report=False, **more,
    )  # fmt: skip
    return result, x


def test_probing_on_a_few_samples_finds_what_whole_batches_find(monkeypatch):
    seen = {}
    original = network.probe_with_counts

    def probe_with_counts(*given):
        model = given[0]
        GIVEN.clear()
        found = original(*given)
        seen[model.whole, model.more] = set(GIVEN)
        return found

    monkeypatch.setattr(network, "probe_with_counts", probe_with_counts)
    results = {}
    for whole, more in ((False, False), (True, False), (False, True)):
        module = made(Counting, whole=whole, more=more)
        results[whole, more], _ = round_of(module)
    assert seen[False, False] == {PROBE_SAMPLES}
    assert seen[True, False] == {48}, "fewer samples do not run"
    assert seen[False, True] == {48}, "fewer samples run other layers"
    groups = [[(g.name, g.channels_before) for g in result.groups] for result in results.values()]
    assert groups[0] == groups[1] == groups[2]
    assert all(result.applied for result in results.values())


def test_a_round_runs_whole_batches_once_to_trace_and_counts_their_calls_meanwhile(monkeypatch):
    """What probing is compared with is what tracing has run."""
    given, original = [], network.trace_model

    def trace_model(*args):
        GIVEN.clear()
        found = original(*args)
        given.append(list(GIVEN))
        GIVEN.clear()
        return found

    def probe_with_counts(*args):
        given.append(list(GIVEN))
        return probe(*args)

    probe = network.probe_with_counts
    monkeypatch.setattr(network, "trace_model", trace_model)
    monkeypatch.setattr(network, "probe_with_counts", probe_with_counts)
    round_of(made(Counting))
    assert given == [[48], [PROBE_SAMPLES]]  # of the training step, which notes them


@pytest.mark.parametrize("compensation", ["least_squares", "none"])
def test_the_rehearsal_trains_the_pruned_network_and_does_not_validate_it_again(monkeypatch, compensation):
    """A plan was scored on all batches, and timed."""
    ran, original = [], ModuleRunner.rehearse

    def rehearse(self):
        validated, trained = Counting.validated, len(GIVEN)
        original(self)
        ran.append((Counting.validated - validated, len(GIVEN) - trained))

    monkeypatch.setattr(ModuleRunner, "rehearse", rehearse)
    result, _ = round_of(made(Counting), compensation=compensation)
    assert result.applied
    assert ran == [(0, 1)]


def test_costs_are_counted_while_the_validation_step_is_traced(monkeypatch):
    counted, original = [], network.CostModel.build

    def build(*args):
        counted.append(Counting.validated)
        return original(*args)

    def rank(*args):
        counted.append(Counting.validated)
        return ranked(*args)

    ranked = network.rank
    monkeypatch.setattr(network.CostModel, "build", build)
    monkeypatch.setattr(network, "rank", rank)
    result, _ = round_of(made(Counting))
    assert len(set(counted)) == 1, "no step of its own"
    assert result.costs_before.macs == sum(
        layer.weight.numel() for layer in made(Counting).modules() if isinstance(layer, torch.nn.Linear)
    )


def test_a_round_looks_for_positions_on_a_few_samples_first(monkeypatch):
    given, original = [], network.find_read_positions

    def find_read_positions(*args):
        GIVEN.clear()
        found = original(*args)
        given.append(set(GIVEN))
        return found

    monkeypatch.setattr(network, "find_read_positions", find_read_positions)
    round_of(made(Counting))
    assert given == [{PROBE_SAMPLES}]


def test_a_layer_that_runs_the_first_time_only_does_not_keep_probes_from_few_samples():
    """Tracing runs a model once more where it makes some of its layers when it first runs."""

    class Warming(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.once, self.is_warm = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), False

        def forward(self, x):
            x = x if self.is_warm else self.once(x)
            self.is_warm = True
            return self.layer(x)

    module, sizes = Warming(), []

    def make(samples=None, shown=False):
        def step():
            sizes.append(samples or 48)
            return module(torch.ones(samples or 48, 2))

        return step

    steps = StepsOfAllKinds(module, ([make], []), lambda flag: flag)
    for _ in range(2):
        run_steps(steps.steps())
    assert steps.calls_of_first(training=False) == {"": 1, "layer": 1}
    assert steps.calls_of_first(training=True) is None
    for few in (4, 8):
        sizes.clear()
        run_steps(steps.on_few(few))
        run_steps(steps.on_few(few))
        assert sizes == [few] * 3, "one to see that it runs the same layers"
