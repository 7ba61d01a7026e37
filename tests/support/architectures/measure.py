"""What becomes of an architecture: how much of it can be pruned, and what works afterwards."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_softprune import PruningGroup, UniformBaseline, find_groups, prune, record, resize
from lightning_softprune.graph import record_usage
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.architectures.table import Architecture, Task

QUERIES = re.compile(r"(^|\.)(q|k|v|qkv|query|key|value|c_attn|[qkv]_(proj|lin)|to_[qkv])$")
"""Names of layers that make queries, keys and values."""


@contextlib.contextmanager
def quietly():
    """No warnings and no notes of libraries."""
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "torch.onnx", "onnxscript")}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def groups_of(task: Task, architecture: Architecture) -> list[PruningGroup]:
    return find_groups(task, architecture.batch())


def only_prunable(groups):
    return [group for group in groups if group.prunable]


def share_in_groups(task: Task, architecture: Architecture, groups) -> float:
    """The part of the parameters that validation uses whose tensors some prunable group slices."""
    with record_usage(task) as used, torch.no_grad():
        task.loss(architecture.batch())
    named = dict(task.named_parameters())
    judged = {id(named[name]): named[name].numel() for name in used.parameters if name in named}
    removable = [group for group in only_prunable(groups) if group.num_channels > 1]
    surgery = apply_plan(task, removable, Plan(((0,),) * len(removable)))
    surgery.undo()
    return sum(judged.get(id(old), 0) for old, *_ in surgery.parameters) / sum(judged.values())


def head_groups(architecture: Architecture, groups) -> tuple[int, int]:
    """How many prunable groups remove whole heads, and how many a dimension of every head."""
    heads = dimensions = 0
    for group in only_prunable(groups):
        counted = any("head" in count.attribute and count.per_channel == 1 for count in group.counts)
        counted = counted or any(member.slot == "heads" for member in group.members)  # of PyTorch's own layer
        makers = [m for m in group.members if m.slot == "out" and QUERIES.search(m.module)]
        runs = [_longest_run(np.flatnonzero(member.owner == 0)) for member in makers]
        if counted or (runs and architecture.head and max(runs) >= architecture.head):
            heads += 1
        elif runs:
            dimensions += 1
    return heads, dimensions


def _longest_run(indices) -> int:
    breaks = np.flatnonzero(np.diff(indices) != 1)
    return int(max(np.diff([-1, *breaks, len(indices) - 1]))) if len(indices) else 0


def largest_left_out(task: Task, groups) -> str:
    """The largest of the groups that are left alone, but for the network's outputs, with its reason."""
    tensors = dict(task.named_parameters())

    def size(group) -> int:
        names = {member.module for member in group.members}
        return sum(tensor.numel() for name, tensor in tensors.items() if {name, name.rpartition(".")[0]} & names)

    outputs = "produces an output of the network"
    left = [group for group in groups if not group.prunable and outputs not in group.reason]
    if not left:
        return "only outputs"
    group = max(left, key=size)
    return f"{group.name.removeprefix('net.')}: {group.reason.replace('net.', '')}"


def pruned(architecture: Architecture, target: float = 0.5, tolerance: float = 0.05, **arguments) -> tuple[Task, float]:
    """A module that was pruned by the same coefficient everywhere: at this sparsity, or the highest that can be had.

    Returns:
        The module, in eval mode, and the sparsity that was reached.
    """
    task = architecture.make()
    how = {"search": UniformBaseline(), "calibration_batches": 1, "report": False, "verbose": False, **arguments}
    try:
        result = prune(task, **architecture.loaders(), target_sparsity=target, tolerance=tolerance, **how)
    except MisconfigurationException as error:
        nearest = re.search(r"target_sparsity: .*?(0\.\d+)\D*$", str(error).splitlines()[0])
        if nearest is None or float(nearest[1]) >= target:
            raise
        return pruned(architecture, float(nearest[1]), 0.5, **arguments)
    return task.eval(), float(result.sparsity)


def outputs_of(task: nn.Module, inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        found = task(*inputs)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def difference(one, other) -> float:
    """The largest difference between two lists of outputs, relative to the scale of the second."""
    pairs = list(zip(one, other, strict=True))
    assert all(a.shape == b.shape for a, b in pairs), "other shapes"
    assert all(bool(torch.isfinite(tensor).all()) for pair in pairs for tensor in pair), "not finite"
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def mixes_channels(task: nn.Module, group: PruningGroup) -> bool:
    """Whether a member normalises over channels, or is attention: masks are then another network than removal."""
    for member in group.members:
        module = task.get_submodule(member.module) if member.module in dict(task.named_modules()) else None
        if module is None:
            module = task.get_submodule(member.module.rpartition(".")[0])
        name = type(module).__name__
        if ("Norm" in name and not name.startswith(("BatchNorm", "InstanceNorm"))) or "MultiheadAttention" in name:
            return True
    return False


def difference_to_masking(architecture: Architecture, groups) -> float | None:
    """How far the pruned network is from the dense one in which all that was removed is zero.

    Groups for which masking is no oracle are not removed for this comparison; ``None`` if no others are left.
    """
    task = architecture.make()
    compared = [g for g in only_prunable(groups) if g.num_channels > 1 and not mixes_channels(task, g)]
    if architecture.mixed or not compared:
        return None
    rng = np.random.default_rng(0)
    removed = [rng.permutation(group.num_channels)[: max(group.num_channels // 3, 1)] for group in compared]
    masked, inputs = copy.deepcopy(task), architecture.example(5)
    surgery = apply_plan(task, compared, Plan(tuple(tuple(sorted(map(int, gone))) for gone in removed)))
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, by_dim in surgery.kept.items():
            for dim, kept in by_dim.items():
                gone = np.setdiff1d(np.arange(tensors[name].shape[dim]), kept.numpy())
                tensors[name].index_fill_(dim, torch.from_numpy(gone), 0)
    return difference(outputs_of(task, inputs), outputs_of(masked, inputs))


def train_a_step(task: Task, batch) -> None:
    """Run it forward and backward, in training mode; every parameter that gets a gradient gets a finite one."""
    task.train()
    task.zero_grad()
    loss = task.loss(batch)
    loss.backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    task.zero_grad()
    task.eval()
    assert gradients, "no gradients"
    assert bool(torch.isfinite(loss)), "the loss is not finite"
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients), "a gradient is not finite"


def saved_and_loaded(task: Task, architecture: Architecture) -> Task:
    """A fresh module in the shape of this one's record, with its weights, through a file."""
    file = io.BytesIO()
    torch.save({"state_dict": task.state_dict(), "softprune": record(task)}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    fresh = architecture.make(1)
    resize(fresh, checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    return fresh.eval()


def exported(task: Task, inputs) -> list[torch.Tensor]:
    """Its outputs after `torch.export`."""
    return outputs_of(torch.export.export(task.net, inputs, strict=False).module(), inputs)


def through_onnx(task: Task, inputs) -> list[torch.Tensor]:
    """Its outputs in ONNX Runtime."""
    import onnxruntime

    program = torch.onnx.export(task.net, inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return [torch.from_numpy(np.asarray(array)) for array in found]


def compiled(task: Task, inputs) -> list[torch.Tensor]:
    """Its outputs as `torch.compile` traces it; no code is generated."""
    torch._dynamo.reset()
    return outputs_of(torch.compile(task.net, backend="eager"), inputs)
