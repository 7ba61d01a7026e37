"""Records that somebody has damaged or made up: refused as a whole, by the field, before anything is changed."""

import copy
import io
import math
import re
from functools import partial

import hypothesis
import lightning.pytorch as pl
import pytest
import torch
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_softprune import PrunedCheckpointMixin, load_from_checkpoint, resize
from lightning_softprune.checkpoint import LoadHook, ModelShapes, keep_record
from support.modules import loaders, softpruning, trainer_of
from support.results import make_result

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = 50_000_000


class Net(pl.LightningModule):
    """With what is hard to compare: a layer without tensors, a buffer that no state dict has, a bare parameter."""

    def __init__(self, width=12):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 8, 1)
        )
        self.norm = nn.GroupNorm(1, 8, affine=False)
        self.head = nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(8, 1))
        self.register_buffer("cache", torch.zeros(1, 6), persistent=False)

    def forward(self, x):
        return self.head((self.norm(self.body(x)) * self.scale).mean(-1))

    def training_step(self, batch, batch_idx):
        return self(batch[0][:, :3, None]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Mixed(PrunedCheckpointMixin, Net):
    pass


class Smaller(Net):
    """A width that no layer of another network has."""

    def __init__(self):
        super().__init__(width=7)
        self.body[0].bias = nn.Parameter(torch.zeros(7))  # as compensation would create it


@pytest.fixture(scope="module")
def saved():
    """A checkpoint of a smaller network, as Lightning would write it, with its state of the optimizer."""
    module = Smaller()
    keep_record(module, ModelShapes.of(Net()), [make_result()])
    optimizer = module.configure_optimizers()
    trainer = type("TrainerLike", (), {"optimizers": [optimizer]})()
    module._trainer = trainer
    checkpoint = {
        "state_dict": module.state_dict(),
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [optimizer.state_dict()],
    }
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["softprune"]["created_biases"] == ["body.0.bias"]
    return checkpoint


def state_of(module):
    """All that a resize may change, by identity."""
    return [
        (id(part), {name: v if isinstance(v, (int, str, tuple, bool)) else id(v) for name, v in held.items()})
        for part in module.modules()
        for held in (vars(part), part._parameters, part._buffers)
    ]


def damaged(saved, *path, value=None, drop=False):
    checkpoint = {**saved, "softprune": copy.deepcopy(saved["softprune"])}
    place = checkpoint["softprune"]
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return checkpoint


def test_what_is_not_damaged_is_read_whole_and_alone(saved):
    for source in (saved, saved["softprune"]):
        module = Net()
        resize(module, source)
        module.load_state_dict(saved["state_dict"])
        assert ModelShapes.of(module) == ModelShapes.of(Smaller())


NOT_A_NUMBER = float("nan")

DAMAGES = [
    *((("format",), value, "format: ") for value in (None, "1", 1.0, True, 0, -1, [1], NOT_A_NUMBER)),
    *(((field,), value, f"{field}: ") for field in ("layers", "shapes") for value in (None, 3, [], "x", [["a", 1]])),
    *((("dense", field), value, f"dense.{field}: ") for field in ("layers", "shapes") for value in (None, 3, [1])),
    *((("dense",), value, "dense: ") for value in (None, 3, [], "x")),
    *((("results",), value, "results: ") for value in (None, 3, {}, "x", NOT_A_NUMBER)),
    *((("results",), [value], r"results\[0\]: ") for value in (None, 3, [], {}, {"epoch": 10**400})),
    *((("results", 0, "epoch"), value, r"results\[0\]: .*epoch: ") for value in (None, "1", 2**63, -(10**5000), 1.5)),
    *((("created_biases",), value, "created_biases: ") for value in (None, 3, {}, "x", [], ["body.0.bias", "gone"])),
    *((("created_biases",), [value], r"created_biases\[0\]: ") for value in (None, 3, [], NOT_A_NUMBER)),
    *((("optimizers",), value, "optimizers: ") for value in (None, 5, {}, "x", [], [[], []])),
    *((("optimizers",), [value], r"optimizers\[0\]: ") for value in (None, 5, {}, "x")),
    *((("optimizers",), [[value]], r"optimizers\[0\]\[0\]: ") for value in (None, 1, {}, "x")),
    *((("optimizers",), [[[value]]], r"optimizers\[0\]\[0\]\[0\]: ") for value in (1, {}, "gone", NOT_A_NUMBER)),
    *((("layers", "head"), value, r"layers\['head'\]: ") for value in (None, 3, [8, 2], {}, {1: 8})),
    *(
        ((*where, "layers", "head", "in"), value, rf"{dense}layers\['head'\]\['in'\]: ")
        for where, dense in (((), ""), (("dense",), r"dense\."))
        for value in (None, "8", 8.0, True, -1, 2**63, 10**5000, [8], NOT_A_NUMBER, float("inf"))
    ),
    *(
        ((*where, "shapes", "head.weight"), value, rf"{dense}shapes\['head\.weight'\]")
        for where, dense in (((), ""), (("dense",), r"dense\."))
        for value in (None, 3, {}, "28", [2, -8], [2, None], [2, 8.0], [[2, 8]], [2, 10**400], [2**62, 4], [1] * 65)
    ),
    *(
        (("shapes", "head.weight"), value, r"shapes\['head\.weight'\]")
        for value in ([2, 9], [8, 2], [2], [], [2, 8, 1])
    ),
    (("layers", 5), {"in": 1}, "layers: the key 5"),
    (("shapes", 5), [1], "shapes: the key 5"),
]


@pytest.mark.parametrize(("path", "value", "field"), DAMAGES, ids=[f"{number}" for number in range(len(DAMAGES))])
def test_a_damaged_field_is_named_and_nothing_changes(saved, path, value, field):
    module = Net()
    before = state_of(module)
    with pytest.raises(ValueError, match=rf"^the 'softprune' record is damaged: {field}") as raised:
        resize(module, damaged(saved, *path, value=value))
    assert state_of(module) == before
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "path",
    [
        *((field,) for field in ("format", "layers", "shapes", "created_biases", "dense", "results", "optimizers")),
        *(("dense", field) for field in ("layers", "shapes")),
        ("results", 0, "epoch"),
    ],
)
def test_a_missing_field_is_named_and_nothing_changes(saved, path, alone):
    checkpoint, module = damaged(saved, *path, drop=True), Net()
    if alone and path == ("optimizers",):
        resize(module, checkpoint["softprune"])  # only full checkpoints have it
        return
    before = state_of(module)
    field = ".".join(part for part in path if isinstance(part, str) and part != "results") or "results"
    with pytest.raises(ValueError, match=rf"^the 'softprune' record is damaged: .*{field}"):
        resize(module, checkpoint["softprune"] if alone else checkpoint)
    assert state_of(module) == before


