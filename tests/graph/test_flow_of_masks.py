"""Masks over tensors of channels: one that is the same for all of them picks and writes whole rows."""

import pytest
import torch
from torch import nn

from support.masked import Net, check


def rows_of(x):
    """Some rows are wanted: a mask without channels, and the same with a dimension for them."""
    rows = (torch.arange(x.shape[1]) % 3 > 0).expand(x.shape[:2])
    return rows, rows[..., None]


def picked(net, x):
    _, mask = rows_of(x)
    x = net.body(x)
    return x[mask.tile(1, 1, x.shape[-1])].view(len(x), -1, x.shape[-1])


def selected(net, x):
    _, mask = rows_of(x)
    x = net.body(x)
    return x.masked_select(mask).view(-1, x.shape[-1])


def scattered(net, x):
    rows, mask = rows_of(x)
    into, other = net.body(x), net.other(x[rows])
    return into.masked_scatter(mask.expand_as(into), other)


def put(net, x):
    rows, mask = rows_of(x)
    into, other = net.body(x).clone(), net.other(x[rows])
    into[mask.expand_as(into)] = other.flatten()
    return into


def put_into_a_token(net, x):
    rows, mask = rows_of(x)
    found = net.body(x[rows])
    into = net.token.repeat(*x.shape[:2], 1)
    into[mask.expand_as(into)] = found.flatten()
    return into


@pytest.mark.parametrize("how", [picked, selected, scattered, put, put_into_a_token])
def test_a_mask_over_whole_rows_leaves_channels_free(how):
    parts = {"body": nn.Linear(4, 6), "head": nn.Linear(6, 2)}
    parts |= {"other": nn.Linear(4, 6)} if how in (scattered, put) else {}
    parts |= {"token": nn.Parameter(torch.randn(6))} if how is put_into_a_token else {}
    net = Net(lambda net, x: net.head(how(net, x)), **parts)
    found = {member.module for member in check(net, torch.randn(2, 6, 4), {"body": 6})["body"].members}
    assert found == parts.keys()


@pytest.mark.parametrize(
    "how",
    [
        lambda x, mask: x[mask],
        lambda x, mask: x.masked_select(mask),
        lambda x, mask: x.masked_scatter(mask, torch.arange(x.numel()) / 9),
        lambda x, mask: x.index_put((mask,), torch.arange(int(mask.sum())) / 9),
    ],
    ids=["index", "select", "scatter", "put"],
)
@pytest.mark.parametrize("of_channels", [True, False])
def test_a_mask_that_tells_channels_apart_refuses_them(how, of_channels):
    def forward(net, x):
        x = net.body(x)
        mask = (x > 0) if of_channels else (torch.arange(6) % 2 == 0).expand(x.shape)
        return how(x, mask).sum() + net.head(x)

    net = Net(forward, body=nn.Linear(4, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(2, 3, 4), {}, {"body": ""})


def test_rows_of_a_fixed_width_fix_what_they_are_written_into():
    def forward(net, x):
        into = net.body(x)
        rows, mask = rows_of(x)
        return net.head(into.masked_scatter(mask.expand_as(into), x[rows].repeat(1, 2)))

    net = Net(forward, body=nn.Linear(3, 6), head=nn.Linear(6, 2))
    check(net, torch.randn(2, 6, 3), {}, {"body": "writes into a fixed width"})


def test_a_mask_of_rows_picks_from_a_parameter_whose_rows_have_a_place():
    """As masked autoencoders pick from their positions: the mask is made of numbers, and one for all samples."""

    def forward(net, x):
        rows, _ = rows_of(x)
        picked = net.up(net.body(x)[rows].reshape(len(x), -1, net.up.in_features))
        places = net.places.expand(len(x), -1, -1)[rows]
        return net.head(picked + places.reshape(len(x), -1, net.places.shape[-1]))

    parts = {"body": nn.Linear(4, 5), "up": nn.Linear(5, 8), "head": nn.Linear(8, 2)}
    net = Net(forward, places=nn.Parameter(torch.randn(1, 6, 8)), **parts)
    groups = check(net, torch.randn(2, 6, 4), {"body": 5, "up": 8})
    assert {member.module for member in groups["up"].members} == {"up", "places", "head"}
