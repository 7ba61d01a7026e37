"""Averages and fixed teachers outside of a model are told apart by what their values do."""

import copy

import pytest
import torch
from torch import nn

from lightning_softprune.surgery import Judgement, Sightings


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


class Owner:
    def __init__(self, kept):
        self.kept = kept


def moved(module, by=0.1):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter) * parameter.std())
    return module


def judged(first, then, *, step=0, later=10):
    """What becomes of a module that the first function makes of a model, and the second one changes in training."""
    model, sightings = network(0), Sightings()
    outside = first(model)
    owner = Owner([outside])
    sightings.look(model, [("owner", owner)], (), step)
    moved(model)
    then(outside)
    sightings.look(model, [("owner", owner)], (), later)
    return sightings.judged(model, later)[id(outside)]


def rests(module):
    pass


def an_average(model):
    return moved(copy.deepcopy(model))


def foreign(model):
    return network(1)


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("first", [copy.deepcopy, an_average])
def test_what_changes_and_is_like_the_model_is_an_average(first, step):
    assert judged(first, moved, step=step) is Judgement.FOLLOWS


@pytest.mark.parametrize(("step", "later"), [(0, 0), (0, 10), (5, 5), (5, 10)])
def test_what_is_unlike_the_model_and_rests_is_a_teacher(step, later):
    assert judged(foreign, rests, step=step, later=later) is Judgement.STAYS


def test_what_is_somewhat_like_the_model_from_the_start_and_rests_while_it_trains_is_a_teacher():
    assert judged(an_average, rests) is Judgement.STAYS


@pytest.mark.parametrize(("step", "later"), [(0, 0), (5, 5), (5, 10)], ids=["epoch 0", "resumed", "resumed before"])
def test_an_average_that_a_checkpoint_has_brought_may_not_have_moved_yet(step, later):
    assert judged(an_average, rests, step=step, later=later) is Judgement.IN_DOUBT


@pytest.mark.parametrize("later", [0, 10])
def test_a_copy_that_rests_may_be_either(later):
    assert judged(copy.deepcopy, rests, later=later) is Judgement.IN_DOUBT


def test_what_is_trained_beside_the_model_may_be_either():
    assert judged(foreign, moved) is Judgement.IN_DOUBT


def test_what_came_from_elsewhere_and_has_come_near_is_an_average():
    def follow(module):
        module.load_state_dict(network(0).state_dict())

    assert judged(foreign, follow) is Judgement.FOLLOWS


def test_zeros_that_something_is_to_be_added_to_are_no_teacher():
    def zeros(model):
        return nn.Sequential(*copy.deepcopy(model)).apply(lambda part: [p.data.zero_() for p in part.parameters()])

    assert judged(zeros, rests, later=0) is Judgement.IN_DOUBT


def test_looking_changes_nothing_and_knows_the_model_itself():
    model, sightings = network(0), Sightings()
    owner = Owner(
        {"model": model, "table": dict(model.named_parameters()), "list": [p.detach() for p in model.parameters()]}
    )
    kept = {name: (id(value), type(value)) for name, value in owner.kept.items()}
    sightings.look(model, [("owner", owner)], (), 0)
    assert not sightings.judged(model, 1)
    assert kept == {name: (id(value), type(value)) for name, value in owner.kept.items()}


def test_a_copy_is_judged_as_a_whole():
    model, sightings = network(0), Sightings()
    outside = an_average(model)
    wrapped = nn.ModuleDict({"average": outside, "probe": nn.Linear(3, 3)})
    sightings.look(model, [("owner", Owner([wrapped]))], (), 0)
    assert sightings.judged(model, 10).keys() == {id(outside)}
