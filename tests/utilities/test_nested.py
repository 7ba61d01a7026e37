"""Containers of other people's making, which constructors of all kinds make."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple

import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.utilities.nested import map_tensors, rebuild, tensors_in


class Pair(tuple):
    """Its constructor takes its items one by one."""

    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


class Items(list):
    """The same, of a list; it has an attribute too."""

    def __init__(self, *items, note):
        super().__init__(items)
        self.note = note


class Noted(namedtuple("Noted", "a b")):
    """A named tuple whose constructor makes one of its items."""

    def __new__(cls, a):
        result = super().__new__(cls, a, 1)
        result.note = "kept"
        return result


class Table(dict):
    def __init__(self, *, keys):
        super().__init__(dict.fromkeys(keys, 1))


@pytest.mark.parametrize(
    "value",
    [
        [1, 1],
        (1, 1),
        {"a": 1, "b": 1},
        OrderedDict(b=1, a=1),
        defaultdict(list, {"a": 1}),
        Pair(1, 1),
        Items(1, 1, 1, note="kept"),
        Noted(1),
        Table(keys="xy"),
        torch.Size([1, 1]),
        torch.ones(2, 3).max(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_container_is_rebuilt_as_what_it_is_without_its_constructor(value):
    made = rebuild(value, lambda item: item + 1)
    assert type(made) is type(value)
    assert made is not value
    assert getattr(made, "__dict__", None) == getattr(value, "__dict__", None)
    before, after = (list(one.values() if isinstance(one, dict) else one) for one in (value, made))
    assert all(
        torch.equal(torch.as_tensor(one) + 1, torch.as_tensor(other)) for one, other in zip(before, after, strict=True)
    )
    if isinstance(value, dict):
        assert list(made) == list(value)
        assert getattr(made, "default_factory", None) is getattr(value, "default_factory", None)


def test_tensors_are_found_in_all_containers_in_order_and_none_is_made_anew():
    class Fixed(tuple):
        def __new__(cls, *items, made=[]):  # noqa: B006 - counts
            assert not made, "made anew"
            made.append(cls)
            return super().__new__(cls, items)

    tensors = [torch.full((1,), float(number)) for number in range(6)]
    tree = Fixed(tensors[0], Items(tensors[1], "x", note=tensors[0]), UserDict(a=tensors[2]), {"b": [tensors[3]]}, None)
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    assert [id(t) for t in tensors_in((tree, tensors[4], packed))] == [*map(id, tensors[:5]), id(packed.data)]
    doubled = map_tensors([Pair(tensors[1], packed)], lambda tensor: 2 * tensor)
    assert type(doubled[0]) is Pair
    assert doubled[0][0].item() == 2.0
    assert torch.equal(doubled[0][1].data, 2 * packed.data)


def test_modules_may_return_tuples_with_a_constructor_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x):
            return Pair(self.a(x), self.b(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.out = Two(), nn.Linear(8, 2)

        def forward(self, x):
            y, z = self.two(x)
            return self.out(y.relu() + z)

    assert [group.num_channels for group in find_groups(Net(), torch.randn(2, 4)) if group.prunable] == [8]
