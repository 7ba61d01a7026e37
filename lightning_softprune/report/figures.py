"""Figures of a round for the Trainer's loggers, drawn with matplotlib (extra `report`).

A logger gets what it can show: `TensorBoardLogger` figures, one with a method `log_image` (`WandbLogger`) images,
others nothing. matplotlib is asked for when there is a logger to draw for; `pyplot` and its global state are left
alone. A figure is a courtesy: what goes wrong with one is a warning and no more.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_softprune.report.series import best_so_far, chosen_trial, is_drawable, score_limits, target_band
from lightning_softprune.results import PruningResult
from lightning_softprune.utilities.libraries import counterparts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_GROUPS = 80

_MAX_NAME = 36

# As on the page: ink for trials, the accent for what was chosen, and a hue for each component.
_ACCENT, _GREY, _INK = "#0b5fa5", "#818b96", "#1b2128"

_COLOURS = ("#0f7480", "#8a6a00", "#5b5bb5", "#a3447e", "#6b7a1c", "#7b5539", "#5c6670")


@rank_zero_only
def log_figures(result: PruningResult, loggers: Iterable[Logger], step: int) -> None:
    """Give the loggers that can show pictures those of a round: nothing happens if there are none.

    Without matplotlib there is one warning per process, and no picture. An error while drawing, or in a logger, becomes
    a warning that names the logger.

    Args:
        result: The round.
        loggers: The Trainer's.
        step: The step to log at.
    """
    boards = counterparts(TensorBoardLogger)
    able = [logger for logger in loggers if isinstance(logger, boards) or _takes_images(logger)]
    if not able or not _has_matplotlib():
        return
    for logger in able:
        _log_to(logger, result, step)


def score_figure(result: PruningResult) -> Figure:
    """Score against sparsity: the trials, the Pareto front, and the sparsities that are feasible."""
    figure, axes = _empty((6.4, 4.8))
    band = target_band(result)
    if band is not None:
        axes.axvspan(*band, color=_INK, alpha=0.1, linewidth=0, label="target sparsity and tolerance")
    if is_drawable(result.score_before):
        axes.axhline(result.score_before, color=_INK, linewidth=1, linestyle=":", label="before pruning")
    styles: tuple[dict[str, Any], ...] = (
        {"label": "not feasible", "facecolors": "none", "edgecolors": _GREY},
        {"label": "feasible trial", "color": _INK, "alpha": 0.55, "linewidths": 0},
    )
    for feasible, style in enumerate(styles):
        points = [(t.sparsity, t.score) for t in result.trials if t.feasible == bool(feasible) and is_drawable(t.score)]
        if points:
            axes.scatter(*zip(*points, strict=True), s=18, zorder=2 + feasible, **style)
    front = [(trial.sparsity, trial.score) for trial in result.pareto if is_drawable(trial.score)]
    if front:
        axes.plot(*zip(*front, strict=True), color=_INK, linewidth=1.8, label="Pareto front", zorder=4)
    chosen = chosen_trial(result)
    if chosen is not None and is_drawable(result.trials[chosen].score):
        trial = result.trials[chosen]
        axes.scatter(
            [trial.sparsity], [trial.score], s=70, marker="D", color=_ACCENT, ec="white", label="chosen", zorder=5
        )
    important = [score for _, score in best_so_far(result)[-1:]] + [result.score_before, result.score_after]
    axes.set_ylim(score_limits([trial.score for trial in result.trials], important))
    axes.set_xlabel("sparsity")
    axes.set_ylabel(_name(result.monitor), parse_math=False)
    axes.set_title(f"Score against sparsity, epoch {result.epoch}", loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize="small", frameon=False, loc="outside lower center", ncols=3)
    return figure


def channels_figure(result: PruningResult) -> Figure:
    """The share of channels kept, one bar per group; of very many groups, those that lost the largest share."""
    groups = [(group, _share(group.channels_after, group.channels_before)) for group in result.groups]
    title = f"Channels kept, epoch {result.epoch}"
    if len(groups) > MAX_GROUPS:
        title += f": {MAX_GROUPS} of {len(groups)} groups, those that lost most"
        kept = {id(group) for group, _ in sorted(groups, key=lambda item: item[1])[:MAX_GROUPS]}
        groups = [item for item in groups if id(item[0]) in kept]
    figure, axes = _empty((6.4, 1.3 + 0.24 * max(len(groups), 2)))
    components = list(dict.fromkeys(group.component for group in result.groups))
    places = list(range(len(groups)))
    axes.barh(places, [1.0] * len(groups), color="#e7eaee", height=0.7)
    for place, (group, share) in zip(places, groups, strict=True):
        colour = _COLOURS[components.index(group.component) % len(_COLOURS)]
        hatch = "///" if group.kind == "inter" else None
        axes.barh(place, share, color=colour, edgecolor="white", linewidth=0, hatch=hatch, height=0.7)
        label = f"{group.channels_after:,} of {group.channels_before:,}"
        axes.annotate(label, (1.0, place), (5, 0), textcoords="offset points", va="center", fontsize="small")
    axes.set_yticks(places, [_name(group.name) for group, _ in groups], parse_math=False, fontsize="small")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


_FIGURES: dict[str, Callable[[PruningResult], Figure]] = {
    "score_against_sparsity": score_figure,
    "channels_kept": channels_figure,
}


def _empty(size: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _takes_images(logger: Logger) -> bool:
    return callable(getattr(logger, "log_image", None))


def _log_to(logger: Any, result: PruningResult, step: int) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            for name, draw in _FIGURES.items():
                figure = draw(result)
                if isinstance(logger, counterparts(TensorBoardLogger)):
                    logger.experiment.add_figure(f"softprune/{name}", figure, global_step=step)
                else:
                    logger.log_image(f"softprune/{name}", [_pixels(figure)], step=step)
    except Exception as error:  # matplotlib's, or a logger's: a figure is no reason to end a training run
        rank_zero_warn(f"SoftPruning: no figures for {type(logger).__name__}: {type(error).__name__}: {error}")


def _pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """The drawn figure: height, width, red-green-blue."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


@functools.cache  # one warning per process
def _has_matplotlib() -> bool:
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    rank_zero_warn("SoftPruning: no figures for the loggers, as matplotlib is missing: lightning-softprune[report]")
    return False


def _share(after: int, before: int) -> float:
    return after / before if before else math.nan


def _name(text: str) -> str:
    """A name short enough for an axis, in characters that can be drawn; its end says more than its start."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= _MAX_NAME else f"…{line[-_MAX_NAME + 1 :]}"
