"""Lookups of groups by name."""

from torch import nn

from support.zoo import BY_NAME, find


def by_name(groups):
    return {group.name: group for group in groups}


def groups_of(name, **kwargs):
    model, x = BY_NAME[name].make()
    return by_name(find(model, x, **kwargs))


def slots(group):
    return {str(member) for member in group.members}


class Wide(nn.Module):
    """Any layer between two linear ones."""

    def __init__(self, between, width=8, out=8):
        super().__init__()
        self.body = nn.Linear(5, width)
        self.between = between
        self.head = nn.Linear(out, 2)

    def forward(self, x):
        x = self.between(self.body(x))
        return self.head(x[0] if isinstance(x, tuple) else x)


class Attending(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **kwargs)

    def forward(self, x):
        return self.attention(x, x, x[..., : self.attention.vdim])[0]
