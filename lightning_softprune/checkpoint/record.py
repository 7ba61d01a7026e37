"""The record that a pruned module writes into its checkpoints."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_softprune.checkpoint.parts import keep_in_parts, tell
from lightning_softprune.checkpoint.shapes import RECORD, ModelShapes, copied, counts_of, tensor_sites, untold_sizes
from lightning_softprune.graph import layer_type
from lightning_softprune.results import PruningResult
from lightning_softprune.utilities.plain_types import LARGEST_INTEGER

FORMAT = 2
"""Version of the record: 2 where it has what older versions do not know: counts, tensors, heads; else 1."""


class InstanceHook:
    """A hook of a LightningModule that stands, as an attribute of the instance, in front of the user's own."""

    name: str
    module: pl.LightningModule
    before: Callable[[dict[str, Any]], None] | None

    def call_before(self, checkpoint: dict[str, Any]) -> None:
        """Call what the hook stands in front of."""
        if self.before is not None:
            self.before(checkpoint)
        else:
            getattr(type(self.module), self.name)(self.module, checkpoint)

    def remove(self) -> None:
        """Leave the module as it was before."""
        if self.module.__dict__.get(self.name) is not self:
            return
        if self.before is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.before


class SaveHook(InstanceHook):
    """A pruned module's `on_save_checkpoint`: the user's own, and then the record.

    It stays on the module (as an attribute of the instance) for as long as the module is pruned, so that whoever saves
    it, with which trainer and callbacks ever, writes a file that can be loaded. It is copied and pickled with its
    module.
    """

    name = "on_save_checkpoint"
    earlier: Sequence[dict[str, Any]] = ()  # of the class: one that 0.1.0 has pickled has none of its own

    def __init__(self, module: pl.LightningModule, dense: ModelShapes, results: list[dict[str, Any]]) -> None:
        self.module, self.dense, self.results = module, dense, results
        self.before = module.__dict__.get(self.name)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Let the user's own hook write, then write the record."""
        self.call_before(checkpoint)
        form = ModelShapes.of(self.module, like=self.dense)
        form = replace(form, left_out=_left_out(self.module, form, self.dense, checkpoint.get("state_dict")))
        begun = checkpoint.get(RECORD, {})
        later = form.counts or form.unsaved or form.left_out
        checkpoint[RECORD] = {
            "format": FORMAT if later or _has_new_sizes(form, self.dense) else 1,
            **form.to_dict(),
            "created_biases": [name for name in form.shapes if name not in self.dense.shapes],
            "dense": self.dense.to_dict(),
            "results": list(self.results),
        }
        mark(checkpoint.get("state_dict"))
        if self.earlier:
            checkpoint[RECORD]["earlier"] = list(self.earlier)
        if "optimizer_states" in checkpoint:
            trainer = self.module.__dict__.get("_trainer")
            names = begun.get("optimizers") or _parameter_names(self.module, getattr(trainer, "optimizers", ()))
            checkpoint[RECORD]["optimizers"] = _as_many(names, checkpoint["optimizer_states"])


def mark(state: Any) -> None:
    """Let a state dict say that it is of a pruned module, where no tensor is: beside the versions of its modules."""
    if isinstance(versions := getattr(state, "_metadata", None), dict):
        versions.setdefault("", {}).setdefault(RECORD, True)


def is_marked(state: Any) -> bool:
    """Whether a state dict says so."""
    versions = getattr(state, "_metadata", None)
    return isinstance(versions, dict) and RECORD in versions.get("", {})


class CountsHook:
    """Writes what no tensor tells of a pruned module into its state dicts: attributes that count channels, and sizes.

    It stays on the module, which is copied and pickled with it. Copies of a state dict in other types lose what it
    writes.
    """

    def __call__(self, module: nn.Module, _: Any, __: str, versions: dict[str, Any]) -> None:
        """Called by the module's `state_dict`."""
        hook = save_hook(module)
        if hook is not None:
            tell(versions, {**untold_sizes(module), **counts_of(module, hook.dense.counts)})


