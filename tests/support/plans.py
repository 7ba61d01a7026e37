"""Plans, snapshots of models, and optimizers with their masked counterparts."""

import numpy as np
import torch
from torch.nn import functional as F

from lightning_softprune.search.plan import Plan


def random_plan(groups, seed, keep=1):
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(1, max(group.num_channels - keep, 1) + 1)) for group in groups]
    return Plan.from_counts(counts, [rng.permutation(group.num_channels) for group in groups])


def plan_for(groups, **removed):
    """A plan by group name (dots as underscores)."""
    return Plan(tuple(removed.get(group.name.replace(".", "_"), ()) for group in groups))


def outputs(result):
    return torch.cat([tensor.flatten() for tensor in (result if isinstance(result, tuple) else (result,))])


def snapshot(model):
    """Every object a module tree holds, and the values of its tensors."""
    held = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            held[name, key] = value if isinstance(value, (int, float, tuple, str, bool)) else id(value)
        for kind in (module._parameters, module._buffers, module._modules):
            for key, value in kind.items():
                held[name, "held", key] = id(value)
    tensors = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return held, tensors


def assert_same(model, before):
    held, tensors = snapshot(model)
    assert held == before[0]
    assert tensors.keys() == before[1].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name]), name


def batches(name, count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shape = (16, 12) if name == "Autoencoder" else (16, 1, 4, 4)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def loss_of(model, x):
    result = model(x)
    if isinstance(result, tuple):
        target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return F.mse_loss(result[0], x.sigmoid()) + F.cross_entropy(result[1], target)
    return F.cross_entropy(result, (x.sum((1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long())


def step(model, optimizer, x, mask=None):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        if mask:
            for name, parameter in model.named_parameters():
                parameter.grad.mul_(mask[name])
        return loss

    loss = optimizer.step(closure)
    if mask:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(mask[name])
    return loss.item()


def two_groups(model):
    """Parameters with and without weight decay."""
    large = [p for p in model.parameters() if p.ndim > 1]
    small = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": large, "weight_decay": 0.05}, {"params": small}]


ELEMENTWISE = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}


def live(optimizer):
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
