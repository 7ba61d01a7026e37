"""Tables in the terminal: the groups of a round, its bounds, what was left out, several rounds beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from lightning_softprune.report.messages import score_path
from lightning_softprune.report.series import (
    against_dense_line,
    constraints_of,
    evaluations_line,
    healing_line,
    healing_rows,
    knobs_line,
    limits_of,
    narrowed_features,
)
from lightning_softprune.results import GroupResult, PruningResult, format_change
from lightning_softprune.search import Solution

_BAR_WIDTH = 10

_LOG_WIDTH = 500

_FORM: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}

_BETWEEN = 2  # blanks between columns, with this padding

_CONTROLS = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def print_round(
    result: PruningResult, console: Console | None = None, *, folder: Path | None = None, notes: Sequence[str] = ()
) -> None:
    """Print the table of groups and the summary line, above any live bar.

    Args:
        result: The round.
        console: Where to print; rich's global one (which `RichProgressBar` draws on) if not given.
        folder: Where its files are, if they were written.
        notes: Further lines, for what the result does not hold.
    """
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm  # not at import: the command line need not wait

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
        if result.coverage:
            print_line(console, result.coverage)
        print_line(console, result.summary)
        for line in (
            evaluations_line(result),
            against_dense_line(result),
            knobs_line(result),
            healing_line(result),
            *narrowed_features(result),
        ):
            if line:
                print_line(console, line)
        if folder is not None:
            print_line(console, f"Report: {folder / 'report.html'}")
        for note in notes:
            print_line(console, note)


def print_finetuned(result: PruningResult, dense: float, console: Console | None = None) -> None:
    """Print what became of the score, at the end of a fit.

    Args:
        result: The last round.
        dense: The score of the first dense model.
        console: Where to print; rich's global one if not given.
    """
    print_line(console or rich.get_console(), f"SoftPruning: {score_path(result, dense)}")


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


def print_solutions(solutions: Sequence[Solution], result: PruningResult, console: Console | None = None) -> None:
    """Print what a round's measurements say of other targets: a row each.

    Args:
        solutions: What `PruningResult.solve` returned.
        result: The round.
        console: Where to print; rich's global one if not given.
    """
    title = f"From epoch {result.epoch}, {result.monitor} {result.score_before:.4g} before it"
    table = FittedTable(title, drop=("MACs", "sparsity"))
    table.add_numbers("target", "sparsity", "parameters", "MACs", result.monitor)
    table.add_column("", no_wrap=True)
    for found in solutions:
        sizes = f"{found.params:,}", _format_count(found.macs)
        how = f"{'measured' if found.measured else 'predicted'}{', below target' if found.is_below else ''}"
        table.add_row(f"{found.target_sparsity:.3g}", f"{found.sparsity:.4f}", *sizes, f"{found.score:.4g}", how)
    (console or rich.get_console()).print(_Printable(table), crop=False)


def groups_table(result: PruningResult) -> FittedTable:
    """One row per group, then costs, score and sparsity before and after, latency, limits and constraints if any.

    The bar is the share of channels kept.
    """
    applied = "" if result.applied else f" (not applied{': ' if result.reason else ''}{result.reason})"
    table = FittedTable(f"SoftPruning, epoch {result.epoch}{applied}", drop=("component", "kind", "kept"))
    table.add_column("group", overflow="fold", min_width=8)
    table.add_column("component", overflow="fold")
    table.add_column("kind", overflow="fold")
    table.add_numbers("channels", "coefficient")
    table.add_column("kept", no_wrap=True)
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
        change, _, spread = result.latency_change.partition(" (spread ")
        table.add_row("latency", "", "", times, change)
        if spread:
            table.add_row("  spread", "", "", spread.removesuffix(")"))
    table.add_row(Text(result.monitor), "", "", f"{result.score_before:.4g} -> {result.score_after:.4g}")
    for name, score, note in healing_rows(result):
        table.add_row(f"  {name}", "", "", f"{score:.4g}", note)
    if result.score_finetuned is not None:
        table.add_row("  fine-tuned", "", "", f"{result.score_finetuned:.4g}")
    target = "" if result.target_sparsity is None else f"target {result.target_sparsity:.4g}"
    table.add_row("sparsity", "", "", f"{result.sparsity:.4g}", target)
    for budget in (*limits_of(result), *constraints_of(result)):
        table.add_row(Text(budget.text), "", "", Text(budget.value), Text(budget.verdict))
    return table


def bounds_table(result: PruningResult) -> FittedTable:
    """One row per group: its bounds, and the costs that go when it alone is pruned as far as they allow."""
    table = FittedTable("One group alone, pruned as far as its bounds allow", drop=("lowest",))
    table.add_column("group", overflow="fold", min_width=8)
    table.add_numbers("lowest", "highest", "parameters", "MACs")
    for group in result.groups:
        costs = [f"-{_format_count(number)}" if number else "0" for number in (group.params, group.macs)]
        table.add_row(Text(group.name), f"{group.low:.3f}", f"{group.high:.3f}", *costs)
    return table


def left_out_table(result: PruningResult) -> FittedTable:
    """What the search leaves alone, and why."""
    table = FittedTable("Left out", drop=("component", "channels"))
    for name in ("name", "component"):
        table.add_column(name, overflow="fold", min_width=8)
    table.add_numbers("channels")
    table.add_column("reason", overflow="fold", min_width=16)
    for item in result.left_out:
        channels = f"{item.channels:,}" if item.channels else ""
        table.add_row(Text(item.name), Text(item.component), channels, Text(item.reason))
    return table


def rounds_table(results: Sequence[PruningResult]) -> FittedTable:
    """One row per round: costs and score before and after, and what became of it."""
    finetuned = any(result.score_finetuned is not None for result in results)
    monitors = {result.monitor for result in results}
    score = "score" if len(monitors) > 1 else next(iter(monitors), "score")
    table = FittedTable("Rounds", drop=("strategy", "MACs", "sparsity", "fine-tuned"))
    table.add_numbers("epoch", "sparsity", "parameters", "MACs", score, *(["fine-tuned"] if finetuned else []))
    table.add_column("strategy", overflow="fold", min_width=12)
    table.add_column("applied", overflow="fold", min_width=7)
    for result in results:
        before, after = result.costs_before, result.costs_after
        scores = f"{result.score_before:.4g} -> {result.score_after:.4g}"
        table.add_row(
            str(result.epoch),
            f"{result.sparsity:.4g}",
            f"{before.params:,} -> {after.params:,}",
            f"{before.macs:,} -> {after.macs:,}",
            Text(f"{result.monitor if len(monitors) > 1 else ''} {scores}".strip()),
            *([_known(result.score_finetuned)] if finetuned else []),
            Text(f"{result.strategy}: {result.stop_reason}"),
            Text("yes" if result.applied else f"no: {result.reason}".removesuffix(": ")),
        )
    return table


def _known(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def channels_table(results: Sequence[PruningResult]) -> FittedTable:
    """One row per group, with its channels from round to round; rounds that were not applied count if none was."""
    table = FittedTable("Groups", drop=("component", "kind"))
    for name in ("group", "component", "kind"):
        table.add_column(name, overflow="fold")
    table.add_numbers("channels")
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


class FittedTable(Table):
    """A table that leaves columns out where the screen is too narrow for all, and never breaks a number.

    Args:
        title: Stands above it.
        drop: Heads of the columns that may be left out, the first one first.
    """

    def __init__(self, title: str, drop: Sequence[str] = ()) -> None:
        super().__init__(title=Text(title), title_justify="left", **_FORM)
        self._drop = tuple(drop)

    def add_numbers(self, *names: str) -> None:
        """Add columns whose cells stay on one line."""
        for name in names:
            self.add_column(Text(name), justify="right", no_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept = list(self.columns)
        for name in self._drop:
            if self._needed(kept, console, options) <= options.max_width:
                break
            kept = [column for column in kept if str(column.header) != name]
        yield from super().__rich_console__(console, options) if len(kept) == len(self.columns) else [self._of(kept)]

    def _of(self, columns: Sequence[Column]) -> Table:
        """The table with these of its columns."""
        fitted = Table(title=self.title, title_justify="left", **_FORM)
        for column in columns:
            form = {name: getattr(column, name) for name in ("justify", "overflow", "no_wrap", "min_width")}
            fitted.add_column(column.header, **form)
        for row, cells in zip(self.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
            fitted.add_row(*cells, end_section=row.end_section)
        return fitted

    @staticmethod
    def _needed(columns: Sequence[Column], console: Console, options: ConsoleOptions) -> int:
        """The width at which no name and no number is broken."""
        wide, widths = options.update(width=_LOG_WIDTH), []
        for column in columns:
            sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
            widths.append(max(size.maximum if column.no_wrap else size.minimum for size in sizes))
        return sum(widths) + _BETWEEN * (len(widths) - 1)


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


def print_line(console: Console, line: str) -> None:
    """Print one line, in characters that the output has."""
    line = _encodable(console, line)
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _encodable(console: Console, text: str) -> str:
    # A name, or a box, that the screen's encoding lacks must not end a training run; one in a file of somebody else's
    # must not command the terminal.
    return text.translate(_CONTROLS).encode(console.encoding, "replace").decode(console.encoding)


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
