"""Steps that are run again: layers compute what they must, and nothing else, and the numbers are the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune.compensation.dense_run import DenseRun
from lightning_softprune.compensation.refit import refit_readers
from lightning_softprune.compensation.replay import Replay
from support.readers import Prepared

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def computed(monkeypatch):
    """The linear layers that have really computed something, in order."""
    seen, own = [], nn.Linear.forward

    def forward(layer, x):
        seen.append(layer)
        return own(layer, x)

    forward.__module__ = own.__module__
    monkeypatch.setattr(nn.Linear, "forward", forward)
    return seen


class Net(nn.Module):
    """In-place functions, a layer that is called twice, and one whose weight is another's too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.d.weight

    def forward(self, x):
        x = F.relu(self.a(x), inplace=True)
        x = self.b(self.tied(self.b(x)))
        x += 1
        return self.d(self.c(x))


def test_layers_compute_again_only_where_something_has_changed(computed):
    torch.manual_seed(0)
    model, x = Net().eval().requires_grad_(False), torch.randn(5, 8)
    wanted = model(x)
    replay = Replay(model)
    names = {id(layer): name for name, layer in model.named_children()}

    def run(x=x):
        computed.clear()
        with replay.step(0):
            found = model(x.clone())
        return found, "".join(names[id(layer)][0] for layer in computed)

    assert run()[1] == "abtbcd"
    assert run()[1] == "ab", "what was changed in place is computed once more, and copied"
    for _ in range(2):
        found, layers = run()
        assert torch.equal(found, wanted)
        assert not layers
    model.b.bias += 1
    assert run()[1] == "btbcd"
    assert not run()[1]
    model.d.weight *= 2
    found, layers = run()
    assert (layers, torch.equal(found, model(x))) == ("tbcd", True)
    run()
    found, layers = run(2 * x)
    assert (layers, torch.equal(found, model(2 * x))) == ("abtbcd", True)
    assert all("forward" not in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(("room", "kept"), [(None, 4), (0.0, 0), (2 * 5 * 8 * 4.0, 2)])
def test_what_follows_a_stop_is_computed_and_so_is_what_there_is_no_room_for(computed, room, kept):
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).eval().requires_grad_(False), torch.randn(5, 8)
    replay = Replay(model, room)

    def run():
        computed.clear()
        with replay.step(0):
            model(x)
        return len(computed)

    assert [run(), run()] == [4, 4 - kept]
    with model[1].register_forward_pre_hook(lambda *_: replay.stop()):
        assert run() == 4 - min(kept, 1)
    assert [run(), run()] == [4 - min(kept, 1), 4 - kept]


@pytest.mark.parametrize("inplace", [False, True])
def test_the_refit_with_outputs_that_are_kept_is_the_refit_without(computed, inplace):
    layers = []
    for width in (24, 20, 16, 12):
        layers += [nn.Linear(layers[-2].out_features if layers else 8, width), nn.ReLU(inplace)]
    torch.manual_seed(0)
    start, x = nn.Sequential(*layers, nn.Linear(12, 4)).eval(), torch.randn(300, 8)
    fitted, counts = [], []
    for room in (None, 0.0):
        model = copy.deepcopy(start)
        net = Prepared(model, x)
        found = net.compensation()
        run = DenseRun(model, found, net.steps * 2)
        run.room = room
        net.prune()
        model.train()  # as it is in a fit; steps see to it that they run in eval mode
        run.steps = [lambda step=step, model=model: (model.eval(), step(), model.train()) for step in run.steps]
        computed.clear()
        refit_readers(model, net.surgery, found, run)
        fitted.append(list(model.parameters()))
        counts.append(len(computed))
    assert all(torch.equal(one, other) for one, other in zip(*fitted, strict=True))
    assert counts == [2 * 4 + 3 * inplace, 2 * (1 + 2 + 3 + 4)], "the second step knows what the first has changed"
