"""A plain HTML page without scripts: every string is escaped here and nowhere else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: its text, a small second line, and how it looks."""

    text: str
    note: str = ""
    style: str = ""  # CSS classes: "text" aligns left, "wrap" may break, "bad" missed, "mine" tints the row
    dot: str = ""  # colour of the mark before the text


Row = Sequence[Cell]
_SHORT_ROWS = 12  # in a table that print keeps on one page


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    look = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>\n{look}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def heading(text: str, *, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{_text(text)}</h{level}>"


def paragraph(text: str, *, style: str = "") -> str:
    """A paragraph, or nothing where there is nothing to say."""
    return f'<p class="{style}">{_text(text)}</p>' if text else ""


def tile(value: str, *, name: str, notes: Iterable[str] = (), bad: bool = False) -> str:
    """One number to see at a glance."""
    spans = f"<b>{_text(value)}</b><strong>{_text(name)}</strong>"
    spans += "".join(f"<span>{_text(note)}</span>" for note in notes if note)
    return f'<div class="tile{" bad" if bad else ""}">{spans}</div>'


def tiles(parts: Iterable[str]) -> str:
    """Tiles side by side."""
    return f'<div class="tiles">{"".join(parts)}</div>'


def table(head: Row, groups: Iterable[Sequence[Row]], *, titles: Sequence[str] = ()) -> str:
    """A table whose groups of rows are set apart by a line, and by a title each where there are titles."""
    named = zip(titles, groups, strict=True) if titles else ((None, rows) for rows in groups)
    bodies = "".join(_group(title, rows, columns=len(head)) for title, rows in named)
    heads = "".join(f'<th class="{cell.style}">{_text(cell.text)}</th>' for cell in head)
    short = " short" if bodies.count("<tr") <= _SHORT_ROWS else ""
    return f'<div class="card{short}"><table><thead><tr>{heads}</tr></thead>{bodies}</table></div>'


def definitions(pairs: Iterable[tuple[Cell, str]]) -> str:
    """Terms and what they mean."""
    return f"<dl>{''.join(f'<dt>{_content(term)}</dt><dd>{_text(text)}</dd>' for term, text in pairs)}</dl>"


def figure(uri: str, *, caption: str) -> str:
    """A figure that was drawn to a data URI, with a sentence that says what to see."""
    image = f'<div class="scroll"><img src="{uri}" alt="{_text(caption)}"></div>'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def code(text: str) -> str:
    """Text to copy, as it is."""
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _group(title: str | None, rows: Sequence[Row], *, columns: int) -> str:
    line = f'<tr class="title"><th colspan="{columns}"><span>{_text(title)}</span></th></tr>' if title else ""
    return f"<tbody>{line}{''.join(map(_row, rows))}</tbody>"


def _row(cells: Row) -> str:
    mine = any("mine" in cell.style for cell in cells)
    return f"<tr{' class=mine' if mine else ''}>{''.join(map(_cell, cells))}</tr>"


def _cell(cell: Cell) -> str:
    return f'<td class="{cell.style}">{_content(cell)}</td>'


def _content(cell: Cell) -> str:
    dot = f'<i style="background:{cell.dot}"></i>' if cell.dot else ""
    return dot + _text(cell.text) + (f"<small>{_text(cell.note)}</small>" if cell.note else "")


def _text(text: str) -> str:
    """Text for HTML, with numbers that keep their % on the line."""
    return escape(text).replace(" %", "\u00a0%")
