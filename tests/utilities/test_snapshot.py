"""What objects hold is put back, whatever else lies beside it; what has a life of its own is left alone."""

import argparse
import array
import collections
import dataclasses
import functools
import io
import logging
import math
import re
import sys
import threading
import types

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import Dataset

import lightning_softprune.utilities.snapshot as snapshot_module
from lightning_softprune.surgery import Transaction
from lightning_softprune.utilities.snapshot import Snapshot


class Hits:
    """Gathers numbers; beside them lies something else."""

    def __init__(self, beside=None):
        self.hits, self.total, self.beside = [1], 0, beside

    def add(self):
        self.hits.append(2)
        self.total += 1

    def __call__(self, *_):
        self.add()

    def held(self):
        return list(self.hits), self.total


class Slotted:
    __slots__ = ("__late", "beside", "hits", "total")

    def __init__(self, beside=None):
        self.hits, self.total, self.beside = [1], 0, beside

    def add(self):
        self.hits.append(2)
        self.total += 1
        self.__late = self.hits

    def held(self):
        return list(self.hits), self.total, hasattr(self, "_Slotted__late")


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    beside: object
    hits: list = dataclasses.field(default_factory=list)
    counts: collections.Counter = dataclasses.field(default_factory=lambda: collections.Counter(a=1))

    def add(self):
        self.hits.append(1)
        self.counts.update("aab")
        object.__setattr__(self, "beside", None)

    def held(self):
        return list(self.hits), dict(self.counts), self.beside


class Guarded(Hits):
    """Its attributes cannot be had the ordinary way."""

    def __init__(self, beside=None):
        vars(self).update(hits=[1], total=0, beside=beside)

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __setattr__(self, name, value):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None

    def add(self):
        self.hits.append(2)
        vars(self)["total"] += 1


class Pretender(Hits):
    """Says that it is a list, as proxies do."""

    @property
    def __class__(self):
        return list


class Counting(list):
    """A list whose methods are not a list's, with a helper beside."""

    def __init__(self, beside=None):
        super().__init__([1])
        self.beside, self.total = beside, 0

    def add(self):
        list.append(self, 2)
        self.total += 1

    def __iter__(self):
        return iter("never")

    def __len__(self):
        return 99

    def __setitem__(self, *_):
        raise RuntimeError

    def held(self):
        return list.copy(self), self.total


KINDS = [Hits, Slotted, Frozen, Guarded, Pretender, Counting]

