"""A terminal that no variable of the environment has a say in."""

from collections.abc import Iterator

import pytest
import rich


@pytest.fixture
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    yield
    rich.reconfigure()  # RichProgressBar changes the global console
