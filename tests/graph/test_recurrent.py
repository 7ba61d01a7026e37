"""Recurrent layers and cells lose hidden units: against the dense network in which nobody reads these."""

import copy
import itertools
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_softprune import resize
from lightning_softprune.checkpoint import ModelShapes, keep_record
from lightning_softprune.graph import (
    Applications,
    CostModel,
    Layout,
    Member,
    PruningGroup,
    layer_type,
    layout_of,
    record_macs,
)
from lightning_softprune.search.coefficients import build_rounding
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import References, apply_plan, repair_optimizers
from lightning_softprune.surgery.apply import select_channels
from support.masked import Net
from support.plans import ELEMENTWISE, assert_same, live, snapshot
from support.zoo import find, prunable

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
IN, HIDDEN, PROJECTED, OUT = 5, 8, 3, 2


class Stack(nn.Module):
    """A linear layer, a recurrent one, and heads on all that it returns."""

    def __init__(self, recurrent):
        super().__init__()
        self.front = nn.Linear(4, IN)
        self.recurrent = recurrent
        width = recurrent.proj_size or recurrent.hidden_size
        self.head = nn.Linear(width * (2 if recurrent.bidirectional else 1), OUT)
        self.last = nn.Linear(width, OUT)
        self.memory = nn.Linear(recurrent.hidden_size, OUT)
        self.double()

    def forward(self, x, hx=None):
        steps, state = self.recurrent(self.front(x).tanh(), hx)
        h, c = state if isinstance(state, tuple) else (state, state)
        return self.head(steps), self.last(h) + self.memory(c)


class Loop(nn.Module):
    """A cell, step by step."""

    def __init__(self, cell):
        super().__init__()
        self.front = nn.Linear(4, IN)
        self.recurrent = cell
        self.head = nn.Linear(HIDDEN, OUT)
        self.last = nn.Linear(HIDDEN, OUT)
        self.memory = nn.Linear(HIDDEN, OUT)
        self.double()

    def forward(self, x, hx=None):
        steps = []
        for step in self.front(x).tanh():
            hx = self.recurrent(step, hx)
            steps.append(hx[0] if isinstance(hx, tuple) else hx)
        h, c = hx if isinstance(hx, tuple) else (hx, hx)
        return self.head(torch.stack(steps)), self.last(h) + self.memory(c)


