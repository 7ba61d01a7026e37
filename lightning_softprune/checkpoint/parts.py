"""What no tensor tells of a pruned module, kept by the modules inside of it that have it.

A network inside of a LightningModule is saved by itself, and a round was the LightningModule's: so the module that has
an attribute which counts channels, or a pruned tensor that no state dict has, knows which these are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lightning_softprune.checkpoint.shapes import RECORD, ModelShapes, copied, counts_of, owner_of, untold_sizes
from lightning_softprune.utilities.names import joined


@dataclass
class PartHook:
    """Writes what no tensor tells of one module into state dicts, beside the version of its class.

    That is attributes that count channels, and the sizes of a layer without tensors. It stays on the module, which is
    copied and pickled with it.

    Attributes:
        counts: The names of these attributes.
        unsaved: Those of pruned tensors that no state dict has.
    """

    counts: set[str] = field(default_factory=set)
    unsaved: set[str] = field(default_factory=set)

    def __call__(self, module: nn.Module, _: Any, __: str, versions: dict[str, Any]) -> None:
        """Called by the `state_dict` of the module, and of those around it."""
        tell(versions, {**untold_sizes(module, inside=False), **counts_of(module, sorted(self.counts))})


def tell(versions: dict[str, Any], told: dict[str, int]) -> None:
    """Write what no tensor tells beside the version of a class, and beside what another hook has written there."""
    if told:
        before = versions.get(RECORD)
        versions[RECORD] = {**before, **told} if isinstance(before, dict) else told


def keep_in_parts(model: nn.Module, form: ModelShapes) -> None:
    """Let the modules inside of a model know what of them no tensor tells.

    Args:
        model: The model.
        form: A form of it, with these attributes and tensors.
    """
    for kind, names in (("counts", form.counts), ("unsaved", form.unsaved)):
        for name in names:
            owner, attribute = owner_of(model, name)
            if owner is not None:
                getattr(_hook_of(owner) or _hooked(owner), kind).add(attribute)
    for layer in model.modules():
        if untold_sizes(layer, inside=False) and _hook_of(layer) is None:
            _hooked(layer)


def form_of_part(model: nn.Module) -> ModelShapes:
    """The form of a module that was never pruned by itself, with what the modules inside of it know."""
    form, counts, unsaved = ModelShapes.of(model), {}, {}
    for path, module in model.named_modules(remove_duplicate=False):
        hook = _hook_of(module)
        if hook is None:
            continue
        counts.update({joined(path, name): n for name, n in counts_of(module, sorted(hook.counts)).items()})
        tensors = {name: getattr(module, name, None) for name in sorted(hook.unsaved)}
        unsaved.update({joined(path, name): t for name, t in tensors.items() if isinstance(t, torch.Tensor)})
    return replace(form, counts=counts, unsaved=copied(unsaved))


def _hook_of(module: nn.Module) -> PartHook | None:
    return next((hook for hook in module._state_dict_hooks.values() if isinstance(hook, PartHook)), None)


def _hooked(module: nn.Module) -> PartHook:
    hook = PartHook()
    module._register_state_dict_hook(hook)  # type: ignore[no-untyped-call]
    return hook