@pytest.mark.parametrize("name", ["head.bias", "head.weight", "body.1.running_mean", "scale"])
def test_a_tensor_beside_the_record_that_it_does_not_know_is_named(saved, name):
    module = Net()
    before = state_of(module)
    with pytest.raises(
        ValueError, match=rf"^the 'softprune' record is damaged: shapes: it has not '{re.escape(name)}'"
    ):
        resize(module, damaged(saved, "shapes", name, drop=True))
    assert state_of(module) == before


@pytest.mark.parametrize("value", [None, 3, [], "x", {}, {"format": 1}])
def test_what_stands_in_the_place_of_the_record_and_is_none_is_said_to_be_damaged(saved, value):
    module = Net()
    before = state_of(module)
    with pytest.raises(ValueError, match=r"^the 'softprune' record is damaged: "):
        resize(module, {**saved, "softprune": value})
    assert state_of(module) == before


def test_a_newer_format_is_named_however_large(saved):
    with pytest.raises(ValueError, match=r"has format an integer of about 5001 digits; this version .* up to 2"):
        resize(Net(), damaged(saved, "format", value=10**5000))


def test_a_parameter_of_the_records_name_is_a_parameter():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.softprune, self.format, self.layers = (nn.Parameter(torch.ones(3)) for _ in range(3))

    module = Named()
    resize(module, {name: torch.ones(2) for name in ("softprune", "format", "layers")})
    assert module.softprune.shape == module.format.shape == module.layers.shape == (2,)


# ---------------------------------------------------------------------------------------------------------- all or none


class Stubborn(nn.Conv1d):
    """Has its width for good."""

    def __setattr__(self, name, value):
        if name == "in_channels" and hasattr(self, "weight"):
            raise AttributeError("in_channels cannot be set")
        super().__setattr__(name, value)


