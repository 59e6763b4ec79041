"""A plain HTML page without scripts: every string is escaped here and nowhere else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_CSS = """
:root { --ink: #1c2127; --soft: #5d6672; --line: #e2e6eb; --page: #f5f6f8; --card: #fff; --accent: #0072b2;
  --tint: #eaf3f9; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4b1; --line: #333b45; 
  --page: #14181d; --card: #1d232a; --accent: #6cb8ea; --tint: #20323f; --bad: #ff8a80; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1100px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 15px; font-weight: 600; color: var(--soft); margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 40px 0 10px; line-height: 1.3 }
h3 { font-size: 15px; margin: 24px 0 6px }
p { margin: 8px 0; max-width: 95ch; overflow-wrap: anywhere }
.headline { font-size: 22px; line-height: 1.4; font-weight: 600; max-width: none; margin: 0 0 8px }
.headline.bad { border-left: 5px solid var(--bad); padding-left: 14px }
.soft, figcaption, small { color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
  margin: 20px 0 }
.tile, .card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.tile { padding: 12px 16px }
.tile b { display: block; font-size: 26px; line-height: 1.3; font-variant-numeric: tabular-nums }
.tile span { display: block; font-size: 13px; color: var(--soft) }
.bad b, td.bad { color: var(--bad); font-weight: 700 }
.card { overflow-x: auto; margin: 12px 0; padding: 4px 8px }
table { border-collapse: collapse; width: 100%; font-size: 13px; line-height: 1.35;
  font-variant-numeric: tabular-nums }
th, td { padding: 5px 8px; text-align: right; vertical-align: top; white-space: nowrap }
th { font-weight: 600; vertical-align: bottom }
thead th { color: var(--soft); border-bottom: 2px solid var(--line); white-space: normal }
tbody + tbody { border-top: 1px solid var(--line) }
.text { text-align: left }
.wrap { width: 100%; white-space: normal; overflow-wrap: anywhere }
td small { display: block; font-size: 11px }
tr.mine td:not([rowspan]) { background: var(--tint); font-weight: 600 }
tr.mine small { font-weight: 400 }
i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px }
figure { margin: 14px 0; padding: 14px 16px }
figure img { display: block; width: 100%; background: #fff; border-radius: 4px }
figcaption { font-size: 13.5px; margin-top: 8px; max-width: 100ch }
details { margin: 10px 0 } summary { cursor: pointer; color: var(--accent); font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 10px 0 } dd { margin: 0 }
dt { font-weight: 600 }
@media (max-width: 640px) { dl { grid-template-columns: 1fr } dd { margin-bottom: 8px }
  .headline { font-size: 18px } }
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: its text, a small second line, and how it looks."""

    text: str
    note: str = ""
    style: str = ""  # CSS classes: "text" aligns left, "wrap" may break, "bad" missed, "mine" tints the row
    dot: str = ""  # colour of the mark before the text
    rows: int = 1  # spanned


Row = Sequence[Cell]


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{_CSS}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def heading(text: str, *, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{_text(text)}</h{level}>"


def paragraph(text: str, *, style: str = "") -> str:
    """A paragraph, or nothing where there is nothing to say."""
    return f'<p class="{style}">{_text(text)}</p>' if text else ""


def tile(value: str, *, name: str, note: str, bad: bool = False) -> str:
    """One number to see at a glance."""
    spans = f"<b>{_text(value)}</b><span>{_text(name)}</span><span>{_text(note)}</span>"
    return f'<div class="tile{" bad" if bad else ""}">{spans}</div>'


def tiles(parts: Iterable[str]) -> str:
    """Tiles side by side."""
    return f'<div class="tiles">{"".join(parts)}</div>'


def table(head: Row, groups: Iterable[Sequence[Row]]) -> str:
    """A table whose groups of rows are set apart by a line."""
    bodies = "".join(f"<tbody>{''.join(map(_row, rows))}</tbody>" for rows in groups)
    titles = "".join(f'<th class="{cell.style}">{_text(cell.text)}</th>' for cell in head)
    return f'<div class="card"><table><thead><tr>{titles}</tr></thead>{bodies}</table></div>'


def definitions(pairs: Iterable[tuple[Cell, str]]) -> str:
    """Terms and what they mean."""
    return f"<dl>{''.join(f'<dt>{_content(term)}</dt><dd>{_text(text)}</dd>' for term, text in pairs)}</dl>"


def figure(uri: str, *, caption: str) -> str:
    """A figure that was drawn to a data URI, with a sentence that says what to see."""
    return (
        f'<figure><img src="{uri}" alt="{_text(caption)}"><figcaption>{_text(caption)}</figcaption></figure>'
    )


def folded(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _row(cells: Row) -> str:
    mine = any("mine" in cell.style for cell in cells)
    return f"<tr{' class=mine' if mine else ''}>{''.join(map(_cell, cells))}</tr>"


def _cell(cell: Cell) -> str:
    span = f' rowspan="{cell.rows}"' if cell.rows > 1 else ""
    return f'<td class="{cell.style}"{span}>{_content(cell)}</td>'


def _content(cell: Cell) -> str:
    dot = f'<i style="background:{cell.dot}"></i>' if cell.dot else ""
    return dot + _text(cell.text) + (f"<small>{_text(cell.note)}</small>" if cell.note else "")


def _text(text: str) -> str:
    """Text for HTML, with numbers that keep their % on the line."""
    return escape(text).replace(" %", "\u00a0%")
