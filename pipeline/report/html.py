"""One self-contained HTML file from the Markdown of a page: pictures and style are inside, no script runs, and
nothing is fetched. How a thing looks follows from what the Markdown says; `templates/style.css` has the rules.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from markupsafe import Markup

from pipeline.drawing.style import COLOURS, FONTS

TEMPLATES = Path(__file__).parent / "templates"
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
FRAME = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)


def to_html(markdown: str, folder: Path) -> str:
    """Write the page whose pictures lie in `folder`. HTML in the Markdown is shown as text, not obeyed."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    for name, rule in (
        ("image", _image),
        ("fence", _fold),
        ("table_open", _table),
        ("table_close", _table_end),
    ):
        parser.add_render_rule(name, rule)
    env = {"folder": folder.resolve()}
    tokens = parser.parse(markdown, env)
    _shape_figures(tokens)
    _shape_rows(tokens)
    title = next((tokens[i + 1].content for i, token in enumerate(tokens) if token.tag == "h1"), "")
    cuts = [i for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    head, *parts = (tokens[start:end] for start, end in pairwise([0, *cuts, len(tokens)]))
    sections = []
    for part in parts:
        name = part[1].content
        body = Markup(parser.renderer.render(part, parser.options, env))
        sections.append((re.sub(r"\W+", "-", name.lower()).strip("-"), name, body))
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return FRAME.get_template("frame.html").render(
        title=title,
        head=Markup(parser.renderer.render(head, parser.options, env)),
        sections=sections,
        style=style,
        colours=COLOURS,
        fonts=Markup(FONTS),
    )


def _shape_figures(tokens: Sequence[Token]) -> None:
    """Make a paragraph that begins with a picture a figure, and the emphasised line below it the caption."""
    for start, inline, end in zip(tokens, tokens[1:], tokens[2:], strict=False):
        children = inline.children or []
        if start.type == "paragraph_open" and children and children[0].type == "image":
            start.tag = end.tag = "figure"
            start.hidden = end.hidden = False
            if len(children) > 2 and children[2].type == "em_open":
                children[2].tag = children[-1].tag = "figcaption"
                del children[1]  # the line break


def _shape_rows(tokens: Sequence[Token]) -> None:
    """Make the first cell of a table's row the heading of the row."""
    for row, cell, _, end in zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False):
        if row.type == "tr_open" and cell.type == "td_open":
            cell.tag = end.tag = "th"
            cell.attrs["scope"] = "row"


def _image(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    """Put the picture into the page. Of a file that is not the page's own, only the words are shown."""
    token = tokens[index]
    alt = renderer.renderInlineAsText(token.children or [], options, env)
    file = (env["folder"] / unquote(str(token.attrs["src"]))).resolve()
    if not (file.is_relative_to(env["folder"]) and file.suffix in TYPES and file.is_file()):
        return escapeHtml(alt)
    data = base64.b64encode(file.read_bytes()).decode()
    token.attrs = {"alt": alt, "class": file.suffix[1:], "src": f"data:{TYPES[file.suffix]};base64,{data}"}
    return renderer.renderToken(tokens, index, options, env)


def _fold(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    """Fold code away under what its fence says after the language."""
    title = tokens[index].info.partition(" ")[2]
    code = f"<pre>{escapeHtml(tokens[index].content)}</pre>"
    return f"<details><summary>{escapeHtml(title)}</summary>{code}</details>" if title else code


def _table(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    return "<div class=scroll><table>"


def _table_end(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    return "</table></div>"
