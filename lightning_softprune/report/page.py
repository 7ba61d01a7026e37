"""`report.html`: a round as one page that needs nothing else, no network, no library, no other file.

`report_page` is a pure function from a `PruningResult` to text. The script sorts the table of trials, saves figures and
says where a table scrolls; without it the page says the same.
"""

from __future__ import annotations

import math

from lightning_softprune.report.blocks import (
    LONG,
    card,
    document,
    heading,
    plain_table,
    scrolling,
    section,
    sortable_table,
)
from lightning_softprune.report.charts import healing_chart, history_chart, sensitivity_charts, sparsity_chart
from lightning_softprune.report.markup import Markup, join, tag
from lightning_softprune.report.series import (
    chosen_trial,
    component_colours,
    constraints_of,
    cost_in_words,
    evaluations_line,
    format_fraction,
    format_number,
    has_parts,
    healing_line,
    healing_rows,
    knobs_line,
    limits_of,
    stages,
    trials_on_front,
)
from lightning_softprune.results import GroupResult, LayerShapes, PruningResult, format_change
from lightning_softprune.search import better
from lightning_softprune.utilities.wording import counted

MAX_ROWS = 1000

MAX_CELLS = 40_000

MAX_COEFFICIENT_COLUMNS = 40

_WORDS = {
    "least_squares": "layers that read removed channels predict them from the kept ones, by regression",
    "bias": "layers that read removed channels keep their mean, in the bias",
    "none": "layers that read removed channels do without",
}
"""What compensation is, by the argument's value."""


def report_page(result: PruningResult) -> str:
    """The page of one round, as HTML.

    Args:
        result: The round.

    Returns:
        The whole document. Whatever is a name or a text in the result is escaped.
    """
    sections = [
        _header(result),
        _banner(result),
        _cards(result),
        _budgets(result),
        _groups(result),
        _layers(result),
        _search(result),
        _healing(result),
        _sensitivity(result),
        _trials(result),
        _metrics(result),
        _left_out(result),
        _settings(result),
    ]
    return document(f"SoftPruning, epoch {result.epoch}", sections)


def _change(before: float, after: float) -> str:
    if not (math.isfinite(before) and math.isfinite(after)):
        return "no finite change"
    return f"{after - before:+.4g}" + (f" ({format_change(before, after)})" if before > 0 else "")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.4g} ms"


def _header(result: PruningResult) -> Markup:
    evaluations = counted(result.evaluations, "evaluation")
    origin = result.origin
    facts = [origin.run, origin.date, result.measured_on]
    facts += [result.strategy, evaluations, f"{result.seconds:,.1f} s", f"stopped: {result.stop_reason}"]
    title = f"{origin.model}, round at epoch {result.epoch}" if origin.model else f"Round at epoch {result.epoch}"
    links = [tag("a", name, href=name) for name in ("trials.csv", "result.json")]
    return heading("SoftPruning", title, facts, links)


def _banner(result: PruningResult) -> Markup:
    if result.applied:
        return Markup()
    reason = result.reason or "no reason was given"
    planned = " Below, “after” is the plan that would have been applied." if chosen_trial(result) is not None else ""
    return tag(
        "div",
        tag("strong", "The model was not changed: "),
        f"{reason}.{planned}" if not reason.endswith(".") else f"{reason}{planned}",
        class_="banner dry" if result.is_dry_run else "banner",
        role="note",
    )


def _cards(result: PruningResult) -> Markup:
    before, after = result.costs_before, result.costs_after
    cards = [
        card(shown, f"{dense:,}", f"{pruned:,}", _saved(result, name, dense, pruned))
        for shown, name, dense, pruned in (
            ("Parameters", "params", before.params, after.params),
            ("MACs", "macs", before.macs, after.macs),
        )
    ]
    if result.latency_before is not None and result.latency_after is not None:
        seconds = result.latency_before, result.latency_after
        notes = [result.latency_change, _of_dense(result, "latency", seconds[1] / seconds[0] if seconds[0] else 1.0)]
        note = ", ".join(filter(None, [*notes, "one validation step", result.measured_on]))
        cards.append(card("Latency", _milliseconds(seconds[0]), _milliseconds(seconds[1]), note))
    scores = format_number(result.score_before), format_number(result.score_after)
    cards.append(card(_monitor(result), *scores, _verdict(result, result.score_after)))
    if result.score_finetuned is not None:
        score = result.score_finetuned
        cards.append(card("After fine-tuning", " → ".join(scores), format_number(score), _verdict(result, score)))
    if result.target_sparsity is None:
        target = "no target: as high as the constraints allow"
    else:
        target = f"target {format_fraction(result.target_sparsity)} ± {format_fraction(result.tolerance)}"
    cards.append(card(f"Sparsity in {cost_in_words(result)}", "", format_fraction(result.sparsity), target))
    hints = [tag("p", f"{hint}.", class_="note hint") for hint in (knobs_line(result), healing_line(result)) if hint]
    return tag("section", tag("h2", "Summary", class_="hidden"), tag("div", *cards, class_="cards"), *hints)


