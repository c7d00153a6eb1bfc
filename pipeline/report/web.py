"""A page as one HTML file: style and pictures are inside, nothing is fetched and no script runs."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import PurePath

from pipeline.report.page import Block, Card, Cards, Code, Matrix, Page, Picture, Pictures, Table, Text
from pipeline.report.style import COLOURS, style


def to_html(page: Page) -> str:
    links = " ".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in page.sections)
    body = [
        f"<header><h1>{_inline(page.title)}</h1><p class=subtitle>{_inline(page.subtitle)}</p>",
        f"<p class=verdict>{_inline(page.verdict)}</p></header>",
        *map(_html, page.head),
        f"<nav>{links}</nav>",
    ]
    for section in page.sections:
        inner = "\n".join(map(_html, section.blocks))
        title = html.escape(section.title)
        body.append(f'<section id="{_anchor(section.title)}"><h2>{title}</h2>\n{inner}</section>')
    return _FRAME.format(title=html.escape(page.title), style=style(), body="\n".join(body))


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _html(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Cards(cards):
            return f"<div class=cards>{''.join(map(_card, cards))}</div>"
        case Table():
            return _html_table(block)
        case Pictures(pictures, wide, small):
            kind = "wide" if wide else "panels three" if small else "panels"
            return f"<div class='{kind}'>{''.join(_figure(picture, wide) for picture in pictures)}</div>"
        case Matrix():
            return _matrix(block)
        case Code(summary, text):
            return f"<details><summary>{_inline(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def _card(card: Card) -> str:
    badge = ""
    if card.badge:
        text, good = card.badge
        badge = f"<span class='badge {'good' if good else 'warn'}'>{_inline(text)}</span>"
    label, value, note = _inline(card.label), _inline(card.value), _inline(card.note)
    return (
        f"<div class=card><div class=label>{label}{badge}</div>"
        f"<div class=value>{value}</div><div class=note>{note}</div></div>"
    )


def _html_table(table: Table) -> str:
    def row(number: int, cells: Sequence[str]) -> str:
        kind = "strong" if number in table.strong else "soft" if number in table.soft else ""
        return (
            f"<tr{kind and f' class={kind}'}><th scope=row>{_inline(cells[0])}</th>{_cells(cells[1:])}</tr>"
        )

    head = f"<thead><tr>{''.join(f'<th>{_inline(h)}</th>' for h in table.header)}</tr></thead>"
    body = "".join(row(number, cells) for number, cells in enumerate(table.rows))
    if table.header:
        narrow, lead = " narrow" if len(table.header) <= 3 else "", " lead" if table.lead else ""
        kind = f"numbers{narrow}{lead}"
    else:
        kind = "facts dense" if table.dense else "facts"
    return f"<div class=scroll><table class='{kind}'>{head if table.header else ''}<tbody>{body}</tbody></table></div>"


def _matrix(matrix: Matrix) -> str:
    head = "".join(f"<th scope=col>{_inline(column)}</th>" for column in matrix.columns)
    body = ""
    for i, row in enumerate(matrix.rows):
        spots = (matrix.cells.get((i, j), ()) for j in range(len(matrix.columns)))
        cells = "".join(f"<td>{''.join(map(_figure, pictures)) or '–'}</td>" for pictures in spots)
        body += f"<tr><th scope=row>{_inline(row)}</th>{cells}</tr>"
    captions = "" if matrix.captions else " plain"
    corner = f"{_inline(matrix.down)} ↓ {_inline(matrix.across)} →"
    return (
        f"<div class=scroll><table class='matrix{captions}'><thead><tr><th>{corner}</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{_inline(cell)}</td>" for cell in cells)


def _figure(picture: Picture, wide: bool = False) -> str:
    caption = f"<figcaption>{_inline(picture.caption)}</figcaption>"
    if PurePath(picture.name).suffix == ".svg":
        plot = f"<div class=scroll>{_themed(picture)}</div>" if wide else _themed(picture)
        return f"<figure class=plot>{plot}{caption}</figure>"
    data = base64.b64encode(picture.data).decode()
    alt = html.escape(picture.caption, quote=True)
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>'


def _themed(picture: Picture) -> str:
    """The SVG element alone, its colours as the page's variables, its size left to the page."""
    svg = picture.data.decode()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # figure_1, axes_1 ...: every plot has them
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    label = html.escape(picture.caption, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    text = re.sub(r"\[([^\]]+)\]\(([^)\s\"]+)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
