"""Steps as functions without arguments, which of them show all of a module, and batches cut short for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_softprune.graph import record_usage
from lightning_softprune.trainer.isolation import isolated_rng
from lightning_softprune.utilities.hooks import forward_hook, is_about_gradients, registered
from lightning_softprune.utilities.nested import is_container, rebuild, tensors_in
from lightning_softprune.utilities.ownership import codes_of, is_of_a_framework

Step = Callable[[], Any]
Steps = list[Step]
Make = Callable[..., Step]


def run_steps(steps: Steps, seed: int = 0) -> list[Any]:
    """Run steps one after another, without gradients, always with the same random numbers; what they return."""
    with isolated_rng(seed), torch.no_grad():
        return [step() for step in steps]


def repeatable(step: Step, seed: int) -> Step:
    """The step with the same random numbers each time."""

    def run() -> Any:
        with isolated_rng(seed):
            return step()

    return run


class GradientsWhereNeeded:
    """Runs training steps without gradients, or with them where a step takes some itself (a penalty on them, forces).

    That is found by trying, and remembered.
    """

    def __init__(self) -> None:
        self._are_needed = False

    def __call__(self, run: Step) -> Any:
        """Run a step; where it does not run either way, its exception without gradients goes on."""
        if torch.is_grad_enabled():
            return run()
        if not self._are_needed:
            try:
                return run()
            except RuntimeError as error:
                if is_about_gradients(error):
                    with torch.enable_grad(), suppress(Exception):
                        found = run()
                        self._are_needed = True
                        return found
                raise
        with torch.enable_grad():
            return run()


def as_far_as_it_runs(step: Step) -> Step:
    """The step, or nothing from where it fails on: whoever runs it for good will be told."""

    def run() -> Any:
        try:
            return step()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None

    return run


def attributes_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Identity and length of the containers and tensors that a module keeps as attributes."""
    return {
        key: (id(value), len(value) if is_container(value) else 0)
        for key, value in vars(module).items()
        if not key.startswith("_") and (is_container(value) or isinstance(value, torch.Tensor))
    }


def what_a_step_shows(
    module: nn.Module, name: str, returned: Any, logged: Mapping[str, Any], before: Mapping[str, tuple[int, int]]
) -> dict[str, list[torch.Tensor]]:
    """All that a step of a LightningModule lets others see, by name: numbers and tensors, copied.

    Args:
        module: The module, right after the step.
        name: The step.
        returned: What it returned.
        logged: What it logged; metrics among it count by their states.
        before: `attributes_of` the module before the step.

    Returns:
        That, with the states of all metrics and what the module keeps since (outputs, for the end of the epoch).
    """
    shown = {f"what {name} returns": returned}
    shown |= {f"{key!r}, which {name} logs,": value for key, value in logged.items() if not isinstance(value, Metric)}
    for path, child in module.named_modules():
        if isinstance(child, Metric):
            shown[f"{path} after {name}"] = child.metric_state
    for key, place in attributes_of(module).items():
        if before.get(key) != place:
            shown[f"self.{key} after {name}"] = vars(module)[key]
    return {key: [tensor.detach().clone() for tensor in _numbers_in(value)] for key, value in shown.items()}


def _numbers_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(float(value))]
    if is_container(value):
        items = value.values() if isinstance(value, Mapping) else value
        return [tensor for item in items for tensor in _numbers_in(item)]
    return tensors_in(value)


