"""Networks of convolutions as users write them, small: what couples their channels is what matters, not their size."""

import torch
from torch import nn
from torch.nn import functional as F


def conv_norm(inputs, outputs, kernel=3, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 5)
        )

    def forward(self, x):
        return self.layers(x)


class ResidualBlock(nn.Module):
    """`shortcut`: ``"projection"``, or ``"padding"`` with zeros as ResNets for CIFAR have it."""

    def __init__(self, inputs, outputs, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.shortcut = None
        if inputs != outputs and shortcut == "projection":
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ResNet(nn.Module):
    def __init__(self, shortcut="projection"):
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.layer1 = ResidualBlock(8, 8, 1, shortcut)
        self.layer2 = ResidualBlock(8, 16, 2, shortcut)
        self.layer3 = ResidualBlock(16, 32, 2, shortcut)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = torch.cat(features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.block = nn.ModuleList(DenseLayer(8 + 6 * i, 6) for i in range(3))
        self.norm = nn.BatchNorm2d(26)
        self.classifier = nn.Linear(26, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.block:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.classifier(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, expand, stride=1):
        super().__init__()
        hidden = inputs * expand
        self.joined = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.conv(x) if self.joined else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 8), InvertedResidual(8, 8, 2), InvertedResidual(8, 12, 3, 2), InvertedResidual(12, 12, 3)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(12, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = conv_norm(3, 8), conv_norm(8, 16)
        self.middle = conv_norm(16, 24)
        self.up2, self.merge2 = nn.ConvTranspose2d(24, 16, 2, 2), conv_norm(32, 16)
        self.up1, self.merge1 = nn.ConvTranspose2d(16, 8, 2, 2), conv_norm(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.middle(F.max_pool2d(two, 2))
        x = self.merge2(torch.cat([self.up2(x), two], 1))
        x = self.merge1(torch.cat([self.up1(x), one], 1))
        return self.head(x)


class InceptionBlock(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.one = conv_norm(inputs, 6, 1)
        self.three = nn.Sequential(conv_norm(inputs, 4, 1), conv_norm(4, 8, 3))
        self.five = nn.Sequential(conv_norm(inputs, 2, 1), conv_norm(2, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(inputs, 4, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.blocks = nn.Sequential(InceptionBlock(8), InceptionBlock(22))
        self.fc = nn.Linear(22, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def channel_shuffle(x, groups):
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half are worked on; then they are shuffled."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_norm(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_norm(half, half, 1),
        )

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((left, self.branch(right)), dim=1), 2)


class ShuffleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.units = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16))
        self.conv5 = conv_norm(16, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(self.conv5(self.units(self.stem(x))).mean([2, 3]))


class SuperResolution(nn.Module):
    """Sub-pixel convolution: channels become positions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 8 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = x + F.relu(self.conv2(x))
        return self.out(F.relu(self.shuffle(self.conv3(x))))


class GatedConv(nn.Module):
    """Gated linear units along time."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv1d(4, 16, 1)
        self.convs = nn.ModuleList(nn.Conv1d(16, 32, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x)
        for conv in self.convs:
            x = (x + F.glu(conv(x), dim=1)) * 0.5**0.5
        return self.head(x.mean(-1))


class Gates(nn.Module):
    """CBAM: a gate per channel from pooled maps, then a gate per position from the channels' mean and maximum."""

    def __init__(self, channels, reduction=4):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, channels // reduction), nn.ReLU(),
            nn.Linear(channels // reduction, channels),
        )  # fmt: skip
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        pooled = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * pooled.sigmoid()[:, :, None, None]
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial(maps).sigmoid()


class GatedResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.conv1, self.gates1 = conv_norm(16, 16), Gates(16)
        self.conv2, self.gates2 = conv_norm(16, 32), Gates(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.gates1(self.conv1(x))
        return self.fc(self.gates2(self.conv2(x)).mean((2, 3)))
