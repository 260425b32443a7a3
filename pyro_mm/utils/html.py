"""Tables and remarks as HTML, for values that notebooks show."""

from __future__ import annotations

import html
from collections.abc import Sequence

CELL = "padding: 0.15em 0.7em; vertical-align: top"


class Markup(str):
    """Text that is HTML already, and is not escaped."""


def escape(text: str) -> str:
    """Return a text as HTML; :class:`Markup` as it is.

    >>> escape("a < b"), escape(Markup("<i>a</i>"))
    ('a &lt; b', '<i>a</i>')
    """
    return text if isinstance(text, Markup) else html.escape(str(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Markup:
    """Return a table, without colours of its own.

    Args:
        header: one heading per column.
        rows: one text per column in each row.
        left: the number of columns that are flush left; the others are flush right.

    >>> table(["site"], [["<z>"]]).count("&lt;z&gt;")
    1
    """

    def line(cells: Sequence[str], tag: str) -> str:
        style = [f"{CELL}; text-align: {'left' if i < left else 'right'}" for i in range(len(cells))]
        each = (f'<{tag} style="{s}">{escape(cell)}</{tag}>' for cell, s in zip(cells, style, strict=True))
        return f"<tr>{''.join(each)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return Markup(f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>")


def report(title: str, *parts: str) -> str:
    """Return a title with parts under it: texts as paragraphs, and :class:`Markup` as it is. Empty ones are left out.

    Args:
        title: the first line, in bold.
        parts: what stands below it.
    """
    below = (part if isinstance(part, Markup) else f"<p>{escape(part)}</p>" for part in parts if part)
    return f'<div class="pyro-mm"><p><b>{escape(title)}</b></p>{"".join(below)}</div>'


def listing(items: Sequence[str], ordered: bool = False) -> Markup:
    """Return a list of sentences; empty for none.

    >>> listing(["a & b"])
    '<ul><li>a &amp; b</li></ul>'
    """
    tag = "ol" if ordered else "ul"
    return Markup(f"<{tag}>{''.join(f'<li>{escape(item)}</li>' for item in items)}</{tag}>" if items else "")
