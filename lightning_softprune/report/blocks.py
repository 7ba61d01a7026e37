"""What pages are built of: the document, sections, tables that scroll, cards.

Style sheet and script lie beside this module (`page.css`, `page.js`) and are copied into the page. A content security
policy in the page's head forbids every request and every script but that one.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
from collections.abc import Iterable, Sequence

from lightning_softprune.report.markup import Markup, join, tag, trusted

LONG = 24
"""More rows than this scroll in a box of their own."""


def document(title: str, sections: Iterable[Markup]) -> str:
    """A whole page that needs nothing else, no network, no library, no other file."""
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
        tag("title", title),
        tag("style", trusted(css)),
    )
    body = tag("body", tag("main", *sections), tag("script", trusted(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


@functools.cache
def _asset(name: str) -> str:
    return importlib.resources.files("lightning_softprune.report").joinpath(name).read_text(encoding="utf-8")


def heading(over: str, title: str, facts: Sequence[str], links: Sequence[Markup] = ()) -> Markup:
    """The top of a page; empty facts are left out."""
    shown = [tag("span", fact) for fact in facts if fact]
    return tag(
        "header",
        tag("p", over, class_="over"),
        tag("h1", title),
        tag("p", join(shown, " "), class_="facts"),
        tag("p", join(links, " "), class_="facts") if links else Markup(),
    )


def section(title: str, *content: str, note: str = "") -> Markup:
    """A part of the page; the note is escaped unless it is markup."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else Markup(), *content)


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]], label: str, class_: str = "") -> Markup:
    """A table that scrolls by itself where it is too wide, or too long, for the page."""
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header)))
    return scrolling(tag("table", head, tag("tbody", *lines), class_=class_ or None), len(lines), label)


def sortable_table(columns: Sequence[tuple[str, str]], rows: Iterable[tuple[Sequence[str], str]], label: str) -> Markup:
    """The same, sorted by a click on a column's head.

    Args:
        columns: Head and kind, `"number"` or `"text"`; the rows come by the first.
        rows: Cells, and the class of the row.
        label: What it holds.
    """
    heads = [
        tag("th", tag("button", name, type="button"), scope="col", data_kind=kind, class_=kind,
            aria_sort="ascending" if number == 0 else None)
        for number, (name, kind) in enumerate(columns)
    ]  # fmt: skip
    kinds = [kind if kind == "text" else None for _, kind in columns]
    lines = [
        tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(cells, kinds, strict=True)), class_=row or None)
        for cells, row in rows
    ]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), class_="sortable")
    return scrolling(table, len(lines), label)


def scrolling(content: Markup, rows: int, label: str) -> Markup:
    """A box that scrolls; its edges are shaded, and the script says so, where something lies beyond them."""
    # Focusable: a box that scrolls has to scroll by keyboard too.
    box = "scroll long" if rows > LONG else "scroll"
    return tag("div", content, class_=box, role="region", tabindex=0, aria_label=label)


def card(name: str, before: str, after: str, note: str) -> Markup:
    """A number before and after, with a note below."""
    old = tag("span", f"{before} →", class_="before") if before else Markup()
    value = tag("p", join([old, tag("span", after, class_="after")], " "), class_="value")
    return tag("div", tag("h3", name), value, tag("p", note, class_="note"), class_="card")
