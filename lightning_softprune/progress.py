"""What people see on rank zero: the search's progress bar, the table of groups, the summary line.

Lightning's own bars may be alive while a search runs, and two live displays on one terminal destroy each other. So the
search's bar follows the Trainer's: with `RichProgressBar` it is one more row of that display, with `TQDMProgressBar`
one more tqdm bar below it, and where no bar is wanted or the output is not a terminal (a CI log), two plain lines.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import rich
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.errors import LiveError
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lightning_softprune.page import budget_rows
from lightning_softprune.results import GroupResult, PruningResult, format_change

Style = Literal["auto", "rich", "tqdm", "plain"]
_STYLES = ("auto", "rich", "tqdm", "plain")
_BAR_WIDTH = 10
_LOG_WIDTH = 500


def progress_style(trainer: Trainer) -> Literal["rich", "tqdm", "plain"]:
    """The style that goes with the Trainer's own progress bar; `"plain"` if it has none or an unknown one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled:
        return "rich"
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        return "tqdm"
    return "plain"


class SearchProgress:
    """A progress bar for a search: trials, best score so far, time elapsed and left.

    On a terminal it moves and is gone afterwards. Elsewhere it is one line at the start and one at the end.

    Args:
        total: Number of trials, if known; an upper bound will do.
        monitor: Name of the metric.
        mode: `"min"` or `"max"`.
        enabled: `False`: print nothing at all.
        style: `"auto"`: what goes with the trainer's own bar, or rich if there is no trainer.
        trainer: The trainer whose bars are on the same screen.
        console: Where to print; rich's global one if not given.

    Raises:
        ValueError: If `mode` or `style` is unknown.

    >>> with SearchProgress(total=2, monitor="val_psnr", mode="max", style="plain") as bar:
    ...     bar.advance(19.5)
    ...     bar.advance(19.7)  # doctest: +ELLIPSIS
    Search: up to 2 trials, val_psnr (max)
    Search: 2 trials, best val_psnr 19.7, ... s
    """

    def __init__(
        self,
        total: int | None,
        monitor: str,
        mode: str,
        enabled: bool = True,
        style: Style = "auto",
        *,
        trainer: Trainer | None = None,
        console: Console | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be one of 'min', 'max', got {mode!r}")
        if style not in _STYLES:
            raise ValueError(f"`style` must be one of {', '.join(map(repr, _STYLES))}, got {style!r}")
        self.total = total
        self.monitor = monitor
        self.mode = mode
        self.enabled = enabled
        self.style = style
        self.trials = 0
        self.best = math.nan
        self._trainer = trainer
        self._console = console
        self._display: _Display | None = None

    def __enter__(self) -> SearchProgress:
        self.trials, self.best = 0, math.nan
        if self.enabled:
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
            display.close(self.trials, self._best_text(), complete=exc_type is None)

    def advance(self, score: float, best: float | None = None) -> None:
        """Count one trial.

        Args:
            score: The trial's score.
            best: The best score so far as the search counts it, NaN for none yet. If not given, the best of the
                scores seen, NaN ignored.
        """
        self.trials += 1
        if best is not None:
            self.best = best
        elif math.isnan(self.best) or (score > self.best if self.mode == "max" else score < self.best):
            self.best = score
        if self._display is not None:
            total = None if self.total is None else max(self.total, self.trials)  # a final check may come on top
            self._display.update(self.trials, total, self._best_text())

    def _best_text(self) -> str:
        return f"best {self.monitor} " + ("-" if math.isnan(self.best) else f"{self.best:.4g}")

    def _open_display(self) -> _Display:
        console = self._console or rich.get_console()
        plain = f"{'' if self.total is None else f'up to {self.total:,} trials, '}{self.monitor} ({self.mode})"
        style: str = self.style
        if style == "auto":
            style = "rich" if self._trainer is None else progress_style(self._trainer)
        if style == "plain" or not _is_animated(console):
            return _PlainLines(console, plain)
        if style == "tqdm":
            return _TqdmBar(console, self.total, self._best_text())
        bar = None if self._trainer is None else self._trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.progress.live.is_started:
            return _RichRow(bar, bar.progress, self.total, self._best_text())
        if console.is_jupyter:  # rich needs ipywidgets there and warns without them; tqdm copes
            return _TqdmBar(console, self.total, self._best_text())
        try:
            return _RichBar(console, self.total, self._best_text())
        except LiveError:  # rich before 14.1: somebody else's live display is on this console
            return _PlainLines(console, plain)


def print_round(result: PruningResult, console: Console | None = None, *, folder: Path | None = None) -> None:
    """Print the table of groups and the summary line, above any live bar.

    Args:
        result: The round.
        console: Where to print; rich's global one (which `RichProgressBar` draws on) if not given.
        folder: Where its files are, if they were written.
    """
    console = console or rich.get_console()
    tables = [groups_table(result)]
    if result.is_dry_run:
        tables.append(bounds_table(result))
        tables += [left_out_table(result)] if result.left_out else []
    with Tqdm.external_write_mode(file=console.file):
        for table in tables:
            console.print(_Printable(table), crop=False)
            if len(tables) > 1:
                console.print()
        _print_line(console, result.summary)
        if folder is not None:
            _print_line(console, f"Report: {folder / 'report.html'}")


def print_rounds(results: Sequence[PruningResult], console: Console | None = None) -> None:
    """Print what several rounds on one model did: a row per round, a row per group.

    Args:
        results: The rounds, in order.
        console: Where to print; rich's global one if not given.
    """
    console = console or rich.get_console()
    for table in (rounds_table(results), channels_table(results)):
        console.print(_Printable(table), crop=False)
        console.print()


def groups_table(result: PruningResult) -> Table:
    """One row per group, then costs, score and sparsity before and after, latency, limits and constraints if any.

    The bar is the share of channels kept.
    """
    applied = "" if result.applied else f" (not applied{': ' if result.reason else ''}{result.reason})"
    table = _table(f"SoftPruning, epoch {result.epoch}{applied}")
    table.add_column("group", overflow="fold", min_width=8)
    table.add_column("component", overflow="fold")
    table.add_column("kind", overflow="fold")
    table.add_column("channels", justify="right", overflow="fold")
    table.add_column("coefficient", justify="right", overflow="fold")
    table.add_column("kept", overflow="fold")
    for group in result.groups:
        before, after = group.channels_before, group.channels_after
        table.add_row(
            Text(group.name),
            Text(group.component),
            Text(group.kind),
            f"{before:,} -> {after:,}",
            f"{group.coefficient:.3f}",
            ProgressBar(total=max(before, 1), completed=after, width=_BAR_WIDTH),
        )
    table.add_section()
    before_costs, after_costs = result.costs_before, result.costs_after
    for name, dense, pruned in (
        ("parameters", before_costs.params, after_costs.params),
        ("MACs", before_costs.macs, after_costs.macs),
    ):
        table.add_row(name, "", "", f"{_format_count(dense)} -> {_format_count(pruned)}", format_change(dense, pruned))
    if result.latency_before is not None and result.latency_after is not None:
        latencies = result.latency_before, result.latency_after
        times = " -> ".join(f"{1000 * seconds:.4g} ms" for seconds in latencies)
        table.add_row("latency", "", "", times, format_change(*latencies))
    table.add_row(Text(result.monitor), "", "", f"{result.score_before:.4g} -> {result.score_after:.4g}")
    target = "" if result.target_sparsity is None else f"target {result.target_sparsity:.4g}"
    table.add_row("sparsity", "", "", f"{result.sparsity:.4g}", target)
    for budget, outcome in budget_rows(result):
        table.add_row(Text(budget), "", "", Text(outcome))
    return table


def bounds_table(result: PruningResult) -> Table:
    """One row per group: its bounds, and the costs that go when it alone is pruned as far as they allow."""
    table = _table("One group alone, pruned as far as its bounds allow")
    table.add_column("group", overflow="fold", min_width=8)
    for name in ("lowest", "highest coefficient", "parameters", "MACs"):
        table.add_column(name, justify="right", overflow="fold")
    for group in result.groups:
        costs = [f"-{_format_count(number)}" if number else "0" for number in (group.params, group.macs)]
        table.add_row(Text(group.name), f"{group.low:.3f}", f"{group.high:.3f}", *costs)
    return table


def left_out_table(result: PruningResult) -> Table:
    """What the search leaves alone, and why."""
    table = _table("Left out")
    for name in ("name", "component", "channels", "reason"):
        table.add_column(name, justify="right" if name == "channels" else "left", overflow="fold")
    for item in result.left_out:
        channels = f"{item.channels:,}" if item.channels else ""
        table.add_row(Text(item.name), Text(item.component), channels, Text(item.reason))
    return table


def rounds_table(results: Sequence[PruningResult]) -> Table:
    """One row per round: costs and score before and after, and what became of it."""
    table = _table("Rounds")
    for name in ("epoch", "sparsity", "parameters", "MACs", "score"):
        table.add_column(name, justify="right", overflow="fold")
    for name in ("strategy", "applied"):
        table.add_column(name, overflow="fold")
    for result in results:
        before, after = result.costs_before, result.costs_after
        table.add_row(
            str(result.epoch),
            f"{result.sparsity:.4g}",
            f"{before.params:,} -> {after.params:,}",
            f"{before.macs:,} -> {after.macs:,}",
            Text(f"{result.monitor} {result.score_before:.4g} -> {result.score_after:.4g}"),
            Text(f"{result.strategy}: {result.stop_reason}"),
            Text("yes" if result.applied else f"no: {result.reason}".removesuffix(": ")),
        )
    return table


def channels_table(results: Sequence[PruningResult]) -> Table:
    """One row per group, with its channels from round to round; rounds that were not applied count if none was."""
    table = _table("Groups")
    for name in ("group", "component", "kind"):
        table.add_column(name, overflow="fold")
    table.add_column("channels", justify="right", overflow="fold")
    applied = [result for result in results if result.applied] or results
    groups: dict[str, list[GroupResult]] = {}
    for result in applied:
        for group in result.groups:
            groups.setdefault(group.name, []).append(group)
    for name, states in groups.items():
        counts = [states[0].channels_before, *(state.channels_after for state in states)]
        path = " -> ".join(f"{count:,}" for count in counts)
        table.add_row(Text(name), Text(states[0].component), Text(states[0].kind), path)
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)