@contextmanager
def layer_calls(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each module is called while this lasts."""
    seen: Counter[str] = Counter()
    with registered(
        forward_hook(layer, lambda *_, name=name: seen.update([name])) for name, layer in model.named_modules()
    ):
        yield seen


def calls_as_often(model: nn.Module, few: Steps, wanted: Counter[str]) -> bool:
    """Whether steps on fewer samples run, and call every layer of the model as often as those on whole batches."""
    try:
        with layer_calls(model) as seen:
            run_steps(few)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the user's code says to fewer samples: whole batches do
        return False
    return seen == wanted


@dataclass
class _Kept:
    """A step of those that together use all of a module.

    Attributes:
        make: Makes it for so many samples.
        calls: How often it called each layer on a whole batch when it was traced last, or run for this; `None` until
            then. A module may make some of its layers when it first runs.
        is_training: Whether it is one of training.
    """

    make: Callable[[int | None], Step]
    calls: Counter[str] | None
    is_training: bool


class StepsOfAllKinds:
    """A few steps that together use all of a module: the first of validation and of training, and what else these lack.

    They return all that they show.

    Args:
        module: The module.
        kinds: What makes the steps of validation, one per loader, and those of training, one per batch; called with
            `samples` and `shown`.
        all_agree: Whether a flag is set on every process.
    """

    def __init__(
        self, module: nn.Module, kinds: tuple[Sequence[Make], Sequence[Make]], all_agree: Callable[[bool], bool]
    ) -> None:
        self._module, self._all_agree = module, all_agree
        self._few: dict[int, Steps] = {}
        self._kept: list[_Kept] = []
        everything = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        everything |= {name for name, layer in module.named_modules() if any(True for _ in layer.parameters(False))}
        used: set[str] = set()
        for kind in kinds:
            for number, make in enumerate(kind):
                if number and everything <= used:
                    break  # no batch can use anything else
                found: set[str] = set()
                calls: Counter[str] | None = None
                if len(kind) > 1:
                    with record_usage(module) as usage, layer_calls(module) as calls:
                        run_steps([make(samples=None)])
                    found = usage.parameters | usage.layers
                if number == 0 or not found <= used:
                    self._kept.append(_Kept(partial(_on_samples, make), calls, kind is kinds[1]))
                used |= found

    def steps(self, samples: int | None = None) -> Steps:
        """The steps, on so many samples or on whole batches; the latter count the calls of layers as they run."""
        return [self._counting(kept) if samples is None else kept.make(samples) for kept in self._kept]

    def on_few(self, samples: int) -> Steps:
        """The steps on so many samples, where these run the same layers as whole batches; else on these."""
        if samples not in self._few:
            run_steps([self._counting(kept) for kept in self._kept if kept.calls is None])
            wanted = sum((kept.calls or Counter() for kept in self._kept), Counter[str]())
            few, whole = ([kept.make(number) for kept in self._kept] for number in (samples, None))
            self._few[samples] = few if self._all_agree(calls_as_often(self._module, few, wanted)) else whole
        return self._few[samples]

    def calls_of_first(self, *, training: bool) -> Counter[str] | None:
        """How often the first step of training, or of validation, calls each layer; `None` where it has not run yet."""
        return next((kept.calls for kept in self._kept if kept.is_training == training), None)

    def _counting(self, kept: _Kept) -> Step:
        whole = kept.make(None)

        def step() -> Any:
            with layer_calls(self._module) as calls:
                shown = whole()
            kept.calls = calls
            return shown

        return step


def _on_samples(make: Make, samples: int | None) -> Step:
    return make(samples=samples, shown=True)


def head_of_batch(batch: Any, count: int | None) -> Any:
    """The first samples of a batch that is made of tensors of one length; any other batch as it is.

    >>> x, y = head_of_batch((torch.ones(64, 3), torch.ones(64)), 32)
    >>> len(x), len(y), head_of_batch({"x": torch.ones(64), "scale": 1.0}, 32)["x"].shape
    (32, 32, torch.Size([64]))
    """
    lengths: set[int | None] = set()

    def cut(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            lengths.add(len(part) if part.ndim else None)
            return part[:count] if part.ndim else part
        if is_container(part):
            return rebuild(part, cut)
        lengths.add(None)
        return part

    shorter = cut(batch) if count else batch
    return shorter if len(lengths) == 1 and None not in lengths else batch


def batch_of(batch: Any, count: int) -> tuple[Any, bool]:
    """A batch of so many samples, the given ones over and over; and whether it could be made.

    Where the batch is not made of tensors of one length, it is returned as it is.

    >>> batch_of([torch.arange(3)], 7)[0][0].tolist()
    [0, 1, 2, 0, 1, 2, 0]
    >>> batch_of([torch.arange(3), "text"], 7)[1]
    False
    """
    lengths: set[int | None] = set()

    def repeated(part: Any) -> Any:
        if is_container(part):
            return rebuild(part, repeated)
        whole = isinstance(part, torch.Tensor) and part.ndim > 0 and len(part) > 0
        lengths.add(len(part) if whole else None)
        return part[torch.arange(count, device=part.device) % len(part)] if whole else part

    longer = repeated(batch)
    made = len(lengths) == 1 and None not in lengths
    return (longer if made else batch), made


def reads_its_mode(module: nn.Module) -> bool:
    """Whether code of the user's own, in a module or below it, asks whether it is training."""
    kinds = {kind for child in module.modules() for kind in type(child).__mro__ if not is_of_a_framework(kind)}
    functions = [value for kind in kinds for value in vars(kind).values()]
    return any("training" in code.co_names for code in codes_of(functions))


def code_in_training(module: nn.Module) -> None:
    """Let code of the user's own run as in training, and layers as in validation.

    Modules that were in eval mode, in one that trains, stay in it.
    """
    trains = module.training
    for child in module.modules():
        child.training = not is_of_a_framework(type(child)) and (child.training or not trains)


def may_log(module: nn.Module, name: str) -> bool:
    """Whether a module's own code has a name in it, as a whole or in two pieces, that it may log at other times.

    Args:
        module: The module.
        name: Of a metric that was not logged.
    """
    pieces: set[str] = set()
    functions = [value for kind in type(module).__mro__ if not is_of_a_framework(kind) for value in vars(kind).values()]
    for code in codes_of(functions):
        for constant in code.co_consts:
            found = constant if isinstance(constant, tuple) else (constant,)
            pieces |= {text for text in found if isinstance(text, str) and len(text) > 1}
    starts, ends = ([len(piece) for piece in pieces if fits(piece)] or [0] for fits in (name.startswith, name.endswith))
    return max(starts) + max(ends) >= len(name) - 1
