"""The data behind tables, charts and figures: pure functions of a `PruningResult`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprune.results import PruningResult, Trial, format_change, pareto_front
from lightning_softprune.search import better, parse_constraint, reaches
from lightning_softprune.utilities.wording import counted

Cell = str | int | float | bool

IN_WORDS = {"params": "parameters", "macs": "MACs", "latency": "latency"}
"""What costs are called."""


def log_values(result: PruningResult) -> dict[str, float]:
    """The scalars that the Trainer's loggers get at a round.

    Returns:
        `softprune/sparsity`, `softprune/params`, `softprune/macs`, `softprune/score`, `softprune/evaluations`, one
        `softprune/coefficient/<group>` per group, and `softprune/score_compensated` where there was healing after that.
    """
    values: dict[str, float] = {
        "sparsity": result.sparsity,
        "params": result.costs_after.params,
        "macs": result.costs_after.macs,
        "score": result.score_after,
        "evaluations": result.evaluations,
        **{f"coefficient/{group.name}": group.coefficient for group in result.groups},
        **{f"score_{name}": score for name, score, _ in healing_rows(result)[:1]},
    }
    return {f"softprune/{name}": float(value) for name, value in values.items()}


def healing_rows(result: PruningResult) -> list[tuple[str, float, str]]:
    """What healing has come to: the score after the refit and that after healing, each with its name and a note.

    Nothing where there was no healing.
    """
    if result.healing is None or result.score_compensated is None:
        return []
    note = "" if result.healing.kept else "not better, taken back"
    return [("compensated", result.score_compensated, ""), ("healed", result.healing.score, note)]


def healing_errors(result: PruningResult, most: int) -> list[tuple[float, float]]:
    """The error of healing by training batch, counted from 1.

    Of more batches than `most`, means of as many neighbours as it takes, each at the middle of its batches. What is not
    finite has no place.

    >>> from types import SimpleNamespace as Some
    >>> healing_errors(Some(healing=Some(errors=(0.5, 0.25, 0.25, 0.75, 0.125))), 3)
    [(1.5, 0.375), (3.5, 0.5), (5.0, 0.125)]
    """
    errors = () if result.healing is None else result.healing.errors
    width = max(1, -(-len(errors) // most))
    points = []
    for start in range(0, len(errors), width):
        part = errors[start : start + width]
        points.append((start + (len(part) + 1) / 2, sum(part) / len(part)))
    return [point for point in points if is_drawable(point[1])]


def trial_rows(result: PruningResult) -> tuple[list[str], list[list[Cell]]]:
    """The trials as a table.

    Returns:
        The header (`trial`, `sparsity`, `score`, `feasible`, `pareto`, `seconds`, `share`, `stage`, `metric/<name>` for
        every metric any trial logged, `coefficient/<group>`) and one row per trial. A metric that a trial did not log
        is an empty cell. `share` is the fraction of the validation batches that score and metrics are of; `stage` is
        what the trial was run for, see `stages`.
    """
    metrics = list(dict.fromkeys(name for trial in result.trials for name in trial.metrics))
    header = ["trial", "sparsity", "score", "feasible", "pareto", "seconds", "share", "stage"]
    header += [f"metric/{name}" for name in metrics]
    header += [f"coefficient/{group.name}" for group in result.groups]
    front = trials_on_front(result)
    rows = []
    for index, (trial, stage) in enumerate(zip(result.trials, stages(result), strict=True)):
        row: list[Cell] = [index, float(trial.sparsity), float(trial.score), bool(trial.feasible), index in front]
        row += [float(trial.seconds), float(trial.share), stage]
        row += [float(trial.metrics[name]) if name in trial.metrics else "" for name in metrics]
        row += map(float, trial.coefficients)
        rows.append(row)
    return header, rows


def trials_on_front(result: PruningResult) -> set[int]:
    """Indices of the trials on all validation batches that no other one beats in sparsity and score."""
    trials = result.trials
    return set(pareto_front([t.sparsity for t in trials], whole_scores(result), result.mode))


def whole_scores(result: PruningResult) -> list[float]:
    """The scores of the trials on all validation batches; NaN for those on a part, which do not compare with them."""
    return [trial.score if trial.share == 1.0 else math.nan for trial in result.trials]


def stages(result: PruningResult) -> list[str]:
    """What each trial was run for.

    `"search"`, `"finalist"` (a plan of the search, then on all validation batches) or `"committed"` (the chosen plan
    once more, as the round leaves it).
    """
    found: list[str] = []
    seen: dict[tuple[float, ...], set[float]] = {}
    for trial in result.trials:
        shares = seen.setdefault(trial.coefficients, set())
        found.append("committed" if trial.share in shares else "finalist" if shares else "search")
        shares.add(trial.share)
    return found


def evaluations_line(result: PruningResult) -> str:
    """What the evaluations were spent on; those of finalists are told apart, as they are not among them."""
    counts = Counter(stages(result))
    parts = ["the dense model", f"{counts['search']:,} of the search"]
    if counts["committed"]:
        parts.append(f"{counts['committed']:,} of the plan as it is committed{_score_before(result)}")
    line = f"{counted(result.evaluations, 'evaluation')}: {', '.join(parts)}"
    finalists = counted(counts["finalist"], "finalist")
    extra = f"; besides, {finalists} on all validation batches" if counts["finalist"] else ""
    known = 1 + counts["search"] + counts["committed"] - result.evaluations
    return line + extra + (f"; {known:,} had a score that was known" if known > 0 else "")


def _score_before(result: PruningResult) -> str:
    """What the search knew the chosen plan by, where refining it has changed its score; else empty."""
    number = chosen_trial(result)
    if number is None:
        return ""
    chosen, first = result.trials[number], result.trials[number]
    for trial in reversed(result.trials[:number]):
        if (trial.coefficients, trial.share) == (chosen.coefficients, chosen.share):
            first = trial
    return "" if first.score == chosen.score else f" ({result.monitor} {first.score:.4g} before that)"


def has_parts(result: PruningResult) -> bool:
    """Whether some trials were scored on a part of the validation batches."""
    return any(trial.share < 1.0 for trial in result.trials)


_LARGEST = 1e150  # beyond it, differences of scores overflow


def is_drawable(score: float) -> bool:
    """Whether a score has a place on an axis: neither NaN nor infinite, nor close to it."""
    return abs(score) < _LARGEST


def score_limits(scores: Sequence[float], important: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis of scores.

    Everything important is on it, and of the rest what lies within Tukey's fences, one and a half interquartile ranges
    beyond the quartiles: one trial that diverged must not press all others into a line.

    Args:
        scores: Every score; those that are not finite are ignored.
        important: Scores that have to be seen.

    Returns:
        Lowest and highest value, with a margin.

    >>> score_limits([1.0, 2.0, 3.0, 4.0, 1e6], important=[0.0])
    (-0.28, 4.28)
    """
    finite = sorted(score for score in scores if is_drawable(score))
    wanted = [score for score in important if is_drawable(score)]
    if finite:
        lower, upper = finite[len(finite) // 4], finite[(3 * len(finite)) // 4 - (len(finite) % 4 == 0)]
        fence = 1.5 * (upper - lower)
        wanted += [score for score in finite if lower - fence <= score <= upper + fence]
    if not wanted:
        return 0.0, 1.0
    low, high = min(wanted), max(wanted)
    margin = 0.07 * (high - low)
    if margin <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.05 * max(abs(low), abs(high)) or 1.0
    return low - margin, high + margin


def best_so_far(result: PruningResult) -> list[tuple[int, float]]:
    """Trial and score of each feasible trial that was better than every feasible one before it.

    Better as a round chooses: of those that reach the target the one with the better score, and without a target the
    sparser one. Trials on another share of the validation batches begin anew.
    """

    def is_better(trial: Trial, other: Trial) -> bool:
        first, second = rank(trial), rank(other)
        return first > second if first != second else better(trial.score, other.score, result.mode)

    def rank(trial: Trial) -> float:
        target = result.target_sparsity
        return trial.sparsity if target is None else float(reaches(trial.sparsity, target))

    found: list[int] = []
    for index, trial in enumerate(result.trials):
        if not trial.feasible or math.isnan(trial.score):
            continue
        last = result.trials[found[-1]] if found else None
        if last is None or trial.share != last.share or is_better(trial, last):
            found.append(index)
    return [(index, result.trials[index].score) for index in found]


def target_band(result: PruningResult) -> tuple[float, float] | None:
    """Lowest and highest sparsity that is feasible; `None` if there is no target."""
    if result.target_sparsity is None:
        return None
    band = (result.target_sparsity - result.tolerance, result.target_sparsity + result.tolerance)
    return band if all(map(is_drawable, band)) else None


def chosen_trial(result: PruningResult) -> int | None:
    """Index of the chosen trial, if there is one."""
    return result.chosen if result.chosen is not None and 0 <= result.chosen < len(result.trials) else None


def component_colours(result: PruningResult) -> dict[str, str]:
    """Component -> class of its colour; seven colours, in the order of the groups."""
    components = dict.fromkeys(group.component for group in result.groups)
    return {component: f"c{number % 7}" for number, component in enumerate(components)}


def cost_in_words(result: PruningResult) -> str:
    """What sparsity is measured in."""
    return IN_WORDS.get(result.cost, result.cost)  # a file that somebody else wrote may say anything


@dataclass(frozen=True)
class Budget:
    """A limit or a constraint, and what the round's plan comes to.

    Attributes:
        text: What was asked for.
        value: What it is after the round; empty where that is not known.
        met: Whether that meets it; ``None`` where it is not known.
    """

    text: str
    value: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """In words whether it is met."""
        return {True: "met", False: "not met", None: ""}[self.met]


def limits_of(result: PruningResult) -> list[Budget]:
    """The limits, in the order in which they were given."""
    found = []
    for name, limit in result.limits.items():
        text, share = f"{name} <= {format_fraction(limit)} of dense", result.shares.get(name)
        known = () if share is None else (f"{format_fraction(share)} of dense", share <= limit)
        found.append(Budget(text, *known))
    return found


def constraints_of(result: PruningResult) -> list[Budget]:
    """The constraints, in the order in which they were given."""
    return [_constraint(text, result.metrics_after) for text in result.constraints]


def _constraint(text: str, metrics: dict[str, float]) -> Budget:
    try:
        constraint = parse_constraint(text, "constraints")
    except ValueError:  # of a file that somebody else wrote
        return Budget(text)
    if constraint.metric not in metrics:
        return Budget(text)
    value = metrics[constraint.metric]
    return Budget(text, format_number(value), constraint.is_met(value))


def against_dense(result: PruningResult) -> list[tuple[str, float]]:
    """What remains of the first dense model: cost by name, and the fraction; latency where it was measured."""
    return [(shown, result.shares[name]) for name, shown in IN_WORDS.items() if name in result.shares]


def against_dense_line(result: PruningResult) -> str:
    """The same in one line, with what latency was measured on; empty where nothing is known."""
    shares = [
        f"{name} {latency_against_dense(result) if name == 'latency' else format_change(1.0, share)}"
        for name, share in against_dense(result)
    ]
    measured = f" ({result.measured_on})" if "latency" in result.shares and result.measured_on else ""
    return f"Against dense: {', '.join(shares)}{measured}" if shares else ""


def latency_against_dense(result: PruningResult) -> str:
    """How latency has changed against dense, without a sign where its spread supports none; empty: not measured."""
    share = result.shares.get("latency")
    if share is None:
        return ""
    return "about the same" if abs(share - 1.0) <= (result.latency_spread or 0.0) else format_change(1.0, share)


def knobs_line(result: PruningResult) -> str:
    """What to ask for where the model has become smaller and not faster; empty where latency gains enough.

    Enough is half of what the target says: with a target of 70 % of the parameters, a latency of 65 % of dense.
    """
    share = result.shares.get("latency")
    target = result.sparsity if result.target_sparsity is None else result.target_sparsity
    gain = math.nan if share is None else 1.0 - share
    if not gain < target / 2 or not any(group.channels_after < group.channels_before for group in result.groups):
        return ""
    knobs = ['cost="macs"'] if result.cost != "macs" else []
    knobs += [f'limits={{"latency": {1.0 - target / 2:.2g}}}'] if "latency" not in result.limits else []
    knobs += ["round_to=8"] if result.configuration.get("round_to", "1") == "1" else []
    came = f"latency falls by {gain:.0%}" if gain > (result.latency_spread or 0.0) else "latency does not fall"
    line = f"{target:.0%} fewer {cost_in_words(result)} were asked for, and {came}"
    if not knobs:
        return f"{line}: where layers are this small, time goes elsewhere than into them"
    last = f" or {knobs[-1]}" if len(knobs) > 1 else knobs[-1]
    return f"{line}: if it is speed that counts, ask for it with {', '.join(knobs[:-1])}{last}"


_PROMISED = 0.01
"""What may be lost of a score, as a fraction of it, before a line says what would help."""


def healing_line(result: PruningResult) -> str:
    """What to ask for where more than 1 % of the score is lost, and nothing is trained after the round; else empty."""
    asked = result.configuration
    if not result.applied or asked.get("healing") != "0" or asked.get("finetune_epochs") != "0":
        return ""
    worse = (result.score_after - result.score_before) * (1 if result.mode == "min" else -1)
    if not worse > _PROMISED * abs(result.score_before) > 0.0:
        return ""
    what = "rose" if result.mode == "min" else "fell"
    return (
        f"{result.monitor} {what} by {worse / abs(result.score_before):.1%}: with healing=N, the dense network teaches "
        "the pruned one on N training batches, without labels; those of a quarter of an epoch are a good start"
    )


def format_number(value: float) -> str:
    """A metric or a score in six digits."""
    return f"{value:.6g}"


def format_fraction(value: float) -> str:
    """A fraction in four digits."""
    return f"{value:.4g}"


_MOST_LINES = 8
"""A network of many small components has said enough then."""


def narrowed_features(result: PruningResult) -> list[str]:
    """A line for each component that hands fewer features to other code, which may rely on their number.

    These are the components, and `forward`, that were seen to give a group's channels; and those after which a group
    that couples several is named. Of the latter, components without channels of their own are layers of a flat model,
    and say nothing.
    """
    verb = "now gives" if result.applied else "would give"
    whole = {group.component for group in result.groups} | {item.component for item in result.left_out}
    lines = []
    for group in result.groups:
        if group.channels_after == group.channels_before:
            continue
        widths = {name or "forward": width for name, width in group.outputs.items()}
        named = group.component.split("+") if group.kind == "inter" else []
        given = [name for name in named if f".{group.name}.".find(f".{name}.") >= 0]
        if given and given[0] in whole:
            widths.setdefault(given[0], group.channels_before)
        before, after = group.channels_before, group.channels_after
        for name, width in widths.items():
            if width == before:
                lines.append(f"{name} {verb} {after:,} features instead of {before:,} ({group.name})")
            else:
                lines.append(f"{name} {verb} {after:,} of {before:,} channels among {width:,} features ({group.name})")
    more = len(lines) - _MOST_LINES
    return lines if more <= 1 else [*lines[:_MOST_LINES], f"and {more} more outputs with fewer features"]
