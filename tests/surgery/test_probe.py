"""The probe finds what only running shows."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.surgery import Candidates, one_can_go, probe_groups, probe_with_counts
from lightning_softprune.surgery.probing.fingerprints import look_at, look_at_dense
from lightning_softprune.surgery.probing.probe import unlike_masked
from support import zoo
from support.attending import group
from support.masked import Net, assert_pruned_is_masked, plans
from support.plans import assert_same, snapshot
from support.zoo import BY_NAME

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_probe_finds_what_only_running_shows_and_undoes_its_cuts():
    model, x = BY_NAME["ConstantView"].make()
    groups = zoo.trace_groups(model, [lambda: model(x)])
    before = snapshot(model)
    traced = {group.name: group.prunable for group in groups}
    probed = {group.name: group for group in probe_groups(model, groups, lambda: model(x))}
    assert traced["body"]
    assert not probed["body"].prunable
    assert probed["body"].reason.startswith("the model does not run with fewer channels: RuntimeError")
    assert probed["inner"].prunable
    assert_same(model, before)


def test_one_group_that_runs_with_channels_gone_is_enough_and_nothing_stays_gone():
    model, x = BY_NAME["ConstantView"].make()
    groups = {group.name: group for group in zoo.trace_groups(model, [lambda: model(x)])}
    body, inner = groups["body"], groups["inner"]  # the former does not run
    before = snapshot(model)
    widths = []

    def run():
        widths.append(len(model.inner.weight))
        model(x)

    def can_go(*groups, number=1):
        return one_can_go(model, groups, number, run)

    assert can_go(body, inner)
    assert widths == [inner.num_channels, inner.num_channels - 1]
    assert not can_go(body)
    assert not can_go(inner.refuse("for a reason"))
    assert can_go(inner, number=inner.num_channels - 1)
    assert not can_go(inner, number=inner.num_channels)
    assert_same(model, before)


def test_two_blocks_of_channels_that_change_places_within_are_found_though_one_is_left_alone():
    """With one block gone, no other can take its place: only masking tells that what is left is in another order."""

    def mixed(net, x):
        x = net.body(x)
        x = net.head(x.reshape(len(x), 2, x.shape[1] // 2).transpose(1, 2).reshape(x.shape))
        return x * 1e-4 + 1  # what is shown hardly differs; what the reader makes does

    torch.manual_seed(0)
    model, x = Net(mixed, body=torch.nn.Linear(5, 8), head=torch.nn.Linear(8, 2)), torch.randn(3, 5)
    halves = group("body", np.arange(8) // 4, ("body", "out"))
    reader = group("body", np.arange(8) % 2, ("head", "in")).members
    pairs = [zoo.PruningGroup("body", "body", "intra", 2, (*halves.members, *reader))]
    before = snapshot(model)
    assert "set to zero" in probe_with_counts(model, pairs, Candidates(), lambda: model(x))[0].reason
    assert_same(model, before)


class Lanes(nn.Module):
    """Takes widths that are multiples of a number, and of one it knows by itself."""

    def __init__(self, multiple, width=24):
        super().__init__()
        self.multiple, self.body, self.head = multiple, nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.body(x)
        if x.shape[1] % self.multiple:
            raise RuntimeError("a stride")
        return self.head(x)


@pytest.mark.parametrize(
    ("multiple", "width", "round_to", "step"),
    [
        *((1, 24, 1, 1), (2, 24, 1, 2), (4, 24, 1, 4), (8, 48, 3, 8), (16, 48, 1, 16), (4, 24, 4, 1), (8, 24, 16, 1)),
        *((3, 24, 1, 0), (8, 24, 12, 0), (8, 24, 3, 0), (8, 8, 1, 0), (24, 24, 1, 0)),
    ],
)
def test_groups_that_run_with_multiples_of_channels_alone_go_in_such_steps(multiple, width, round_to, step):
    model, x = Lanes(multiple, width), torch.randn(5, 6)
    groups = zoo.trace_groups(model, [lambda: Lanes.forward(model, x)])
    before = snapshot(model)
    body = probe_with_counts(model, groups, Candidates(), lambda: model(x), round_to=round_to)[0]
    assert (body.name, body.prunable, body.step if body.prunable else 0) == ("body", step > 0, step)
    assert_same(model, before)


def test_blocks_alike_are_counted_by_the_first_and_each_keeps_its_own_verdict():
    """One is tried before the others; one of another make is refused all the same, and no attribute changes for it."""

    class Heads(nn.Module):
        def __init__(self, fixed):
            super().__init__()
            self.num_heads, self.fixed = 4, fixed
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x):
            count = 4 if self.fixed else self.num_heads
            return x + self.down(self.up(x).view(len(x), count, 2).tanh().flatten(1))

    torch.manual_seed(0)
    blocks = nn.Sequential(*[Heads(fixed=number == 2) for number in range(5)])
    model = nn.Sequential(nn.Linear(3, 6), blocks, nn.Linear(6, 2))
    groups = {group.name: group for group in find_groups(model, torch.randn(5, 3))}
    for number in range(5):
        group = groups[f"1.{number}.up"]
        assert group.prunable == (number != 2)
        assert [count.attribute for count in group.counts] == ([] if number == 2 else ["num_heads"])
    assert "with fewer channels: RuntimeError" in groups["1.2.up"].reason


class Written(nn.Module):
    """Writes both of its widths down, and reads its inputs by the one and lays its outputs out by the other."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)

    def forward(self, x):
        return (x.reshape(-1, self.inputs) @ self.weight).view(len(x), self.outputs)