def options():
    for layers, both, bias, first in itertools.product((1, 2, 3), (False, True), (True, False), (False, True)):
        yield {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": first}


LAYERS = {"rnn": nn.RNN, "relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU, "projected": nn.LSTM}
CELLS = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
NAMED = {"relu": {"nonlinearity": "relu"}, "projected": {"proj_size": PROJECTED}}
CASES = {
    f"{name} {' '.join(f'{value:d}' for value in chosen.values())}": (name, chosen)
    for name in LAYERS
    for chosen in options()
} | {f"{name} cell {bias:d}": (f"{name} cell", {"bias": bias}) for name in CELLS for bias in (True, False)}


def make(case, seed=0):
    name, chosen = CASES[case]
    torch.manual_seed(seed)
    if name.endswith("cell"):
        return Loop(CELLS[name.removesuffix(" cell")](IN, HIDDEN, **chosen))
    return Stack(LAYERS[name](IN, HIDDEN, **chosen, **NAMED.get(name, {})))


def inputs():
    return torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def group(name, size, members):
    found = tuple(Member(module, slot, np.tile(np.arange(size), copies)) for module, slot, copies in members)
    return PruningGroup(name, "", "intra", size, found)


def groups_of(model):
    """What a tracer would find."""
    layer = model.recurrent
    directions = 2 if getattr(layer, "bidirectional", False) else 1
    projected = getattr(layer, "proj_size", 0)
    given = [("recurrent", "out", 1), ("head", "in", directions), ("last", "in", 1)]
    memory = ("memory", "in", 1)
    found = [group("front", IN, [("front", "out", 1), ("recurrent", "in", 1)])]
    if projected:
        found.append(group("recurrent.hidden", HIDDEN, [("recurrent", "hidden", 1), memory]))
        return [*found, group("recurrent", PROJECTED, given)]
    return [*found, group("recurrent", HIDDEN, [*given, memory])]


def slots_of(groups):
    return [next(member.slot for member in found.members if member.module == "recurrent") for found in groups]


def gone_from(layer):
    """What is removed, by slot; without projections the hidden units are what it gives."""
    if getattr(layer, "proj_size", 0):
        return {"in": (1, 4), "out": (1,), "hidden": (0, 3, 4, 7)}
    return {"in": (1, 4), "out": (0, 3, 4), "hidden": (0, 3, 4)}


def removed(model, groups):
    return [gone_from(model.recurrent)[slot] for slot in slots_of(groups)]


def prune(model, groups=None):
    groups = groups or groups_of(model)
    return apply_plan(model, groups, Plan(tuple(removed(model, groups))))


def masked(model, groups=None):
    """The dense network in which nobody reads what is removed: every column that reads it is zero."""
    model, groups = copy.deepcopy(model), groups or groups_of(model)
    with torch.no_grad():
        for slot, gone in zip(slots_of(groups), removed(model, groups), strict=True):
            for name, weight in model.recurrent.named_parameters():
                first = "_l" not in name or "_l0" in name
                reads = {
                    "in": name.startswith("weight_ih") and first,
                    "out": name.startswith("weight_hh") or (name.startswith("weight_ih") and not first),
                    "hidden": name.startswith("weight_hr"),
                }[slot]
                if reads:
                    size = {"in": IN, "out": model.last.in_features, "hidden": HIDDEN}[slot]
                    weight.view(len(weight), -1, size)[:, :, list(gone)] = 0
            projected = getattr(model.recurrent, "proj_size", 0)
            heads = {"in": (), "out": (model.head, model.last), "hidden": (model.memory,)}[slot]
            for head in (*heads, model.memory) if slot == "out" and not projected else heads:
                size = HIDDEN if head is model.memory else model.last.in_features
                head.weight.view(OUT, -1, size)[:, :, list(gone)] = 0
    return model


def same(one, other):
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize(
    "case", [case for case in CASES if case.endswith((" 2 1 1 0", " 1 0 0 1", "cell 1", "cell 0"))]
)


@every_case
def test_the_pruned_network_computes_what_the_masked_one_does(case):
    model = make(case)
    expected, dense = masked(model)(inputs()), model(inputs())
    prune(model)
    same(model(inputs()), expected)
    assert not torch.allclose(expected[0], dense[0])


@every_kind
@pytest.mark.parametrize("slot", ["in", "out", "hidden"])
def test_each_slot_alone_computes_what_the_masked_network_does(case, slot):
    model = make(case)
    groups = [found for found in groups_of(model) if slot in slots_of([found])]
    if not groups:
        assert slot == "hidden"
        assert "projected" not in case
        return
    expected = masked(model, groups)(inputs())
    prune(model, groups)
    same(model(inputs()), expected)


@every_kind
def test_an_initial_state_loses_the_units_that_the_layer_loses(case):
    model = make(case)
    layer = model.recurrent
    batch = 6 if getattr(layer, "batch_first", False) else 3
    rows = (layer.num_layers * (1 + layer.bidirectional),) if isinstance(model, Stack) else ()
    generator = torch.Generator().manual_seed(2)
    h, c = (
        torch.randn(*rows, batch, size, dtype=torch.float64, generator=generator)
        for size in (model.last.in_features, HIDDEN)
    )
    is_lstm = isinstance(layer, (nn.LSTM, nn.LSTMCell))
    expected = masked(model)(inputs(), (h, c) if is_lstm else h)
    prune(model)
    gone = gone_from(layer)
    h = h[..., [i for i in range(h.shape[-1]) if i not in gone["out"]]]
    c = c[..., [i for i in range(HIDDEN) if i not in gone["hidden"]]]
    same(model(inputs(), (h, c) if is_lstm else h), expected)


@every_kind
def test_the_layers_attributes_count_what_is_left_and_a_new_layer_of_these_sizes_takes_its_state(case):
    model = make(case)
    prune(model)
    layer = model.recurrent
    gone = gone_from(layer)
    assert layer.input_size == IN - len(gone["in"])
    assert layer.hidden_size == HIDDEN - len(gone["hidden"])
    name, chosen = CASES[case]
    if name == "projected":
        chosen = chosen | {"proj_size": PROJECTED - len(gone["out"])}
        assert layer.proj_size == chosen["proj_size"]
    kind, named = type(layer), {} if name == "projected" else NAMED.get(name, {})
    fresh = kind(layer.input_size, layer.hidden_size, **chosen, **named)
    fresh.load_state_dict(layer.state_dict())


@every_kind
def test_undo_brings_back_the_same_objects_and_outputs(case):
    model = make(case)
    dense, before = model(inputs()), snapshot(model)
    flat = list(getattr(model.recurrent, "_flat_weights", ()))
    surgery = prune(model)
    model(inputs())
    surgery.undo()
    assert_same(model, before)
    assert [id(weight) for weight in flat] == [id(w) for w in getattr(model.recurrent, "_flat_weights", ())]
    assert all(torch.equal(now, then) for now, then in zip(model(inputs()), dense, strict=True))


def assert_flat(layer):
    """The list that a recurrent layer keeps has its parameters, before it runs."""
    flat = [getattr(layer, name) for name in layer._flat_weights_names]
    assert [id(weight) for weight in layer._flat_weights] == [id(weight) for weight in flat]
    assert [id(reference()) for reference in layer._flat_weight_refs] == [id(weight) for weight in flat]


layers_only = pytest.mark.parametrize("case", [case for case in CASES if case.endswith((" 2 1 1 0", " 1 0 0 1"))])


@layers_only
def test_the_list_of_weights_is_of_the_pruned_ones(case):
    model = make(case)
    surgery = prune(model)
    assert_flat(model.recurrent)
    surgery.undo()
    assert_flat(model.recurrent)


@layers_only
def test_a_layer_that_shares_a_weight_with_a_sliced_one_keeps_the_new_one_in_its_list(case):
    """Also the layer that no group knows."""
    model = make(case)
    model.other = copy.deepcopy(model.recurrent)
    for name, parameter in model.recurrent.named_parameters():
        setattr(model.other, name, parameter)
    prune(model)
    assert model.other.weight_hh_l0 is model.recurrent.weight_hh_l0
    assert_flat(model.other)


@layers_only
def test_a_parameter_that_takes_anothers_place_is_in_the_list(case):
    model = make(case)
    surgery = prune(model)
    layer = model.recurrent
    surgery.replace(layer, "weight_hh_l0", "recurrent.weight_hh_l0", nn.Parameter(layer.weight_hh_l0.detach().clone()))
    assert_flat(layer)


@layers_only
def test_a_copy_outside_of_the_model_follows_with_its_list(case):
    model, holder = make(case), type("Holder", (), {})()
    holder.average = copy.deepcopy(model)
    expected = masked(model)(inputs())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    before = snapshot(holder.average)
    carried = References(model, prune(model), shapes)
    carried.carry("holder", holder)
    assert carried.left == []
    assert_flat(holder.average.recurrent)
    same(holder.average(inputs()), expected)
    carried.undo()
    assert_same(holder.average, before)


@layers_only
def test_a_layers_own_list_is_no_list_of_parameters_that_others_keep(case):
    model = make(case)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    carried = References(model, prune(model), shapes)
    before = snapshot(model)
    flat = model.recurrent._flat_weights
    carried.carry("model", model)
    assert carried.left == []
    assert model.recurrent._flat_weights is flat
    assert_same(model, before)
    assert_flat(model.recurrent)


@every_kind
def test_copies_and_pickles_of_the_pruned_network_compute_the_same(case):
    model = make(case)
    prune(model)
    expected = model(inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(other(inputs()), expected, strict=True))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(part.square().mean() for part in model(inputs())).backward()
        yield  # to look at the gradients
        optimizer.step()


@every_kind
@pytest.mark.parametrize("optimizer", ["Adam", "SGD momentum", "RMSprop"])
def test_training_goes_on_as_that_of_the_masked_network(case, optimizer):
    """The masked one keeps its zeros: neither gradients nor what an optimizer has accumulated move them."""
    model = make(case)
    optimizers = [ELEMENTWISE[optimizer](model.parameters())]
    for _ in train(model, optimizers[0], 2):
        pass
    twin = masked(model)
    zero = {name: (now == 0) for name, now in twin.named_parameters()}
    optimizers.append(ELEMENTWISE[optimizer](twin.parameters()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    repair_optimizers(optimizers[:1], prune(model))
    assert live(optimizers[0]) == [id(parameter) for parameter in model.parameters()]
    for _ in train(model, optimizers[0], 3):
        pass
    for _ in train(twin, optimizers[1], 3):
        for name, parameter in twin.named_parameters():
            parameter.grad[zero[name]] = 0
            state = optimizers[1].state[parameter]
            for key, tensor in state.items():
                if isinstance(tensor, torch.Tensor) and tensor.shape == parameter.shape:
                    state[key] = tensor.masked_fill(zero[name], 0)
    same(model(inputs()), twin(inputs()))


@every_kind
@pytest.mark.parametrize("fresh_first", [True, False], ids=["shrinks", "grows"])
def test_a_state_dict_shapes_a_network_of_another_size(case, fresh_first):
    model, other = make(case), make(case, seed=1)
    if not fresh_first:  # the pruned one grows back
        model, other = other, model
        prune(other)
    else:
        prune(model)
    resize(other, model.state_dict())
    if isinstance(other, Stack):
        assert_flat(other.recurrent)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other(inputs()), model(inputs()), strict=True))
    assert str(other) == str(model)


class Wrapped(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net


@every_kind
def test_the_record_in_a_checkpoint_alone_shapes_a_network(case):
    dense, module = Wrapped(make(case)), Wrapped(make(case))
    prune(module.net)
    keep_record(module, ModelShapes.of(dense), [])
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other = Wrapped(make(case, seed=1))
    resize(other, checkpoint["softprune"])
    if isinstance(other.net, Stack):
        assert_flat(other.net.recurrent)
    other.load_state_dict(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.net(inputs()), module.net(inputs()), strict=True))


def test_a_state_dict_of_another_number_of_gates_is_refused():
    saved = nn.Sequential(nn.LSTM(4, 6)).state_dict()
    for other in (nn.GRU(4, 7), nn.RNN(4, 7), nn.LSTM(4, 7, num_layers=2), nn.LSTM(4, 7, bidirectional=True)):
        with pytest.raises(ValueError, match=r"^0: "):
            resize(nn.Sequential(other), saved)


def layer_calls(case):
    """A layer, calls of it (arguments, by name), and what they return."""
    layer = make(case).recurrent
    x = torch.randn(6, 3, IN, dtype=torch.float64)
    if isinstance(layer, nn.RNNCellBase):
        x = x[0]
        yield layer, (x,), {}
        yield layer, (x[0],), {}
        yield layer, (x, layer(x)), {}
        yield layer, (), {"input": x, "hx": layer(x)}
        return
    _, state = layer(x)
    yield layer, (x,), {}
    yield layer, (x[:, 0],), {}
    yield layer, (x, state), {}
    yield layer, (x,), {"hx": state}
    yield layer, (), {"input": x, "hx": None}
    packed = pack_sequence([x[:4, 0], x[:2, 1]])
    yield layer, (packed,), {}
    yield layer, (packed, layer(packed)[1]), {}


def tensors_of(value):
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None else [tensor for item in value for tensor in tensors_of(item)]


@every_kind
def test_ports_are_all_that_is_taken_and_given_with_the_channels_last(case):
    for layer, args, kwargs in layer_calls(case):
        entry, layout = layer_type(layer), layout_of(layer)
        assert isinstance(layout, Layout)
        output = layer(*args, **kwargs)
        taken = list(entry.taken(layer, {**dict(enumerate(args)), **kwargs}))
        given = list(entry.given(layer, output))
        assert [id(port.tensor) for port in taken] == [id(t) for t in tensors_of([*args, *kwargs.values()])]
        assert [id(port.tensor) for port in given] == [id(t) for t in tensors_of(output)]
        for port in (*taken, *given):
            assert port.tensor.shape[port.dim] == port.repeat * layout.slots[port.slot]
            assert port.dim == port.tensor.ndim - 1
        assert [port.slot for port in taken][:1] == ["in"]
        memory = "hidden" if "hidden" in layout.slots else "out"
        names = ["out", memory] if isinstance(layer, (nn.LSTM, nn.LSTMCell)) else ["out"]
        assert [port.slot for port in taken][1:] in ([], names)
        steps = [] if isinstance(layer, nn.RNNCellBase) else ["out"]
        assert [port.slot for port in given] == steps + names


@pytest.mark.parametrize("both", [False, True])
def test_the_output_holds_the_units_once_for_each_direction(both):
    layer = nn.GRU(IN, HIDDEN, bidirectional=both)
    given = list(layer_type(layer).given(layer, layer(torch.randn(6, 3, IN))))
    assert [port.repeat for port in given] == [1 + both, 1]


class ByHand(nn.Module):
    """A recurrent layer of linear ones, which count themselves."""

    def __init__(self, layer):
        super().__init__()
        gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
        directions, given = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size
        self.read, self.remember, self.project = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number in range(layer.num_layers):
            width = given * directions if number else layer.input_size
            for _ in range(directions):
                self.read.append(nn.Linear(width, gates * layer.hidden_size))
                self.remember.append(nn.Linear(given, gates * layer.hidden_size))
                self.project.extend([nn.Linear(layer.hidden_size, given)] if layer.proj_size else [])
        self.double()

    def forward(self, rows):
        """Each for every row; values do not matter here."""
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                linear(rows.new_zeros(rows.numel() // rows.shape[-1], linear.in_features))


def macs_of(model, *args):
    """Counted by the cost model of a network that loses nothing."""
    with record_macs(model) as seen, torch.no_grad():
        model(*args)
    return int(CostModel.build(model, [], [], seen).count("macs", np.zeros((1, 0), dtype=np.int64))[0])


@layers_only
def test_a_layer_costs_what_its_linear_layers_would(case):
    layer = make(case).recurrent
    x = torch.randn(6, 3, IN, dtype=torch.float64)
    assert macs_of(layer, x) == macs_of(ByHand(layer), x)
    assert macs_of(layer, x[0]) == macs_of(ByHand(layer), x[0])
    packed = pack_sequence([x[:4, 0], x[:2, 1]])
    assert macs_of(layer, packed) == macs_of(ByHand(layer), packed.data)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNNCell, 1), (nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_a_cell_costs_its_gates_at_each_step(kind, gates):
    cell, x = kind(5, 8), torch.randn(3, 5)
    assert macs_of(cell, x) == 3 * gates * 8 * (5 + 8)
    assert macs_of(cell, x[0]) == gates * 8 * (5 + 8)


@every_kind
@pytest.mark.parametrize("what", ["params", "macs"])
def test_the_cost_model_counts_what_the_pruned_network_has(case, what):
    model, groups = make(case), groups_of(make(case))
    gone = removed(model, groups)
    rankings = [
        np.array([*channels, *np.setdiff1d(np.arange(found.num_channels), channels)], dtype=np.int64)
        for found, channels in zip(groups, gone, strict=True)
    ]
    with record_macs(model) as seen, torch.no_grad():
        model(inputs())
    costs = CostModel.build(model, groups, rankings, seen)
    for counts in ([0] * len(groups), [len(channels) for channels in gone]):
        surgery = apply_plan(model, groups, Plan.from_counts(counts, rankings))
        expected = sum(p.numel() for p in model.parameters()) if what == "params" else macs_of(model, inputs())
        assert costs.count(what, np.array(counts)).tolist() == [expected]
        surgery.undo()


@every_kind
def test_units_that_change_places_leave_the_network_as_it_is(case):
    model = make(case)
    expected = model(inputs())
    rng = np.random.default_rng(0)
    for found in groups_of(model):
        order = rng.permutation(found.num_channels)
        selected = {}
        for member in found.members:
            copies = len(member.owner) // found.num_channels
            moved = np.concatenate([order + copy * found.num_channels for copy in range(copies)])
            selected[member.module] = {member.slot: torch.from_numpy(moved)}
        sizes = {(member.module, member.slot): len(member.owner) for member in found.members}
        surgery = select_channels(model, selected, sizes)
        same(model(inputs()), expected)
        surgery.undo()


class OwnLayer(nn.RNNBase):
    """Nobody knows what it computes."""

    def __init__(self):
        super().__init__("GRU", 4, 6)


class OwnCell(nn.RNNCellBase):
    def __init__(self):
        super().__init__(4, 6, bias=True, num_chunks=2)


@pytest.mark.parametrize("kind", [OwnLayer, OwnCell])
def test_a_recurrent_layer_of_ones_own_is_left_alone(kind):
    layer = kind()
    assert layout_of(layer) == f"{kind.__name__} layers cannot be sliced"
    entry, x = layer_type(layer), torch.randn(3, 2, 4)
    assert not list(entry.taken(layer, {0: x}))
    assert not list(entry.given(layer, (x, x)))
    assert entry.recorded_sizes(layer) == {}
    assert entry.mac_sizes(layer) == {"in": 4, "out": 6}
    assert {slot for term in entry.macs(layer, Applications(1.0)) for slot in term.slots} == {"in", "out"}


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1_reverse", "bias_hh_l1"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_computed_weights_are_refused_whichever_they_are(name, wrap):
    layer = wrap(nn.LSTM(4, 6, num_layers=2, bidirectional=True), name)
    assert "the weights of this LSTM are computed" in layout_of(layer)


class Projected(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.lstm = nn.LSTM(IN, hidden, proj_size=PROJECTED)
        self.head = nn.Linear(PROJECTED, OUT)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("shown", ["steps", "memory"])
def test_projections_that_are_the_output_leave_the_units_free_unless_the_memory_is_shown_too(shown):
    def forward(net, x):
        steps, (_, memory) = net.lstm(x)
        return steps if shown == "steps" else (steps, memory)

    model = Net(forward, lstm=nn.LSTM(IN, HIDDEN, proj_size=PROJECTED))
    groups = find(model, torch.randn(3, 4, IN))
    assert {group.name: group.prunable for group in groups} == {"lstm": False, "lstm.hidden": shown == "steps"}


def test_an_lstm_keeps_more_units_than_projections_whatever_a_search_asks_for():
    model, x = Projected(HIDDEN), torch.randn(3, 4, IN)
    groups = prunable(model, x)
    rounding = build_rounding(groups, None, 1)
    asked = np.linspace(0, 1, 21)[:, None].repeat(len(groups), 1)
    kept = {g.name: g.num_channels - n for g, n in zip(groups, rounding.counts(asked).T, strict=True)}
    assert kept["lstm.hidden"].min() == PROJECTED + 1
    assert kept["lstm"].min() == 1
    most = rounding.counts(np.ones(len(groups)))
    apply_plan(model, groups, Plan.from_counts(most, [np.arange(g.num_channels) for g in groups]))
    nn.LSTM(model.lstm.input_size, model.lstm.hidden_size, proj_size=model.lstm.proj_size)  # PyTorch takes these sizes
    assert model(x).shape == (3, 4, OUT)


@pytest.mark.parametrize("round_to", [1, 2, 4])
def test_units_that_have_to_stay_stay_with_any_rounding(round_to):
    groups = [g for g in prunable(Projected(HIDDEN), torch.randn(3, 4, IN)) if g.name == "lstm.hidden"]
    counts = build_rounding(groups, None, round_to).counts(np.linspace(0, 1, 21)[:, None])
    assert HIDDEN - counts.max() == 4
    assert ((HIDDEN - counts) % round_to == 0).all()


def test_an_lstm_with_one_unit_more_than_projections_loses_none():
    found = {g.name: g for g in find(Projected(PROJECTED + 1), torch.randn(3, 4, IN))}
    assert not found["lstm.hidden"].prunable
    assert found["lstm.hidden"].reason == f"lstm needs all of its {PROJECTED + 1} channels"
