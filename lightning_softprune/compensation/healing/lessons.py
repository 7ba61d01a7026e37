"""Healing: for a few training batches, the pruned network is trained to compute what the dense one computes.

Each batch runs through both by the module's own step, whose loss is not used, and so no label is. The dense network is
in eval mode. So is the pruned one, without dropout, but for layers that keep statistics (BatchNorm): these are as in
training, and keep what training would leave in them. Everything else that steps change around the parameters is put
back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_softprune.compensation.healing.dense import DenseNetwork
from lightning_softprune.compensation.healing.points import mismatch, watch_outputs
from lightning_softprune.compensation.healing.pupil import Lesson, Pupil
from lightning_softprune.utilities.distributed import sum_over_processes

if TYPE_CHECKING:
    from lightning_softprune.trainer import ModuleRunner

_HELD = 5
"""Copies of the network that healing holds: the dense one, that before healing, gradients, two averages at most."""


def teaching_bytes(module: nn.Module, heals: bool) -> int:
    """How many bytes it takes beside the pruned module and one batch to heal, or only to keep the dense network.

    Args:
        module: The dense module.
        heals: Whether there is healing; else there is a teacher alone.
    """
    copies = _HELD if heals else 1
    return copies * sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def teach(
    runner: ModuleRunner,
    dense: DenseNetwork,
    judged: Set[str],
    batches: int,
    advance: Callable[[float], None],
) -> list[float]:
    """Train the pruned module, in place, to compute what it computed as the dense network.

    Args:
        runner: Runs the module.
        dense: What the module was.
        judged: Names of the parameters that validation runs: only these are trained.
        batches: Training batches.
        advance: Is told the error of each batch.

    Returns:
        The error on each batch before it was learned from: the fraction that the pruned network misses of the variance
        of what steps use, and of what blocks give. Empty where nothing learns (see :func:`learning_in`) and where there
        is nothing to learn from: no training data, or no common output.

    Raises:
        Exception: The user's own.
    """
    classroom = Classroom.of(runner, dense, judged)
    if not classroom.parameters:
        return []
    pupil = Pupil(classroom.parameters, batches, halved=runner.scales_losses, look_ups=_look_ups_in(runner.module))
    errors: list[float] = []
    with contextlib.closing(_endless(runner, batches)) as stream:
        for number, raw in enumerate(stream):
            if not runner.all_agree(raw is not _NO_MORE):
                break
            lesson, failure = None, None
            try:
                lesson = classroom.lesson(raw, number, pupil)
            except Exception as error:
                failure = error
            if not runner.all_agree(failure is None):
                raise failure or RuntimeError("another process has failed while it was healing")
            if runner.all_agree(lesson is not None):
                assert lesson is not None
                errors.append(pupil.learn(lesson, number))
                advance(errors[-1])
            elif number == 0:
                break  # nor will the others have anything in common
    for _, _, buffer in statistics_in(runner.module):
        if runner.trainer.world_size > 1 and buffer.is_floating_point():
            buffer.copy_(sum_over_processes(buffer.detach().clone()) / runner.trainer.world_size)
    return errors


_NO_MORE = object()


def _endless(runner: ModuleRunner, count: int) -> Generator[Any]:
    """Training batches and then a sign that there are no more: processes may have different numbers of them."""
    with contextlib.closing(runner.further_training_batches(count)) as batches:
        yield from batches
    yield _NO_MORE


def statistics_in(module: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """The buffers of layers that keep statistics: layers without parts, and with buffers of numbers."""
    found = []
    for part in module.modules():
        buffers = [(name, buffer) for name, buffer in part._buffers.items() if buffer is not None]
        if not any(True for _ in part.children()) and any(buffer.is_floating_point() for _, buffer in buffers):
            found += [(part, name, buffer) for name, buffer in buffers]
    return found


def layers_in_eval_mode(module: nn.Module) -> int:
    """How many layers that keep statistics would learn, were they not in eval mode, where they gather none."""
    layers = {part for part, _, _ in statistics_in(module)}
    return sum(not part.training and any(p.requires_grad for p in part.parameters()) for part in layers)


def learning_in(module: nn.Module, dense: DenseNetwork, judged: Set[str]) -> list[nn.Parameter]:
    """The parameters that healing trains, tied ones once: those that validation runs and a gradient is required of.

    Args:
        module: The pruned module.
        dense: What it was.
        judged: Names of the parameters that validation runs.
    """
    names = {*judged, *dense.created}
    found = {
        id(parameter): parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in names and parameter.requires_grad and parameter.is_floating_point()
    }
    return list(found.values())


def _look_ups_in(module: nn.Module) -> list[nn.Parameter]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return [parameter for part in module.modules() if isinstance(part, kinds) for parameter in part.parameters()]


@dataclass(frozen=True)
class Classroom:
    """The dense and the pruned network, side by side.

    Attributes:
        runner: Runs the module.
        dense: The teacher.
        judged: Names of the parameters that count.
        parameters: Those of the pruned network that learn, tied ones once.
        modes: What keeps statistics, or refuses to be differentiated in eval mode -> whether it is in training mode.
    """

    runner: ModuleRunner
    dense: DenseNetwork
    judged: Set[str]
    parameters: list[nn.Parameter]
    modes: Mapping[nn.Module, bool]

    @classmethod
    def of(cls, runner: ModuleRunner, dense: DenseNetwork, judged: Set[str]) -> Classroom:
        """The two of a runner's module as it is now: what is frozen does not learn."""
        module = runner.module
        modes = {part: part.training for part, _, _ in statistics_in(module)}
        # cuDNN differentiates recurrent layers in training mode only
        modes |= {part: part.training for part in module.modules() if isinstance(part, nn.RNNBase)}
        return cls(runner, dense, judged, learning_in(module, dense, judged), modes)

    @contextlib.contextmanager
    def compared(self, raw: Any, number: int) -> Iterator[torch.Tensor | None]:
        """The error on one batch, to be differentiated within the block; ``None`` where the two have nothing in common.

        What the steps have changed is put back after the block.
        """
        runner, module = self.runner, self.runner.module
        step = runner.teaching_step(raw, number)
        with runner.undisturbed() as again, torch.enable_grad():
            with (
                self.dense.in_place(),
                runner.evaluating(),
                torch.no_grad(),
                watch_outputs(module, self.judged) as wanted,
            ):
                step()
            again()
            module.eval()
            for part, training in self.modes.items():
                part.training = training
            with watch_outputs(module, self.judged) as found:
                step()
            yield mismatch(wanted, found)

    def lesson(self, raw: Any, number: int, pupil: Pupil) -> Lesson | None:
        """What one batch teaches; ``None`` where the two have nothing in common."""
        module = self.runner.module
        with self.compared(raw, number) as error:
            if error is None:
                return None
            gradients = pupil.gradients(error)
            statistics = [(part, name, value.detach().clone()) for part, name, value in statistics_in(module)]
        for part, name, value in statistics:
            buffer = part.get_buffer(name)
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(value)
        return Lesson(float(error.detach()), gradients)
