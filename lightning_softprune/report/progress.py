"""A round's progress bars on rank zero: one for the search, one without an end for each other *phase*.

Lightning's own bars may be alive while a search runs, and two live displays on one terminal destroy each other. So the
search's bar follows the Trainer's: with `RichProgressBar` it is one more row of that display, with `TQDMProgressBar`
one more tqdm bar below it, and where no bar is wanted or the output is not a terminal (a CI log), plain lines: one at
the start of the search, one at its end, and one every 30 s between them and in all other phases.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Protocol

import rich
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console
from rich.errors import LiveError
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_softprune.report.tables import print_line
from lightning_softprune.search import better
from lightning_softprune.utilities import checks
from lightning_softprune.utilities.libraries import counterparts
from lightning_softprune.utilities.wording import counted

Style = Literal["auto", "rich", "tqdm", "plain", "none"]

_STYLES = ("auto", "rich", "tqdm", "plain", "none")

LINE_EVERY = 30.0
"""Seconds between the lines of a round where no bar moves."""


def progress_style(trainer: Trainer) -> Literal["rich", "tqdm", "plain"]:
    """The style that goes with the Trainer's own progress bar; `"plain"` if it has none or an unknown one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, counterparts(RichProgressBar)) and bar.is_enabled:
        return "rich"
    if isinstance(bar, counterparts(TQDMProgressBar)) and bar.is_enabled:
        return "tqdm"
    return "plain"


class SearchProgress:
    """A progress bar for a search: evaluations, best score so far, time elapsed and left.

    On a terminal it moves and is gone afterwards. Elsewhere it is one line at the start, one every 30 s with the time
    left, and one at the end.

    Args:
        total: Number of evaluations, if known; an upper bound will do.
        monitor: Name of the metric.
        mode: `"min"` or `"max"`.
        style: `"auto"`: what goes with the trainer's own bar, or rich if there is no trainer. `"none"`: print nothing.
        trainer: The trainer whose bars are on the same screen.
        console: Where to print; rich's global one if not given.

    Raises:
        ValueError: If `mode` or `style` is unknown.

    Attributes:
        name: What the bar is of.

    >>> with SearchProgress(total=2, monitor="val_psnr", mode="max", style="plain") as bar:
    ...     bar.advance(19.5)
    ...     bar.advance(19.7)  # doctest: +ELLIPSIS
    Search: up to 2 evaluations, val_psnr (max)
    Search: 2 evaluations, best val_psnr 19.7, ... s
    """

    name = "Search"

    def __init__(
        self,
        total: int | None,
        monitor: str,
        mode: str,
        style: Style = "auto",
        *,
        trainer: Trainer | None = None,
        console: Console | None = None,
    ) -> None:
        checks.one_of("mode", mode, ("min", "max"))
        checks.one_of("style", style, _STYLES)
        self.total = total
        self.monitor = monitor
        self.mode = mode
        self.style = style
        self.evaluations = 0
        self.best = math.nan
        self._trainer = trainer
        self._console = console
        self._display: _Display | None = None

    def __enter__(self) -> SearchProgress:
        self.evaluations, self.best = 0, math.nan
        if self.style != "none":
            self._display = self._open_display()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        display, self._display = self._display, None
        if display is not None:
            display.close(self.evaluations, self._best_text(), complete=exc_type is None)

    def advance(self, score: float, best: float | None = None) -> None:
        """Count one evaluation.

        Args:
            score: Its score.
            best: The best score so far as the search counts it, NaN for none yet. If not given, the best of the
                scores seen, NaN ignored.
        """
        self.evaluations += 1
        if best is not None:
            self.best = best
        elif math.isnan(self.best) or better(score, self.best, self.mode):
            self.best = score
        if self._display is not None:
            total = None if self.total is None else max(self.total, self.evaluations)  # a final check may come on top
            self._display.update(self.evaluations, total, self._best_text())

    def say(self, line: str) -> None:
        """Print a line above whatever moves, unless nothing is to be printed."""
        if self.style != "none":
            console = self._console or rich.get_console()
            with Tqdm.external_write_mode(file=console.file):
                print_line(console, line)

    def _best_text(self) -> str:
        return f"best {self.monitor} " + ("-" if math.isnan(self.best) else f"{self.best:.4g}")

    def _open_display(self) -> _Display | None:
        console = self._console or rich.get_console()
        style: str = self.style
        if style == "auto":
            style = "rich" if self._trainer is None else progress_style(self._trainer)
        if style == "plain" or not _is_animated(console):
            return self._plain_lines(console)
        if style == "tqdm":
            return _TqdmBar(console, self.name, self.total, self._best_text())
        bar = None if self._trainer is None else self._trainer.progress_bar_callback
        if isinstance(bar, counterparts(RichProgressBar)) and bar.progress is not None and bar.progress.live.is_started:
            return _RichRow(bar, self.name, self.total, self._best_text())
        if console.is_jupyter:  # rich needs ipywidgets there and warns without them; tqdm copes
            return _TqdmBar(console, self.name, self.total, self._best_text())
        try:
            return _RichBar(console, self.name, self.total, self._best_text())
        except LiveError:  # rich before 14.1: somebody else's live display is on this console
            return self._plain_lines(console)

    def _plain_lines(self, console: Console) -> _Display | None:
        total = "" if self.total is None else f"up to {self.total:,} evaluations, "
        return _PlainLines(console, f"{total}{self.monitor} ({self.mode})")