def _is_animated(console: Console) -> bool:
    """Whether a moving bar can be drawn."""
    if console.is_jupyter:
        return True
    # FORCE_COLOR, common in CI, makes rich take a log file for a terminal: colours are wanted there, moving bars not.
    if os.environ.get("TTY_INTERACTIVE") == "0" or ("FORCE_COLOR" in os.environ and not console.file.isatty()):
        return False
    return console.is_terminal and not console.is_dumb_terminal


def _format_count(number: int) -> str:
    """A large number in three digits.

    >>> [_format_count(number) for number in (999, 1_079_344, 322_102, 999_999, 4_089_184_256)]
    ['999', '1.08 M', '322 K', '1.00 M', '4.09 G']
    """
    digits, exponent = f"{number:.2e}".split("e")  # rounded first: 999,999 is a million
    if int(exponent) < 3:
        return str(number)
    power = min(int(exponent) // 3, 4)
    decimals = max(0, 2 - (int(exponent) - 3 * power))
    return f"{float(f'{digits}e{exponent}') / 1000**power:.{decimals}f} {' KMGT'[power]}"


def _print_line(console: Console, line: str) -> None:
    line = _encodable(console, line)
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _encodable(console: Console, text: str) -> str:
    # A name, or a box, that the screen's encoding lacks must not end a training run.
    return text.encode(console.encoding, "replace").decode(console.encoding)


class _Printable:
    """Anything rich can draw, in characters that the output has; in a log file, as wide as it needs to be."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not (console.is_terminal or console.is_jupyter):
            wide = options.update(width=_LOG_WIDTH)
            wanted = Measurement.get(console, wide, self._renderable).maximum
            options = options.update(width=max(options.max_width, wanted))
        for segment in console.render(self._renderable, options):
            yield Segment(_encodable(console, segment.text), segment.style, segment.control)


class _Display(Protocol):
    """One way of drawing; the constructor draws it for the first time."""

    def update(self, trials: int, total: int | None, best: str) -> None: ...

    def close(self, trials: int, best: str, complete: bool) -> None: ...


class _PlainLines:
    def __init__(self, console: Console, description: str) -> None:
        self._console = console
        self._start = time.perf_counter()
        self._print(f"Search: {description}")

    def update(self, trials: int, total: int | None, best: str) -> None:
        pass

    def close(self, trials: int, best: str, complete: bool) -> None:
        seconds = time.perf_counter() - self._start
        count = f"{trials:,} trial{'' if trials == 1 else 's'}"
        self._print(f"Search{'' if complete else ' interrupted'}: {count}, {best}, {seconds:.1f} s")

    def _print(self, line: str) -> None:
        with Tqdm.external_write_mode(file=self._console.file):
            _print_line(self._console, line)


class _RichRow:
    """One more row in the display that Lightning's `RichProgressBar` keeps."""

    def __init__(self, bar: RichProgressBar, progress: Progress, total: int | None, best: str) -> None:
        self._bar = bar
        self._progress = progress
        # Lightning's columns take infinity, not None, for an unknown total.
        self._task: TaskID = progress.add_task(self._description(best), total=math.inf if total is None else total)
        progress.refresh()

    def update(self, trials: int, total: int | None, best: str) -> None:
        total_or_inf = math.inf if total is None else total
        self._progress.update(self._task, completed=trials, total=total_or_inf, description=self._description(best))
        self._bar.refresh()

    def close(self, trials: int, best: str, complete: bool) -> None:
        # Hidden, not removed, as Lightning does with its own: it looks its tasks up by their place in the list.
        self._progress.update(self._task, visible=False)
        self._progress.refresh()

    @staticmethod
    def _description(best: str) -> str:
        return escape(f"Search, {best}")


class _RichBar:
    """A display of its own."""

    def __init__(self, console: Console, total: int | None, best: str) -> None:
        self._progress = Progress(
            TextColumn("Search"),
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

    def update(self, trials: int, total: int | None, best: str) -> None:
        self._progress.update(self._task, completed=trials, total=total, best=best)

    def close(self, trials: int, best: str, complete: bool) -> None:
        self._progress.stop()


class _TqdmBar:
    """One more tqdm bar, of the class that Lightning's `TQDMProgressBar` uses, in the first free line."""

    def __init__(self, console: Console, total: int | None, best: str) -> None:
        self._bar = Tqdm(
            desc="Search",
            total=total,
            leave=False,
            dynamic_ncols=True,
            file=console.file,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            postfix=best,
        )

    def update(self, trials: int, total: int | None, best: str) -> None:
        self._bar.total = total
        self._bar.set_postfix_str(best, refresh=False)
        self._bar.update(trials - self._bar.n)

    def close(self, trials: int, best: str, complete: bool) -> None:
        self._bar.close()