def counts_in(state: Any) -> dict[str, int]:
    """The attributes and slots of layers that a state dict knows, by name, and their values."""
    versions = getattr(state, "_metadata", None)
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, held in (versions.items() if isinstance(versions, dict) else ())
        for name, value in (held[RECORD].items() if isinstance(held.get(RECORD), dict) else ())
        if type(value) is int and 0 < value <= LARGEST_INTEGER
    }


def keep_dense(
    module: pl.LightningModule, dense: ModelShapes, counts: Mapping[str, int], unsaved: Mapping[str, torch.Tensor]
) -> None:
    """Remember what a module was before a round; what an earlier round has left stays as it is.

    Args:
        module: A pruned module. From now on it writes the record into its checkpoints.
        dense: Its form before the round.
        counts: The attributes that the round has changed, and the values before.
        unsaved: The tensors of no state dict that the round has changed, before it.
    """
    hook = save_hook(module) or _hooked(module, dense)
    before = hook.dense
    hook.dense = replace(before, counts={**counts, **before.counts}, unsaved={**copied(unsaved), **before.unsaved})
    keep_in_parts(module, hook.dense)


def keep_record(
    module: pl.LightningModule,
    dense: ModelShapes,
    results: Iterable[PruningResult | dict[str, Any]],
    earlier: Iterable[PruningResult | dict[str, Any]] = (),
) -> None:
    """From now on, write the record into every checkpoint of this module.

    Args:
        module: A pruned module.
        dense: Its form before the first round; ignored where an earlier round has left one.
        results: The rounds so far.
        earlier: The rounds of the fits before.
    """
    hook = save_hook(module) or _hooked(module, dense)
    hook.results, hook.earlier = _plain(results), _plain(earlier)


def _hooked(module: pl.LightningModule, dense: ModelShapes) -> SaveHook:
    """Give a module the hooks of a pruned one."""
    hook = module.__dict__[SaveHook.name] = SaveHook(module, dense, [])
    if not any(isinstance(other, CountsHook) for other in module._state_dict_hooks.values()):
        module._register_state_dict_hook(CountsHook())  # type: ignore[no-untyped-call]
    return hook


def _left_out(module: nn.Module, form: ModelShapes, dense: ModelShapes, state: Any) -> dict[str, torch.Tensor]:
    """What a state dict leaves out though rounds have changed it, such as a frozen backbone that `__init__` loads.

    Beside what was sliced, that is all that lies in the same layers (biases of readers are compensated), and BatchNorm.

    Args:
        module: The pruned module.
        form: Its form.
        dense: Its form before the first round.
        state: The state dict; the module's own, where there is none.
    """
    sites = list(tensor_sites(module))
    saved = state if isinstance(state, Mapping) and state else module.state_dict()
    known = {_place(site.tensor) for site in sites if site.name in saved}  # a tied tensor: once is enough
    known |= {_place(value) for value in saved.values() if isinstance(value, torch.Tensor)}  # under another name
    changed = {id(site.module) for site in sites if form.shapes.get(site.name) != dense.shapes.get(site.name)}
    missing = {
        site.name: site.tensor
        for site in sites
        if _place(site.tensor) not in known
        and site.attribute not in site.module._non_persistent_buffers_set
        and (id(site.module) in changed or _takes_shifts(site.module))
    }
    pruned = any(form.shapes.get(name) != dense.shapes.get(name) for name in missing)
    return copied(missing) if pruned else {}


def _takes_shifts(module: nn.Module) -> bool:
    """Whether a layer's running mean may have taken what compensation adds in front of it."""
    entry = layer_type(module)
    return entry is not None and entry.mean_buffer(module) is not None


def _place(tensor: torch.Tensor) -> tuple[str, int]:
    """Where a tensor's values are; a state dict has other objects that share them."""
    try:
        return (str(tensor.device), tensor.data_ptr()) if not tensor.is_meta else ("", id(tensor))
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, not initialised
        return ("", id(tensor))


def _has_new_sizes(form: ModelShapes, dense: ModelShapes) -> bool:
    """Whether layers have sizes that they had not before they were pruned."""
    return any(sizes.keys() != dense.layers.get(name, sizes).keys() for name, sizes in form.layers.items())


