"""A page in its folder: Markdown from a template, the HTML made from it, and the pictures beside both.

The HTML is one self-contained file: pictures and `templates/style.css` are inside, no script runs, nothing is fetched.
"""

import base64
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from pipeline.console import format_duration
from pipeline.drawing.style import COLOURS, FONTS
from pipeline.report import paper
from pipeline.scores.metrics import HEADLINE, METRICS
from pipeline.store.files import write_atomically, write_manifest
from pipeline.store.run import REPORT_HTML, REPORT_MD

TEMPLATES = Path(__file__).parent / "templates"
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
FRAME = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
# The words of a protocol, in the order of a page.
PROTOCOL = {
    "n": "Images scored", "checkpoint": "Checkpoint (step)", "checkpoint_rule": "Chosen as",
    "first_index": "Index of the first", "official_data": "The pixels are CIFAR-10's",
    "schedule": "Schedule", "timesteps": "T", "conditional": "Network is told the class", "weights": "Weights",
    "sampler": "Sampler", "steps": "Sampling steps", "eta": "eta", "variance": "Sampling variance",
    "rounding": "Rounding to uint8", "reference": "Reference", "reference_images": "Reference images",
    "fid_test_images": "Test images in FID, test set", "extractor": "Feature extractor",
    "classifier_accuracy": "Test accuracy of the classifier", "features": "Feature width", "splits": "Splits of the IS",
    "jackknife_groups": "Groups of the jackknife (errors)", "kid": "KID", "prc": "Precision and recall",
    "nll_images": "Images in the NLL", "nll_timesteps": "Timesteps drawn for each", "nll_profile": "The NLL is",
    "nll_se": "Standard errors of the NLL", "nll_split": "Split of the NLL", "test_images": "Test images",
    "train_images": "Training images", "code": "Code", "nll_variance": "Variance in the NLL",
    "decoder": "Decoder", "precision": "Sampling precision", "compiled": "Sampling compiled",
    "nll_precision": "NLL precision", "nll_compiled": "NLL compiled",
    "batch_size": "Images per sampling unit", "seed": "Seed",
}  # fmt: skip


def write_page(folder: Path, compose: Callable[[Path], str], **facts: str) -> None:
    """Write a page's Markdown, HTML and pictures, then its manifest with `facts`.

    compose: returns the Markdown; it draws the page's pictures into the folder that it is called with.
    """
    with write_atomically(folder, folder=True) as temporary:
        markdown = re.sub(r"\n{3,}", "\n\n", compose(temporary)).strip() + "\n"
        (temporary / REPORT_MD).write_text(markdown, encoding="utf-8")
        (temporary / REPORT_HTML).write_text(convert_to_html(markdown, temporary), encoding="utf-8")
        write_manifest(temporary, sorted(path.name for path in temporary.iterdir()), **facts)


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


def format_value(value: str | float | Sequence[int | float | str] | None) -> str:
    """Return a setting or a count as Markdown text: 50,000, true, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value):,} values"
    return f"{value:,}" if isinstance(value, int) else escape_markdown(str(value))


def escape_markdown(text: str) -> str:
    """Escape the characters that Markdown would read as code, emphasis, a link or a tag."""
    return re.sub(r"([\\`*<]|(?<=\])\()", r"\\\1", text)


# Without autoescape, which is for HTML: `convert_to_html` escapes what Markdown does not know.
TEMPLATE = Environment(
    loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATE.globals |= {
    "HEADLINE": HEADLINE,
    "METRICS": METRICS,
    "PROTOCOL": PROTOCOL,
    "paper": paper,
    "zip": zip,
}
TEMPLATE.filters |= {
    "cell": lambda text: text.replace("|", "\\|").replace("\n", " "),
    "duration": format_duration,
    "signed": lambda value, digits: f"{value:+.{digits}f}".replace("-", "−"),
    "value": format_value,
}
