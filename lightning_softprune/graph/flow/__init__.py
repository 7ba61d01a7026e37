"""How channels flow through a model: its steps on a tape, and labels carried along it.

`tape` records what runs, `labels` says what a dimension's indices belong to, `rules` and its tables tell what each
operator does to them, `propagate` puts it together. `yardsticks` tells from a tape what is no part of the network.
"""

from lightning_softprune.graph.flow.labels import CROSSED, Couplings, Pin, is_atoms
from lightning_softprune.graph.flow.propagate import Flow
from lightning_softprune.graph.flow.rules import BY_NUMBER
from lightning_softprune.graph.flow.tape import Recorder, Tape, TooLongError, named_tensors
from lightning_softprune.graph.flow.yardsticks import frozen_networks, yardsticks_in

__all__ = [
    "BY_NUMBER",
    "CROSSED",
    "Couplings",
    "Flow",
    "Pin",
    "Recorder",
    "Tape",
    "TooLongError",
    "frozen_networks",
    "is_atoms",
    "named_tensors",
    "yardsticks_in",
]
