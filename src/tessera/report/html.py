"""HTML that is safe by construction: every text is escaped unless it is `Html` already."""

import json
from html import escape
from typing import Any


class Html(str):
    """Text that is HTML."""


def join(*parts: object) -> Html:
    """The parts one after another; those that are not `Html` are escaped, None is left out."""
    return Html("".join(p if isinstance(p, Html) else escape(str(p)) for p in parts if p is not None))


def tag(name: str, *inner: object, **attributes: object) -> Html:
    """An element: `tag("td", "a < b", class_="number")`. An attribute that is None is left out.

    A _ at the end of an attribute's name goes, others become hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*inner)}</{name}>")


def data(value: Any) -> Html:
    """A value for the page's script, as JSON in an element that is not shown. ValueError: a number is not finite."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # no text in it can end the element
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json">{text}</script>')


def table(heads: list[object], rows: list[list[object]], text_columns: int = 1) -> Html:
    """A table; all columns but the first `text_columns` are numbers. It scrolls by itself where it is too wide."""

    def row(cells: list[object], name: str) -> Html:
        return tag(
            "tr",
            *(tag(name, cell, class_=None if at < text_columns else "number") for at, cell in enumerate(cells)),
        )

    body = tag("tbody", *(row(cells, "td") for cells in rows))
    return tag("div", tag("table", tag("thead", row(heads, "th")), body), class_="wide")