def _plain(results: Iterable[PruningResult | dict[str, Any]]) -> list[dict[str, Any]]:
    return [result.to_dict() if isinstance(result, PruningResult) else result for result in results]


def rounds_of(module: nn.Module) -> list[PruningResult]:
    """The rounds that have made this module what it is, as far as it remembers; the first knows the dense costs."""
    hook = save_hook(module)
    if hook is None:
        return []
    return [PruningResult.from_dict(result) for result in (*hook.earlier, *hook.results)]


def is_recorded(module: nn.Module) -> bool:
    """Whether this module was pruned, and writes the record when it is saved."""
    return save_hook(module) is not None


def save_hook(module: nn.Module) -> SaveHook | None:
    """The hook of a pruned module; ``None`` where it was not pruned."""
    hook = module.__dict__.get(SaveHook.name)
    return hook if isinstance(hook, SaveHook) else None


def _parameter_names(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[list[list[str | None]]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def _as_many(names: list[list[list[str | None]]], states: Iterable[Mapping[str, Any]]) -> list[list[list[str | None]]]:
    """The names, if they are of the optimizers that are saved; else as many places without a name.

    The trainer that saves need not be the one that the module was with last.
    """
    places: list[list[list[str | None]]] = [
        [[None] * len(group["params"]) for group in state.get("param_groups", ())] for state in states
    ]
    fits = [list(map(len, groups)) for groups in names] == [list(map(len, groups)) for groups in places]
    return names if fits else places


def name_parameters(checkpoint: dict[str, Any], module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Begin the record of a pruned module's checkpoint, by the trainer that saves it, with what its optimizers hold.

    Args:
        checkpoint: What is about to be saved.
        module: The module, which writes the rest when its own hook is called.
        optimizers: The trainer's.
    """
    if is_recorded(module) and "optimizer_states" in checkpoint:
        checkpoint[RECORD] = {"optimizers": _parameter_names(module, optimizers)}


def _flat(groups: list[list[str | None]]) -> list[str]:
    return [str(name) for name in itertools.chain(*groups)]


def order_parameters(module: nn.Module, optimizers: Sequence[Optimizer], record: Mapping[str, Any] | None) -> None:
    """Bring the parameters of fresh optimizers into the order in which a checkpoint has their state.

    PyTorch matches optimizer state by position. A bias that compensation created joined a parameter group when it was
    made; an optimizer that is built later finds it elsewhere, perhaps in another group. It is done once more when the
    state comes: callbacks that restore parameter groups of their own (`BaseFinetuning`) may do so later than this.

    Args:
        module: The module, in the checkpoint's shape.
        optimizers: Its optimizers. One that does not hold the same parameters as then is left alone; created biases
            may be missing.
        record: The checkpoint's record.
    """
    wanted = (record or {}).get("optimizers") or []
    if len(wanted) != len(optimizers):
        return
    created = set((record or {}).get("created_biases") or [])
    for optimizer, names in zip(optimizers, wanted, strict=True):
        _order_groups(module, optimizer, names, created)
        _order_when_state_comes(module, optimizer, names, created)


def _order_groups(module: nn.Module, optimizer: Optimizer, then: list[list[str | None]], created: set[str]) -> None:
    (now,) = _parameter_names(module, [optimizer])
    parameters = dict(module.named_parameters())
    held, wanted = Counter(_flat(now)), Counter(_flat(then))
    missing = wanted - held
    if len(now) == len(then) and not held - wanted and missing.keys() <= created and wanted.keys() <= parameters.keys():
        for group, names in zip(optimizer.param_groups, then, strict=True):
            group["params"][:] = [parameters[str(name)] for name in names]


def _order_when_state_comes(
    module: nn.Module, optimizer: Optimizer, then: list[list[str | None]], created: set[str]
) -> None:
    waiting = [module]

    def before_loading(optimizer: Optimizer, _: dict[str, Any]) -> None:
        if waiting:  # once; a hook that removes itself breaks those behind it
            _order_groups(waiting.pop(), optimizer, then, created)

    optimizer.register_load_state_dict_pre_hook(before_loading)
