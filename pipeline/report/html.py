"""One self-contained HTML file from the Markdown of a page: pictures and style are inside, no script runs, and
nothing is fetched. How a thing looks follows from what the Markdown says; `templates/style.css` has the rules.
"""

import base64
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token
from markupsafe import Markup

from pipeline.drawing.style import COLOURS, FONTS

TEMPLATES = Path(__file__).parent / "templates"
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
FRAME = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)


def to_html(markdown: str, folder: Path) -> str:
    """Make the page whose pictures lie in `folder`. HTML in the Markdown is shown as text, not obeyed."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    _shape(tokens, folder.resolve())

    def render(part: Sequence[Token]) -> Markup:
        html = parser.renderer.render(part, parser.options, {})
        return Markup(
            html.replace("<table>", "<div class=scroll><table>").replace("</table>", "</table></div>")
        )

    cuts = [i for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    head, *parts = (tokens[start:end] for start, end in pairwise([0, *cuts, len(tokens)]))
    return FRAME.get_template("frame.html").render(
        title=head[1].content if head else "",
        head=render(head),
        sections=[
            (re.sub(r"\W+", "-", part[1].content.lower()).strip("-"), part[1].content, render(part))
            for part in parts
        ],
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        colours=COLOURS,
        fonts=Markup(FONTS),
    )


def _shape(tokens: Sequence[Token], folder: Path) -> None:
    """Put pictures inside; make figures, headings of rows, and folds of what has no tag of its own in Markdown."""
    for number, token in enumerate(tokens):
        for child in token.children or []:
            if child.type == "image":
                _embed(child, folder)
        if token.type == "inline" and tokens[number - 1].type == "paragraph_open":
            _shape_figure(tokens[number - 1], token, tokens[number + 1])
        elif token.type == "tr_open" and tokens[number + 1].type == "td_open":
            tokens[number + 1].tag = tokens[number + 3].tag = "th"
            tokens[number + 1].attrs["scope"] = "row"
        elif token.type == "fence":  # folded away under what stands after the language
            title, code = (escapeHtml(text) for text in (token.info.partition(" ")[2], token.content))
            token.type = "html_block"
            token.content = f"<details><summary>{title}</summary><pre>{code}</pre></details>"


def _embed(image: Token, folder: Path) -> None:
    """Of a file that is not the page's own, only the words are shown."""
    file = (folder / unquote(str(image.attrs["src"]))).resolve()
    if file.is_relative_to(folder) and file.suffix in TYPES and file.is_file():
        data = base64.b64encode(file.read_bytes()).decode()
        image.attrs |= {"class": file.suffix[1:], "src": f"data:{TYPES[file.suffix]};base64,{data}"}
    else:
        image.type = "text"


def _shape_figure(start: Token, inline: Token, end: Token) -> None:
    """A paragraph that begins with a picture is a figure, and the emphasised line below it the caption."""
    children = inline.children or []
    if children and children[0].type == "image":
        start.tag = end.tag = "figure"
        start.hidden = end.hidden = False
        if len(children) > 2 and children[2].type == "em_open":
            children[2].tag = children[-1].tag = "figcaption"
            del children[1]  # the line break
