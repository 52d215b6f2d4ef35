"""HTML without outside resources. All text is escaped here, since names of runs and files are not to be trusted."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root { --ink: #1c2430; --pale: #5b6676; --line: #d9dee5; --ground: #f5f7f9; --accent: #0b5cad; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: white;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 0.25rem; }
p, li { max-width: 46rem; }
.pale { color: var(--pale); font-size: 0.9rem; }
.verdict { padding: 0.6rem 0.9rem; border-left: 4px solid var(--accent); background: var(--ground); }
nav ul { padding-left: 1.2rem; }
a { color: var(--accent); }
.wide { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap;
  overflow-wrap: normal; }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; background: white; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button::after { content: " \\2195"; color: var(--pale); }
th[aria-sort="ascending"] button::after { content: " \\2191"; color: var(--accent); }
th[aria-sort="descending"] button::after { content: " \\2193"; color: var(--accent); }
th:first-child, td:first-child { position: sticky; left: 0; background: white; }
tbody tr:hover, tbody tr:hover td { background: var(--ground); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--pale); font-size: 0.88rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; }
  th:first-child, td:first-child { position: static; }
  table { font-size: 7.5pt; }
  th, td { white-space: normal; padding: 0.15rem 0.3rem; }
  th button::after { content: "" !important; }
  figure, tr, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .pictures { grid-template-columns: 1fr 1fr; }
  nav { display: none; }
}
"""

SCRIPT = """
"use strict";
function valueOf(row, column) {
  const cell = row.cells[column];
  const number = cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
  return Number.isNaN(number) ? [cell.dataset.value === undefined ? 0 : 1, cell.textContent] : [0, number];
}
function compare(a, b) {
  if (a[0] !== b[0]) return a[0] - b[0];
  return typeof a[1] === "number" && typeof b[1] === "number" ? a[1] - b[1] : String(a[1]).localeCompare(String(b[1]));
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex, falling = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const rows = Array.from(body.rows).map(row => [valueOf(row, column), row]);
    const empty = rows.filter(([value]) => value[0] === 1), full = rows.filter(([value]) => value[0] === 0);
    full.sort((a, b) => (falling ? -1 : 1) * compare(a[0], b[0]));
    body.append(...full.concat(empty).map(([, row]) => row));
  });
}
"""


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    value: float | None = None
    """The number by which the cell is sorted, NaN for none, which sorts last; None: it is sorted by its text."""
    link: str | None = None
    """Where the text leads, an address that is already quoted."""


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of a class."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>"


def heading(level: int, text: str, name: str = "") -> str:
    """Return a heading, with a name that links can lead to."""
    return f"<h{level}{f' id={chr(34)}{escape(name)}{chr(34)}' if name else ''}>{escape(text)}</h{level}>"


def contents(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return links to headings: name of the heading, text of the link, and what follows it."""
    lines = (f'<li><a href="#{escape(name)}">{escape(text)}</a>: {escape(more)}</li>' for name, text, more in entries)
    return f"<nav><ul>{''.join(lines)}</ul></nav>"


def side_by_side(figures: Sequence[str]) -> str:
    """Return pictures in as many columns as the page has room for."""
    return f'<div class="pictures">{"".join(figures)}</div>'


def list_of(items: Sequence[str]) -> str:
    """Return an unordered list of texts."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def cell(content: Cell, tag: str = "td") -> str:
    """Return a cell of a table."""
    text = escape(content.text)
    if content.link is not None:
        text = f'<a href="{escape(content.link)}">{text}</a>'
    if content.value is None:
        return f"<{tag}{' class=' + chr(34) + 'long' + chr(34) if len(content.text) > 60 else ''}>{text}</{tag}>"
    return f'<{tag} class="number" data-value="{content.value!r}">{text}</{tag}>'


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> str:
    """Return a table whose columns sort on a click. ``caption`` is for readers who do not see it."""
    numeric = [bool(rows) and all(row[i].value is not None for row in rows) for i in range(len(header))]
    heads = "".join(
        f'<th scope="col"{" class=" + chr(34) + "number" + chr(34) if number else ""}>'
        f'<button type="button">{escape(name)}</button></th>'
        for name, number in zip(header, numeric, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(cell(one) for one in row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def figure(png: bytes, alternative: str, caption: str) -> str:
    """Return a picture with its text alternative and its caption."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    data = base64.b64encode(png).decode()
    size = f'width="{width}" height="{height}"'
    image = f'<img src="data:image/png;base64,{data}" {size} alt="{escape(alternative)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def digest(text: str) -> str:
    """Return the hash by which a page allows a script or style of its own, and no other."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def page(title: str, parts: Sequence[str]) -> str:
    """Return the whole page."""
    policy = f"default-src 'none'; img-src data:; style-src {digest(STYLE)}; script-src {digest(SCRIPT)}"
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