@pytest.mark.parametrize("fault", ["an attribute that refuses", "no memory"])
def test_what_fails_after_all_changes_nothing(saved, monkeypatch, fault):
    module = Net()
    keep_record(module, ModelShapes.of(module), [])
    if fault == "no memory":
        monkeypatch.setattr(torch.Tensor, "new_zeros", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
    else:
        module.body[3] = Stubborn(12, 8, 1)
    before = state_of(module)
    with pytest.raises((AttributeError, MemoryError), match=r"cannot be set|full"):
        resize(module, saved)
    assert state_of(module) == before


@pytest.mark.slow
@pytest.mark.parametrize("fault", [True, False])
def test_a_module_and_its_averaged_copy_are_resized_both_or_not(saved, fault):
    module, averaged = Net(), Net()
    if fault:
        averaged.body[3] = Stubborn(12, 8, 1)
    before = state_of(module), state_of(averaged)
    hook = LoadHook(module, lambda: [averaged])
    if not fault:
        hook(saved)
        assert ModelShapes.of(module) == ModelShapes.of(averaged) == ModelShapes.of(Smaller())
        return
    with pytest.raises(AttributeError, match="cannot be set"):
        hook(saved)
    hook.remove()
    assert (state_of(module), state_of(averaged)) == before


WAYS = ["function", "mixin", "fit", "fit with averages", "validate"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("results",), None),
        (("optimizers",), 5),
        (("optimizers",), [[1]]),
        (("dense", "shapes"), 3),
        (("layers", "norm", "both"), -1),
        (("shapes", "body.0.weight"), [WIDE, 3, 1]),
    ],
)
def test_every_way_to_load_refuses_and_leaves_the_module_alone(saved, tmp_path, way, path, value):
    file = tmp_path / "model.ckpt"
    torch.save(damaged(saved, *path, value=value), file)
    field = path[0] if path[0] != "dense" else r"dense\.shapes"
    message = rf"^the 'softprune' record is damaged: {field}"
    if way in ("function", "mixin"):
        with pytest.raises(ValueError, match=message):
            load_from_checkpoint(Net, file) if way == "function" else Mixed.load_from_checkpoint(file)
        return
    module = Net()
    shapes, text, hooks = ModelShapes.of(module), str(module), {name for name in vars(module) if name.startswith("on_")}
    callbacks = [softpruning(), *([EMAWeightAveraging(decay=0.5)] if "averages" in way else [])]
    trainer = trainer_of(tmp_path, *callbacks, max_epochs=2)
    val = loaders(None)["val_dataloaders"]
    loading = partial(trainer.validate, module, val) if way == "validate" else partial(trainer.fit, module, val, val)
    with pytest.raises(ValueError, match=message):
        loading(ckpt_path=file)
    assert (ModelShapes.of(module), str(module)) == (shapes, text)
    assert {name for name in vars(module) if name.startswith("on_")} == hooks


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def allocated(monkeypatch):
    """Sizes of the tensors that a resize makes."""
    sizes, real = [], torch.Tensor.new_zeros

    def counted(tensor, *size, **arguments):
        sizes.append(math.prod(size[0] if isinstance(size[0], (tuple, list)) else size))
        return real(tensor, *size, **arguments)

    monkeypatch.setattr(torch.Tensor, "new_zeros", counted)
    return sizes


def widened(checkpoint, width):
    """A record, consistent in itself, that claims a width."""
    checkpoint = {**checkpoint, "softprune": copy.deepcopy(checkpoint["softprune"])}
    record = checkpoint["softprune"]
    for form in (record, record["dense"]):
        form["layers"]["body.0"]["out"] = form["layers"]["body.1"]["both"] = form["layers"]["body.3"]["in"] = width
        form["shapes"] |= {f"body.1.{name}": [width] for name in ("weight", "bias", "running_mean", "running_var")}
        form["shapes"] |= {"body.0.weight": [width, 3, 1], "body.3.weight": [8, width, 1]}
    record["shapes"]["body.0.bias"] = [width]
    return checkpoint


def expanded(state, width):
    """Tensors of that width that hold one number each."""
    wide = {name: value for name, value in state.items() if name.startswith("body.") and value.ndim}
    shapes = {name: [width if n == 7 else n for n in value.shape] for name, value in wide.items()}
    return {**state, **{name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}}


def in_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    assert file.tell() < 40_000
    file.seek(0)
    return torch.load(file, weights_only=True)


