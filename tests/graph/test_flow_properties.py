"""Whatever is composed of operators: pruned, it computes what the masked dense network does, or it is refused."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_softprune import find_groups
from lightning_softprune.search.plan import Plan
from support.masked import assert_pruned_is_masked

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, TOKENS, SIZE = 2, 3, 4


@dataclass(frozen=True)
class Node:
    """A tensor of a network: its number, what it is (`vector`, `tokens`, `map`), channels, and pixels in a row."""

    number: int
    kind: str
    width: int
    size: int = 0

    @property
    def dim(self):
        return 1 if self.kind == "map" else -1

    def like(self, other):
        return (self.kind, self.width, self.size) == (other.kind, other.width, other.size)


class Random(nn.Module):
    """A network composed by `steps`: (operation, source, other source, number), each taken modulo what there is."""

    def __init__(self, kind, steps):
        super().__init__()
        self.parts = nn.ModuleDict()
        self.calls, self.nodes, self.used, self.made = [], [], set(), Counter()
        self.kind = kind
        self.nodes.append(Node(0, kind, 5 if kind != "map" else 2, SIZE if kind == "map" else 0))
        self.layer(self.nodes[0], 8)
        for operation, one, other, number in steps:
            source, second = self.node(one), self.node(other)
            possible = [name for name, (fits, _) in OPERATIONS.items() if fits(source, second)]
            name = possible[operation % len(possible)]
            OPERATIONS[name][1](self, source, second, number)
            self.made[name] += 1
        ends = [node for node in self.nodes[1:] if node.number not in self.used]
        self.heads = nn.ModuleList(nn.Linear(node.width, 2) for node in ends)
        self.ends = ends
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)

    def node(self, number):
        return self.nodes[-1 - number % max(len(self.nodes) - 1, 1)]  # the latest first, never the input

    def add(self, function, sources, width, kind=None, size=None):
        first = sources[0]
        self.used |= {source.number for source in sources}
        self.calls.append((function, [source.number for source in sources]))
        size = first.size if size is None else size
        self.nodes.append(Node(len(self.nodes), kind or first.kind, width, size))
        return self.nodes[-1]

    def part(self, module):
        name = f"p{len(self.parts)}"
        self.parts[name] = module
        return lambda net, x: net.parts[name](x)

    def layer(self, source, width):
        if source.kind == "map":
            kernel = 1 + 2 * (width % 2)
            return self.add(self.part(nn.Conv2d(source.width, width, kernel, padding=kernel // 2)), [source], width)
        return self.add(self.part(nn.Linear(source.width, width)), [source], width)

    def tensor(self, kind, *shape):
        name = f"t{len(self.nodes)}"
        if kind == "parameter":
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        elif kind == "buffer":
            self.register_buffer(name, torch.randn(shape))
        else:
            setattr(self, name, torch.randn(shape))
        return name

    def forward(self, x):
        values = [x]
        for function, sources in self.calls:
            values.append(function(self, *(values[number] for number in sources)))
        result = 0
        for node, head in zip(self.ends, self.heads, strict=True):
            value = values[node.number]
            value = value.mean((2, 3)) if node.kind == "map" else value.mean(1) if node.kind == "tokens" else value
            result = result + head(value).tanh()
        return result


# ---------------------------------------------------------------------------------------------------------- operations


def anything(one, _):
    return True


def wide(factor, kinds=("vector", "tokens", "map")):
    return lambda one, _: one.kind in kinds and one.width % factor == 0 and one.width > factor


def only(*kinds):
    return lambda one, _: one.kind in kinds and one.width < 40


def alike(one, other):
    return one.like(other)


def cat_fits(one, other):
    return (one.kind, one.size) == (other.kind, other.size) and one.width + other.width < 30


def layer(net, one, other, number):
    net.layer(one, (2, 3, 4, 6, 8, 1)[number % 6])


def activation(net, one, other, number):
    functions = torch.relu, torch.tanh, torch.sigmoid, F.gelu, lambda x: x.clamp(-1, 2) * 0.5, lambda x: x.square()
    net.add(lambda net, x: functions[number % 6](x), [one], one.width)


def chunk_gate(net, one, other, number):
    def gate(net, x):
        value, scale = x.chunk(2, one.dim)
        return value * scale.sigmoid()

    def by_slices(net, x):
        x = x.movedim(one.dim, 0)
        half = len(x) // 2
        return (x[:half].tanh() + x[half:]).movedim(0, one.dim)

    forms = gate, lambda net, x: F.glu(x, one.dim), by_slices
    net.add(forms[number % 3], [one], one.width // 2)


def chunk_swap(net, one, other, number):
    def swap(net, x):
        a, b = x.split(x.shape[one.dim] // 2, one.dim)
        return torch.cat([b, a], one.dim) if number % 2 else torch.cat([b, a * b, a.relu()], one.dim)

    net.add(swap, [one], one.width if number % 2 else one.width // 2 * 3)


def pairs(net, one, other, number):
    def meet(net, x):
        x = x.movedim(one.dim, -1)
        x = x[..., ::2] * x[..., 1::2] if number % 2 else x.unflatten(-1, (-1, 2)).prod(-1)
        return x.movedim(-1, one.dim)

    net.add(meet, [one], one.width // 2)


def shuffle(net, one, other, number):
    def mix(net, x):
        x = x.movedim(one.dim, 1)
        parts = x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2)
        return parts.reshape(x.shape).movedim(1, one.dim)

    net.add(mix, [one], one.width)


def pad(net, one, other, number):
    before, after = number % 3, number % 2 + 1
    around = (0, 0) * (2 if one.kind == "map" else 0)
    net.add(lambda net, x: F.pad(x, (*around, before, after)), [one], one.width + before + after)


def scale(net, one, other, number):
    kind = ("parameter", "buffer", "attribute")[number % 3]
    name = net.tensor(kind, one.width, *((1, 1) if one.kind == "map" else ()))

    def apply(net, x):
        return x * getattr(net, name) if number % 2 else x + getattr(net, name)

    net.add(apply, [one], one.width)


def in_place(net, one, other, number):
    def write(net, x):
        x = x.clone(memory_format=torch.contiguous_format)
        view = x.view(-1) if number % 2 else x.movedim(one.dim, 0)
        view.mul_(0.5).add_(0.25)
        return x

    net.add(write, [one], one.width)


def binary(net, one, other, number):
    functions = torch.add, torch.mul, torch.maximum, lambda x, y: torch.stack([x, y, x]).sum(0)
    net.add(lambda net, x, y: functions[number % 4](x, y), [one, other], one.width)


def cat(net, one, other, number):
    net.add(lambda net, x, y: torch.cat([x, y], one.dim), [one, other], one.width + other.width)


def broadcast(net, one, other, number):
    gate = net.layer(one, 1)
    net.add(lambda net, x, y: x * y.sigmoid(), [one, gate], one.width)


def adapter(net, one, other, number):
    down, up = nn.Parameter(torch.randn(2, one.width)), nn.Parameter(torch.randn(one.width, 2))
    key = len(net.nodes)
    setattr(net, f"down{key}", down)
    setattr(net, f"up{key}", up)

    def apply(net, x):
        a, b = getattr(net, f"down{key}"), getattr(net, f"up{key}")
        return x + (x @ a.T @ b.T if number % 2 else torch.einsum("...c,rc,dr->...d", x, a, b))

    net.add(apply, [one], one.width)


def attention(net, one, other, number):
    heads, width = 2 + number % 2, 2
    fused = net.part(nn.Linear(one.width, 3 * heads * width))
    out = net.part(nn.Linear(heads * width, one.width))
    forms = (
        lambda x: [t.view(*t.shape[:2], -1, width).transpose(1, 2) for t in x.chunk(3, -1)],
        lambda x: x.view(*x.shape[:2], 3, -1, width).permute(2, 0, 3, 1, 4).unbind(0),
        lambda x: x.view(*x.shape[:2], -1, 3 * width).transpose(1, 2).chunk(3, -1),
    )

    def attend(net, x):
        q, k, v = forms[number % 3](fused(net, x))
        mixed = F.scaled_dot_product_attention(q, k, v) if number % 2 else (q @ k.mT * 0.7).softmax(-1) @ v
        return x + out(net, mixed.transpose(1, 2).flatten(2))

    net.add(attend, [one], one.width)


def batch_norm(net, one, other, number):
    net.add(net.part(nn.BatchNorm2d(one.width)), [one], one.width)


def depthwise(net, one, other, number):
    net.add(net.part(nn.Conv2d(one.width, one.width, 3, padding=1, groups=one.width)), [one], one.width)


def grouped(net, one, other, number):
    width = 2 * (2 + number % 3)
    net.add(net.part(nn.Conv2d(one.width, width, 1, groups=2)), [one], width)


def pixels(net, one, other, number):
    if one.width % 4 == 0 and one.width > 4 and one.size <= SIZE:
        net.add(lambda net, x: F.pixel_shuffle(x, 2), [one], one.width // 4, size=one.size * 2)
    elif one.width <= 4 and one.size >= 2 and one.size % 2 == 0:
        net.add(lambda net, x: F.pixel_unshuffle(x, 2), [one], one.width * 4, size=one.size // 2)
    elif one.size >= 2 and one.size % 2 == 0:
        forms = (
            lambda net, x: F.max_pool2d(x, 2),
            lambda net, x: F.avg_pool2d(x, 2),
            lambda net, x: F.adaptive_avg_pool2d(x, x.shape[-1] // 2),
        )
        net.add(forms[number % 3], [one], one.width, size=one.size // 2)
    else:
        net.add(lambda net, x: F.interpolate(x, scale_factor=2), [one], one.width, size=one.size * 2)


def excite(net, one, other, number):
    down, up = net.part(nn.Conv2d(one.width, 3, 1)), net.part(nn.Conv2d(3, one.width, 1))
    net.add(lambda net, x: x * up(net, down(net, x.mean((2, 3), True)).relu()).sigmoid(), [one], one.width)


def to_another_kind(net, one, other, number):
    if one.kind == "map" and number % 3 == 0 and one.size <= 2:
        net.add(lambda net, x: x.flatten(1), [one], one.width * one.size**2, "vector", 0)
    elif one.kind == "map" and number % 3 == 1:
        net.add(lambda net, x: x.mean((2, 3)), [one], one.width, "vector", 0)
    elif one.kind == "map":
        net.add(lambda net, x: x.flatten(2).transpose(1, 2), [one], one.width, "tokens", -(one.size**2))
    elif one.kind == "tokens" and number % 2 and one.size == 0:
        net.add(lambda net, x: x.flatten(1), [one], one.width * TOKENS, "vector", 0)
    elif one.kind == "tokens":
        net.add(lambda net, x: x.mean(1), [one], one.width, "vector", 0)
    else:
        net.add(lambda net, x: x[:, None].expand(-1, TOKENS, -1), [one], one.width, "tokens", 0)


OPERATIONS = {
    "layer": (anything, layer),
    "activation": (anything, activation),
    "binary": (alike, binary),
    "cat": (cat_fits, cat),
    "gate": (wide(2), chunk_gate),
    "swap": (wide(2), chunk_swap),
    "pairs": (wide(2), pairs),
    "shuffle": (wide(2), shuffle),
    "pad": (only("vector", "tokens", "map"), pad),
    "scale": (anything, scale),
    "in place": (anything, in_place),
    "broadcast": (anything, broadcast),
    "adapter": (only("vector", "tokens"), adapter),
    "attention": (only("tokens"), attention),
    "batch norm": (only("map"), batch_norm),
    "depthwise": (lambda one, _: one.kind == "map" and one.width > 1, depthwise),
    "grouped": (wide(2, ("map",)), grouped),
    "pixels": (only("map"), pixels),
    "excite": (only("map"), excite),
    "kind": (only("vector", "tokens", "map"), to_another_kind),
}
INPUTS = {"vector": (BATCH + 2, 5), "tokens": (BATCH, TOKENS, 5), "map": (BATCH, 2, SIZE, SIZE)}
STEP = st.tuples(st.integers(0, 59), st.integers(0, 2), st.integers(0, 5), st.integers(0, 11))


def checked(kind, steps, seed):
    """Build, find, prune all groups at once, compare; return the network and its groups."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, x = Random(kind, steps).eval(), torch.randn(INPUTS[kind])
        groups = find_groups(net, x)
    found = [group for group in groups if group.prunable]
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(2):
        sizes = [int(rng.integers(0, group.num_channels)) for group in found]
        chosen.append(
            Plan(
                tuple(
                    tuple(sorted(rng.permutation(group.num_channels)[:size].tolist()))
                    for group, size in zip(found, sizes, strict=True)
                )
            )
        )
    assert_pruned_is_masked(net, x, found, [plan for plan in chosen if leaves_something(found, plan)])
    return net, groups


