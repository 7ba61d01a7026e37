"""A small ViT and a small decoder, trained, without half of their heads and MLP units, without fine-tuning.

    python tests/benchmarks/attention.py [--seeds 3] [--epochs 30]

The ViT reads scikit-learn's digits in patches of 2 x 2. The decoders have two query heads to a key/value head: one
reads the same patches, causally, and names the digit behind the last one; the other predicts the next character of the
descriptions of scikit-learn's data sets. Held-out windows of that small text overlap with those it was trained on, so
that it partly learns the text by heart.

"Half" takes half of the heads and units of every layer; "searched" lets the default search take as many parameters
where they cost least. A third of the held-out data scores plans; accuracies are those of the rest, which no plan has
seen.
"""

import argparse
import copy
import logging
import warnings

import lightning as L
import torch
from sklearn import datasets
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import SensitivitySearch, UniformBaseline, find_groups, prune

WIDTH, HEADS, DEPTH = 64, 8, 2
KINDS = ("ViT", "digits decoder", "text decoder")


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.causal = HEADS, HEADS // 2 if causal else HEADS, causal
        self.head_dim = WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * self.num_kv_heads * self.head_dim)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(causal)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(L.LightningModule):
    def __init__(self, embed, length, classes, kind):
        super().__init__()
        causal = kind != "ViT"
        self.embed, self.position = embed, nn.Parameter(0.02 * torch.randn(length, WIDTH))
        self.blocks = nn.Sequential(*(Block(causal) for _ in range(DEPTH)))
        self.norm, self.head, self.kind = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes), kind

    def forward(self, x):
        x = self.norm(self.blocks(self.embed(x) + self.position))
        if self.kind == "text decoder":
            return self.head(x)
        return self.head(x.mean(1) if self.kind == "ViT" else x[:, -1])

    def loss(self, batch):
        out = self(batch[0])
        self.log("accuracy", (out.argmax(-1) == batch[1]).float().mean())
        return F.cross_entropy(out.flatten(0, -2), batch[1].flatten())

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def digits():
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4) / 16
    data = TensorDataset(images, torch.tensor(labels))
    return *torch.utils.data.random_split(data, [1200, 597], torch.Generator().manual_seed(0)), 10


def text():
    loaders = (datasets.load_iris, datasets.load_wine, datasets.load_digits, datasets.load_diabetes)
    characters = "".join(load().DESCR for load in (*loaders, datasets.load_breast_cancer, datasets.load_linnerud))
    known = sorted(set(characters))
    codes = torch.tensor([known.index(character) for character in characters])
    windows = codes.unfold(0, 33, 8)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    train, held = windows[order[len(order) // 8 :]], windows[order[: len(order) // 8]]
    return *(TensorDataset(part[:, :-1], part[:, 1:]) for part in (train, held)), len(known)


def accuracy(module, data):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return trainer.validate(module, DataLoader(data, 256), verbose=False)[0]["accuracy"]


def trained(kind, seed, epochs, train, classes):
    L.seed_everything(seed, verbose=False)
    embed = nn.Embedding(classes, WIDTH) if kind == "text decoder" else nn.Linear(4, WIDTH)
    module = Transformer(embed, 32 if kind == "text decoder" else 16, classes, kind)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    return module


def pruned(module, train, scored, **settings):
    """The fraction of parameters that went, and what is left of each group."""
    before = sum(p.numel() for p in module.parameters())
    result = prune(
        module,
        train_dataloaders=DataLoader(train, 64),
        val_dataloaders=DataLoader(scored, 256),
        monitor="val_loss",
        calibration_batches=16,
        report=False,
        verbose=False,
        **settings,
    )
    return 1 - sum(p.numel() for p in module.parameters()) / before, result.groups


def run(kind, seed, epochs):
    train, rest, classes = text() if kind == "text decoder" else digits()
    scored, held = torch.utils.data.random_split(rest, [1 / 3, 2 / 3], torch.Generator().manual_seed(1))
    dense = trained(kind, seed, epochs, train, classes)
    inner = [g for g in find_groups(dense, next(iter(DataLoader(held, 8)))) if g.prunable and g.name != "embed"]
    assert len([g for g in inner if "attention" in g.name]) == DEPTH
    kept_embed = {"embed": [0.0, 0.0]}
    halves = {**kept_embed, **{g.name: [0.5, 0.5] for g in inner}}
    row, gone, groups = [kind, seed, f"{accuracy(dense, held):.3f}"], 0.0, ()
    for compensation, importance in (("none", "activation"), ("least_squares", "reconstruction")):
        module = copy.deepcopy(dense)
        how = {"compensation": compensation, "importance": importance, "bounds": halves, "search": UniformBaseline()}
        gone, groups = pruned(module, train, scored, target_sparsity=0.35, tolerance=0.2, **how)
        kept = {g.name: g.channels_after / g.channels_before for g in groups}
        assert all(abs(kept[g.name] - 0.5) < 0.01 for g in inner)
        row += [f"{accuracy(module, held):.3f}"]
    module = copy.deepcopy(dense)
    how = {"importance": "reconstruction", "bounds": kept_embed, "search": SensitivitySearch()}
    searched, groups = pruned(module, train, scored, target_sparsity=gone, tolerance=0.01, **how)
    kept = ", ".join(f"{g.channels_after}/{g.channels_before}" for g in groups if g.name != "embed")
    row += [f"{gone:.0%}", f"{accuracy(module, held):.3f}", f"{searched:.0%}", kept]
    print("|", " | ".join(map(str, row)), "|", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    columns = ["network", "seed", "dense", "half, none", "half, least squares", "parameters removed"]
    columns += ["searched", "parameters removed", "heads and units kept"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for kind in KINDS if given.kind == "all" else (given.kind,):
        for seed in range(given.seeds):
            run(kind, seed, given.epochs)


if __name__ == "__main__":
    main()
