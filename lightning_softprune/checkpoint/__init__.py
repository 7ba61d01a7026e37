"""Checkpoints of pruned models: the record in the file, and modules that take the shape a file needs.

A pruned model's checkpoint is an ordinary one with one more entry, ``checkpoint["softprune"]``, in plain types:

- ``format``: version of the record;
- ``layers``: module name -> its slot sizes, for every layer that has slots (convolutions: ``in``, ``out``, ``groups``);
- ``shapes``: name of every parameter and buffer -> its shape, bare parameters included;
- ``created_biases``: names of the biases that compensation added; the class itself does not make them;
- ``counts``: attributes that count pruned channels (``num_heads``), by name, and their values;
- ``unsaved``: pruned tensors that no state dict has (plain attributes, buffers that are not persistent), by name: these
  are tensors;
- ``left_out``: in the same way, pruned parameters and buffers that the module's own ``state_dict`` leaves out;
- ``dense``: ``layers``, ``shapes``, ``counts`` and ``unsaved`` of the model before its first round;
- ``results``: the rounds, as :meth:`PruningResult.to_dict` writes them;
- ``earlier``: those of the fits before, if the module was pruned in any;
- ``optimizers``: in full checkpoints, the parameters of each group of each optimizer by name, in order.

Sizes and shapes are read off the live module whenever it is saved, so they are right also after further rounds, and in
later runs without the callback. :func:`resize` is the way back. A file may come from anybody: a record is checked
wholly (`reading.py`) before anything is allocated or changed. Where a file has no record, shapes tell the sizes of all
layers that keep a tensor along each of their slots.
"""

from lightning_softprune.checkpoint.anywhere import record as record_of
from lightning_softprune.checkpoint.anywhere import resizing
from lightning_softprune.checkpoint.load import LoadHook, PrunedCheckpointMixin, load_from_checkpoint
from lightning_softprune.checkpoint.reading import recorded_rounds
from lightning_softprune.checkpoint.record import (
    is_recorded,
    keep_dense,
    keep_record,
    name_parameters,
    order_parameters,
    rounds_of,
)
from lightning_softprune.checkpoint.resize_plan import resize
from lightning_softprune.checkpoint.shapes import RECORD, ModelShapes

__all__ = [
    "RECORD",
    "LoadHook",
    "ModelShapes",
    "PrunedCheckpointMixin",
    "is_recorded",
    "keep_dense",
    "keep_record",
    "load_from_checkpoint",
    "name_parameters",
    "order_parameters",
    "record_of",
    "recorded_rounds",
    "resize",
    "resizing",
    "rounds_of",
]
