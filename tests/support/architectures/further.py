"""Networks of kinds of their own: branches, dilations, spectra, scans, graphs, and products of two views."""

import torch
from torch import nn
from torch.nn import functional as F


class Branches(nn.Module):
    """HRNet: maps of two sizes side by side, each given what the other has found."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.blocks = nn.ModuleList([nn.Conv2d(12, 12, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)])
        self.up, self.down = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.head = nn.Conv2d(28, 5, 1)

    def forward(self, x):
        fine = F.relu(self.fine(x))
        coarse = F.relu(self.coarse(fine))
        fine, coarse = (F.relu(x + block(x)) for x, block in zip((fine, coarse), self.blocks, strict=True))
        size = fine.shape[-2:]
        fine, coarse = (
            F.relu(fine + F.interpolate(self.up(coarse), size=size, mode="bilinear")),
            F.relu(coarse + self.down(fine)),
        )
        return self.head(torch.cat([fine, F.interpolate(coarse, size=size)], 1))


class WaveNet(nn.Module):
    """Gates behind dilated convolutions; what each block adds is skipped to the end."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv1d(2, 12, 1)
        self.filters = nn.ModuleList(nn.Conv1d(12, 32, 2, dilation=2**i) for i in range(3))
        self.back = nn.ModuleList(nn.Conv1d(16, 12, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(16, 20, 1) for _ in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(20, 20, 1), nn.ReLU(), nn.Conv1d(20, 3, 1))

    def forward(self, x):
        x, total = self.inner(x), 0
        for i, (gated, back, skip) in enumerate(zip(self.filters, self.back, self.skips, strict=True)):
            value, gate = gated(F.pad(x, (2**i, 0))).chunk(2, 1)
            value = value.tanh() * gate.sigmoid()
            x, total = x + back(value), total + skip(value)
        return self.head(total)


class FourierOperator(nn.Module):
    """Complex weights mix the channels of the lowest frequencies; the others are zeros that are left."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(2, 12)
        self.weights = nn.ParameterList(nn.Parameter(0.2 * torch.randn(12, 12, 4, dtype=torch.cfloat)) for _ in "ab")
        self.beside = nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in "ab")
        self.project = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 1))

    def forward(self, x):
        x = self.lift(x).transpose(1, 2)
        for weight, beside in zip(self.weights, self.beside, strict=True):
            spectrum = torch.fft.rfft(x)
            mixed = torch.zeros(len(x), weight.shape[1], spectrum.shape[-1], dtype=spectrum.dtype, device=x.device)
            mixed[:, :, :4] = torch.einsum("bim,iom->bom", spectrum[:, :, :4], weight)
            x = F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + beside(x))
        return self.project(x.transpose(1, 2))


class SelectiveScan(nn.Module):
    """Mamba: a state whose decay depends on the input, step by step."""

    def __init__(self, width=12, inner=24, state=4, rank=3):
        super().__init__()
        self.rank, self.state = rank, state
        self.embed, self.norm = nn.Linear(3, width), nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select, self.step = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.decay = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out, self.head = nn.Linear(inner, width, bias=False), nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        u, gate = self.inner(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, write, read = self.select(u).split([self.rank, self.state, self.state], -1)
        step = F.softplus(self.step(step))
        kept = (step[..., None] * -self.decay.exp()).exp()
        new = step[..., None] * write[:, :, None] * u[..., None]
        state, found = torch.zeros_like(new[:, 0]), []
        for t in range(x.shape[1]):
            state = kept[:, t] * state + new[:, t]
            found.append((state * read[:, t, None]).sum(-1))
        y = torch.stack(found, 1) + u * self.skip
        return self.head(x + self.out(y * F.silu(gate)))


class GraphAttention(nn.Module):
    """Messages along the edges of a graph, weighed by each head and summed where they arrive."""

    def __init__(self, heads=4, width=16):
        super().__init__()
        self.heads = heads
        self.nodes = nn.Linear(5, width)
        self.sends, self.takes = (nn.Parameter(torch.randn(heads, width // heads)) for _ in "st")
        self.out, self.head = nn.Linear(width, 12), nn.Linear(12, 5)
        edges = torch.arange(9)
        self.register_buffer(
            "edges", torch.stack([torch.cat([edges, edges]), torch.cat([edges.roll(1), edges.roll(4)])])
        )

    def forward(self, x):
        source, target = self.edges
        z = self.nodes(x).unflatten(-1, (self.heads, -1))
        sent, taken = (z * self.sends).sum(-1), (z * self.takes).sum(-1)
        weight = F.leaky_relu(sent[:, source] + taken[:, target]).exp()
        total = torch.zeros_like(sent).index_add(1, target, weight)
        weight = (weight / total[:, target])[..., None]
        arrived = torch.zeros_like(z).index_add(1, target, weight * z[:, source])
        return self.head(F.elu(self.out(arrived.flatten(2))))


class BilinearPooling(nn.Module):
    """Every channel of one view times every channel of the other, averaged over the image."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 8, 3)
        self.head = nn.Sequential(nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x):
        one, other = F.relu(self.one(x)).flatten(2), F.relu(self.other(x)).flatten(2)
        return self.head((one @ other.transpose(1, 2) / one.shape[-1]).flatten(1))
