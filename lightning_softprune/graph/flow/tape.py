"""The tape: what a model computes, operation by operation, while its own steps run.

An *operation* is one call of a layer of the table, taken as a whole, or one elementary operator of PyTorch (below
autograd, where a few hundred of them make up everything: `einsum` arrives as permutations and products). Tensors are
*values*, numbered in the order in which they appear. Nothing of them is kept but their shapes.

A tensor is known again by the memory that it looks at, not by the object: views have several. Memory that was freed
is not mistaken for what took its place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lightning_softprune.graph.layers import Layout, Port, layer_type
from lightning_softprune.utilities.hooks import forward_hook, forward_pre_hook, registered
from lightning_softprune.utilities.names import joined
from lightning_softprune.utilities.nested import innermost, is_transformed, tensors_in
from lightning_softprune.utilities.ownership import users_line


@dataclass(frozen=True)
class Value:
    """A tensor at one moment: its number on the tape."""

    number: int


@dataclass(frozen=True)
class Site:
    """Where in the user's code an operation is.

    Attributes:
        module: Name of the innermost module that was running.
        line: File and line, as in ``"model.py:12"``; empty where it is not known.
    """

    module: str
    line: str

    def __str__(self) -> str:
        where = f"in {self.module}" if self.module else "in the module itself"
        return f"{where} ({self.line})" if self.line else where


@dataclass(frozen=True)
class Operation:
    """One thing that was computed.

    Attributes:
        name: The operator (``"add"``), or ``"layer"``, or ``"cut"`` for a module that cannot be looked into.
        arguments: Its arguments by name, with values in the place of tensors.
        outputs: The values that it made or wrote; ``None`` for what is no tensor.
        site: Where it was.
        pointwise: Whether it works element by element.
        layer: The layer's name.
        taken, given: A layer's ports: value, slot, dimension, copies of all, and of each index.
    """

    name: str
    arguments: Mapping[str, Any]
    outputs: tuple[Value | None, ...]
    site: Site
    pointwise: bool = False
    layer: str = ""
    taken: tuple[tuple[Value, str, int, int, int], ...] = ()
    given: tuple[tuple[Value, str, int, int, int], ...] = ()

    @property
    def result(self) -> Value:
        """The first output, of an operator that gives tensors."""
        result = self.outputs[0]
        assert result is not None
        return result

    @property
    def inputs(self) -> list[Value]:
        """The values among the arguments."""
        return list(_values_in(self.arguments.values()))


@dataclass
class Tape:
    """What the steps computed.

    Attributes:
        operations: In the order in which they ran.
        shapes: Of each value.
        sources: Value -> name of the parameter, buffer or tensor attribute that it is.
        names: Of all parameters, buffers and tensor attributes.
        fresh: Values that were made from sizes alone (`torch.zeros`), or by a backward pass.
        custom: Value -> name of the user's own autograd function that made it.
        aliases: Of each value, the number of the memory that it looks at.
        shown: Values that leave the steps: returned, read by Python, kept.
        returned: What modules that are no layers gave: name of the module, value.
        apart: Name of a layer that ran on tensors that are not followed -> what it did.
        ran: Names of the modules that ran.
        order: The same, in the order in which they were first done.
    """

    operations: list[Operation] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    sources: dict[int, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    fresh: set[int] = field(default_factory=set)
    custom: dict[int, str] = field(default_factory=dict)
    aliases: list[int] = field(default_factory=list)
    shown: set[int] = field(default_factory=set)
    returned: list[tuple[str, Value]] = field(default_factory=list)
    apart: dict[str, str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    order: dict[str, None] = field(default_factory=dict)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The value's shape."""
        return self.shapes[value.number]


class TooLongError(BaseException):
    """More is computed than was to be recorded; no exception that the user's code would catch."""


