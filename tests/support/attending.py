"""A network that keeps counts of its channels and a positional encoding, and its groups, written by hand."""

import copy

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from lightning_softprune.graph.groups import Count, Member, PruningGroup

WIDTH, HEADS, HEAD_DIM, LENGTH, FEATURES = 12, 4, 3, 10, 5
KINDS = ("buffer", "temporary buffer", "plain attribute")


class Attention(nn.Module):
    """As many write it: heads and their total width are attributes, which `view` is called with."""

    def __init__(self, width=WIDTH, heads=HEADS):
        super().__init__()
        self.num_heads, self.all_head_size = heads, heads * HEAD_DIM
        self.q, self.k, self.v = (nn.Linear(width, self.all_head_size) for _ in range(3))
        self.out = nn.Linear(self.all_head_size, width)

    def heads_of(self, x):
        return x.view(*x.shape[:2], self.num_heads, self.all_head_size // self.num_heads).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads_of(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], self.all_head_size))


class Position(nn.Module):
    """Adds a fixed encoding: random, so that no two modules have the same."""

    def __init__(self, kind, width=WIDTH, length=LENGTH):
        super().__init__()
        pe = torch.randn(1, length, width)
        if kind == "plain attribute":
            self.pe = pe
        else:
            self.register_buffer("pe", pe, persistent=kind == "buffer")

    def forward(self, x):
        return x + self.pe[:, : x.shape[1]]


class LatePosition(nn.Module):
    """Makes its encoding when it is first needed."""

    def __init__(self, known=True):
        super().__init__()
        if known:
            self.pe = None

    def forward(self, x):
        if getattr(self, "pe", None) is None:
            self.pe = torch.randn(1, LENGTH, x.shape[-1])
        return x + self.pe[:, : x.shape[1]]


class Reader(pl.LightningModule):
    """Embeds, adds positions, attends and reads."""

    def __init__(self, kind="buffer", heads=HEADS):
        super().__init__()
        self.save_hyperparameters()
        self.d_model = WIDTH
        self.sizes = WIDTH + heads * HEAD_DIM
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.pos = LatePosition(kind == "late") if kind.startswith("late") else Position(kind)
        self.attn = Attention(heads=heads)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.pos(self.embed(x))
        return self.head((x + self.attn(x)).relu())

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - 1).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", (self(batch[0]) - 1).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def group(name, owner, *slots, counts=(), **fields):
    owner = np.asarray(owner)
    members = tuple(Member(*slot, owner) for slot in slots)
    return PruningGroup(name, name, "intra", int(owner.max()) + 1, members, counts=counts, **fields)


def groups_of_reader(heads=HEADS, width=WIDTH):
    """The width that embedding, positions and attention share; and the heads. Both count in `sizes`."""
    return [
        group(
            "embed",
            np.arange(width),
            *(("embed", "out"), ("pos.pe", "dim2"), ("attn.q", "in"), ("attn.k", "in"), ("attn.v", "in")),
            *(("attn.out", "out"), ("head", "in")),
            counts=(Count("", "d_model", 1), Count("", "sizes", 1)),
        ),
        group(
            "attn.q",
            np.arange(heads).repeat(HEAD_DIM),
            *(("attn.q", "out"), ("attn.k", "out"), ("attn.v", "out"), ("attn.out", "in")),
            counts=(
                Count("attn", "num_heads", 1),
                Count("attn", "all_head_size", HEAD_DIM),
                Count("", "sizes", HEAD_DIM),
            ),
        ),
    ]


def masked_reader(model, plan):
    """The same network with zeros in the weights that read removed channels."""
    model = copy.deepcopy(model)
    width, heads = (list(channels) for channels in plan.removed)
    columns = [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]
    with torch.no_grad():
        for layer in (model.attn.q, model.attn.k, model.attn.v, model.head):
            layer.weight[:, width] = 0
        model.attn.out.weight[:, columns] = 0
    return model


def made_reader(kind="buffer", seed=0, **arguments):
    torch.manual_seed(seed)
    return Reader(kind, **arguments)


def sequences(seed=1, count=3, length=7):
    return torch.randn(count, length, FEATURES, generator=torch.Generator().manual_seed(seed))
