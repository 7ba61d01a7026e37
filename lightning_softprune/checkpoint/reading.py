"""Reads the record of a file that may come from anybody: it is checked wholly before anything is done with it.

Each field has to be of its type, and the fields have to agree: with each other, and with the tensors that the file has
beside the record. Whatever is wrong is a `ValueError` that names the field.

What cannot be compared with a tensor (a record alone; a buffer that a state dict leaves out) cannot be known to be
wrong, and must not cost more memory than a file can be believed: `resize_plan.py` bounds that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_softprune.checkpoint.record import FORMAT
from lightning_softprune.checkpoint.shapes import RECORD, ModelShapes, damaged
from lightning_softprune.graph import Shape
from lightning_softprune.results import PruningResult
from lightning_softprune.utilities.plain_types import shown

_FIELDS = ("format", "layers", "shapes", "created_biases", "dense", "results")


@dataclass(frozen=True)
class Record:
    """A record that was checked.

    Attributes:
        form: The form of the model that was saved.
        dense: Its form before its first round. No more than a claim: nothing else in a file shows it.
        results: The rounds, in plain types.
        earlier: Those of the fits before.
    """

    form: ModelShapes
    dense: ModelShapes
    results: list[dict[str, Any]]
    earlier: list[dict[str, Any]]


def is_record(source: Mapping[Any, Any]) -> bool:
    """Whether this is a record by itself, be it a damaged one; a state dict may have a field's name for a tensor."""
    named = [field for field in _FIELDS if field in source]
    return len(named) > 1 and not any(isinstance(source[field], torch.Tensor) for field in named)


def read_record(record: Any, checkpoint: Mapping[str, Any]) -> Record:
    """Check a record.

    Args:
        record: What a file has in its place.
        checkpoint: The rest of the file; empty where there is none.

    Raises:
        ValueError: The record is damaged, or of a newer format; the message names the field.
    """
    _check_format(record)
    form = ModelShapes.from_dict(record)
    dense = ModelShapes.from_dict(_field(record, "dense"), "dense.")
    recorded_rounds(record)
    if "earlier" in record:
        recorded_rounds(record, "earlier")
    _check_biases(record, form, dense)
    _check_counts(form, dense)
    state = checkpoint.get("state_dict")
    tensors = tensor_shapes(state) if isinstance(state, Mapping) else {}
    for name, shape in tensors.items():
        if form.shapes.get(name, shape) != shape:
            raise damaged(
                f"shapes[{shown(name)}]: {shown(form.shapes[name])} is not {shape}, the shape of the tensor beside it"
            )
    _check_optimizers(record, {*form.shapes, *(state if isinstance(state, Mapping) else ())}, checkpoint)
    return Record(form, dense, list(record["results"]), list(record.get("earlier", ())))


def read_source(source: Any) -> tuple[Record | None, Mapping[str, Any]]:
    """Tell a checkpoint, a record and a state dict apart: the record, if there is one, and the state dict."""
    wrong = ValueError('neither a checkpoint, nor its "softprune" record, nor a state dict of tensors')
    if isinstance(source, (str, Path)):
        raise ValueError(f"{str(source)!r} is a path and {wrong}; load it first, as in torch.load(path)")
    if not isinstance(source, Mapping):
        raise wrong
    state = source.get("state_dict", source)
    state = state if isinstance(state, Mapping) else {}
    if RECORD in source and not isinstance(source[RECORD], torch.Tensor):  # a parameter may have this name
        return read_record(source[RECORD], source), {} if state is source else state
    if "state_dict" not in source and is_record(source):
        return read_record(source, {}), {}
    if not tensor_shapes(state):
        raise wrong
    return None, state


