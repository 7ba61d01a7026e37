"""Steps that are run again: layers compute what they must, and nothing else, and the numbers are the same."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune.compensation.dense_run import run_dense
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
        run = run_dense(model, found, net.steps * 2)
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


class Block(nn.Module):
    """A sum whose other addend is computed behind the layer, as in ResNets."""

    def __init__(self, inplace=False):
        super().__init__()
        self.first, self.last, self.short, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.inplace = inplace

    def forward(self, x):
        x = F.relu(self.first(x), inplace=self.inplace)
        y = self.norm(self.last(x))
        if self.inplace:
            y += self.short(x)
        else:
            y = y + self.short(x)
        return F.relu(self.head(F.gelu(y)).flatten(1))


def block(inplace=False):
    torch.manual_seed(0)
    return Block(inplace).eval().requires_grad_(False), torch.randn(5, 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_the_model_changes_in_place_is_never_given_out_changed(inplace):
    model, x = block(inplace)
    wanted = model(x)
    replay = Replay(model)
    for _ in range(4):
        with replay.step(0):
            assert torch.equal(model(x.clone()), wanted)


def test_a_spared_layer_gives_zeros_and_what_hangs_on_them_is_not_kept(computed):
    model, x = block()
    wanted = model(x)
    replay, names = Replay(model), {id(layer): name for name, layer in model.named_children()}

    def run(*hooks):
        computed.clear()
        with replay.step(0):
            found = model(x)
        for hook in hooks:
            hook.remove()
        return found, [names[id(layer)] for layer in computed]

    seen = []
    last = model.last.register_forward_pre_hook(lambda *_: replay.spare(model.last))
    norm = model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    short = model.head.register_forward_pre_hook(lambda *_: replay.stop())
    assert run(last, norm, short)[1] == ["first", "last", "short", "head"]
    assert seen[0].shape == (5, 8)
    assert not seen[0].any(), "one sample of it was computed, for the shape"
    found, layers = run()
    assert torch.equal(found, wanted)
    assert layers == ["last", "head"], "the shortcut has been kept"
    assert not run()[1]


def test_a_layer_that_is_given_one_sample_without_a_batch_is_not_spared(computed):
    model = nn.Sequential(nn.Linear(8, 8)).eval().requires_grad_(False)
    replay, x = Replay(model), torch.randn(8)
    with model[0].register_forward_pre_hook(lambda *_: replay.spare(model[0])), replay.step(0):
        assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))


class Twice(Block):
    """The layer whose outputs are added to something runs twice."""

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x + self.last(x)
        return self.head(F.relu(x + self.last(x)))


@pytest.mark.parametrize("kind", [Block, partial(Block, True), Twice])
def test_the_refit_to_sums_is_the_same_where_layers_are_spared(monkeypatch, kind):
    spared = []
    real = Replay.spare
    fitted = []
    for spare in (lambda replay, layer: spared.append(layer) or real(replay, layer), lambda replay, _: replay.stop()):
        monkeypatch.setattr(Replay, "spare", spare)
        torch.manual_seed(0)
        model = nn.Sequential(*(kind() for _ in range(3)), nn.Linear(8, 3)).eval()
        for one in model.modules():
            if isinstance(one, nn.BatchNorm1d):
                nn.init.uniform_(one.running_mean)
        x = torch.randn(300, 8)
        net = Prepared(model, x)
        found = net.compensation()
        run = run_dense(model, found, net.steps * 2)
        assert run.summed
        net.prune()
        refit_readers(model, net.surgery, found, run)
        fitted.append([*model.parameters(), *model.buffers()])
    assert spared
    assert all(torch.equal(one, other) for one, other in zip(*fitted, strict=True))
