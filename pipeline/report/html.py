"""One self-contained HTML file from the Markdown of a page.

Pictures and style are inside, no script runs, and nothing is fetched. `templates/style.css` is the style.
"""

import base64
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from pipeline.drawing.style import COLOURS, FONTS

TEMPLATES = Path(__file__).parent / "templates"
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
FRAME = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)


def convert_to_html(markdown: str, folder: Path) -> str:
    """Convert a page's Markdown to HTML; pictures are read from `folder`, HTML is shown as text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    # Links are of the web or relative: the name of a file or a run may hold any text.
    parser.validateLink = lambda url: bool(re.match("https?://|(?!//)[^:]*([/?#]|$)", url))  # type: ignore[method-assign]
    tokens = parser.parse(markdown)
    _edit_tokens(tokens, folder.resolve())

    def render(part: Sequence[Token]) -> Markup:
        html = parser.renderer.render(part, parser.options, {})
        html = html.replace("<table>", "<div class=scroll><table>").replace("</table>", "</table></div>")
        shown, *folds = html.split("<h3>")  # the text below a heading of level 3 can be folded
        folds = [fold.replace("</h3>", "</summary>", 1) for fold in folds]
        return Markup(shown + "".join(f"<details><summary>{fold}</details>" for fold in folds))

    cuts = [i for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    head, *parts = (tokens[start:end] for start, end in pairwise([0, *cuts, len(tokens)]))
    names = [part[1].content for part in parts]
    return FRAME.get_template("frame.html").render(
        title=head[1].content if head else "",
        head=render(head),
        sections=[
            (re.sub(r"\W+", "-", name.lower()).strip("-"), name, render(part))
            for name, part in zip(names, parts, strict=True)
        ],
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        colours=COLOURS,
        fonts=Markup(FONTS),
    )


def _edit_tokens(tokens: Sequence[Token], folder: Path) -> None:
    """Embed the pictures; make figures and headings of rows, for which Markdown has no tags."""
    for number, token in enumerate(tokens):
        for image in (child for child in token.children or [] if child.type == "image"):
            file = (folder / unquote(str(image.attrs["src"]))).resolve()
            if file.is_relative_to(folder) and file.suffix in TYPES and file.is_file():
                data = base64.b64encode(file.read_bytes()).decode()
                image.attrs |= {"class": file.suffix[1:], "src": f"data:{TYPES[file.suffix]};base64,{data}"}
            else:  # not a picture of this page: its words alone are shown
                image.type = "text"
        if token.type == "inline" and tokens[number - 1].type == "paragraph_open":
            children = token.children or []
            if children and children[0].type == "image":  # a paragraph that begins with one is a figure
                for tag in (tokens[number - 1], tokens[number + 1]):
                    tag.tag, tag.hidden = "figure", False
                if (
                    len(children) > 2 and children[2].type == "em_open"
                ):  # the emphasised line below is its caption
                    children[2].tag = children[-1].tag = "figcaption"
                    del children[1]  # the line break
        elif token.type == "tr_open" and tokens[number + 1].type == "td_open":
            tokens[number + 1].tag = tokens[number + 3].tag = "th"
            tokens[number + 1].attrs["scope"] = "row"
