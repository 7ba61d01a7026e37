"""Recurrent layers and cells: entries of the table of layer types, see `layers.py`.

All layers and directions of one recurrent layer have the same number of *hidden units*, so all of them lose the same
ones: what a unit remembers is read by every gate of every unit (``weight_hh``), by the layer above, and by whoever
reads the output. Without projections the units are the slot ``"out"``. An LSTM with projections
(``proj_size``) gives its projections instead: these are ``"out"``, and the units behind them, of which only ``c_n``
can be seen from outside, are ``"hidden"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from lightning_softprune.graph.computed import why_not_sliced
from lightning_softprune.graph.layers import (
    Applications,
    LayerType,
    Layout,
    MacTerm,
    Port,
    Sizes,
    TensorAxis,
    add_layer_type,
)
from lightning_softprune.utilities.nested import tensors_in


class _Recurrent(LayerType):
    """What recurrent layers have in common with their cells.

    Attributes:
        known: The classes whose ``forward`` is known; others of :attr:`types` cannot be sliced.
        gates: How many times their units each of these has in a row of weights.
    """

    known: tuple[type[nn.Module], ...] = ()

    def describe(self, module: Any) -> Layout | str:
        """See `LayerType`."""
        name = type(module).__name__
        if not isinstance(module, self.known):
            return f"{name} layers cannot be sliced"
        axes = tuple(self._axes(module))
        if any(module._parameters.get(axis.tensor) is None for axis in axes):
            return why_not_sliced(name, module)
        return Layout(self.mac_sizes(module), axes, least=self._least(module))

    def taken(self, module: Any, inputs: Mapping[str | int, Any]) -> Iterator[Port]:
        """The input, and the state to begin with."""
        if isinstance(self.layout(module), Layout):
            yield from _ports(tensors_in(_argument(inputs, 0, "input")), ("in",))
            yield from _ports(tensors_in(_argument(inputs, 1, "hx")), ("out", self._units(module)))

    def observe(self, module: Any, inputs: Mapping[str | int, Any], output: Any, seen: Applications) -> None:
        """Count time steps, of all sequences."""
        rows = tensors_in(_argument(inputs, 0, "input"))[0]
        seen.applied += rows.numel() / max(rows.shape[-1], 1)

    def _axes(self, module: Any) -> Iterator[TensorAxis]:
        """Which dimension of which tensor follows which slot."""
        raise NotImplementedError

    def _units(self, module: Any) -> str:
        """The slot of the hidden units."""
        return "out"

    def _least(self, module: Any) -> Sizes:
        """How much of a slot has to stay."""
        return {}


class RecurrentType(_Recurrent):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``; also in layers, in both directions, and with projections."""

    types = (nn.RNNBase,)
    known = (nn.RNN, nn.LSTM, nn.GRU)
    weight = "weight_ih_l0"

    def resize(self, module: nn.RNNBase, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        module.input_size = sizes.get("in", module.input_size)
        module.hidden_size = sizes.get(self._units(module), module.hidden_size)
        if module.proj_size:
            module.proj_size = sizes.get("out", module.proj_size)

    def refresh(self, module: nn.RNNBase) -> None:
        """It keeps its weights in a list, and on a GPU in one piece of memory.

        The list is a new one: who remembers the attributes has the old one, with the old weights.
        """
        with torch.inference_mode(False), suppress(RuntimeError):  # in many pieces it is slower, not wrong
            module._init_flat_weights()

    def given(self, module: nn.RNNBase, output: Any) -> Iterator[Port]:
        """The output of all time steps, with the directions side by side, and the last state."""
        if isinstance(self.layout(module), Layout):
            steps, state = output
            yield from _ports(tensors_in(steps), ("out",), _directions(module))
            yield from _ports(tensors_in(state), ("out", self._units(module)))

    def macs(self, module: nn.RNNBase, seen: Applications) -> tuple[MacTerm, ...]:
        """Of all gates, layers and directions; a layer above the first reads all directions of the one below."""
        units, directions = self._units(module), _directions(module)
        gates, cells = _GATES[module.mode], module.num_layers * directions
        above = (cells - directions) * directions
        projected = cells if module.proj_size else 0
        return (
            MacTerm(seen.applied * gates * directions, ("in", units)),
            MacTerm(seen.applied * (gates * (cells + above) + projected), ("out", units)),
        )

    def mac_sizes(self, module: nn.RNNBase) -> Sizes:
        """See `LayerType`."""
        if module.proj_size:
            return {"in": module.input_size, "hidden": module.hidden_size, "out": module.proj_size}
        return {"in": module.input_size, "out": module.hidden_size}

    def _axes(self, module: nn.RNNBase) -> Iterator[TensorAxis]:
        units, gates, directions = self._units(module), _GATES[module.mode], _directions(module)
        for layer in range(module.num_layers):
            for suffix in (f"l{layer}", f"l{layer}_reverse")[:directions]:
                yield TensorAxis(f"weight_ih_{suffix}", 0, units, gates)
                if layer == 0:
                    yield TensorAxis(f"weight_ih_{suffix}", 1, "in")
                else:
                    yield TensorAxis(f"weight_ih_{suffix}", 1, "out", directions)
                yield TensorAxis(f"weight_hh_{suffix}", 0, units, gates)
                yield TensorAxis(f"weight_hh_{suffix}", 1, "out")
                if module.bias:
                    yield TensorAxis(f"bias_ih_{suffix}", 0, units, gates)
                    yield TensorAxis(f"bias_hh_{suffix}", 0, units, gates)
                if module.proj_size:
                    yield TensorAxis(f"weight_hr_{suffix}", 0, "out")
                    yield TensorAxis(f"weight_hr_{suffix}", 1, units)

    def _units(self, module: nn.RNNBase) -> str:
        return "hidden" if module.proj_size else "out"

    def _least(self, module: nn.RNNBase) -> Sizes:
        """PyTorch builds no layer with fewer units than projections: those of now, since others may keep all."""
        return {"hidden": module.proj_size + 1} if module.proj_size else {}


class RecurrentCellType(_Recurrent):
    """``nn.RNNCell``, ``nn.LSTMCell`` and ``nn.GRUCell``: one time step."""

    types = (nn.RNNCellBase,)
    known = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    weight = "weight_ih"

    def resize(self, module: nn.RNNCellBase, sizes: Mapping[str, int]) -> None:
        """See `LayerType`."""
        module.input_size = sizes.get("in", module.input_size)
        module.hidden_size = sizes.get("out", module.hidden_size)

    def given(self, module: nn.RNNCellBase, output: Any) -> Iterator[Port]:
        """The new state."""
        if isinstance(self.layout(module), Layout):
            yield from _ports(tensors_in(output), ("out", "out"))

    def macs(self, module: nn.RNNCellBase, seen: Applications) -> tuple[MacTerm, ...]:
        """Of all gates."""
        applied = seen.applied * _cell_gates(module)
        return MacTerm(applied, ("in", "out")), MacTerm(applied, ("out", "out"))

    def mac_sizes(self, module: nn.RNNCellBase) -> Sizes:
        """See `LayerType`."""
        return {"in": module.input_size, "out": module.hidden_size}

    def _axes(self, module: nn.RNNCellBase) -> Iterator[TensorAxis]:
        gates = _cell_gates(module)
        yield TensorAxis("weight_ih", 0, "out", gates)
        yield TensorAxis("weight_ih", 1, "in")
        yield TensorAxis("weight_hh", 0, "out", gates)
        yield TensorAxis("weight_hh", 1, "out")
        if module.bias:
            yield TensorAxis("bias_ih", 0, "out", gates)
            yield TensorAxis("bias_hh", 0, "out", gates)


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def _cell_gates(module: nn.RNNCellBase) -> int:
    return 4 if isinstance(module, nn.LSTMCell) else 3 if isinstance(module, nn.GRUCell) else 1


def _directions(module: nn.RNNBase) -> int:
    return 2 if module.bidirectional else 1


def _argument(inputs: Mapping[str | int, Any], place: int, name: str) -> Any:
    return inputs[place] if place in inputs else inputs.get(name)


def _ports(tensors: list[torch.Tensor], slots: tuple[str, ...], repeat: int = 1) -> Iterator[Port]:
    """The last dimensions of tensors hold these slots: of a state, what is given (``h``) and what is kept (``c``)."""
    yield from (
        Port(tensor, slot, tensor.ndim - 1, repeat) for tensor, slot in zip(tensors, slots, strict=False) if tensor.ndim
    )


RECURRENT_TYPES: tuple[LayerType, ...] = (RecurrentType(), RecurrentCellType())
"""The entries of this file; importing it puts them into the table."""

for _entry in RECURRENT_TYPES:
    add_layer_type(_entry)
