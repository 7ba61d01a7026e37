"""Components: named sub-networks, found by patterns of module names, and twins that mirror other modules.

A *component* is a set of modules; a group is ``intra`` where all its members lie in one, ``inter`` where it couples
several. A *twin* (a target network, an EMA teacher) follows the module it mirrors: the same plan, no coefficients of
its own.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.graph.geometry import Shape
from lightning_softprune.graph.groups import Count, PruningGroup
from lightning_softprune.utilities.names import is_inside, no_match, no_module, without_digits
from lightning_softprune.utilities.nested import integer_of

_APART = "have it read those of the module that is mirrored, or take the twin out"

Form = tuple[tuple[str, Shape], ...]
"""Names and shapes of a module's parameters."""


@dataclass(frozen=True)
class Component:
    """A named sub-network: the modules whose names match one of the patterns, and everything inside them."""

    name: str
    patterns: tuple[str, ...]

    def contains(self, module: str) -> bool:
        """Whether a module lies in this component."""
        return any(fnmatch.fnmatchcase(n, pattern) for n in self_and_parents(module) for pattern in self.patterns)

    def is_whole(self, module: str) -> bool:
        """Whether one of the patterns names this module itself."""
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self.patterns)


def match_modules(model: nn.Module, patterns: Iterable[str], argument: str) -> dict[str, list[str]]:
    """Find the modules (and bare parameters) that each pattern names.

    Args:
        model: Where to look.
        patterns: ``fnmatch`` patterns of module names.
        argument: The user's argument, for the error.

    Raises:
        ValueError: A pattern matches nothing; the message gives the nearest module names.
    """
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in names or "." not in name]
    found = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(no_match(argument, pattern, names, "module"))
        found[pattern] = hits
    return found


def default_components(model: nn.Module) -> list[Component]:
    """The top-level children with parameters; a single wrapping child is looked through."""
    prefix, current = "", model
    while True:
        children = [(name, child) for name, child in current.named_children() if any(True for _ in child.parameters())]
        bare = any(True for _ in current.parameters(recurse=False))
        nested = len(children) == 1 and not bare and any(True for _ in children[0][1].children())
        if not nested:
            return [Component(name, (prefix + name,)) for name, _ in children]
        prefix, current = f"{prefix}{children[0][0]}.", children[0][1]


def assign_components(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    components: Mapping[str, Sequence[str]] | None,
    twins: Iterable[str] = (),
) -> list[PruningGroup]:
    """Write component and kind into each group.

    Args:
        model: The traced model.
        groups: Groups of it.
        components: Component name -> module-name patterns; ``None``: the default components. Modules of the default
            components that no pattern names keep their default.
        twins: Modules that only follow others: what is in them does not count.

    Raises:
        ValueError: A pattern matches nothing.
    """
    named = []
    if components is not None:
        for name, patterns in components.items():
            match_modules(model, patterns, f"components[{name!r}]")
            named.append(Component(name, tuple(patterns)))
    defaults = default_components(model)

    def component_of(module: str) -> str:
        for component in (*named, *defaults):
            if component.contains(module):
                return component.name
        return module.split(".")[0]

    def outputs_of(group: PruningGroup) -> tuple[tuple[str, int], ...]:
        whole = {"": ""}  # modules that are all of a component
        for component in (*defaults, *named):
            whole |= {n: component.name for n, _ in group.outputs if component.is_whole(n)}
        return tuple(dict.fromkeys((whole[n], width) for n, width in group.outputs if n in whole))

    assigned = []
    for group in groups:
        own = [member.module for member in group.members if not any(is_inside(member.module, twin) for twin in twins)]
        names = list(dict.fromkeys(map(component_of, own)))
        kind = "intra" if len(names) <= 1 else "inter"
        assigned.append(replace(group, component="+".join(names), kind=kind, outputs=outputs_of(group)))
    return assigned


