"""A page of words, tables and pictures, written twice: one self-contained HTML file, and its Markdown twin.

Text may hold `code` and **strong** words. Pictures are PNG or SVG; an SVG drawn in the light colours of
`COLOURS` follows the reader's theme in the HTML.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

# name: (light, dark)
COLOURS = {
    "paper": ("#ffffff", "#16191f"),
    "ink": ("#1c2430", "#e4e8ee"),
    "soft": ("#5d6878", "#98a3b3"),
    "line": ("#dfe4ea", "#2d333d"),
    "run": ("#1769c2", "#6cb2ff"),
    "other": ("#c2570c", "#ffa657"),
    "good": ("#1a7f4b", "#56d08b"),
    "warn": ("#9a6200", "#e3b341"),
}


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Card:
    """A number to be seen at a glance; `badge` is (text, good?)."""

    label: str
    value: str
    note: str
    badge: tuple[str, bool] | None = None


@dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]


@dataclass(frozen=True)
class Table:
    """`header` empty: rows of a name and what it is; `strong` rows stand out, `dense` facts share lines."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()
    dense: bool = False


@dataclass(frozen=True)
class Picture:
    """`name` with its suffix .png or .svg; `data` its bytes."""

    name: str
    data: bytes
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Panels share a row where there is room; a wide picture has one of its own."""

    pictures: Sequence[Picture]
    wide: bool = False


@dataclass(frozen=True)
class Code:
    summary: str
    text: str


Block = Text | Cards | Table | Pictures | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    verdict: str
    head: Sequence[Block]
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        blocks = [*self.head, *(block for section in self.sections for block in section.blocks)]
        return [picture for block in blocks if isinstance(block, Pictures) for picture in block.pictures]


# Markdown


def to_markdown(page: Page) -> str:
    """Pictures are links to files beside it, named as the pictures are."""
    parts = [f"# {page.title}", page.subtitle, f"**{page.verdict}**", *map(_markdown, page.head)]
    for section in page.sections:
        parts += [f"## {section.title}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Text(text):
            return text
        case Cards(cards):
            rows = [(c.label, c.value, c.note, c.badge[0] if c.badge else "") for c in cards]
            return _markdown_table(("", "this run", "beside it", ""), rows)
        case Table(header, rows):
            return _markdown_table(header or ("", ""), rows)
        case Pictures(pictures):
            return "\n\n".join(f"![{p.caption}]({p.name})\n\n*{p.caption}*" for p in pictures)
        case Code(summary, text):
            return f"{summary}:\n\n```yaml\n{text.rstrip()}\n```"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:" if len(header) > 2 else "---"] * (len(header) - 1)
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# HTML


def to_html(page: Page) -> str:
    """One file: style and pictures are inside, nothing is fetched and no script runs."""
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
    return _FRAME.format(title=html.escape(page.title), style=_style(), body="\n".join(body))


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
        case Pictures(pictures, wide):
            kind = "wide" if wide else "panels three" if len(pictures) == 3 else "panels"
            return f"<div class='{kind}'>{''.join(map(_figure, pictures))}</div>"
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
        strong = " class=strong" if number in table.strong else ""
        return f"<tr{strong}><th scope=row>{_inline(cells[0])}</th>{_cells(cells[1:])}</tr>"

    head = f"<thead><tr>{''.join(f'<th>{_inline(h)}</th>' for h in table.header)}</tr></thead>"
    body = "".join(row(number, cells) for number, cells in enumerate(table.rows))
    kind = "numbers" if table.header else "facts dense" if table.dense else "facts"
    return f"<div class=scroll><table class='{kind}'>{head if table.header else ''}<tbody>{body}</tbody></table></div>"


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{_inline(cell)}</td>" for cell in cells)


def _figure(picture: Picture) -> str:
    caption = f"<figcaption>{_inline(picture.caption)}</figcaption>"
    if PurePath(picture.name).suffix == ".svg":
        return f"<figure class=plot>{_themed(picture)}{caption}</figure>"
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
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _style() -> str:
    light, dark = (" ".join(f"--{name}: {values[i]};" for name, values in COLOURS.items()) for i in (0, 1))
    return f":root {{ color-scheme: light dark; {light} }}\n" + (
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{_RULES}"
    )


_RULES = """
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { margin: 0; font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2rem) 5rem; }
h1 { font-size: clamp(1.9rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 .9rem; }
p { margin: 0 0 1rem; max-width: 46rem; }
section { margin-top: 2.5rem; padding-top: 2rem; border-top: 1px solid var(--line); }
.subtitle { color: var(--soft); margin: .4rem 0 1.4rem; font-size: .95rem; }
.verdict { font-size: clamp(1.1rem, 2.6vw, 1.3rem); line-height: 1.45; margin-bottom: 1.6rem; text-wrap: pretty; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1.6rem; font-size: .9rem; }
a { color: var(--run); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
code { font-size: .88em; background: color-mix(in srgb, var(--ink) 7%, transparent); border-radius: .25em;
  padding: .1em .3em; overflow-wrap: anywhere; }
pre { font-size: .82rem; line-height: 1.5; overflow-x: auto; padding: 1rem; border: 1px solid var(--line);
  border-radius: .6rem; }
summary { cursor: pointer; color: var(--run); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .9rem; }
.card { border: 1px solid var(--line); border-radius: .75rem; padding: 1rem 1.15rem; }
.card .label { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: .4rem;
  color: var(--soft); font-size: .88rem; }
.card .value { font-size: 2.1rem; line-height: 1.3; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.card .note { color: var(--soft); font-size: .88rem; line-height: 1.4; }
.badge { font-size: .72rem; font-weight: 600; line-height: 1.6; border-radius: 1rem; padding: 0 .6em;
  white-space: nowrap; }
.badge.good { color: var(--good); background: color-mix(in srgb, var(--good) 13%, transparent); }
.badge.warn { color: var(--warn); background: color-mix(in srgb, var(--warn) 13%, transparent); }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th:first-child { padding-left: 0; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .82rem; }
.numbers { width: 100%; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.facts th { color: var(--soft); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.strong th, .strong td { font-weight: 650; color: var(--run); }
.facts.dense, .dense tbody, .dense th, .dense td { display: block; }
.dense tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 45%), 1fr)); gap: 0 1.4rem; }
.dense tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
.dense th, .dense td { border: 0; padding: 0; white-space: normal; }
.dense th { font-size: .82rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem 1.6rem; }
.panels.three { grid-template-columns: repeat(auto-fill, minmax(min(16.5rem, 100%), 1fr)); }
.wide figure { max-width: 44rem; }
figure { margin: 0 0 1rem; min-width: 0; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { border-radius: .4rem; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: .85rem; line-height: 1.45; margin-top: .5rem; }
@media (max-width: 34rem) {
  .numbers td, .numbers th { padding: .4rem 0 .4rem .5rem; font-size: .8rem; }
  .numbers th:first-child { padding-left: 0; }
  .numbers thead th:not(:first-child) { white-space: normal; }
  .facts th { white-space: normal; }
}
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""
