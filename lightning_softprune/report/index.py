"""`softprune.html`: rounds and runs beside each other, what each costs and scores, and which of them none beats.

A *point* is a round with the score that it came to in the end: after fine-tuning where there was some, else as it was
pruned. Scores are compared where they are of the same metric; a round that changed nothing has no point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from lightning_softprune.report.blocks import document, heading, section, sortable_table
from lightning_softprune.report.charts import (
    HEIGHT,
    WIDTH,
    Heading,
    axes_of,
    corners_of,
    legend_of,
    picture,
    ticks,
)
from lightning_softprune.report.markup import Markup, join, tag
from lightning_softprune.report.series import (
    format_fraction,
    format_number,
    is_drawable,
    latency_against_dense,
    score_limits,
)
from lightning_softprune.results import Outcome, PruningResult, pareto_front
from lightning_softprune.utilities.wording import counted

_MOST_NUMBERED = 60


@dataclass(frozen=True)
class _Round:
    """One line of the page: its number, its folder, and what was found there."""

    number: int
    folder: str
    result: PruningResult

    @property
    def has_point(self) -> bool:
        """Whether there is a plan to compare."""
        return self.result.outcome != Outcome.SKIPPED and self.result.costs_after != self.result.costs_before


def index_page(name: str, rounds: Sequence[tuple[str, PruningResult]]) -> str:
    """The page, as HTML.

    Args:
        name: Of the folder that all are below.
        rounds: Their folders, relative to it, and what was found there.

    Returns:
        The whole document. Whatever is a name or a text in a result is escaped.
    """
    lines = [_Round(number, folder, result) for number, (folder, result) in enumerate(rounds, start=1)]
    runs = {(line.folder.rpartition("/")[0], line.result.origin.identity) for line in lines}
    counts = (
        counted(len(lines), "round"),
        counted(len(runs), "run"),
    )
    sections = [heading("SoftPruning", f"Rounds below {name}", counts)]
    by_metric: dict[tuple[str, str], list[_Round]] = {}
    for line in lines:
        by_metric.setdefault((line.result.monitor, line.result.mode), []).append(line)
    sections += [_metric(number, *key, own) for number, (key, own) in enumerate(by_metric.items())]
    return document(f"SoftPruning, {name}", sections)


def _metric(number: int, monitor: str, mode: str, lines: Sequence[_Round]) -> Markup:
    points = [line for line in lines if line.has_point and is_drawable(line.result.score_in_the_end)]
    sizes = {line.number: float(line.result.costs_after.params) for line in points}
    latencies, latency_name = _latencies(points)
    fronts = {name: _front(points, places, mode) for name, places in (("size", sizes), ("latency", latencies))}
    charts = [
        _chart(Heading(f"size-{number}", "Score against size", "parameters"), points, sizes, fronts["size"]),
        _chart(
            Heading(f"latency-{number}", "Score against latency", latency_name), points, latencies, fronts["latency"]
        ),
    ]
    note = (
        f"{'Higher' if mode == 'max' else 'Lower'} is better. “front”: no other round is at least as good in both and"
        " better in one. The score is that after fine-tuning, where there was some."
    )
    table = sortable_table(_COLUMNS, [_row(line, fronts) for line in lines], f"Rounds scored by {monitor}")
    return section(monitor, tag("div", *charts, class_="charts"), tag("p", class_="gap"), table, note=note)


def _latencies(points: Sequence[_Round]) -> tuple[dict[int, float], str]:
    """Latency by number, and its name: in milliseconds where all were measured alike, else against dense."""
    timed = {line.number: line.result for line in points if line.result.latency_after is not None}
    ways = {result.measured_on for result in timed.values()}
    if len(ways) == 1 and ways != {""}:
        return {n: 1000 * (r.latency_after or 0.0) for n, r in timed.items()}, f"latency in ms ({next(iter(ways))})"
    shares = {n: r.shares["latency"] for n, r in timed.items() if "latency" in r.shares}
    return shares, "latency, fraction of dense"


def _front(points: Sequence[_Round], places: dict[int, float], mode: str) -> list[int]:
    """Numbers of the rounds that no other beats, by descending cost."""
    placed = [line for line in points if line.number in places]
    savings = [-places[line.number] for line in placed]
    found = pareto_front(savings, [line.result.score_in_the_end for line in placed], mode)
    return [placed[index].number for index in found]


_COLUMNS = [
    *((name, "number") for name in ("number",)),
    *((name, "text") for name in ("round", "model", "date", "front")),
    *(
        (name, "number")
        for name in ("dense", "pruned", "fine-tuned", "sparsity", "parameters", "MACs", "latency in ms")
    ),
    *((name, "text") for name in ("of dense", "measured on", "strategy", "outcome")),
]


def _row(line: _Round, fronts: dict[str, list[int]]) -> tuple[list[str], str]:
    result = line.result
    latency = result.latency_after
    finetuned = "" if result.score_finetuned is None else format_number(result.score_finetuned)
    cells = [
        str(line.number),
        tag("a", line.folder, href=f"{quote(line.folder)}/report.html"),
        result.origin.model,
        result.origin.date,
        ", ".join(name for name, numbers in fronts.items() if line.number in numbers),
        format_number(result.score_before),
        format_number(result.score_after),
        finetuned,
        format_fraction(result.sparsity),
        str(result.costs_after.params),
        str(result.costs_after.macs),
        "" if latency is None else f"{1000 * latency:.4g}",
        latency_against_dense(result),
        result.measured_on,
        result.strategy,
        str(result.outcome),
    ]
    return cells, ""


def _chart(name: Heading, points: Sequence[_Round], places: dict[int, float], front: Sequence[int]) -> Markup:
    """Scores upwards, costs to the right, a mark with its number for each round, and the front."""
    placed = [line for line in points if line.number in places and is_drawable(places[line.number])]
    if not placed:
        return tag("figure", tag("h3", name.title), tag("figcaption", f"No round has a {name.summary.split(',')[0]}."))
    scores = {line.number: line.result.score_in_the_end for line in placed}
    dense = {line.result.score_before for line in placed} if len(placed) == 1 else set()
    low, high = score_limits(list(scores.values()), [*scores.values(), *dense])
    least, most = min(places[line.number] for line in placed), max(places[line.number] for line in placed)
    margin = 0.08 * (most - least) or 0.05 * abs(most) or 1.0
    ends = (least - margin, most + margin)
    labels = {value: f"{value:.6g}" for value in ticks(*ends, 4)}
    x, y, axes = axes_of(ends, (low, high), labels, (name.summary, placed[0].result.monitor))
    marks = []
    for line in placed:
        a, b = x.at(places[line.number]), y.at(scores[line.number])
        kind = "infeasible" if line.result.score_finetuned is None else "feasible"
        title = tag(
            "title", f"{line.number}: {line.folder}, score {scores[line.number]:.5g}, {places[line.number]:,.6g}"
        )
        marks.append(tag("circle", title, cx=a, cy=b, r=4.5, class_=kind))
        if len(placed) <= _MOST_NUMBERED:
            marks.append(tag("text", str(line.number), x=a, y=b - 8, class_="tick x"))
    corners = [(x.at(places[number]), y.at(scores[number])) for number in front if number in scores]
    path = tag("polyline", points=corners_of(corners), class_="front") if len(corners) > 1 else Markup()
    kinds = {line.result.score_finetuned is None for line in placed}
    shown = [("feasible", "after fine-tuning")] if False in kinds else []
    shown += [("infeasible", "as pruned")] if True in kinds else []
    summary = f"{len(placed):,} rounds, {len(corners):,} of them on the Pareto front."
    return tag(
        "figure",
        tag("h3", name.title),
        picture(Heading(name.key, name.title, summary), (WIDTH, HEIGHT), join([axes, path, *marks])),
        tag("ul", *(legend_of(*item) for item in [*shown, ("front", "Pareto front")]), class_="legend"),
    )
