"""Small networks, each for one way in which channels depend on each other; with an input that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from lightning_softprune.graph.components import assign_components
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.graph.groups import PruningGroup
from lightning_softprune.surgery import probe_groups


class Autoencoder(nn.Module):
    """A latent of four channels that a decoder and a classifier read."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 12), nn.Sigmoid())
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder(z), self.classifier(z)


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual addition, and a linear layer on the flattened maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.Conv2d(6, 9, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(9)
        self.down = nn.Conv2d(9, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4, 5)
        randomise_statistics(self)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.down(self.inner_norm(self.up(x)).relu())
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all before it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.second = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.third = nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(18, 3)
        randomise_statistics(self)

    def forward(self, x):
        x = self.first(x)
        x = torch.cat([x, self.second(x.relu())], 1)
        x = torch.cat([x, self.third(self.norm(x).relu())], 1)
        return self.head(x.mean((2, 3)))


class UnevenSplit(nn.Module):
    """One layer's channels are split into parts of unequal size, by the sizes of the layers that read them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 10)
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(7, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        left, right = self.body(x).split([self.left.in_features, self.right.in_features], 1)
        return self.head((self.left(left.relu()) + self.right(right.relu())).tanh())


class ChunkGate(nn.Module):
    """The second half of a layer's channels gates the first: they go in pairs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 12)
        self.inner = nn.Linear(6, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        value, gate = self.body(x).chunk(2, -1)
        return self.head(self.inner(value * gate.sigmoid()).relu())


class ChunkHeads(nn.Module):
    """Both halves of a layer's channels have a reader of their own: a half stays half only if they go in pairs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, x):
        left, right = self.body(x).chunk(2, 1)
        return self.left(left.relu()) + self.right(right.tanh())


class ChunkSwap(nn.Module):
    """The halves of a layer's channels change places."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        left, right = self.body(x).chunk(2, 1)
        return self.head(torch.cat([right, left], 1))


class DepthwiseSeparable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.pointwise(self.depthwise(self.stem(x).relu()).relu()).relu()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class GroupedConv(nn.Module):
    """Both sides of a grouped convolution lose the same channels in each of its parts."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        return self.head(self.grouped(self.stem(x).relu()).relu())


class TransposedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 6, 3, 2, 1)
        self.up = nn.ConvTranspose2d(6, 8, 4, 2, 1)
        self.grouped = nn.ConvTranspose2d(8, 4, 3, 1, 1, groups=2)
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.head(self.grouped(self.up(self.down(x).relu()).relu()).relu())


class LayerNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        randomise_statistics(self)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


class NormedMaps(nn.Module):
    """A LayerNorm over channels and positions, and one over time and channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.LayerNorm((6, 4, 4))
        self.body, self.over_time, self.head = nn.Linear(6, 5), nn.LayerNorm((16, 5)), nn.Linear(5, 2)
        randomise_statistics(self)

    def forward(self, x):
        h = self.body(self.norm(self.stem(x)).flatten(2).transpose(1, 2))
        return self.head(self.over_time(h.tanh()).relu())


class RMSNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 3)
        randomise_statistics(self)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


class GroupNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 12, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.head = nn.Conv2d(12, 2, 1)
        randomise_statistics(self)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


class ChannelNormed(nn.Module):
    """A GroupNorm of whose groups each is a channel."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(6, 6)
        self.head = nn.Conv2d(6, 2, 1)
        randomise_statistics(self)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


class InstanceNormed(nn.Module):
    """InstanceNorm with running statistics and weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.head = nn.Conv2d(6, 2, 1)
        randomise_statistics(self)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


class Attention(nn.Module):
    """Cross-free self-attention between two linear layers, with biases on keys and values."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.body(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Transformer(nn.Module):
    """An embedding tied to the output layer, a bare positional parameter and one encoder layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight
        randomise_statistics(self)

    def forward(self, tokens):
        return self.head(self.norm(self.layer(self.embedding(tokens) + self.position)))


class ClassToken(nn.Module):
    """A vision transformer's class token, joined to as many tokens as the channels are a multiple of."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.inner = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.body(x)], 1)
        return self.head(self.inner(x)[:, 0].relu())


class PReLUs(nn.Module):
    """PReLU with a slope per channel, and with one for all."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.many = nn.PReLU(8)
        self.inner = nn.Linear(8, 6)
        self.one = nn.PReLU()
        self.head = nn.Linear(6, 2)
        nn.init.uniform_(self.many.weight)

    def forward(self, x):
        return self.head(self.one(self.inner(self.many(self.body(x)))))


class Sequence(nn.Module):
    """Conv1d over (batch, channel, time), and a linear layer on the flattened sequence."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv1d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.inner = nn.Conv1d(6, 5, 3, padding=1)
        self.head = nn.Linear(5 * 7, 2)
        randomise_statistics(self)

    def forward(self, x):
        return self.head(self.inner(self.norm(self.body(x)).relu()).relu().flatten(1))


class Critic(nn.Module):
    """A latent state joined with a raw action, on both sides of it."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.q = nn.Linear(3 + 8 + 2, 10)
        self.head = nn.Linear(10, 1)

    def forward(self, x):
        z = self.encoder(x).relu()
        return self.head(self.q(torch.cat([x[..., :3], z, x[..., 3:5]], -1)).relu())


class Frozen(nn.Module):
    """A frozen backbone under a trained head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU()).requires_grad_(False)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


class Recurrent(nn.Module):
    """A GRU between linear layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.inner = nn.Linear(6, 5)
        self.gru = nn.GRU(5, 7, batch_first=True)
        self.after = nn.Linear(7, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.after(self.gru(self.inner(self.body(x).relu()))[0]).relu())


class WeightNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.normed = weight_norm(nn.Linear(6, 5))
        self.after = nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.after(self.normed(self.body(x).relu()).relu()).relu())