CLAIMS = {
    "whole": lambda saved: widened(saved, WIDE),
    "a record alone": lambda saved: widened(saved, WIDE)["softprune"],
    "without the tensors": lambda saved: {**widened(saved, WIDE), "state_dict": {"head.bias": torch.zeros(2)}},
    "without any tensor": lambda saved: {**widened(saved, WIDE), "state_dict": {}},
    "tensors that hold nothing": lambda saved: {
        **widened(saved, WIDE), "state_dict": expanded(saved["state_dict"], WIDE)
    },
    "a state dict that holds nothing": lambda saved: expanded(saved["state_dict"], WIDE),
    "a buffer that no state dict has": lambda saved: damaged(saved, "shapes", "cache", value=[WIDE, 6]),
    "an empty tensor of absurd strides": lambda saved: damaged(saved, "shapes", "cache", value=[0, 2**62]),
    "a layer without tensors": lambda saved: damaged(saved, "layers", "norm", "both", value=WIDE),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_small_file_cannot_claim_memory(saved, allocated, claim):
    module = Net()
    before = state_of(module)
    with pytest.raises(ValueError, match=r"^(the 'softprune' record|the state dict|norm: )"):
        resize(module, in_file(CLAIMS[claim](saved)))
    assert state_of(module) == before
    assert allocated == []


def test_a_wide_network_is_loaded_by_what_its_tensors_hold_and_by_a_record_in_bounds(saved, allocated):
    width = 600_000  # body.3.weight alone is more than what is believed without a tensor
    wide = widened(saved, width)
    wide["state_dict"] = expanded(saved["state_dict"], width)
    with pytest.raises(ValueError, match=r"the 'softprune' record asks for new tensors of 9,600,000 elements"):
        resize(Net(), wide)
    wide["state_dict"] = {name: value.contiguous() for name, value in wide["state_dict"].items()}
    module = Net()
    resize(module, wide)
    module.load_state_dict(wide["state_dict"])
    assert sum(allocated) == 9_600_000
    fresh = Net(100)
    resize(fresh, widened(saved, 10_000)["softprune"])
    assert fresh.body[3].weight.shape == (8, 10_000, 1)


def test_lists_that_a_file_holds_once_and_names_a_thousand_times_are_read_once(saved):
    many = 3000
    result = saved["softprune"]["results"][0]
    trial = {**result["trials"][0], "coefficients": [0.5] * many}
    group = result["groups"][0]
    result = {**result, "groups": [group] * many, "trials": [trial] * many}  # nine million coefficients
    checkpoint = damaged(saved, "results", value=[result] * many)
    checkpoint["softprune"]["optimizers"] = [[["head.weight"] * many] * many] * many
    checkpoint["optimizer_states"] = [{}] * many
    module = Net()
    resize(module, checkpoint)
    assert ModelShapes.of(module) == ModelShapes.of(Smaller())


# ----------------------------------------------------------------------------------------------------------------- fuzz

NUMBERS = (
    st.sampled_from([0, 1, -1, 7, 8, 12, 64, WIDE, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, -(10**4000), 1e308])
    | st.integers()
    | st.floats()
)
NAMES = st.sampled_from(["", "head", "head.weight", "body.0.bias", "in", "both", "layers", "nan"]) | st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


def places(value):
    """Containers and keys of all that is in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


@st.composite
def mutations(draw):
    """A place in a record, by its number, and what becomes of it."""
    return draw(st.integers(0, 2**16)), draw(st.sampled_from(["replace"] * 4 + ["drop", "swap", "grow"])), draw(JSON)


def mutate(record, number, kind, value):
    found = list(places(record))
    holder, key = found[number % len(found)]
    if kind == "drop":
        del holder[key]
    elif kind == "swap":  # with what stands somewhere else
        other, other_key = found[(number // len(found)) % len(found)]
        holder[key] = copy.deepcopy(other[other_key])
    elif kind == "grow" and isinstance(holder[key], dict):
        holder[key][str(value)[:3]] = value
    elif kind == "grow" and isinstance(holder[key], list):
        holder[key].append(value)
    else:
        holder[key] = value


MODULES = "|".join(re.escape(name) for name in [*dict(Net().named_modules()), "scale", "cache"] if name)
REFUSED = rf"the 'softprune' record |neither a checkpoint|({MODULES}): |.*: the checkpoint has "


def refusal(module, source):
    """What resizing complains about, if it does."""
    try:
        resize(module, source)
    except ValueError as error:
        return str(error)
    return None


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(changes=st.lists(mutations(), min_size=1, max_size=2), alone=st.booleans())
def fuzz(saved, allocated, changes, alone):
    record = copy.deepcopy(saved["softprune"])
    for change in changes:
        mutate(record, *change)
    module = Net()
    before, values = state_of(module), {name: value.clone() for name, value in module.state_dict().items()}
    allocated.clear()
    error = refusal(module, record if alone else {**saved, "softprune": record})
    if error is not None:
        assert re.match(REFUSED, error), error
        assert state_of(module) == before
        assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
        assert allocated == []
        return
    if not alone:
        module.load_state_dict(saved["state_dict"])
        assert module(torch.ones(2, 3, 5)).shape == (2, 2)
    again: dict[str, object] = {}
    module.on_save_checkpoint(again)
    resize(Net(), again["softprune"])  # what it says now is a record again
    assert sum(allocated) <= 2**23


@pytest.mark.slow
def test_any_change_of_a_record_is_refused_by_name_or_harmless(saved, allocated):
    fuzz(saved, allocated)
