"""An argument parser for LightningCLI that answers a typo with what was meant.

The parser of a plain LightningCLI names the key that is wrong, and no more. It reads the arguments of each class with a
parser of its own type, which knows them all: so this one finds near misses for any class, not only for this package's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.fabric.utilities import exceptions
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lightning_softprune.calibration import IMPORTANCES
from lightning_softprune.search import SearchStrategy
from lightning_softprune.trainer import MisconfigurationException
from lightning_softprune.utilities.checks import near_miss
from lightning_softprune.utilities.libraries import counterparts

__all__ = ["SuggestingParser"]

# What jsonargparse says of keys: the whole message of the parser that should know the key. An error then passes through
# every parser around that one, and through some twice: what has its hint is left alone.
UNKNOWN_OPTIONS = re.compile(r"unrecognized arguments: (?!.*; did you mean )(.*)", re.IGNORECASE | re.DOTALL)
UNKNOWN_KEY = re.compile(
    r"(?:.*Group '(?P<group>[^']+)')?.*\b(?:option|key) '(?P<key>[^']+)'(?: is not (?:accepted|expected))?",
    re.IGNORECASE,  # and in the words of older versions
)
# What it says of values: a line of a message.
BAD_CHOICE = re.compile(
    r"Expected a typing\.Literal\[(?P<choices>.*)\]\. Got value: (?!.*; did you mean )(?P<value>.*)$", re.MULTILINE
)
BAD_MODULE = re.compile(r"No module named '(?P<value>\w+)'$", re.MULTILINE)
BAD_NAME = re.compile(  # the first such line below the innermost key: there is one per member of a union
    r'Parser key "(?:[^"]*\.)?(?P<key>callbacks|search|importance)":'
    r'(?:(?!Parser key ").)*?Expected a dot import path string: (?P<value>\w+)$',
    re.MULTILINE | re.DOTALL,
)
BASES = {"callbacks": Callback, "search": SearchStrategy}  # whose subclasses go by their bare names


class SuggestingParser(LightningArgumentParser):
    """Adds `; did you mean 'target_sparsity'?` to an error, beside the misspelt key, class name or choice.

    Nothing is added where nothing is near, and nothing else is changed:

        LightningCLI(Model, DataModule, parser_class=SuggestingParser)
    """

    def add_lightning_class_args(self, lightning_class: Any, *args: Any, **kwargs: Any) -> list[str]:
        """As Lightning's, for the classes of every library that is imported."""
        for kind in counterparts(LightningArgumentParser):
            with suppress(*counterparts(exceptions.MisconfigurationException)):
                return kind.add_lightning_class_args(self, lightning_class, *args, **kwargs)
        raise MisconfigurationException(
            f"lightning_class: {lightning_class!r} is not a Trainer, LightningModule, LightningDataModule or Callback, "
            "nor a function that returns one"
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with the message and what was meant: exits, or raises if the parser was told not to exit."""
        parser = getattr(ex, "subcommand_parser", None) or self
        keys = {option[2:].rstrip("+") for option in parser._option_string_actions if option.startswith("--")}
        super().error(_with_hints(message, keys), ex)


def _with_hints(message: str, keys: Iterable[str]) -> str:
    if found := UNKNOWN_OPTIONS.fullmatch(message):
        options = [word[2:].partition("=")[0] for word in found[1].split() if word.startswith("--")]
        return message + _hint(f"--{key}" for key in (_near_key(option, keys) for option in options) if key)
    if found := UNKNOWN_KEY.fullmatch(message):
        group = f"{found['group']}." if found["group"] else ""
        key = _near_key(group + found["key"], keys)
        return message + _hint([key.removeprefix(group)] if key else [])
    message = BAD_CHOICE.sub(lambda bad: _answer(bad, re.findall(r"'([^']*)'", bad["choices"])), message)
    message = BAD_MODULE.sub(lambda bad: _answer(bad, [__name__.partition(".")[0]], cutoff=0.85), message)
    return BAD_NAME.sub(lambda bad: _answer(bad, _names_for(bad["key"])), message)


def _names_for(key: str) -> Iterable[str]:
    """What may stand there without a path."""
    return IMPORTANCES if key == "importance" else _subclass_names(*counterparts(BASES[key]))


def _answer(bad: re.Match[str], names: Iterable[str], cutoff: float = 0.6) -> str:
    return bad[0] + near_miss(bad["value"], names, cutoff=cutoff)


def _hint(names: Iterable[str]) -> str:
    meant = ", ".join(map(repr, names))
    return f"; did you mean {meant}?" if meant else ""


def _near_key(key: str, keys: Iterable[str]) -> str | None:
    """The key with every part replaced by the nearest that is known there, if that changes it.

    >>> _near_key("trainer.calbacks.search", ["trainer.callbacks", "trainer.max_epochs"])
    'trainer.callbacks.search'
    """
    known = [one.split(".") for one in keys]
    meant: list[str] = []
    for place, part in enumerate(key.split(".")):
        parts = {one[place] for one in known if one[:place] == meant and len(one) > place}
        near = [part] if part in parts else get_close_matches(part, sorted(parts), n=1)
        meant += near or [part]
    return ".".join(meant) if meant != key.split(".") else None


def _subclass_names(*bases: type[object]) -> set[str]:
    """Of all subclasses that are loaded, as for jsonargparse."""
    below = [kind for base in bases for kind in base.__subclasses__()]
    names = {kind.__name__ for kind in below if not kind.__name__.startswith("_")}
    return names | _subclass_names(*below) if below else names
