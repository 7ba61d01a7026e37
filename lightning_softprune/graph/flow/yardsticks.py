"""Frozen networks that only measure: those of a loss, and teachers.

Validation may run them, and they are no part of the network all the same: to prune one moves the yardstick by which
plans are judged, and serves nobody. A tape tells them from frozen parts of the network, behind which something trained
comes, or which nothing but trained layers feed:

- A *loss network* (of a perceptual loss) is given what trained layers have made and, through the same layers, in
  another call or further down the batch, what none has: the targets.
- A *teacher* is given nothing that trained layers have made, and what it gives is compared with what they give.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_softprune.graph.flow.tape import Operation, Tape, Value
from lightning_softprune.utilities.names import is_inside, joined

_COMPARING = frozenset(
    [
        *("sub", "rsub", "mul", "eq", "ne", "_cdist_forward", "_euclidean_dist"),
        *("mse_loss", "smooth_l1_loss", "huber_loss"),
        *("nll_loss_forward", "nll_loss2d_forward", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    ]
)
"""Operators by which losses compare two tensors; a network adds, concatenates or multiplies matrices."""


def frozen_networks(model: nn.Module, trained: Collection[str]) -> list[str]:
    """Names of the outermost modules that have parameters, none of which is trained; none where nothing is trained.

    Args:
        model: The model.
        trained: Names of its parameters that are trained, tied ones under all their names.
    """
    found: list[str] = []
    for name, module in model.named_modules() if trained else ():
        if any(is_inside(name, other) for other in found):
            continue
        own = [joined(name, parameter) for parameter, _ in module.named_parameters(remove_duplicate=False)]
        if own and not any(parameter in trained for parameter in own):
            found.append(name)
    return found


def yardsticks_in(model: nn.Module, tape: Tape, frozen: Sequence[str], trained: Collection[str]) -> dict[str, str]:
    """The frozen networks that only measure -> why they are left alone.

    Args:
        model: The model.
        tape: What validation computes.
        frozen: Names of frozen networks.
        trained: See `frozen_networks`.
    """
    return _Reading(model, tape, frozen, trained).reasons()


@dataclass
class _Network:
    """What is seen of a frozen network.

    Attributes:
        calls: Its layers, and parameters that are used without one -> whether what they were given hung on anything
            trained, for all calls.
        leads_on: Whether something trained comes behind it.
        met_by: The operators in which what it gives meets what trained layers give, first of all.
    """

    calls: dict[str, set[bool]] = field(default_factory=lambda: defaultdict(set))
    leads_on: bool = False
    met_by: set[str] = field(default_factory=set)

    def reason(self, name: str) -> str | None:
        """Why it is left alone, if it only measures."""
        if self.leads_on:
            return None
        if any(len(given) == 2 for given in self.calls.values()):
            return f"it is inside of {name}, a loss network: frozen, and given targets as well as outputs"
        if self.met_by and self.met_by <= _COMPARING and not any(True in given for given in self.calls.values()):
            return f"it is inside of {name}, a teacher: frozen, and compared with what trained layers give"
        return None


class _Reading:
    """Reads a tape once, and notes of each value what it hangs on."""

    def __init__(self, model: nn.Module, tape: Tape, frozen: Sequence[str], trained: Collection[str]) -> None:
        self._tape = tape
        self._networks = {name: _Network() for name in frozen}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        learning = {id(parameters[name]) for name in trained}
        modules = model.named_modules()
        self._learning = {name for name, one in modules if not learning.isdisjoint(map(id, one.parameters()))}
        self._parameters = {number: name for number, name in tape.sources.items() if name in parameters}
        self._bare = set(self._parameters)  # parameters, and what is made of nothing but these
        self._hanging = {number for number, name in self._parameters.items() if name in trained}
        self._mixed: set[int] = set()  # batches of which a part hangs on what is trained
        self._of: dict[int, frozenset[str]] = {}  # the networks that a value has come through
        self._within: dict[str, str | None] = {}
        for operation in tape.operations:
            self._note(operation)

    def reasons(self) -> dict[str, str]:
        """The networks that only measure, with the reason."""
        found = {name: network.reason(name) for name, network in self._networks.items()}
        return {name: reason for name, reason in found.items() if reason is not None}

    def _note(self, operation: Operation) -> None:
        inputs = operation.inputs
        learns = bool(operation.layer) and operation.layer in self._learning
        network = self._network_of(operation)
        through = frozenset().union(*(self._of.get(value.number, ()) for value in inputs))
        if network is not None:
            given = {any(map(self._hangs, inputs))}
            given |= {False} if any(value.number in self._mixed for value in inputs) else set()
            for part in self._parts_of(operation):
                self._networks[network].calls[part] |= given
            through |= {network}
        else:
            for name in through:
                self._meet(self._networks[name], name, operation, learns)
        made = [value.number for value in operation.outputs if value is not None]
        if learns or any(map(self._hangs, inputs)):
            self._hanging.update(made)
        if inputs and all(value.number in self._bare for value in inputs):
            self._bare.update(made)
        if any(value.number in self._mixed for value in inputs) or self._mixes(operation):
            self._mixed.update(made)
        self._of.update(dict.fromkeys(made, through))

    def _meet(self, network: _Network, name: str, operation: Operation, learns: bool) -> None:
        """An operation beside a network, of what has come through it; a loss that is one number may be weighed."""
        inputs = operation.inputs
        come = [v for v in inputs if name in self._of.get(v.number, ()) and math.prod(self._tape.shape(v)) > 1]
        if not come:
            return
        if learns or any(value.number in self._bare and self._hangs(value) for value in inputs):
            network.leads_on = True
        others = [value for value in inputs if name not in self._of.get(value.number, ())]
        if any(map(self._hangs, others)) and not all(map(self._hangs, come)):
            network.met_by.add(operation.name)

    def _mixes(self, operation: Operation) -> bool:
        """Whether an operation puts outputs and targets into one batch; a prompt that is trained is neither."""
        if operation.name != "cat" or operation.arguments.get("dim", 0) != 0:
            return False
        hanging = {self._hangs(value) for value in operation.inputs if value.number not in self._bare}
        return len(hanging) == 2

    def _hangs(self, value: Value) -> bool:
        """Whether anything trained has had to do with a value."""
        return value.number in self._hanging

    def _network_of(self, operation: Operation) -> str | None:
        place = operation.layer or operation.site.module
        if place not in self._within:
            self._within[place] = next((name for name in self._networks if is_inside(place, name)), None)
        return self._within[place]

    def _parts_of(self, operation: Operation) -> Iterator[str]:
        """The layer, or the parameters, that an operation within a network applies."""
        if operation.layer:
            yield operation.layer
        else:
            yield from (self._parameters[v.number] for v in operation.inputs if v.number in self._parameters)
