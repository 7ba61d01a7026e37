"""The charts of the report: SVG in the page's own text, drawn from a `PruningResult` with no library.

Each function returns a finished `<figure>`. Colours, line styles and font sizes are the style sheet's: an element says
by its class what it is (a feasible trial, the front), not what it looks like. Where a few trials are far worse than the
rest, the axis shows the rest and those trials sit at its edge (`score_limits`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_softprune.report.markup import Markup, join, tag
from lightning_softprune.report.series import (
    best_so_far,
    chosen_trial,
    component_colours,
    healing_errors,
    is_drawable,
    score_limits,
    target_band,
    trials_on_front,
)
from lightning_softprune.results import PruningResult, Sensitivity
from lightning_softprune.utilities.wording import counted

WIDTH, HEIGHT = 480, 300

_RIGHT, _TOP, _BOTTOM = 14, 12, 50

_SMALL_WIDTH, _SMALL_HEIGHT = 220, 150

_MANY = 400  # more points than this: one path for all of them, without a tooltip each

_FAR = 100.0


@dataclass(frozen=True)
class Axis:
    """Values to pixels, linear.

    >>> axis = Axis(0.0, 1.0, 60.0, 460.0)
    >>> axis.at(0.25), axis.at(7.0)
    (160.0, 460.0)
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value; of one beyond the axis, its end."""
        return self.beyond(min(max(value, self.low), self.high))

    def beyond(self, value: float) -> float:
        """The pixel of a value, on the axis or not; a browser has no use for one that is very far away."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, -_FAR), _FAR) * (self.end - self.start)

    def has(self, value: float) -> bool:
        """Whether the value lies on the axis."""
        return self.low <= value <= self.high