def test_layers_of_one_width_that_write_it_down_lose_their_channels_apart():
    """Attributes of one name and value count the outputs of each layer by itself, and the inputs of the next."""
    torch.manual_seed(0)
    layers = [Written(5, 8), nn.Tanh(), Written(8, 8), nn.Tanh(), Written(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    model, x = nn.Sequential(*layers), torch.randn(3, 5)
    groups = [group for group in find_groups(model, x) if group.prunable]
    counted = {group.name: {(count.module, count.attribute) for count in group.counts} for group in groups}
    first, second = {("0", "outputs"), ("2", "inputs")}, {("2", "outputs"), ("4", "inputs")}
    assert counted == {"0": first, "2": second, "4": {("4", "outputs")}}
    assert_pruned_is_masked(model, x, groups, plans(groups))


class Stepping(nn.Module):
    """Looks where the last digits of what it has computed say, as solvers do that choose their steps by tiny errors."""

    def __init__(self, by_number=False):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 64), nn.Linear(64, 4), nn.Linear(4, 2)
        self.by_number = by_number

    def forward(self, x):
        y = self.down(self.up(x).tanh())
        ahead = self.up(x + (y.detach().sum() * 1e8).sin()).tanh()
        reached = self.down(ahead.flip(1) if self.by_number else ahead)
        return self.head(y + (reached if self.by_number else 0 * reached))


def test_inner_layers_whose_outputs_rounding_alone_changes_are_not_compared():
    torch.manual_seed(0)
    model, x = Stepping(), torch.randn(5, 4)
    before = snapshot(model)
    groups = {group.name: group for group in find_groups(model, x)}
    assert groups["up"].prunable
    assert_same(model, before)
    assert_pruned_is_masked(model, x, [groups["up"]], plans([groups["up"]]))
    assert not {group.name: group for group in find_groups(Stepping(by_number=True), x)}["up"].prunable


class Spaced(nn.Module):
    """Divides by a table of distances, as splines do, and says where the result is no number; its width is written."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("distances", torch.rand(8) + 1)

    def forward(self, x):
        result = self.head((self.body(x) / self.distances).view(len(x), self.width))
        if result.isnan().any():
            raise ValueError("no number")
        return result


def test_a_network_that_does_not_take_zeros_is_compared_with_its_tables_as_they_are():
    torch.manual_seed(0)
    model, x = Spaced(), torch.randn(5, 4)
    before = snapshot(model)
    body = find_groups(model, x)[0]
    assert (body.name, body.prunable) == ("body", True)
    assert [count.attribute for count in body.counts] == ["width"]
    assert_same(model, before)


class Sorted(nn.Module):
    """Sums by kind; the number of kinds is that of its channels, and tells an operator how much memory to write."""

    def __init__(self):
        super().__init__()
        self.kinds = 4
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("kind", torch.tensor([0, 1, 1, 2, 3]))

    def forward(self, x):
        starts = torch._convert_indices_from_coo_to_csr(self.kind, self.kinds)
        return self.head(self.body(x).view(len(x), 4)) * starts.diff().sum()


def test_a_count_that_would_let_an_operator_write_beyond_its_memory_is_an_error_of_the_try():
    model, x, original = Sorted(), torch.randn(5, 4), torch._convert_indices_from_coo_to_csr
    model.kinds = 3
    with pytest.raises(IndexError, match="index 3 is out of bounds for a size of 3"):
        look_at(model, lambda: model(x))
    model.kinds = 4
    assert "does not run with fewer channels" in find_groups(model, x)[0].reason
    assert torch._convert_indices_from_coo_to_csr is original


class Copied(nn.Module):
    """Attention that keeps its sizes twice, one of them for itself."""

    def __init__(self):
        super().__init__()
        self.sizes = {"heads": 4}
        self._sizes = dict(self.sizes)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            part(x).view(*x.shape[:2], sizes["heads"], 3).transpose(1, 2)
            for part, sizes in ((self.q, self.sizes), (self.k, self._sizes), (self.v, self.sizes))
        )
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_private_copy_of_sizes_follows_what_it_is_a_copy_of():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 12), Copied(), nn.Linear(12, 2)), torch.randn(2, 5, 3)
    groups = [group for group in find_groups(model, x) if group.prunable]
    counted = {group.name: {count.attribute for count in group.counts} for group in groups}
    assert counted["1.q"] == {"sizes[heads]", "_sizes[heads]"}
    assert_pruned_is_masked(model, x, groups, plans(groups))


def test_a_number_that_a_module_keeps_for_itself_counts_its_heads():
    """As many as there are samples, so that a size that is written down cannot pass."""

    def forward(net, x):
        q, k, v = (part(x).view(*x.shape[:2], net._heads, -1).transpose(1, 2) for part in (net.q, net.k, net.v))
        return net.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    layers = {name: nn.Linear(3, 12) for name in "qkv"}
    model, x = Net(forward, **layers, _heads=4, out=nn.Linear(12, 2)).eval(), torch.randn(4, 5, 3)
    groups = [group for group in find_groups(model, x) if group.prunable]
    assert [(g.name, g.num_channels, [c.attribute for c in g.counts]) for g in groups] == [("q", 4, ["_heads"])]
    assert_pruned_is_masked(model, x, groups, plans(groups))


@pytest.mark.parametrize("table", [False, True])
def test_what_is_unlike_the_masked_network_is_compared_again_only_where_tables_could_be_why(table):
    """Its outputs are divided by the number of channels, which masking does not change."""

    def forward(net, x):
        h = net.body(x) + net.table
        return net.head(h / h.shape[1])

    buffers = {"table": torch.randn(8) if table else torch.zeros(())}
    net, x, runs = Net(forward, buffers, body=nn.Linear(4, 8), head=nn.Linear(8, 2)), torch.randn(5, 4), []
    (body,) = [one for one in zoo.trace_groups(net, [lambda: net(x)]) if one.name == "body"]
    dense = look_at_dense(net, lambda: net(x))
    assert unlike_masked(net, [body], lambda: runs.append(0) or net(x), None, dense) == [body]
    assert len(runs) == 2 + table
