"""Recurrent networks, and networks that are made by what they are trained for."""

import torch
from torch import nn
from torch.nn import functional as F


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.hidden, self.head = nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, tokens):
        x, _ = self.lstm(self.embedding(tokens))
        return self.head(F.relu(self.hidden(x)))


class RecurrentClassifier(nn.Module):
    """Two layers in both directions, of which the last states are read."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 16)
        self.gru = nn.GRU(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x):
        _, state = self.gru(F.relu(self.project(x)))
        return self.head(torch.cat([state[-2], state[-1]], -1))


class VariationalAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(24, 8), nn.Linear(24, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16))

    def forward(self, x):
        x = self.encoder(x)
        mean, log_variance = self.mean(x), self.log_variance(x)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return self.decoder(z), mean, log_variance

    def loss(self, x):
        out, mean, log_variance = self(x)
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1).mean()
        return F.mse_loss(out, x) + 0.01 * divergence


class Coupling(nn.Module):
    def __init__(self, features, hidden, flip):
        super().__init__()
        self.flip, half = flip, features // 2
        self.net = nn.Sequential(
            nn.Linear(half, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * half)
        )

    def forward(self, x):
        one, two = x.chunk(2, -1)
        if self.flip:
            one, two = two, one
        scale, shift = self.net(one).chunk(2, -1)
        scale = scale.tanh()
        two = two * scale.exp() + shift
        return torch.cat([two, one] if self.flip else [one, two], -1), scale.sum(-1)


class Flow(nn.Module):
    """Affine couplings: the density of the data is the loss."""

    def __init__(self):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(8, 24, bool(i % 2)) for i in range(3))

    def forward(self, x):
        volume = torch.zeros(len(x), device=x.device)
        for coupling in self.couplings:
            x, change = coupling(x)
            volume = volume + change
        return x, volume

    def loss(self, x):
        z, volume = self(x)
        return (0.5 * z.pow(2).sum(-1) - volume).mean()


class Siamese(nn.Module):
    """Two views through one encoder; what is compared is normalised over the channels."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.projection = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, one, two):
        return tuple(F.normalize(self.projection(self.encoder(view)), dim=-1) for view in (one, two))

    def loss(self, one, two):
        a, b = self(one, two)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a), device=a.device))
