"""Each method of the literature against a statement of its paper."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.testing import check_strategy, mlp_space, plan_loss, steep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def channels(experiment):
    return experiment("baseline_methods.channels")


@pytest.fixture
def images():
    return torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network(experiment, images):
    """The residual classifier with statistics as after training, in eval mode."""
    torch.manual_seed(0)
    network = experiment("promise_networks").NETWORKS["residual"]()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -1.0, 1.0)
            nn.init.normal_(layer.bias)
            layer.momentum = 1.0
    network(images)
    return network.eval()


@pytest.fixture
def groups(channels, network, images):
    return channels.inner_groups(find_groups(network, (images[:4], torch.zeros(4, dtype=torch.long))))


def copied(network, group, source, target, factor=1.0, weak=1.0):
    """Whoever reads channel `target` sees `factor` times channel `source` now, from a filter that is `weak`."""
    producer, norm = (network.get_submodule(member.module) for member in group.members[:2])
    for tensor in (producer.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data[target] = tensor.data[source]
    producer.weight.data[target] *= weak
    norm.running_mean[target] *= weak
    norm.running_var[target] = (norm.running_var[source] + norm.eps) * weak**2 - norm.eps
    norm.weight.data[target] *= factor
    norm.bias.data[target] *= factor


def test_uniform_widths_remove_what_was_asked_for_without_touching_residual_streams(channels, network, images, groups):
    assert [group.name for group in groups] == [f"body.{block}.branch.0" for block in (3, 4, 5)]
    total = sum(p.numel() for p in network.parameters())
    channels.prune_by_norm(network, groups, channels.uniform_widths(network, groups, 0.5))
    assert 1 - sum(p.numel() for p in network.parameters()) / total == pytest.approx(0.5, abs=0.01)
    assert network(images).shape == (32, 10)


def test_after_repair_channels_have_the_mean_and_deviation_of_the_dense_network(
    experiment, channels, network, images, groups
):
    method = experiment("baseline_methods.repair")
    targets = method.channel_moments(network, images)
    kept = channels.prune_by_norm(network, groups, [8, 16, 32])
    for group, matrix in zip(groups, kept, strict=True):
        name = group.members[1].module
        targets[name] = targets[name].mapped(matrix)
    last = list(targets)[-1]
    assert not torch.allclose(method.channel_moments(network, images)[last].mean, targets[last].mean, atol=0.01)
    method.repair(network, targets, images)
    for name, found in method.channel_moments(network, images).items():
        torch.testing.assert_close(found.mean, targets[name].mean, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(found.deviation, targets[name].deviation, atol=2e-4, rtol=1e-3)


def test_folding_changes_nothing_where_only_copies_are_merged(experiment, channels, network, images, groups):
    pytest.importorskip("sklearn")
    method, before = experiment("baseline_methods.folding"), network(images)
    method.fold(network, groups, [group.num_channels for group in groups], seed=0)  # each channel its own cluster
    torch.testing.assert_close(network(images), before)
    copied(network, groups[0], 2, 5)
    copied(network, groups[0], 2, 9)
    before = network(images)
    method.fold(network, groups[:1], [14], seed=0)
    assert channels.producer(network, groups[0]).out_channels == 14
    torch.testing.assert_close(network(images), before)


def test_grail_is_exact_where_removed_channels_depend_on_kept_ones(experiment, channels, network, images, groups):
    method, group = experiment("baseline_methods.grail"), groups[0]
    copied(network, group, 2, 5, factor=0.5, weak=0.1)  # what has the smallest norms goes
    copied(network, group, 3, 9, factor=2.0, weak=0.1)
    before, plain = network(images), copy.deepcopy(network)
    channels.prune_by_norm(plain, [group], [14])
    method.prune_and_rebuild(network, [group], [14], method.gram_matrices(network, [group], images), ridge=1e-12)
    assert (network(images) - before).norm() < 1e-3 * (plain(images) - before).norm()


def test_torch_prunings_modes_reach_the_count(experiment, network, images, groups):
    pytest.importorskip("torch_pruning")
    method = experiment("baseline_methods.torch_pruning_modes")
    total = sum(p.numel() for p in network.parameters())
    last = next(name for name, layer in network.named_modules() if isinstance(layer, nn.Linear))
    smaller = method.pruned_by_mode(network, "global", 0.5, images[:1], [last])
    assert 1 - sum(p.numel() for p in smaller.parameters()) / total == pytest.approx(0.5, abs=0.01)
    assert sum(p.numel() for p in network.parameters()) == total


def test_the_threshold_takes_of_every_group_what_costs_no_more_alone(experiment):
    strategy = experiment("baseline_methods.threshold").ThresholdSearch(levels=8)
    check_strategy(strategy)
    space = mlp_space([64, 32, 32, 32, 10], target=0.5)
    loss = plan_loss(space, steep([1.0, 0.3, 2.0]))
    strategy.start(space, 0)
    while (x := strategy.ask()) is not None:
        strategy.tell(loss(x))
        last = x
    assert space.on_target(last)
    alone = [loss(np.where(np.arange(3) == i, last, 0.0)) - loss(np.zeros(3)) for i in range(3)]
    assert max(alone) < 1.3 * min(alone)  # equal, up to a channel and to what is between scored widths
