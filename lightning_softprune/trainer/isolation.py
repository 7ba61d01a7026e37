"""What is put back after a step or a pass: random states, and everything around the module's parameters.

*Untouched* is what was saved before and put back after: the same objects with the same values.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric, MetricCollection

from lightning_softprune.trainer.other_callbacks import callbacks_of
from lightning_softprune.utilities.hooks import unwatched
from lightning_softprune.utilities.libraries import counterparts
from lightning_softprune.utilities.snapshot import Snapshot


def opaque() -> tuple[type, ...]:
    """Types of objects with a life of their own: kept by reference, their insides are left alone."""
    lightnings = (pl.Trainer, pl.LightningDataModule, pl.Callback, Logger)
    return (Dataset, DataLoader, Sampler, Optimizer, *(kind for one in lightnings for kind in counterparts(one)))


def seed_from(*numbers: int) -> int:
    """A seed that every generator takes, 0 to 2^32 - 1, from whole numbers of any size, none below 0.

    >>> seed_from(0, 1) == seed_from(0, 1) != seed_from(0, 2), seed_from(2**70) < 2**32
    (True, True)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Puts the random state of Python, NumPy, torch and every CUDA device back on exit, also after an exception.

    Args:
        seed: If given, all of them are seeded with it on entry.

    Yields:
        Nothing.
    """
    before = _RandomStates()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            # torch.manual_seed would also queue a seed for a CUDA that starts later, and that cannot be taken back.
            torch.default_generator.manual_seed(seed)
            if before.cuda is not None:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        before.put_back()


class _RandomStates:
    """The random state of Python, NumPy, torch and every CUDA device that has been started, as it is now."""

    def __init__(self) -> None:
        self.python, self.torch = random.getstate(), torch.get_rng_state()
        self.numpy = np.random.get_state()  # noqa: NPY002 - the global state is the one users' code draws from
        # Asking an idle CUDA for its state would start it on every device.
        started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.cuda = torch.cuda.get_rng_state_all() if started else None

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


class OwnRandomness:
    """A random state of its own for what is done in pieces: each `with` block goes on where the last one has ended.

    What happens between the blocks neither moves it nor is moved by it.

    Args:
        seed: What the first block begins with.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._mine: _RandomStates | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One block."""
        with isolated_rng(self._seed if self._mine is None else None):
            if self._mine is not None:
                self._mine.put_back()
            try:
                yield
            finally:
                self._mine = _RandomStates()


@contextmanager
def untouched(trainer: pl.Trainer, pl_module: pl.LightningModule, memory: Snapshot | None = None) -> Iterator[None]:
    """Puts back, on exit, everything around the module's parameters that the user's own code may change.

    What that is, :func:`remembered` says. Objects stay the same objects, also when an exception passes through.

    Pending gradients are set aside meanwhile (inside, every `parameter.grad` starts as `None`, as in Lightning's
    validation) and come back untouched. Parameter values (but for those that a change of mode moves, and see
    `StillParameters`) and the optimizers' state are not looked after, so a change that should last (the final prune)
    belongs outside.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        memory: What is to be put back; default: all as it is now.

    Yields:
        Nothing.
    """
    memory = memory or remembered(trainer, pl_module)
    with _still_in_modes(pl_module), memory.around():
        yield


class StillParameters:
    """The values of parameters that a module's own steps move, as momentum encoders do: put back after each step.

    Which these are, the first step shows that runs to its end, of which all values are compared; after it, those alone
    are copied. A parameter that only another step moves is not found.

    Args:
        moved: The names of those that are moved, where that is known.
    """

    def __init__(self, moved: Set[str] | None = None) -> None:
        self._moved = moved

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[None]:
        """Put the values back when the block ends.

        Args:
            module: The one that steps move, whatever its shape is now.
        """
        with unwatched():
            before = {
                name: (parameter, parameter.detach().clone())
                for name, parameter in module.named_parameters()
                if not is_lazy(parameter) and (self._moved is None or name in self._moved)
            }
        try:
            yield
        except BaseException:
            self._restore(before)
            raise
        moved = self._restore(before)
        self._moved = moved if self._moved is None else self._moved

    @staticmethod
    def _restore(before: Mapping[str, tuple[nn.Parameter, Tensor]]) -> set[str]:
        """Put the values back that are others now; which these were."""
        with unwatched():
            moved = {name for name, (now, then) in before.items() if not torch.equal(now.detach(), then)}
            for name in moved:
                parameter, value = before[name]
                parameter.detach().copy_(value)
        return moved


def remembered(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Snapshot:
    """Everything around the module's parameters that the user's own code may change, as it is now.

    That is: the schedulers' state and the optimizers' hyperparameters; the trainer's metrics, stage, `should_stop` and
    loggers; of the module and all its submodules the buffers, metric states, `training` and `requires_grad` flags, and
    what they keep as attributes: data, and objects of the user's own with what these hold (`Snapshot` says how far).
    """
    memory = Snapshot(opaque())
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            memory.ignore(group["params"])
        memory.contents(optimizer.param_groups)
    for config in trainer.lr_scheduler_configs:
        memory.contents(vars(config.scheduler))
    for name in ("should_stop", "_last_val_time", "callbacks", "_loggers", "profiler", "_logger_connector"):
        memory.attribute(trainer, name)
    memory.contents(vars(trainer._logger_connector), vars(trainer.state), trainer.loggers)
    memory.contents(callbacks_of(trainer))
    memory.attribute(trainer.strategy, "_model")
    memory.attributes(getattr(trainer, "datamodule", None))
    memory.contents(pl_module)
    return memory


@contextmanager
def attributes_replaced(owner: object, **values: object) -> Iterator[None]:
    """Gives an object other attributes for a while."""
    missing = object()
    mapping = vars(owner)
    before = {name: mapping.get(name, missing) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def make_fresh(module: nn.Module) -> None:
    """Replace the module's tensors that were made in inference mode by ordinary ones.

    `Trainer.validate` runs in that mode. Outside of it torch neither changes such tensors in place nor lets gradients
    pass by them. Metrics start afresh, and what modules have made of their parameters to evaluate is forgotten. Wrap it
    in `untouched`, which puts the originals back.
    """
    _reset_metrics(module)
    forget_evaluations(module)
    for child in module.modules():
        for holder in (child._buffers, vars(child)):
            for name, value in holder.items():
                if isinstance(value, Tensor) and not is_lazy(value) and value.is_inference():
                    holder[name] = value.clone()


def is_fresh(module: nn.Module) -> bool:
    """Whether :func:`make_fresh` would find nothing to do."""
    return not has_inference_tensors(module) and not any(
        isinstance(child, (Metric, MetricCollection)) or _has_own_modes(child) for child in module.modules()
    )


def forget_evaluations(module: nn.Module) -> None:
    """Let modules drop what they have made of their parameters to evaluate, as their own `train` does.

    These are tables of a head's biases, or adapters that are merged into weights; Lightning sets flags, and calls it
    once. Every module stays in the mode that it is in.
    """
    for child in filter(_has_own_modes, module.modules()):
        modes = [(part, part.training) for part in child.modules()]
        child.train(True)
        for part, training in modes:
            part.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode, afresh, whatever tensors are in its places: what that moves of these is put back."""
    with _still_in_modes(module):
        make_fresh(module)
        module.eval()
        yield