def leaves_something(groups, plan):
    """Whether every slot keeps an index: one may hold a part of a group's channels alone, and does not run without."""
    left = {}
    for group, removed in zip(groups, plan.removed, strict=True):
        for member in group.members:
            place = (member.module, member.slot)
            left.setdefault(place, np.ones(len(member.owner), dtype=bool))
            left[place] &= ~np.isin(member.owner, removed)
    return all(kept.any() for kept in left.values())


def run_examples(kind, count, length):
    """Any composition, and how much of what was found could be pruned."""
    seen, prunable, everything = Counter(), 0, 0

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(STEP, min_size=2, max_size=length), st.integers(0, 99))
    def holds(steps, seed):
        nonlocal prunable, everything
        net, groups = checked(kind, steps, seed)
        seen.update(net.made)
        names = [group for group in groups if group.num_channels > 1 and not group.name.startswith("heads")]
        prunable += sum(group.prunable for group in names)
        everything += len(names)

    holds()
    return seen, prunable / everything


@pytest.mark.slow
@pytest.mark.parametrize("kind", INPUTS)
def test_any_composition_equals_the_masked_network_or_is_refused(kind):
    seen, share = run_examples(kind, 60, 8)
    assert share > 0.6
    assert len(seen) >= {"vector": 13, "tokens": 14, "map": 18}[kind]


@pytest.mark.parametrize("kind", INPUTS)
def test_short_compositions_equal_the_masked_network_or_are_refused(kind):
    run_examples(kind, 5, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_between_two_layers(kind, operation):
    """Layer, operation, layer: in all its forms, so that none is left to chance."""
    fits, _ = OPERATIONS[operation]
    for number in range(0, 12, 1 if operation == "attention" else 2 if operation == "activation" else 5):
        net = Random(kind, [])
        if not fits(net.nodes[-1], net.nodes[-1]):
            pytest.skip("no operation on this kind")
        place = [name for name, (possible, _) in OPERATIONS.items() if possible(net.nodes[-1], net.nodes[-1])].index(
            operation
        )
        _, groups = checked(kind, [(place, 0, 0, number), (0, 0, 0, 3)], number)
        assert any(group.prunable for group in groups)