BESIDE = {
    "nothing": lambda: None,
    "a logger": lambda: logging.getLogger("x"),
    "a lock": threading.Lock,
    "an event": threading.Event,
    "a file": io.StringIO,
    "a function": lambda: len,
    "a module": lambda: math,
    "a class": lambda: Hits,
    "a pattern": lambda: re.compile("a"),
    "a generator": lambda: iter([1]),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_data_are_put_back_whatever_lies_beside_them(kind, beside):
    module, helper = nn.Module(), BESIDE[beside]()
    module.evaluator = evaluator = kind(helper)
    before = evaluator.held()
    memory = Snapshot()
    memory.contents(module)
    evaluator.add()
    assert evaluator.held() != before
    memory.restore()
    assert evaluator.held() == before
    assert module.evaluator is evaluator
    assert evaluator.beside is helper


WAYS = {
    "in an object": lambda inner: Hits(Hits(inner)),
    "in slots": Slotted,
    "in a list": lambda inner: [logging.getLogger(), inner],
    "in a dict of lists": lambda inner: {"a": [(inner,)]},
    "in a set": lambda inner: {inner},
    "in a deque": lambda inner: collections.deque([inner], maxlen=3),
    "in a defaultdict": lambda inner: collections.defaultdict(list, a=inner),
    "in a namespace": lambda inner: types.SimpleNamespace(logger=logging.getLogger(), inner=inner),
    "in parsed arguments": lambda inner: argparse.Namespace(inner=inner),
    "in a UserDict": lambda inner: collections.UserDict(a=inner),
    "by a bound method": lambda inner: inner.add,
    "by a partial function": lambda inner: functools.partial(print, x=inner),
    "in a class": lambda inner: type("Holder", (), {"inner": inner, "__module__": __name__})(),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_object_is_found_wherever_it_lies(way):
    inner = Hits(logging.getLogger())
    module = nn.Module()
    module.held = WAYS[way](inner)
    memory = Snapshot()
    memory.contents(module)
    inner.add()
    memory.restore()
    assert inner.held() == ([1], 0)


def test_an_object_that_is_a_hook_and_one_that_has_one():
    layer, called, bound = nn.Linear(1, 1), Hits(threading.Lock()), Hits(threading.Lock())
    layer.register_forward_hook(called)
    layer.register_forward_hook(bound.__call__)
    memory = Snapshot()
    memory.contents(layer)
    layer(torch.zeros(1))
    memory.restore()
    assert called.held() == bound.held() == ([1], 0)


def test_every_kind_of_data_is_put_back_in_its_order():
    def filled():
        return Hits({
            "counter": collections.Counter(b=1, a=2),
            "default": collections.defaultdict(list, a=[1]),
            "ordered": collections.OrderedDict(a=1, b=2, c=3),
            "bytes": bytearray(b"ab"),
            "array": array.array("d", [1.0]),
            "deque": collections.deque([1, 2], maxlen=2),
            "set": {1, 2},
            "numbers": np.arange(3.0),
            "names": np.array(["a", None], dtype=object),
            "tensor": torch.arange(3.0),
            "rng": np.random.default_rng(0),
        })  # fmt: skip

    found, expected = filled(), filled()
    data = found.beside
    kept = dict(data)
    memory = Snapshot()
    memory.contents(found)
    data["counter"].update("abc")
    data["default"]["b"].append(1)
    data["default"]["a"].append(1)
    data["ordered"].move_to_end("a")
    del data["ordered"]["b"]
    data["bytes"].extend(b"c")
    data["array"].append(2.0)
    data["deque"].append(3)
    data["set"].add(3)
    data["numbers"][:] = 7
    data["names"][0] = "b"
    data["tensor"].add_(1)
    data["rng"].random()
    data["new"] = data.pop("counter")
    memory.restore()
    assert list(data) == list(expected.beside)
    assert all(data[name] is value for name, value in kept.items())
    for name in ("counter", "default", "ordered", "bytes", "array", "deque", "set"):
        assert data[name] == expected.beside[name], name
    assert list(data["ordered"].items()) == [("a", 1), ("b", 2), ("c", 3)]
    assert list(data["counter"]) == ["b", "a"]
    assert np.array_equal(data["numbers"], np.arange(3.0))
    assert list(data["names"]) == ["a", None]
    assert torch.equal(data["tensor"], torch.arange(3.0))
    assert data["rng"].random() == expected.beside["rng"].random()


def test_objects_that_hold_each_other_and_the_module():
    module, one, other = nn.Module(), Hits(), Hits()
    one.beside, other.beside, module.one, one.owner = other, one, one, module
    memory = Snapshot()
    memory.contents(module)
    one.add()
    other.add()
    other.beside = None
    memory.restore()
    assert one.held() == other.held() == ([1], 0)
    assert other.beside is one


def test_modules_and_metrics_in_an_object_are_modules_and_metrics():
    holder = Hits(threading.Lock())
    holder.metric, holder.norm = torchmetrics.MeanMetric(), nn.BatchNorm1d(2)
    module = nn.Module()
    module.holder = holder
    memory = Snapshot()
    memory.contents(module)
    holder.metric.update(3.0)
    holder.norm(torch.ones(2, 2))
    holder.norm.eval()
    memory.restore()
    assert holder.metric._update_count == 0
    assert holder.metric.weight == 0
    assert torch.equal(holder.norm.running_mean, torch.zeros(2))
    assert holder.norm.training


def test_data_of_the_users_own_classes_are_put_back():
    class Base(nn.Module):
        seen = [1]  # noqa: RUF012

    class Module(Base):
        table = {"a": {1}}  # noqa: RUF012
        evaluator = Hits(logging.getLogger())
        evaluations = 0

    class Evaluator:
        results = collections.defaultdict(list)  # noqa: RUF012
        beside = threading.Lock()

    module = Module()
    module.helper = Evaluator()
    memory = Snapshot()
    memory.contents(module)
    Module.seen.append(2)
    Module.table["a"].add(2)
    Module.evaluator.add()
    Module.evaluations += 1
    Evaluator.results["a"].append(1)
    memory.restore()
    assert Base.seen == [1]
    assert Module.table == {"a": {1}}
    assert Module.evaluator.held() == ([1], 0)
    assert Evaluator.results == {}
    assert Module.evaluations == 1, "which values a class's attributes have is not put back"


# ------------------------------------------------------------------------------------------------- what is left alone


class OwnDataset(Dataset):
    def __init__(self):
        self.read = []


class OwnCallback(pl.Callback):
    def __init__(self):
        self.read = []


class OwnThread(threading.Thread):
    def __init__(self):
        super().__init__()
        self.read = []


class OwnHandler(logging.Handler):
    def __init__(self):
        super().__init__()
        self.read = []


class OwnFile(io.StringIO):
    def __init__(self):
        super().__init__()
        self.read = []


@pytest.mark.parametrize("kind", [OwnDataset, OwnCallback, OwnThread, OwnHandler, OwnFile])
def test_what_is_alive_is_left_alone(kind):
    alive = kind()
    memory = Snapshot()
    memory.contents(Hits(alive))
    alive.read.append(1)
    memory.restore()
    assert alive.read == [1]


@pytest.fixture
def installed(monkeypatch):
    """A class of an installed library."""
    library = types.ModuleType("somelibrary")
    library.__file__ = "/usr/lib/python3/dist-packages/somelibrary/__init__.py"
    source = "class Pool:\n    def __init__(self, beside):\n        self.open, self.beside = [], beside\n"
    exec(source, vars(library))
    monkeypatch.setitem(sys.modules, "somelibrary", library)
    return library.Pool


def left_in(pool, *roots):
    memory = Snapshot()
    memory.contents(*roots)
    pool.open.append(1)
    memory.restore()
    return pool.open


def test_an_object_of_an_installed_library_is_looked_into_where_it_holds_nothing_but_data(installed):
    pool = installed(3)
    assert left_in(pool, Hits(pool)) == []
    pool = installed(threading.Lock())
    assert left_in(pool, Hits(pool)) == [1]


def test_a_class_that_inherits_from_a_librarys_is_the_users_own(installed):
    own = type("Own", (installed,), {"__module__": __name__})(threading.Lock())
    assert left_in(own, Hits(own)) == []


def test_the_package_of_the_module_is_the_users_even_where_it_is_installed(installed):
    module = type("Net", (nn.Module,), {"__module__": "somelibrary.nets"})()
    module.pool = installed(threading.Lock())
    assert left_in(module.pool, module) == []


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_huge_tensor_in_an_object_is_not_copied_and_the_rest_is_put_back(monkeypatch):
    monkeypatch.setattr(snapshot_module, "ROOM", 2**12)
    evaluator = Hits([torch.zeros(2**10), np.zeros(2**10), [0] * 2**10, torch.zeros(4)])
    large, table, items, small = evaluator.beside
    module = nn.Module()
    module.evaluator, module.own = evaluator, torch.zeros(2**11)
    memory = Snapshot()
    memory.contents(module)
    evaluator.add()
    for value in (large, table, small, module.own):
        value += 1
    items.append(1)
    memory.restore()
    assert evaluator.held() == ([1], 0)
    assert small.sum() == module.own.sum() == 0
    assert large.sum() == 2**10, "as it was left"
    assert table.sum() == 2**10
    assert len(items) == 2**10 + 1


def test_of_a_list_of_too_many_values_the_list_is_put_back_and_they_are_not(monkeypatch):
    monkeypatch.setattr(snapshot_module, "MOST_VALUES", 10)
    evaluator = Hits([[number] for number in range(20)])
    first = evaluator.beside[0]
    memory = Snapshot()
    memory.contents(evaluator)
    first.append(1)
    evaluator.beside.append([20])
    evaluator.add()
    memory.restore()
    assert evaluator.held() == ([1], 0)
    assert len(evaluator.beside) == 20
    assert first == [0, 1]


def test_a_rollback_puts_objects_back_too():
    model = nn.Linear(2, 2)
    model.evaluator = Hits(logging.getLogger())
    model.evaluator.weights = nn.Parameter(torch.zeros(2))
    with Transaction(model):
        model.evaluator.add()
        model.evaluator.weights.data.add_(1)
    assert model.evaluator.held() == ([1], 0)
    assert model.evaluator.weights.sum() == 0