def check_twins(model: nn.Module, twins: Mapping[str, str]) -> None:
    """Make sure that twins are modules with the parameters of the modules that they mirror.

    Raises:
        ValueError: A name is not that of a module, a module is its own twin or mirrors a twin, or the two have other
            parameters.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for twin, original in twins.items():
        for name in (twin, original):
            if name not in modules:
                raise ValueError(no_module("twins", name, list(modules)))
        if twin == original:
            raise ValueError(f"twins: {twin!r} is given as its own twin; name the module that it mirrors")
        if original in twins:
            raise ValueError(
                f"twins: {twin!r} mirrors {original!r}, which is a twin itself; name the module that both mirror"
            )
        forms = [form_of(modules[name]) for name in (twin, original)]
        differing = sorted(dict({*forms[0]} ^ {*forms[1]}))
        if differing and not any(map(is_lazy, (*modules[twin].parameters(), *modules[original].parameters()))):
            raise ValueError(
                f"twins: {twin!r} does not mirror {original!r}; different are: {', '.join(map(repr, differing))}"
            )


def mirror_twins(model: nn.Module, groups: Sequence[PruningGroup], twins: Mapping[str, str]) -> list[PruningGroup]:
    """Let twins follow the modules they mirror: the same plan, no coefficients of their own.

    Args:
        model: The traced model.
        groups: Groups of it.
        twins: Module name -> the module it mirrors (target networks, EMA teachers, momentum encoders).

    Returns:
        The groups without those of the twins alone; every member inside a mirrored module has its twin beside it. Where
        others read channels that only a twin makes, these stay.

    Raises:
        ValueError: As for `check_twins`.
    """
    check_twins(model, twins)
    mirrored = []
    for group in groups:
        own = [member for member in group.members if not any(is_inside(member.module, twin) for twin in twins)]
        if not own:
            continue
        if group.prunable and any(is_inside(group.name.partition("#")[0], twin) for twin in twins):
            group = group.refuse(
                f"{own[0].module} reads channels that only {group.name} makes, which twins names; {_APART}"
            )
        added = [
            replace(member, module=twin + member.module[len(original) :])
            for member in own
            for twin, original in twins.items()
            if is_inside(member.module, original)
        ]
        mirrored.append(replace(group, members=(*own, *added)))
    return mirrored


def mirror_counts(model: nn.Module, counts: Sequence[Count], twins: Mapping[str, str]) -> tuple[Count, ...]:
    """The attributes, with those of the twins of their modules."""
    added = (
        replace(count, module=twin + count.module[len(original) :])
        for count in counts
        for twin, original in twins.items()
        if is_inside(count.module, original)
    )
    modules = dict(model.named_modules())
    return (*counts, *(count for count in added if integer_of(modules.get(count.module), count.attribute)))


def self_and_parents(name: str) -> list[str]:
    """The names of a module and of all modules around it, from the outside in."""
    parents = name.split(".")
    return [".".join(parents[:depth]) for depth in range(1, len(parents) + 1)]


def undeclared_twins(
    model: nn.Module, trained: Set[int], known: Collection[str] = (), ignored: Iterable[str] = ()
) -> dict[str, str]:
    """Find modules that look like teachers or targets of a trained one: none of theirs is trained, all looks the same.

    The parameters have the same names and shapes. Layers that follow each other may look alike too, with some frozen.
    So where the two names differ in a number only (blocks, layers of a stack), and where there is but one layer, the
    values have to be the same as well, as they are in a copy that was just made.

    Args:
        model: The model, before it is trained.
        trained: Identities of the parameters that an optimizer changes.
        known: Modules that are declared as twins, or left alone.
        ignored: Patterns of modules that keep their widths anyhow.

    Returns:
        The outermost of them -> the module each looks like.
    """
    forms: dict[Form, list[str]] = defaultdict(list)
    untrained, whole = [], dict(model.named_modules())
    for name, module in whole.items():
        own = list(module.parameters())
        if not name or not own:
            continue
        form = form_of(module)
        if any(id(parameter) in trained for parameter in own):
            forms[form].append(name)
        elif not any(is_inside(name, other) for other in known):
            untrained.append((name, form))
    found: dict[str, str] = {}
    left_alone = Component("ignored", tuple(ignored))
    for name, form in untrained:
        if any(is_inside(name, other) for other in found):
            continue
        if left_alone.contains(name):
            continue
        alike = [other for other in forms.get(form, ()) if not is_inside(name, other) and not is_inside(other, name)]
        same = [other for other in alike if _same_values(whole[name], whole[other])]
        layers = sum(1 for part in whole[name].modules() if any(True for _ in part.parameters(recurse=False)))
        apart = [other for other in alike if layers > 1 and without_digits(name) != without_digits(other)]
        if candidates := same or apart:
            found[name] = max(candidates, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
    return found


def equal_parts(
    model: nn.Module, trained: Set[int], known: Collection[str] = (), ignored: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """Find pairs of modules that an optimizer holds and that have the same values, as a module and its copy have.

    Names that differ in a number only are those of blocks that have begun alike, and no such pair.

    Args:
        model: The model, before it is trained.
        trained: Identities of the parameters that an optimizer changes.
        known: Modules that are declared as twins, or left alone.
        ignored: Patterns of modules that keep their widths anyhow.

    Returns:
        The names of the outermost of them, each pair in both orders.
    """
    forms: dict[Form, list[str]] = defaultdict(list)
    whole, left_alone = dict(model.named_modules()), Component("ignored", tuple(ignored))
    for name, module in whole.items():
        own = list(module.parameters())
        if not name or not own or any(id(parameter) not in trained or is_lazy(parameter) for parameter in own):
            continue
        if not any(is_inside(name, other) for other in known) and not left_alone.contains(name):
            forms[form_of(module)].append(name)
    found: list[tuple[str, str]] = []
    for one, other in (pair for names in forms.values() for pair in itertools.combinations(names, 2)):
        apart = not is_inside(one, other) and not is_inside(other, one)
        inner = any(is_inside(one, a) and is_inside(other, b) for a, b in found)
        named_apart = without_digits(one) != without_digits(other)
        if apart and named_apart and not inner and _same_values(whole[one], whole[other]):
            found += [(one, other), (other, one)]
    return found


def form_of(module: nn.Module) -> Form:
    """What a module's parameters are; those without a size yet have none."""
    return tuple((name, () if is_lazy(p) else tuple(p.shape)) for name, p in module.named_parameters())


def _same_values(one: nn.Module, other: nn.Module) -> bool:
    """Whether one has the values of the other, as its copy has, and not those that any layer begins with."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(a.device == b.device and not a.is_meta and torch.equal(a, b) for a, b in pairs) and _says_something(one)


def _says_something(module: nn.Module) -> bool:
    """Whether a parameter was drawn at random or trained: ones and zeros are what fresh layers begin with."""
    return any(p.numel() > 1 and bool((p != p.flatten()[0]).any()) for p in module.parameters())