class _PhaseBar(SearchProgress):
    """A bar of a phase, which may have no known end; where no bar moves, a line when one is due."""

    def __init__(self, name: str, phases: Phases, total: int | None = None) -> None:
        super().__init__(total, "", "min", phases.style, trainer=phases.trainer)
        self.name = f"SoftPruning, {name}"
        self._pace = phases.pace

    def tick(self) -> None:
        """Something was done that is no step of the phase."""
        if isinstance(self._display, _PhaseLines):
            self._display.update(self.evaluations, self.total, "")

    def _best_text(self) -> str:
        return ""

    def _plain_lines(self, console: Console) -> _Display:
        return _PhaseLines(console, self.name, self._pace)


class Phases:
    """What a round does besides its search: each phase is a bar of its own while it lasts, and its time is kept.

    Args:
        style: As for `SearchProgress`.
        trainer: The trainer whose bars are on the same screen.

    Attributes:
        seconds: Phase -> what it took; one that comes again is added up.
    """

    def __init__(self, style: Style, trainer: Trainer | None = None) -> None:
        self.style, self.trainer = style, trainer
        self.seconds: dict[str, float] = {}
        self.pace = _Pace()
        self._bar: _PhaseBar | None = None

    def tick(self) -> None:
        """Note that the phase goes on: to be called as often as may be, or there is no line where one is due."""
        if self._bar is not None:
            self._bar.tick()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Show the phase while the block runs."""
        with self._shown(name):
            yield

    @contextmanager
    def counted(self, name: str, total: int) -> Iterator[Callable[[float], None]]:
        """Show a phase of so many steps; yields what to call with each step's error."""
        with self._shown(name, total) as bar:
            yield bar.advance

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Keep the time of a phase that has a bar, and lines, of its own."""
        with self._kept(name):
            yield
        self.pace.last = time.perf_counter()

    @contextmanager
    def _shown(self, name: str, total: int | None = None) -> Iterator[_PhaseBar]:
        self._bar = bar = _PhaseBar(name, self, total)
        try:
            with self._kept(name), bar:
                yield bar
        finally:
            self._bar = None

    @contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def _is_animated(console: Console) -> bool:
    """Whether a moving bar can be drawn."""
    if console.is_jupyter:
        return True
    # FORCE_COLOR, common in CI, makes rich take a log file for a terminal: colours are wanted there, moving bars not.
    if os.environ.get("TTY_INTERACTIVE") == "0" or ("FORCE_COLOR" in os.environ and not console.file.isatty()):
        return False
    return console.is_terminal and not console.is_dumb_terminal


class _Display(Protocol):
    """One way of drawing; the constructor draws it for the first time."""

    def update(self, evaluations: int, total: int | None, best: str) -> None: ...

    def close(self, evaluations: int, best: str, complete: bool) -> None: ...


class _Pace:
    """When lines of a round are due that no bar is drawn of.

    Attributes:
        began: When the round did.
        last: When the last line was printed.
    """

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()

    def is_due(self) -> bool:
        """Whether a line is; it counts as printed."""
        now = time.perf_counter()
        due = now - self.last >= LINE_EVERY
        self.last = now if due else self.last
        return due


class _PhaseLines:
    def __init__(self, console: Console, name: str, pace: _Pace) -> None:
        self._console, self._name, self._pace = console, name, pace

    def update(self, evaluations: int, total: int | None, best: str) -> None:
        if self._pace.is_due():
            count = "" if total is None else f" {evaluations:,} of {total:,},"
            with Tqdm.external_write_mode(file=self._console.file):
                passed = self._pace.last - self._pace.began
                print_line(self._console, f"{self._name}:{count} {passed:.0f} s since the round began")

    def close(self, evaluations: int, best: str, complete: bool) -> None:
        pass


class _PlainLines:
    def __init__(self, console: Console, description: str) -> None:
        self._console = console
        self._start = self._last = time.perf_counter()
        self._print(f"Search: {description}")

    def update(self, evaluations: int, total: int | None, best: str) -> None:
        now = time.perf_counter()
        if now - self._last < LINE_EVERY:
            return
        self._last, passed = now, now - self._start
        count = f"{evaluations:,}" if total is None else f"{evaluations:,} of up to {total:,}"
        left = "" if total is None else f", up to {passed / evaluations * (total - evaluations):.0f} s left"
        self._print(f"Search: {count} evaluations, {best}, {passed:.0f} s{left}")

    def close(self, evaluations: int, best: str, complete: bool) -> None:
        seconds = time.perf_counter() - self._start
        count = counted(evaluations, "evaluation")
        self._print(f"Search{'' if complete else ' interrupted'}: {count}, {best}, {seconds:.1f} s")

    def _print(self, line: str) -> None:
        with Tqdm.external_write_mode(file=self._console.file):
            print_line(self._console, line)


class _RichRow:
    """One more row in the display that Lightning's `RichProgressBar` keeps."""

    def __init__(self, bar: RichProgressBar, name: str, total: int | None, best: str) -> None:
        progress = bar.progress
        assert progress is not None
        self._bar, self._name = bar, name
        self._progress = progress
        # Lightning's columns take infinity, not None, for an unknown total.
        self._task: TaskID = progress.add_task(self._description(best), total=math.inf if total is None else total)
        progress.refresh()

    def update(self, evaluations: int, total: int | None, best: str) -> None:
        total_or_inf = math.inf if total is None else total
        self._progress.update(
            self._task, completed=evaluations, total=total_or_inf, description=self._description(best)
        )
        self._bar.refresh()

    def close(self, evaluations: int, best: str, complete: bool) -> None:
        # Hidden, not removed, as Lightning does with its own: it looks its tasks up by their place in the list.
        self._progress.update(self._task, visible=False)
        self._progress.refresh()

    def _description(self, best: str) -> str:
        return escape(f"{self._name}, {best}" if best else self._name)


class _RichBar:
    """A display of its own."""

    def __init__(self, console: Console, name: str, total: int | None, best: str) -> None:
        self._progress = Progress(
            TextColumn(name, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, best=best)
        self._progress.start()

    def update(self, evaluations: int, total: int | None, best: str) -> None:
        self._progress.update(self._task, completed=evaluations, total=total, best=best)

    def close(self, evaluations: int, best: str, complete: bool) -> None:
        self._progress.stop()


class _TqdmBar:
    """One more tqdm bar, of the class that Lightning's `TQDMProgressBar` uses, in the first free line."""

    def __init__(self, console: Console, name: str, total: int | None, best: str) -> None:
        self._bar = Tqdm(
            desc=name,
            total=total,
            leave=False,
            dynamic_ncols=True,
            file=console.file,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            postfix=best,
        )

    def update(self, evaluations: int, total: int | None, best: str) -> None:
        self._bar.total = total
        self._bar.set_postfix_str(best, refresh=False)
        self._bar.update(evaluations - self._bar.n)

    def close(self, evaluations: int, best: str, complete: bool) -> None:
        self._bar.close()