def recorded_rounds(record: Any, field: str = "results") -> list[PruningResult]:
    """The rounds of a record; its sizes are not looked at.

    Args:
        record: The record.
        field: Which of them: `"results"`, or the `"earlier"` ones.

    Raises:
        ValueError: The record is damaged here, or of a newer format.
    """
    _check_format(record)
    results = _list(_field(record, field), field)
    read: dict[int, PruningResult] = {}  # a pickled list may hold one object a thousand times
    for index, result in enumerate(results):
        if id(result) not in read:
            try:
                read[id(result)] = PruningResult.from_dict(result)
            except ValueError as error:
                raise damaged(f"{field}[{index}]: {error}") from error
    return [read[id(result)] for result in results]


def tensor_shapes(state: Mapping[Any, Any]) -> dict[str, Shape]:
    """The shapes of a state dict's tensors."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and not is_lazy(value)
    }


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise damaged(f"{name}: it is missing")
    return record[name]


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise damaged(f"{where}: {shown(value)} is not a list")
    return list(value)


def _check_format(record: Any) -> None:
    if not isinstance(record, Mapping):
        raise damaged(f"{shown(record)} is not a dict")
    version = record.get("format")
    if not isinstance(version, int) or isinstance(version, bool):
        raise damaged(f"format: it has no format version, {shown(version)} is none")
    if version < 1:
        raise damaged(f"format: {shown(version)} is less than 1")
    if version > FORMAT:
        raise ValueError(
            f"the {RECORD!r} record has format {shown(version)}; this version of lightning-softprune "
            f"reads formats up to {FORMAT}"
        )


def _check_biases(record: Mapping[str, Any], form: ModelShapes, dense: ModelShapes) -> None:
    names = _list(_field(record, "created_biases"), "created_biases")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise damaged(f"created_biases[{index}]: {shown(name)} is not a string")
    created = form.shapes.keys() - dense.shapes.keys()
    if created != set(names):
        name = min(created ^ set(names))
        here, there = ("has", "do not") if name in names else ("has not", "do")
        raise damaged(f"created_biases: it {here} {shown(name)}, shapes and dense.shapes {there} tell that it is new")


def _check_counts(form: ModelShapes, dense: ModelShapes) -> None:
    """Both forms have to name the same, and counts only fall."""
    for name, value in form.counts.items():
        if name not in dense.counts:
            raise damaged(f"dense.counts: it has not {shown(name)}, counts has")
        if value > dense.counts[name]:
            raise damaged(f"counts[{shown(name)}]: {value} is more than the {dense.counts[name]} of dense.counts")
    for name in form.left_out:
        if name not in form.shapes:
            raise damaged(f"shapes: it has not {shown(name)}, left_out has")
    for name in form.unsaved:
        if name not in dense.unsaved:
            raise damaged(f"dense.unsaved: it has not {shown(name)}, unsaved has")


def _check_optimizers(record: Mapping[str, Any], names: set[Any], checkpoint: Mapping[str, Any]) -> None:
    """The names of the parameters that optimizers held; full checkpoints have them, one entry per optimizer."""
    states = checkpoint.get("optimizer_states")
    if "optimizers" not in record:
        if states:
            raise damaged("optimizers: it is missing, and there are optimizer states beside it")
        return
    optimizers = _list(record["optimizers"], "optimizers")
    if isinstance(states, (list, tuple)) and len(states) != len(optimizers):
        raise damaged(f"optimizers: they are {len(optimizers)}, of {len(states)} there are states beside it")
    seen: set[int] = set()  # a pickled list may hold one list a thousand times
    for i, groups in enumerate(optimizers):
        if id(groups) in seen:
            continue
        seen.add(id(groups))
        for j, group in enumerate(_list(groups, f"optimizers[{i}]")):
            if id(group) in seen:
                continue
            seen.add(id(group))
            for k, name in enumerate(_list(group, f"optimizers[{i}][{j}]")):
                if name is not None and not (isinstance(name, str) and name in names):
                    raise damaged(f"optimizers[{i}][{j}][{k}]: {shown(name)} is not the name of a parameter in shapes")