def _still_in_modes(module: nn.Module) -> AbstractContextManager[None]:
    """The values of parameters that a change of mode moves are put back when the block ends."""
    moved = _moved_by_modes(module)
    return StillParameters(moved)(module) if moved else nullcontext()


def _has_own_modes(module: nn.Module) -> bool:
    """Whether a module does more than set flags when it is told to train."""
    return type(module).train is not nn.Module.train


_moved: WeakKeyDictionary[nn.Module, tuple[list[str], Set[str]]] = WeakKeyDictionary()


def _moved_by_modes(module: nn.Module) -> Set[str]:
    """The names of parameters whose values a change of mode moves (weights that adapters are merged into).

    That is tried once for each module with the parts of it that have modes of their own, and remembered.
    """
    parts = [name for name, part in module.named_modules() if _has_own_modes(part)]
    if not parts:
        return frozenset()
    if module not in _moved or _moved[module][0] != parts:
        memory = Snapshot(opaque())
        memory.contents(module)
        kept = {
            name: (parameter, parameter.detach().clone())
            for name, parameter in module.named_parameters()
            if not is_lazy(parameter) and parameter.is_floating_point()
        }
        found: set[str] = set()
        try:
            for mode in (True, False):  # to undo a merge and to do it again may move nothing
                with memory.around():
                    _fill((parameter, _other(value)) for parameter, value in kept.values())
                    forget_evaluations(module)
                    module.train(mode)
                    found |= {name for name, (now, value) in kept.items() if not torch.equal(now, _other(value))}
        finally:
            _fill(kept.values())
        _moved[module] = parts, found
    return _moved[module][1]


def _other(value: Tensor) -> Tensor:
    """Other values: adapters that are zero yet move nothing."""
    return value * 1.01 + 0.01


def _fill(values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    with unwatched(), torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)


def has_inference_tensors(module: nn.Module) -> bool:
    """Whether a `Trainer.validate` left buffers or metric states that a fit cannot use."""
    holders = (holder for child in module.modules() for holder in (child._buffers, vars(child)))
    tensors = (value for holder in holders for value in holder.values() if isinstance(value, Tensor))
    return any(not is_lazy(tensor) and tensor.is_inference() for tensor in tensors)


def metrics_in(module: nn.Module) -> dict[str, str]:
    """The metrics in a module that have parameters (the network of a perceptual metric) -> why they are left alone."""
    return {
        name: f"it is inside of {name}, a metric"
        for name, child in module.named_modules()
        if isinstance(child, Metric) and any(True for _ in child.parameters())
    }


def _reset_metrics(module: nn.Module) -> None:
    collections: list[MetricCollection] = []
    for child in module.modules():
        if isinstance(child, MetricCollection):
            collections.append(child)
        elif isinstance(child, Metric):
            child.reset()
    for collection in collections:  # after their members, whose shared states they tie together again
        collection.reset()