def _monitor(result: PruningResult) -> str:
    return f"{result.monitor} ({'higher' if result.mode == 'max' else 'lower'} is better)"


def _saved(result: PruningResult, name: str, before: int, after: int) -> str:
    return ", ".join(
        filter(None, [format_change(before, after), _of_dense(result, name, after / before if before else 1)])
    )


def _of_dense(result: PruningResult, name: str, share_of_round: float) -> str:
    """The change against the first dense model, where earlier rounds have been at work too."""
    share = result.shares.get(name)
    if share is None or abs(share - share_of_round) < 5e-4:
        return ""
    return f"{format_change(1.0, share)} against the first dense model"


def _verdict(result: PruningResult, score: float) -> Markup:
    """How a score compares with that before; only one that a constraint does not allow is in the colour of what is bad.

    A smaller model may be worse than the dense one: that is what constraints are for.
    """
    change = _change(result.score_before, score)
    if not (math.isfinite(result.score_before) and math.isfinite(score)) or score == result.score_before:
        return join([change])
    if better(score, result.score_before, result.mode):
        return join([change, tag("span", "better", class_="better")], " ")
    if any(constraint.met is False for constraint in constraints_of(result)):
        return join([change, tag("span", "worse, a constraint is not met", class_="worse")], " ")
    return join(
        [
            change,
            "lower" if score < result.score_before else "higher",
            *(["within the constraints"] if result.constraints else []),
        ],
        " ",
    )


def _budgets(result: PruningResult) -> Markup:
    budgets = [*limits_of(result), *constraints_of(result)]
    rows = [(budget.text, ": ".join(filter(None, (budget.value, budget.verdict)))) for budget in budgets]
    if not rows:
        return Markup()
    return section("Limits and constraints", plain_table(["budget", "after"], rows, "Limits and constraints", "plain"))


def _groups(result: PruningResult) -> Markup:
    colours = component_colours(result)
    if not result.groups:
        return section("Groups", tag("p", "There is nothing to prune.", class_="empty"))
    extra = any(group.params or group.macs for group in result.groups)
    items = [_group(group, colours[group.component], extra) for group in result.groups]
    head = ["group", _kept_axis(), "channels", "coefficient", "bounds", *(["can go"] if extra else [])]
    first = tag("li", *(tag("span", name) for name in head), class_="head", aria_hidden="true")
    keys = [tag("li", tag("i", class_=colour), name) for name, colour in colours.items()]
    striped = any(group.kind == "inter" for group in result.groups)
    if striped:
        keys.append(tag("li", tag("svg", tag("rect", width=20, height=12, fill="url(#inter)"), class_="stripes",
                                  width=20, height=12, aria_hidden="true"),
                        "striped: an inter group, whose channels several components share"))  # fmt: skip
    stripes = tag("path", d="M-2,2l4,-4M0,8l8,-8M6,10l4,-4", class_="stripe")
    pattern = tag("pattern", stripes, id="inter", width=8, height=8, patternUnits="userSpaceOnUse")
    plan = tag("ul", first, *items, class_="groups extra" if extra else "groups")
    return section(
        "Groups",
        tag("svg", pattern, width=0, height=0, class_="hidden", aria_hidden="true"),
        tag("ul", *keys, class_="legend"),
        scrolling(plan, len(items), "Groups"),
        note="A group is pruned as one: its channels run through layers that have to go along. “intra”: all of these"
        " are in one component, a named part of the network; “inter”: they are in several, as a latent space is."
        " Coloured: channels kept. The bracket below a bar spans what the group's bounds allow to keep."
        + (" “can go”: the costs that go when this group alone is pruned as far as they allow." if extra else ""),
    )


def _kept_axis() -> Markup:
    """The axis of the bars below it."""
    marks = [
        tag("text", f"{share} %", x=f"{share}%", y=11, class_=f"tick {where}")
        for share, where in ((0, "start"), (50, "x"), (100, "y"))
    ]
    lines = [tag("line", x1=f"{share}%", x2=f"{share}%", y1=15, y2=20, class_="axis") for share in (0, 50, 100)]
    return join(["channels kept", tag("svg", *marks, *lines, class_="kept-axis")])


