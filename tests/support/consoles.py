"""Consoles that keep what is printed on them."""

import io
import re

from rich.console import Console

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A text file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def make_console(terminal: bool = True, width: int = 120) -> Console:
    return Console(file=Terminal() if terminal else io.StringIO(), force_terminal=terminal, width=width)


def output_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def visible(text: str) -> str:
    return ESCAPES.sub("", text)