class Recorder:
    """Fills a tape while a model runs.

    Args:
        model: The model.
        layouts: Names of the layers that are taken as a whole.
        reasons: Names of the modules that cannot be looked into.
        most: So many operations are noted; `None`: all.

    Raises:
        TooLongError: While recording, by the first operation that is one too many.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Mapping[str, Layout],
        reasons: Mapping[str, str],
        most: int | None = None,
    ) -> None:
        self.tape = Tape()
        self._most_operations = most
        self._model, self._layouts, self._reasons = model, layouts, reasons
        self._known: dict[Any, int] = {}
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}  # storage -> a hold on its address, alias number
        self._running: list[str] = []
        self._whole: list[tuple[nn.Module, dict[str | int, Any]]] = []
        self._made: set[int] = set()  # aliases of what operations made
        for name, tensor in named_tensors(model):
            self.tape.names.add(name)
            self.tape.sources.setdefault(self.value(tensor).number, name)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While this lasts, what runs is noted."""
        fastpath = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            torch.backends.mha.set_fastpath_enabled(False)  # it runs layers without calling them
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            stack.enter_context(registered(self._hooks()))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # made of products that the rules know
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_Reads(self))
            stack.enter_context(_Operators(self))
            yield

    def show(self, result: Any) -> None:
        """Note what a step returned."""
        self.tape.shown.update(self.value(tensor).number for tensor in tensors_in(result))

    # ------------------------------------------------------------------------------------------------------- values

    def value(self, tensor: torch.Tensor) -> Value:
        """The value that a tensor is now."""
        tensor = innermost(tensor)
        key = self._key(tensor)
        number = self._known.get(key)
        return self._new(key, tensor) if number is None else Value(number)

    def _key(self, tensor: torch.Tensor) -> Any:
        if tensor.layout is not torch.strided or tensor.is_nested or _is_wrapped(tensor):
            return id(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = _hold(storage), len(self._memory)
        return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype

    def _new(self, key: Any, tensor: torch.Tensor) -> Value:
        number = len(self.tape.shapes)
        self._known[key] = number
        self.tape.shapes.append(_shape(tensor))
        memory = self._memory.get(key[0]) if isinstance(key, tuple) else None
        self.tape.aliases.append(-1 - number if memory is None else memory[1])
        return Value(number)

    def made(self, tensor: Any, fresh: bool = False) -> Value | None:
        """A new value for what an operation has made or written."""
        if not isinstance(tensor, torch.Tensor):
            return None
        tensor = innermost(tensor)
        value = self._new(self._key(tensor), tensor)
        if fresh:
            self.tape.fresh.add(value.number)
        return value

    def given(self, argument: Any) -> Any:
        """An argument, with values in the place of tensors."""
        if isinstance(argument, torch.Tensor):
            value = self.value(argument)
            kind = getattr(argument.grad_fn, "_forward_cls", None)  # a torch.autograd.Function
            if kind is not None and not kind.__module__.startswith("torch."):
                self.tape.custom[value.number] = kind.__name__
            return value
        if isinstance(argument, (list, tuple)):
            return tuple(self.given(item) for item in argument)
        return argument

    # --------------------------------------------------------------------------------------------------- operations

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operator and note it."""
        if self._whole:
            return func(*args, **kwargs)
        if self._most_operations is not None and len(self.tape.operations) >= self._most_operations:
            raise TooLongError
        if torch._C._current_graph_task_id() != -1:  # inside of a backward pass
            output = func(*args, **kwargs)
            for tensor in tensors_in(output):
                self.made(tensor, fresh=True)
            return output
        names = [argument.name for argument in func._schema.arguments]
        arguments = {name: self.given(value) for name, value in (*zip(names, args, strict=False), *kwargs.items())}
        output = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if not func._schema.name.startswith(("aten::", "prims::")):
            name = func._schema.name
        if name.startswith(_EACH):
            self._note_each(func, name[len(_EACH) :].rstrip("_"), arguments, args[0] if output is None else output)
            return output
        pointwise = torch.Tag.pointwise in func.tags
        fresh = not any(True for _ in _values_in(arguments.values()))
        flat = output if isinstance(output, (list, tuple)) else [output]
        outputs = tuple(self.made(tensor, fresh) for tensor in flat)
        self.tape.operations.append(
            Operation(name if name.startswith("__") else name.rstrip("_"), arguments, outputs, self.site(), pointwise)
        )
        if (not outputs or outputs == (None,)) and name not in _OF_SHAPES:
            self.tape.shown.update(value.number for value in _values_in(arguments.values()))
        return output

    def _note_each(self, func: Any, name: str, arguments: Mapping[str, Any], results: Sequence[torch.Tensor]) -> None:
        """Note an operator on lists of tensors as one on each of these."""
        schema = {one.name: one.type for one in func._schema.arguments}
        lists = {key for key in arguments if isinstance(schema[key], torch.ListType)}
        packed = {key for key in arguments.keys() - lists if key == "scalars"}  # one tensor with a number for each
        self.tape.shown.update(arguments[key].number for key in packed)
        packet = getattr(torch.ops.aten, name, None)
        kinds = [getattr(packet, kind) for kind in packet.overloads()] if packet is not None else []
        pointwise = any(torch.Tag.pointwise in kind.tags for kind in kinds)
        for place, result in enumerate(results):
            one = {_ONE.get(k, k): v[place] if k in lists else v for k, v in arguments.items() if k not in packed}
            self.tape.operations.append(Operation(name, one, (self.made(result),), self.site(), pointwise))

    def unfused(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run what a recurrent layer or attention computes with products that the rules know, whatever is asked for."""
        backends: tuple[Any, ...] = () if self._whole else (torch.backends.mkldnn, torch.backends.cudnn)
        before = [backend.enabled for backend in backends]
        try:
            for backend in backends:
                backend.enabled = False
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        finally:
            for backend, enabled in zip(backends, before, strict=True):
                backend.enabled = enabled

    def read(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note that Python code has looked into tensors."""
        if not self._whole:
            self.tape.shown.update(self.value(tensor).number for tensor in tensors)

    def site(self) -> Site:
        """Where the user's code is now."""
        return Site(self._running[-1] if self._running else "", users_line(sys._getframe(2)))

    # -------------------------------------------------------------------------------------------------------- hooks

    def _hooks(self) -> Iterator[RemovableHandle]:
        for name, module in self._model.named_modules():
            yield forward_pre_hook(module, self._entering(name))
            yield forward_hook(module, self._leaving(name))

    def _entering(self, name: str) -> Any:
        whole = name in self._layouts or name in self._reasons

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._running.append(name)
            if whole:
                inputs: dict[str | int, Any] = dict(enumerate(args))
                inputs.update(kwargs)
                self._whole.append((module, inputs))

        return hook

    def _leaving(self, name: str) -> Any:
        whole = name in self._layouts or name in self._reasons

        def hook(module: nn.Module, _: Any, output: Any) -> None:
            while self._running and self._running.pop() != name:
                pass  # one that raised an exception, which the code around it has caught
            if not whole:
                self.tape.ran.add(name)
                self.tape.order.setdefault(name)
                if not self._whole:
                    self.tape.returned += [(name, self.value(tensor)) for tensor in tensors_in(output)]
                return
            inputs: dict[str | int, Any] = {}
            while self._whole:
                inner, inputs = self._whole.pop()
                if inner is module:
                    break
            if not self._whole:
                self.tape.ran.add(name)
                self._note_layer(name, module, inputs, output)

        return hook

    def _note_layer(self, name: str, module: nn.Module, inputs: dict[str | int, Any], output: Any) -> None:
        self.tape.order.setdefault(name)
        arguments = {str(key): tuple(self.given(t) for t in tensors_in(value)) for key, value in inputs.items()}
        tensors = tensors_in(output)
        entry = layer_type(module) if name in self._layouts else None
        apart = next(filter(None, map(_why_apart, (*tensors_in(inputs), *tensors))), "")
        if apart:
            self.tape.apart[name] = apart
            entry = None
        taken = [self._port(port) for port in (entry.taken(module, inputs) if entry is not None else ())]
        outputs = tuple(self.made(tensor) for tensor in tensors)
        given = [self._port(port) for port in (entry.given(module, output) if entry is not None else ())]
        kind = "cut" if entry is None else "layer"
        site = Site(name, "")
        self.tape.operations.append(Operation(kind, arguments, outputs, site, False, name, tuple(taken), tuple(given)))

    def _port(self, port: Port) -> tuple[Value, str, int, int, int]:
        return self.value(port.tensor), port.slot, port.dim, port.repeat, port.each


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every elementary operator to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.operator(func, args, kwargs or {})


class _Reads(TorchFunctionMode):
    """Notes what leaves for Python or NumPy: no operator tells of it. And has layers run in operators."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self._recorder.read([argument for argument in args if isinstance(argument, torch.Tensor)])
        if func in _FUSED:
            return self._recorder.unfused(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_READS = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.__array__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__bool__,
    torch.Tensor.data_ptr,
}

_EACH = "_foreach_"
"""Begins the names of operators that do the same to every tensor of a list."""

_ONE = {"scalar": "other", "scalars": "other"}
"""Names of their arguments -> those of the operators that they are many of."""

_FUSED = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.nn.functional.scaled_dot_product_attention}

_OF_SHAPES = {"is_same_size", "_has_same_storage_numel", "prim::layout"}
"""Operators that tell something of shapes alone, which forward derivatives and nested tensors ask for."""


def _hold(storage: torch.UntypedStorage) -> StorageWeakRef:
    """Keep the address of a memory from being taken by another, not its content."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _why_apart(tensor: torch.Tensor) -> str:
    """What a layer does that is given this tensor, or gives it, if it is one that is not followed."""
    if is_transformed(tensor):
        return "runs inside of torch.func (vmap, jvp, grad), where channels are not followed; call it outside of that"
    return "runs on nested tensors, whose channels are not followed; hand it padded ones" if tensor.is_nested else ""


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """A tensor's shape; nested tensors of the older kind, which have none, count as empty."""
    ragged = tensor.is_nested and tensor.layout is torch.strided
    return (0,) * tensor.dim() if ragged else tuple(tensor.shape)


def _is_wrapped(tensor: torch.Tensor) -> bool:
    return type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


def _values_in(arguments: Any) -> Iterator[Value]:
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, tuple):
            yield from _values_in(argument)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that modules keep as plain attributes, by full name."""
    for prefix, module in model.named_modules():
        kept = ((key, value) for key, value in vars(module).items() if isinstance(value, torch.Tensor))
        for name, tensor in (*module._parameters.items(), *module._buffers.items(), *kept):
            if tensor is not None and not is_lazy(tensor):
                yield joined(prefix, name), tensor
