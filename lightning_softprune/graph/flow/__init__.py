"""How channels flow through a model: its steps on a tape, and labels carried along it.

`tape` records what runs, `labels` says what a dimension's indices belong to, `rules` and its tables tell what each
operator does to them, `propagate` puts it together.
"""

from lightning_softprune.graph.flow.labels import CROSSED, Couplings, Split, is_atoms
from lightning_softprune.graph.flow.propagate import Flow
from lightning_softprune.graph.flow.tape import Recorder, Tape, TooLongError, named_tensors

__all__ = ["CROSSED", "Couplings", "Flow", "Recorder", "Split", "Tape", "TooLongError", "is_atoms", "named_tensors"]
