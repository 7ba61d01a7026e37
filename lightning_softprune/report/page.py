"""`report.html`: a round as one page that needs nothing else, no network, no library, no other file.

`report_page` is a pure function from a `PruningResult` to text. Style sheet and script lie beside this module
(`page.css`, `page.js`) and are copied into the page. The script sorts the table of trials; without it the page says the
same. A content security policy in the page's head forbids every request and every script but that one.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import math
from collections.abc import Iterable, Sequence

from lightning_softprune.report.charts import history_chart, sensitivity_charts, sparsity_chart
from lightning_softprune.report.markup import Markup, join, tag, trusted
from lightning_softprune.report.series import (
    budget_rows,
    chosen_trial,
    component_colours,
    format_fraction,
    format_number,
    has_parts,
    trials_on_front,
)
from lightning_softprune.results import GroupResult, PruningResult, format_change
from lightning_softprune.search import better

MAX_ROWS = 1000

MAX_CELLS = 40_000

MAX_COEFFICIENT_COLUMNS = 40

_LONG = 24  # more rows than this scroll in a box of their own


def report_page(result: PruningResult) -> str:
    """The page of one round, as HTML.

    Args:
        result: The round.

    Returns:
        The whole document. Whatever is a name or a text in the result is escaped.
    """
    css, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),  # or the browser asks a server for one
        tag("title", f"SoftPruning, epoch {result.epoch}"),
        tag("style", trusted(css)),
    )
    sections = [
        _header(result),
        _banner(result),
        _cards(result),
        _budgets(result),
        _groups(result),
        _search(result),
        _sensitivity(result),
        _trials(result),
        _metrics(result),
        _left_out(result),
        _settings(result),
    ]
    body = tag("body", tag("main", *sections), tag("script", trusted(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


@functools.cache
def _asset(name: str) -> str:
    return importlib.resources.files("lightning_softprune.report").joinpath(name).read_text(encoding="utf-8")


def _section(title: str, *content: str, note: str = "") -> Markup:
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else Markup(), *content)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], label: str, class_: str = "") -> Markup:
    """A table that scrolls by itself where it is too wide, or too long, for the page."""
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header)))
    return _scrolling(tag("table", head, tag("tbody", *lines), class_=class_ or None), len(lines), label)


def _scrolling(table: Markup, rows: int, label: str) -> Markup:
    # Focusable: a box that scrolls has to scroll by keyboard too.
    box = "scroll long" if rows > _LONG else "scroll"
    return tag("div", table, class_=box, role="region", tabindex=0, aria_label=label)


def _change(before: float, after: float) -> str:
    if not (math.isfinite(before) and math.isfinite(after)):
        return "no finite change"
    return f"{after - before:+.4g}" + (f" ({format_change(before, after)})" if before > 0 else "")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.4g} ms"


def _header(result: PruningResult) -> Markup:
    passes = f"{result.evaluations:,} evaluation{'' if result.evaluations == 1 else 's'}"
    facts = [result.strategy, passes, f"{result.seconds:,.1f} s", f"stopped: {result.stop_reason}"]
    return tag(
        "header",
        tag("p", "SoftPruning", class_="over"),
        tag("h1", f"Round at epoch {result.epoch}"),
        tag("p", join((tag("span", fact) for fact in facts), " "), class_="facts"),
    )


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
        _card("Parameters", f"{before.params:,}", f"{after.params:,}", format_change(before.params, after.params)),
        _card("MACs", f"{before.macs:,}", f"{after.macs:,}", format_change(before.macs, after.macs)),
    ]
    if result.latency_before is not None and result.latency_after is not None:
        seconds = result.latency_before, result.latency_after
        note = f"{result.latency_change}, one validation step"
        cards.append(_card("Latency", _milliseconds(seconds[0]), _milliseconds(seconds[1]), note))
    scores = result.score_before, result.score_after
    change, verdict = _change(*scores), ""
    if math.isfinite(scores[0]) and math.isfinite(scores[1]) and scores[0] != scores[1]:
        verdict = "better" if better(scores[1], scores[0], result.mode) else "worse"
    note = join([change, tag("span", verdict, class_=verdict)], " ") if verdict else change
    cards.append(_card(f"{result.monitor} ({result.mode})", format_number(scores[0]), format_number(scores[1]), note))
    if result.target_sparsity is None:
        target = "no target: as high as the constraints allow"
    else:
        target = f"target {format_fraction(result.target_sparsity)} ± {format_fraction(result.tolerance)}"
    what = {"params": "parameters", "macs": "MACs"}.get(result.cost, result.cost)
    cards.append(_card(f"Sparsity in {what}", "", format_fraction(result.sparsity), target))
    return tag("section", tag("h2", "Summary", class_="hidden"), tag("div", *cards, class_="cards"))


def _card(name: str, before: str, after: str, note: str) -> Markup:
    old = tag("span", f"{before} →", class_="before") if before else Markup()
    value = tag("p", join([old, tag("span", after, class_="after")], " "), class_="value")
    return tag("div", tag("h3", name), value, tag("p", note, class_="note"), class_="card")


def _budgets(result: PruningResult) -> Markup:
    rows = budget_rows(result)
    if not rows:
        return Markup()
    return _section("Limits and constraints", _table(["budget", "after"], rows, "Limits and constraints", "plain"))


def _groups(result: PruningResult) -> Markup:
    colours = component_colours(result)
    if not result.groups:
        return _section("Groups", tag("p", "There is nothing to prune.", class_="empty"))
    extra = any(group.params or group.macs for group in result.groups)
    items = [_group(group, colours[group.component], extra) for group in result.groups]
    head = ["group", "channels kept", "channels", "coefficient", "bounds", *(["can go"] if extra else [])]
    first = tag("li", *(tag("span", name) for name in head), class_="head", aria_hidden="true")
    keys = [tag("li", tag("i", class_=colour), name) for name, colour in colours.items()]
    striped = any(group.kind == "inter" for group in result.groups)
    if striped:
        keys.append(tag("li", tag("svg", tag("rect", width=20, height=12, fill="url(#inter)"), class_="stripes",
                                  width=20, height=12, aria_hidden="true"),
                        "striped: an inter group, which couples components"))  # fmt: skip
    stripes = tag("path", d="M-2,2l4,-4M0,8l8,-8M6,10l4,-4", class_="stripe")
    pattern = tag("pattern", stripes, id="inter", width=8, height=8, patternUnits="userSpaceOnUse")
    plan = tag("ul", first, *items, class_="groups extra" if extra else "groups")
    return _section(
        "Groups",
        tag("svg", pattern, width=0, height=0, class_="hidden", aria_hidden="true"),
        tag("ul", *keys, class_="legend"),
        _scrolling(plan, len(items), "Groups"),
        note="Coloured: channels kept. The bracket below a bar spans what the group's bounds allow to keep."
        + (" “can go”: the costs that go when this group alone is pruned as far as they allow." if extra else ""),
    )


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
        return _section("Search", tag("p", "No plan was scored.", class_="empty"))
    charts = tag("div", history_chart(result), sparsity_chart(result), class_="charts")
    return _section("Search", charts, note=f"The score is {result.monitor}.")


def _sensitivity(result: PruningResult) -> Markup:
    if not result.sensitivity:
        return Markup()
    charts = sensitivity_charts(result)
    return _section(
        "Sensitivity",
        _scrolling(charts, len(result.sensitivity), "Sensitivity") if len(result.sensitivity) > _LONG else charts,
        note=f"{result.monitor} against the coefficient of one group, all others left whole. "
        "A curve that leaves its chart goes on beyond it. Dashed: the coefficient that the round gave the group.",
    )


def _trials(result: PruningResult) -> Markup:
    if not result.trials:
        return Markup()
    trials, chosen = result.trials, chosen_trial(result)
    front = trials_on_front(result)
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
        cells = [
            str(index),
            format_number(trial.sparsity),
            format_number(trial.score),
            "yes" if trial.feasible else "no",
        ]
        cells += [", ".join(notes), f"{trial.seconds:.3g}", *([format_fraction(trial.share)] if parts else [])]
        cells += [format_number(trial.metrics[name]) if name in trial.metrics else "" for name in metrics]
        cells += [format_fraction(coefficient) for coefficient in trial.coefficients] if groups else []
        row = tag("tr", *(tag("td", cell) for cell in cells), class_="chosen" if index == chosen else None)
        rows.append(row)
    heads = [
        tag("th", tag("button", name, type="button"), scope="col", data_kind=kind,
            aria_sort="ascending" if number == 0 else None)
        for number, (name, kind) in enumerate(columns)
    ]  # fmt: skip
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="sortable")
    note: list[str] = ["“front”: no other trial is better in both sparsity and score."]
    if parts:
        note[0] += " Scores of a part of the validation batches are of that part alone; finalists were scored on all."
    if len(shown) < len(trials):
        note.insert(0, f"The {len(shown):,} best of {len(trials):,} trials; all are in ")
    elif wide:
        note.insert(0, f"The coefficients of {len(result.groups):,} groups are in ")
    if len(note) == 2:
        note.insert(1, join([tag("a", "trials.csv", href="trials.csv"), ". "]))
    explained = tag("p", *note, class_="note")
    return _section("Trials", explained, _scrolling(table, len(rows), "Trials"))


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
    return _section("Metrics", _table(["metric", "before", "after", "change"], rows, "Metrics", "numbers"))


def _left_out(result: PruningResult) -> Markup:
    if not result.left_out:
        return Markup()
    items = []
    for item in result.left_out:
        channels = f"{item.channels:,} channel{'' if item.channels == 1 else 's'}" if item.channels else ""
        where = " · ".join(filter(None, (item.component, channels)))
        name = tag("span", tag("b", item.name), tag("span", where, class_="where"))
        items.append(tag("li", name, tag("span", item.reason)))
    box = _scrolling(tag("ul", *items, class_="reasons"), len(items), "Left out")
    note = f"What the search leaves alone, and why. {result.coverage}".strip()
    return _section("Left out", box, note=note)


def _settings(result: PruningResult) -> Markup:
    blocks = [
        tag("div", tag("h3", title), tag("dl", *(join([tag("dt", k), tag("dd", v)]) for k, v in values.items())))
        for title, values in (("Configuration", result.configuration), ("Versions", result.versions))
        if values
    ]
    return _section("Settings", tag("div", *blocks, class_="settings")) if blocks else Markup()