class Heading(NamedTuple):
    """What names a chart: a key for its element, a title, and what it shows in words."""

    key: str
    title: str
    summary: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten, about `count` of them.

    >>> ticks(0.03, 0.91)
    [0.2, 0.4, 0.6, 0.8]
    >>> ticks(-30.0, 1250.0)
    [0.0, 500.0, 1000.0]
    """
    rough = (high - low) / count
    if not (rough > 0 and math.isfinite(rough)):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    decimals = max(0, 2 - math.floor(math.log10(step)))
    found = [round(number * step, decimals) for number in range(first, first + count + 2)]
    return [value for value in found if value <= high + 1e-9 * step] or [low]


def history_chart(result: PruningResult) -> Markup:
    """The score of each trial, in the order in which they were tried, and the best feasible one so far."""
    count = len(result.trials)
    frame = _Frame.of(result, (-0.5, count - 0.5), [t for t in ticks(0, count - 1) if t == int(t)], "trial", ",.0f")
    x, y = frame.x, frame.y
    corners: list[str] = []
    best = [(index, score) for index, score in best_so_far(result) if is_drawable(score)]
    for (index, score), (end, _) in itertools.pairwise([*best, (count - 1, 0.0)] if best else []):
        corners.append(f"{_pair(x.at(index), y.at(score))} {_pair(x.at(end), y.at(score))}")
    line = tag("polyline", points=" ".join(corners), class_="best") if corners else Markup()
    summary = f"{count:,} trials in the order in which they were tried."
    if best:
        summary += f" The best feasible score is {best[-1][1]:.5g}, of trial {best[-1][0]}."
    places = [float(index) for index in range(count)]
    return frame.figure(Heading("history", "Search history", summary), Markup(), line, places, ["best", "before"])


def sparsity_chart(result: PruningResult) -> Markup:
    """Score against sparsity: the trials, those that no other beats, and the sparsities that are feasible."""
    trials = result.trials
    sparsities = [trial.sparsity for trial in trials]
    drawable = [value for value in sparsities if is_drawable(value)]
    target, band = result.target_sparsity, target_band(result)
    low, high = min([*drawable, *(band or ())], default=0.0), max([*drawable, *(band or ())], default=1.0)
    margin = max(0.05 * (high - low), 0.002, 1e-6 * max(abs(low), abs(high)))
    low, high = low - margin, high + margin
    frame = _Frame.of(result, (low, high), ticks(low, high), "sparsity", "g")
    x, y = frame.x, frame.y
    below = Markup()
    keys = ["front", "before"]
    summary = f"Score and sparsity of {len(trials):,} trials."
    if band is not None:
        left, width = x.at(band[0]), max(x.at(band[1]) - x.at(band[0]), 1.5)
        note = f"target {target:.4g} ± {result.tolerance:.4g}"
        below = tag("rect", tag("title", note), x=left, y=y.end, width=width, height=y.start - y.end, class_="band")
        keys.append("band")
        summary += f" Feasible sparsities: {note}."
    front = sorted(trials_on_front(result), key=lambda index: sparsities[index])
    points = [(trials[index].sparsity, trials[index].score) for index in front]
    points = [point for point in points if is_drawable(point[0]) and is_drawable(point[1])]
    corners = corners_of([(x.at(a), y.at(b)) for a, b in points])
    line = tag("polyline", points=corners, class_="front") if points else Markup()
    if points:
        summary += f" {len(points):,} of them are on the Pareto front."
    return frame.figure(Heading("sparsity", "Score against sparsity", summary), below, line, sparsities, keys)


def healing_chart(result: PruningResult) -> Markup:
    """How far the pruned network was from the dense one on each training batch of healing."""
    count = 0 if result.healing is None else len(result.healing.errors)
    points = healing_errors(result, _MANY)
    low, high = score_limits([error for _, error in points], [error for _, error in points[-1:]])
    marks = {value: format(value, ",.0f") for value in ticks(1, count) if value == int(value)}
    ends = (0.5, max(count, 1) + 0.5)
    x, y, axes = axes_of(ends, (max(low, 0.0), high), marks, ("training batch", "fraction of variance missed"))
    corners = corners_of([(x.at(a), y.at(b)) for a, b in points])
    line = tag("polyline", points=corners, class_="best") if points else Markup()
    summary = f"{count:,} training batch{'' if count == 1 else 'es'}."
    if points:
        summary += f" From {points[0][1]:.4g} to {points[-1][1]:.4g}."
    return tag(
        "figure",
        tag("h3", "Error by batch"),
        picture(Heading("healing", "Error by batch", summary), (WIDTH, HEIGHT), join([axes, line])),
        tag("figcaption", f"Lower is better. {summary}"),
    )


def sensitivity_charts(result: PruningResult) -> Markup:
    """One small chart per group: the score as this group alone is pruned. All have the same axes."""
    scores = [score for curve in result.sensitivity for score in curve.scores]
    low, high = score_limits(scores, [result.score_before])
    colours = component_colours(result)
    groups = {group.name: group for group in result.groups}
    lines = result.modelled_sensitivity()
    figures = []
    for number, curve in enumerate(result.sensitivity):
        group = groups.get(curve.group)
        colour = colours[group.component] if group else "c0"
        key = Heading(f"sensitivity-{number}", result.monitor, "")
        points = sorted(zip(curve.coefficients, curve.scores, strict=True))
        line = lines.get(curve.group, points)
        chart = _small_chart(curve, (low, high), None if group is None else group.coefficient, key, line)
        figures.append(tag("figure", tag("figcaption", curve.group), chart, class_=f"small {colour}"))
    return tag("div", *figures, class_="smalls")


_KEYS = {
    "feasible": "feasible trial",
    "infeasible": "not feasible",
    "chosen": "chosen",
    "best": "best feasible so far",
    "front": "Pareto front",
    "band": "target sparsity and tolerance",
    "before": "before pruning",
}


def axes_of(
    ends: tuple[float, float], heights: tuple[float, float], marks: dict[float, str], names: tuple[str, str]
) -> tuple[Axis, Axis, Markup]:
    """Two axes, to the right and upwards, and their drawing.

    Args:
        ends: Of the one to the right.
        heights: Of the one upwards.
        marks: What is written where on the one to the right.
        names: Of both.
    """
    low, high = heights
    labels = {value: f"{value:.6g}" for value in ticks(low, high)}
    left = 30 + 9.2 * max(map(len, labels.values()))  # wide enough for the larger type of small screens
    x = Axis(*ends, start=left, end=WIDTH - _RIGHT)
    y = Axis(low, high, start=HEIGHT - _BOTTOM, end=_TOP)
    parts = []
    for value, label in labels.items():
        at = y.at(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", label, x=x.start - 7, y=at, dy="0.34em", class_="tick y"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    for value, label in marks.items():
        at = x.at(value)
        parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="axis"))
        parts.append(tag("text", label, x=at, y=y.start + 19, class_="tick x"))
    parts.append(tag("text", names[0], x=(x.start + x.end) / 2, y=HEIGHT - 7, class_="label x"))
    middle = (y.start + y.end) / 2
    turned = f"rotate(-90 14 {middle:g})"
    parts.append(tag("text", short_name(names[1]), x=14, y=middle, transform=turned, class_="label x"))
    return x, y, join(parts)


@dataclass(frozen=True)
class _Frame:
    """A chart with its axes: scores upwards, one of two things to the right."""

    result: PruningResult
    x: Axis
    y: Axis
    axes: Markup

    @classmethod
    def of(
        cls, result: PruningResult, ends: tuple[float, float], marks: Sequence[float], name: str, form: str
    ) -> _Frame:
        scores = [trial.score for trial in result.trials]
        important = [score for _, score in best_so_far(result)[-1:]] + [result.score_before, result.score_after]
        low, high = score_limits(scores, important)
        names = {value: format(value, form) for value in marks}
        return cls(result, *axes_of(ends, (low, high), names, (name, result.monitor)))

    def figure(
        self,
        heading: Heading,
        below: Markup,
        line: Markup,
        places: Sequence[float],
        keys: Sequence[str],
    ) -> Markup:
        """The finished chart: what lies below the trials, the trials at their `places`, a line above them, a legend."""
        result, y = self.result, self.y
        before = Markup()
        if is_drawable(result.score_before):
            at = y.at(result.score_before)
            before = tag("line", x1=self.x.start, x2=self.x.end, y1=at, y2=at, class_="before")
        shown = ["feasible", "infeasible", *keys]
        chosen = chosen_trial(result)
        star = Markup()
        if chosen is not None and is_drawable(result.trials[chosen].score) and is_drawable(places[chosen]):
            star = _diamond(self.x.at(places[chosen]), y.at(result.trials[chosen].score), self._title(chosen))
            shown.insert(2, "chosen")
        trials, left_away, beyond = self._trials(places)
        if not any(trial.feasible for trial in result.trials):
            shown = [name for name in shown if name not in ("feasible", "best")]
        if all(trial.feasible for trial in result.trials):
            shown.remove("infeasible")
        notes = [f"{'Higher' if result.mode == 'max' else 'Lower'} is better."]
        if beyond:
            notes.append(f"{_trials(beyond)} beyond the axis, drawn as {'a triangle' if beyond == 1 else 'triangles'}.")
        if left_away:
            notes.append(f"{_trials(left_away)} without a finite score, not drawn.")
        # Lines last: one diverged trial's mark must not hide them.
        drawing = join([self.axes, below, before, trials, line, star])
        return tag(
            "figure",
            tag("h3", heading.title),
            picture(heading, (WIDTH, HEIGHT), drawing),
            tag("ul", *(legend_of(name, _KEYS[name]) for name in shown), class_="legend"),
            tag("figcaption", " ".join(notes)),
        )

    def _trials(self, places: Sequence[float]) -> tuple[Markup, int, int]:
        """The marks of all trials, how many have none, and how many sit at the edge."""
        x, y = self.x, self.y
        dots: dict[str, list[tuple[float, float, int]]] = {"infeasible": [], "feasible": []}
        edges = {}
        left_away = beyond = 0
        for index, (place, trial) in enumerate(zip(places, self.result.trials, strict=True)):
            if not (is_drawable(place) and is_drawable(trial.score)):
                left_away += 1
                continue
            kind = "feasible" if trial.feasible else "infeasible"
            if y.has(trial.score):
                dots[kind].append((x.at(place), y.at(trial.score), index))
            else:
                beyond += 1
                at, up = round(x.at(place)), trial.score > y.high
                tip, base = (y.end, y.end + 7) if up else (y.start, y.start - 7)
                edges[at, up, kind] = tag(
                    "path",
                    tag("title", self._title(index)),
                    d=f"M{_pair(at, tip)}L{_pair(at - 4, base)}H{at + 4}Z",
                    class_=kind,
                )
        parts = list(edges.values())
        for kind, points in dots.items():
            if len(points) > _MANY:
                pixels = dict.fromkeys(f"M{_pair(round(2 * a) / 2, round(2 * b) / 2)}h0" for a, b, _ in points)
                parts.append(tag("path", d="".join(pixels), class_=f"many {kind}"))
            else:
                parts += [
                    tag("circle", tag("title", self._title(index)), cx=a, cy=b, r=3.5, class_=kind)
                    for a, b, index in points
                ]
        return join(parts), left_away, beyond

    def _title(self, index: int) -> str:
        trial = self.result.trials[index]
        feasible = "feasible" if trial.feasible else "not feasible"
        chosen = ", chosen" if index == self.result.chosen else ""
        part = "" if trial.share == 1.0 else f" on {trial.share:.1%} of the validation batches"
        return f"trial {index}: score {trial.score:.5g}{part}, sparsity {trial.sparsity:.4g}, {feasible}{chosen}"


def _small_chart(
    curve: Sensitivity,
    ends: tuple[float, float],
    coefficient: float | None,
    heading: Heading,
    line: Sequence[tuple[float, float]],
) -> Markup:
    low, high = ends
    marks = ticks(low, high, 2)
    marks = marks if len(marks) > 1 else ticks(low, high, 4)  # one mark alone is no scale
    labels = [f"{value:.4g}" for value in marks]
    left = 22 + 8.0 * max(map(len, labels))
    x = Axis(0.0, 1.0, left, _SMALL_WIDTH - 8)
    y = Axis(low, high, _SMALL_HEIGHT - 42, 6)
    parts = []
    for value, label in zip(marks, labels, strict=True):
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y.at(value), y2=y.at(value), class_="grid"))
        parts.append(tag("text", label, x=x.start - 5, y=y.at(value), dy="0.34em", class_="tick y"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts += [tag("text", f"{v:g}", x=x.at(v), y=_SMALL_HEIGHT - 25, class_="tick x") for v in (0.0, 0.5, 1.0)]
    parts.append(tag("text", "coefficient", x=(x.start + x.end) / 2, y=_SMALL_HEIGHT - 6, class_="label x"))
    middle = (y.start + y.end) / 2
    turned = f"rotate(-90 11 {middle:g})"
    parts.append(tag("text", short_name(heading.title, 14), x=11, y=middle, transform=turned, class_="label x"))
    if coefficient is not None and math.isfinite(coefficient):
        note = tag("title", f"coefficient {coefficient:.3g}")
        at = x.at(coefficient)
        parts.append(tag("line", note, x1=at, x2=at, y1=y.start, y2=y.end, class_="coefficient"))
    curves = []
    points = sorted(zip(curve.coefficients, curve.scores, strict=True))
    for drawable, run in itertools.groupby(line, key=lambda point: all(map(is_drawable, point))):
        if drawable:
            curves.append(tag("polyline", points=" ".join(_pair(x.at(a), y.beyond(b)) for a, b in run), class_="curve"))
    # A picture in the picture: it cuts off what lies beyond the axis.
    width, height = x.end - x.start + 4, y.start - y.end
    inside = f"{x.start - 2:g} {y.end:g} {width:g} {height:g}"
    parts.append(tag("svg", *curves, x=x.start - 2, y=y.end, width=width, height=height, viewBox=inside))
    for a, b in points:
        if is_drawable(a) and is_drawable(b) and y.has(b):
            note = tag("title", f"coefficient {a:.3g}: score {b:.5g}")
            parts.append(tag("circle", note, cx=x.at(a), cy=y.at(b), r=2.5, class_="dot"))
    values = "; ".join(f"{a:.3g}: {b:.5g}" for a, b in points)
    told = Heading(heading.key, f"Sensitivity of {curve.group}", values)
    return picture(told, (_SMALL_WIDTH, _SMALL_HEIGHT), join(parts))


def picture(heading: Heading, size: tuple[int, int], drawing: Markup) -> Markup:
    """A drawing of this size, with what it shows in words."""
    return tag(
        "svg",
        tag("title", heading.title, id=f"{heading.key}-title"),
        tag("desc", heading.summary, id=f"{heading.key}-desc"),
        drawing,
        viewBox=f"0 0 {size[0]} {size[1]}",
        role="img",
        aria_labelledby=f"{heading.key}-title {heading.key}-desc",
    )


def short_name(name: str, most: int = 32) -> str:
    """A name that fits beside an axis; its end says more than its start.

    >>> short_name("validation/reconstruction/val_psnr", 12)
    '…on/val_psnr'
    """
    return name if len(name) <= most else f"…{name[1 - most :]}"


def legend_of(kind: str, name: str) -> Markup:
    """An entry of a legend."""
    if kind in ("feasible", "infeasible"):
        mark = tag("circle", cx=10, cy=7, r=3.5, class_=kind)
    elif kind == "chosen":
        mark = _diamond(10, 7, "")
    elif kind == "band":
        mark = tag("rect", x=4, y=0, width=12, height=14, class_=kind)
    else:
        mark = tag("line", x1=0, x2=20, y1=7, y2=7, class_=kind)
    return tag("li", tag("svg", mark, width=20, height=14, aria_hidden="true"), name)


def corners_of(points: Sequence[tuple[float, float]]) -> str:
    """The corners of a line."""
    return " ".join(dict.fromkeys(_pair(x, y) for x, y in points))


def _diamond(x: float, y: float, title: str) -> Markup:
    note = tag("title", title) if title else Markup()
    return tag("path", note, d=f"M{_pair(x, y - 7)}l7 7l-7 7l-7 -7z", class_="chosen")


def _pair(x: float, y: float) -> str:
    return f"{round(x, 1):g},{round(y, 1):g}"


def _trials(count: int) -> str:
    return counted(count, "trial")