class DepthwiseMultiplier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.multiplied = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.enlarged = nn.ConvTranspose2d(8, 24, 2, stride=2, groups=8)
        self.inner = nn.Conv2d(24, 5, 1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.norm(self.multiplied(self.stem(x).relu())).relu()
        return self.head(self.inner(self.enlarged(x).relu()).relu())


class ConstantView(nn.Module):
    """A view with a constant: found only by running the model with fewer channels."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 12)
        self.inner = nn.Linear(12, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.body(x).view(-1, 3, 4).relu().flatten(1)
        return self.head(self.inner(x).relu())


class RawResidual(nn.Module):
    """A layer's output is added to the raw input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 9)
        self.back = nn.Linear(9, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head((x + self.back(self.body(x).relu())).relu())


class Unused(nn.Module):
    """Layers and parameters that no step runs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)
        self.spare = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head(self.body(x).relu())


class SharedLayer(nn.Module):
    """One layer called twice, and one under two names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.again(self.shared(self.body(x).relu()).relu()).relu())


class TornWeights(nn.Module):
    """One weight in two places that need other channels of it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.body.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.other(self.body(x).relu()).relu())


class OuterProduct(nn.Module):
    """An outer product of two widths, flattened, beside one of them."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(5, 4), nn.Linear(5, 3)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        one = self.one(x).relu()
        return self.head(torch.cat([one, torch.einsum("bi,bj->bij", one, self.other(x)).flatten(1)], 1))


@dataclass(frozen=True)
class Case:
    """A network of the zoo.

    ``groups``: its prunable groups with their channels, in the order in which they run. ``masked``: whether zeroing
    what reads a channel is the same as removing it (not so where a normalisation or a softmax mixes channels).
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, int]
    masked: bool = True

    @property
    def name(self) -> str:
        return self.build.__name__

    def make(self, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
        """Build the network, in eval mode, and an input."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().eval()
            return model, self.input()

    def input(self) -> torch.Tensor:
        return torch.randint(0, 11, self.shape) if self.build is Transformer else torch.randn(self.shape)


CASES = (
    Case(Autoencoder, (3, 12), {"encoder.0": 10, "encoder.2": 4, "decoder.0": 8}),
    Case(Residual, (3, 1, 4, 4), {"stem": 6, "up": 9}),
    Case(Dense, (3, 2, 4, 4), {"first": 4, "second": 6, "third": 8}),
    Case(UnevenSplit, (3, 6), {"body": 10, "left": 4}),
    Case(ChunkGate, (3, 5), {"body": 6, "inner": 7}),
    Case(ChunkGate, (3, 2, 5), {"body": 6, "inner": 7}),
    Case(ChunkHeads, (3, 5), {"body": 4}),
    Case(ChunkSwap, (3, 5), {"body": 4}),
    Case(DepthwiseSeparable, (3, 1, 5, 5), {"stem": 6, "pointwise": 8}),
    Case(GroupedConv, (3, 1, 5, 5), {"stem": 4, "grouped": 6}),
    Case(TransposedConv, (2, 1, 8, 8), {"down": 6, "up": 4, "grouped": 2}),
    Case(LayerNormed, (3, 5), {"body": 8}, masked=False),
    Case(RMSNormed, (3, 5), {"body": 8}, masked=False),
    Case(NormedMaps, (3, 2, 4, 4), {"stem": 6, "body": 5}, masked=False),
    Case(GroupNormed, (3, 2, 4, 4), {"body": 4}, masked=False),
    Case(ChannelNormed, (3, 2, 4, 4), {"body": 6}),
    Case(InstanceNormed, (3, 2, 4, 4), {"body": 6}),
    Case(Attention, (2, 5, 5), {"body": 12, "attention.heads": 3}),
    Case(Transformer, (2, 5), {"embedding": 8, "layer.self_attn.heads": 2, "layer.linear1": 16}, masked=False),
    Case(ClassToken, (2, 3, 5), {"body": 8, "inner": 6}),
    Case(PReLUs, (3, 5), {"body": 8, "inner": 6}),
    Case(Sequence, (3, 2, 7), {"body": 6, "inner": 5}),
    Case(Critic, (3, 6), {"encoder": 8, "q": 10}),
    Case(Critic, (3, 2, 6), {"encoder": 8, "q": 10}),
    Case(Frozen, (3, 5), {"backbone.0": 8, "backbone.2": 6}),
    Case(Recurrent, (2, 3, 4), {"body": 6, "inner": 5, "gru": 7, "after": 6}),
    Case(WeightNormed, (3, 4), {"body": 6, "normed": 5, "after": 6}),
    Case(DepthwiseMultiplier, (2, 1, 5, 5), {"stem": 4, "inner": 5}),
    Case(ConstantView, (3, 4), {"inner": 5}),
    Case(RawResidual, (3, 6), {"body": 9}),
    Case(Unused, (3, 4), {"body": 6}),
    Case(SharedLayer, (3, 4), {"body": 6}),
    Case(TornWeights, (3, 6), {}),
    Case(OuterProduct, (3, 5), {"one": 4, "other": 3}),
)
BY_NAME = {case.name: case for case in CASES}
PRUNABLE = tuple(case for case in CASES if case.groups)


def materialise(model: nn.Module) -> None:
    """Put parameters in the place of the weights that layers compute."""
    for module in list(model.modules()):
        if is_parametrized(module):
            weight = module.weight.detach().clone()
            del module.parametrizations
            module.__class__ = type(module).__mro__[1]  # its own class is shared with its copies
            module.weight = nn.Parameter(weight)


def randomise_statistics(model: nn.Module) -> None:
    """Give normalisation layers values that differ by channel."""
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5 if name != "bias" else -1.0, 1.5)


def find(
    model: nn.Module,
    x: torch.Tensor,
    components: dict[str, list[str]] | None = None,
    ignore: tuple[str, ...] | list[str] = (),
) -> list[PruningGroup]:
    """Trace, name and probe a model's groups."""

    def run() -> object:
        return model(x)

    traced = trace_groups(model, [run], ignore)
    return probe_groups(model, assign_components(model, traced, components), run)


def prunable(model: nn.Module, x: torch.Tensor) -> list[PruningGroup]:
    """The prunable groups of a model."""
    return [group for group in find(model, x) if group.prunable]
