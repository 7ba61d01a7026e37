"""HTML and SVG by construction: what is not known to be markup is escaped.

`tag` builds one element. Its content is escaped unless it is `Markup`, which only `tag`, `join` and `trusted` make; so
no name, reason or version that a user's program supplies can end an element or start a script.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

Attribute = str | int | float | bool | None

# Elements that have no content and no end tag: HTML's, and those of SVG that the charts draw with.
_VOID = frozenset({"meta", "link", "br"})

_EMPTY = frozenset({"rect", "line", "path", "circle", "polyline"})

# No document may hold these; a lone surrogate cannot even be written to a file.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *content: str, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        name: Its name.
        content: What it holds; escaped unless it is `Markup`.
        attributes: A trailing underscore is dropped, others become hyphens. `True` is an attribute without value,
            `False` and `None` are none. Floats (coordinates) are rounded to a tenth.

    >>> tag("td", "a < b", class_="name", data_label='"x"', hidden=True, title=None)
    '<td class="name" data-label="&quot;x&quot;" hidden>a &lt; b</td>'
    >>> tag("rect", x=1.0, width=12.345)
    '<rect x="1" width="12.3"/>'
    """
    start = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{start}>")
    inner = join(content)
    if name in _EMPTY and not inner:
        return Markup(f"<{start}/>")
    return Markup(f"<{start}>{inner}</{name}>")


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Several pieces in a row, each escaped unless it is `Markup`.

    >>> join(["a & b", tag("b", "c")], between=" ")
    'a &amp; b <b>c</b>'
    """
    return Markup(_escaped(between).join(map(_escaped, parts)))


def trusted(text: str) -> Markup:
    """Text of the package's own (its style sheet, its script) as it stands."""
    return Markup(text)


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(_FORBIDDEN.sub("\ufffd", text))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{round(value, 1):g}" if isinstance(value, float) else str(value)
    return f' {name}="{_escaped(text)}"'