def _layers(result: PruningResult) -> Markup:
    if not result.layers:
        return Markup()
    rows = []
    for layer in result.layers:
        counts = [sum(map(math.prod, shapes.values())) for shapes in (layer.before, layer.after)]
        rows.append([layer.name, layer.kind, *_shapes(layer), f"{counts[0]:,} → {counts[1]:,}"])
    table = plain_table(["layer", "type", "before", "after", "parameters"], rows, "Layers", "shapes")
    return section(
        "Layers", table, note="The layers that the round makes smaller, with the shapes of their parameters."
    )


def _shapes(layer: LayerShapes) -> list[str]:
    return [
        ", ".join(f"{name} {' x '.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
        for shapes in (layer.before, layer.after)
    ]


def _group(group: GroupResult, colour: str, extra: bool) -> Markup:
    before, after = group.channels_before, group.channels_after
    kind = tag("span", group.kind, class_="badge") if group.kind == "inter" else group.kind
    parts = [
        tag("span", tag("b", group.name), tag("span", group.component, " · ", kind, class_="where"), class_="name"),
        _bar(group),
        _value("channels", f"{before:,} → {after:,}"),
        _value("coefficient", f"{group.coefficient:.3f}"),
        _value("bounds", f"{group.low:.3g} to {group.high:.3g}"),
    ]
    if extra:
        costs = join([tag("span", f"{group.params:,} params"), tag("span", f"{group.macs:,} MACs")], " ")
        parts.append(_value("can go", costs))
    return tag("li", *parts, class_=colour)


def _value(name: str, value: str) -> Markup:
    return tag("span", tag("span", f"{name} ", class_="key"), value, class_="number")


def _bar(group: GroupResult) -> Markup:
    before, after = max(group.channels_before, 1), group.channels_after
    kept = _percent(after / before)
    low, high = _percent(1 - group.high), _percent(1 - group.low)
    label = f"{after:,} of {group.channels_before:,} channels kept"
    parts = [
        tag("title", label),
        tag("rect", width="100%", height=14, class_="removed"),
        tag("rect", width=kept, height=14, class_="kept"),
    ]
    if group.kind == "inter":
        parts.append(tag("rect", width=kept, height=14, fill="url(#inter)"))
    parts.append(tag("line", x1=low, x2=high, y1=18, y2=18, class_="bounds"))
    parts += [tag("line", x1=end, x2=end, y1=15.5, y2=20.5, class_="bounds") for end in (low, high)]
    return tag("svg", *parts, class_="bar", role="img", aria_label=label)


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0:.4g}%"


def _search(result: PruningResult) -> Markup:
    if not result.trials:
        return section("Search", tag("p", "No plan was scored.", class_="empty"))
    charts = tag("div", history_chart(result), sparsity_chart(result), class_="charts")
    return section("Search", charts, note=f"The score is {_monitor(result)}.")


def _healing(result: PruningResult) -> Markup:
    rows = healing_rows(result)
    if not rows:
        return Markup()
    scores = [["before", format_number(result.score_before), ""]]
    scores += [[name, format_number(score), note] for name, score, note in rows]
    return section(
        "Healing",
        tag("div", healing_chart(result), class_="charts"),
        tag("p", class_="gap"),
        plain_table(["healing", result.monitor, ""], scores, "Scores around healing", "plain"),
        note="The pruned network is trained to compute what the dense one computes, without labels. The error of a"
        " batch, before it is learned from: the fraction that the pruned network misses of the variance of what the"
        " module's steps use.",
    )


def _sensitivity(result: PruningResult) -> Markup:
    if not result.sensitivity:
        return Markup()
    charts = sensitivity_charts(result)
    expected = result.numbers is not None and result.numbers.errors is not None
    return section(
        "Sensitivity",
        scrolling(charts, len(result.sensitivity), "Sensitivity") if len(result.sensitivity) > LONG else charts,
        note=f"{result.monitor} against the coefficient of one group, all others left whole. "
        f"{'Points are measured, lines as expected by what outputs miss. ' if expected else ''}"
        "A curve that leaves its chart goes on beyond it. Dashed: the coefficient that the round gave the group.",
    )


def _trials(result: PruningResult) -> Markup:
    if not result.trials:
        return Markup()
    trials, chosen = result.trials, chosen_trial(result)
    front, stage = trials_on_front(result), stages(result)
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.metrics if name != result.monitor))
    wide = len(result.groups) > MAX_COEFFICIENT_COLUMNS
    groups = [] if wide else result.groups
    columns = [("trial", "number"), ("sparsity", "number"), ("score", "number"), ("feasible", "text"), ("note", "text")]
    parts = has_parts(result)
    columns += [("seconds", "number"), *([("share of batches", "number")] if parts else [])]
    columns += [(name, "number") for name in metrics]
    columns += [(f"coefficient of {group.name}", "number") for group in groups]
    most = max(1, min(MAX_ROWS, MAX_CELLS // len(columns)))
    shown = _best_trials(result, most)
    rows = []
    for index in shown:
        trial = trials[index]
        notes = [note for note, holds in (("chosen", index == chosen), ("front", index in front)) if holds]
        notes += [stage[index]] if stage[index] != "search" else []
        cells = [
            str(index),
            format_number(trial.sparsity),
            format_number(trial.score),
            "yes" if trial.feasible else "no",
        ]
        cells += [", ".join(notes), f"{trial.seconds:.3g}", *([format_fraction(trial.share)] if parts else [])]
        cells += [format_number(trial.metrics[name]) if name in trial.metrics else "" for name in metrics]
        cells += [format_fraction(coefficient) for coefficient in trial.coefficients] if groups else []
        rows.append((cells, "chosen" if index == chosen else ""))
    note: list[str] = ["“front”: no other trial is better in both sparsity and score."]
    if parts:
        note[0] += " Scores of a part of the validation batches are of that part alone; finalists were scored on all."
    if len(shown) < len(trials):
        note.insert(0, f"The {len(shown):,} best of {len(trials):,} trials; all are in ")
    elif wide:
        note.insert(0, f"The coefficients of {len(result.groups):,} groups are in ")
    if len(note) == 2:  # the link is part of the sentence
        note.insert(1, join([tag("a", "trials.csv", href="trials.csv"), ". "]))
    note.append(f" {evaluations_line(result)}.")
    return section("Trials", sortable_table(columns, rows, "Trials"), note=join(note))


def _best_trials(result: PruningResult, most: int) -> list[int]:
    """Indices of at most so many trials, in order: the chosen one, those on all data, the feasible ones, by score."""
    chosen = chosen_trial(result)

    def rank(index: int) -> tuple[bool | float, ...]:
        trial = result.trials[index]
        score = -trial.score if result.mode == "max" else trial.score
        known = not math.isnan(score)
        return index != chosen, trial.share < 1.0, not trial.feasible, not known, score if known else 0.0

    return sorted(sorted(range(len(result.trials)), key=rank)[:most])


def _metrics(result: PruningResult) -> Markup:
    names = list(dict.fromkeys([*result.metrics_before, *result.metrics_after]))
    if not names:
        return Markup()
    rows = []
    for name in names:
        before, after = (metrics.get(name) for metrics in (result.metrics_before, result.metrics_after))
        values = ["" if value is None else format_number(value) for value in (before, after)]
        rows.append([name, *values, "" if before is None or after is None else _change(before, after)])
    return section("Metrics", plain_table(["metric", "before", "after", "change"], rows, "Metrics", "numbers"))


def _left_out(result: PruningResult) -> Markup:
    if not result.left_out:
        return Markup()
    items = []
    for item in result.left_out:
        channels = counted(item.channels, "channel") if item.channels else ""
        where = " · ".join(filter(None, (item.component, channels)))
        name = tag("span", tag("b", item.name), tag("span", where, class_="where"))
        items.append(tag("li", name, tag("span", item.reason)))
    box = scrolling(tag("ul", *items, class_="reasons"), len(items), "Left out")
    note = f"What the search leaves alone, and why. {result.coverage}".strip()
    return section("Left out", box, note=note)


def _settings(result: PruningResult) -> Markup:
    blocks = [
        tag(
            "div",
            tag("h3", title),
            tag("dl", *(join([tag("dt", k), tag("dd", v, _explained(k, v))]) for k, v in values.items())),
        )
        for title, values in (("Configuration", result.configuration), ("Versions", result.versions))
        if values
    ]
    return section("Settings", tag("div", *blocks, class_="settings")) if blocks else Markup()


def _explained(name: str, value: str) -> Markup:
    words = _WORDS.get(value.strip("'\"")) if name == "compensation" else None
    return tag("span", f" {words}", class_="where") if words else Markup()
