"""A page in its folder: Markdown from a template, the HTML made from it, and the pictures beside both."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.console import format_duration
from pipeline.report import paper
from pipeline.report.html import TEMPLATES, to_html
from pipeline.scores.metrics import HEADLINE, METRICS
from pipeline.store.files import write_folder_atomically, write_manifest
from pipeline.store.run import REPORT_HTML, REPORT_MD

# What a protocol says, in the order of a page.
PROTOCOL = {
    "n": "Images scored", "checkpoint": "Checkpoint (step)", "checkpoint_rule": "Chosen as", "weights": "Weights",
    "sampler": "Sampler", "steps": "Sampling steps", "eta": "eta", "variance": "Sampling variance",
    "rounding": "Rounding to uint8", "reference": "Reference", "reference_images": "Reference images",
    "fid_test_images": "Test images in FID, test set", "extractor": "Feature extractor",
    "features": "Feature width", "splits": "Splits of the IS", "kid": "KID", "prc": "Precision and recall",
    "nll_images": "Test images in the NLL", "test_images": "Test images", "nll_variance": "Variance in the NLL",
    "decoder": "Decoder", "precision": "Sampling precision", "compiled": "Sampling compiled",
    "nll_precision": "NLL precision", "batch_size": "Images per sampling unit", "seed": "Seed",
}  # fmt: skip


def write_page(folder: Path, write_markdown: Callable[[Path], str], **facts: str) -> None:
    """Write the page atomically and seal it with `facts`. `write_markdown` is handed the folder for its pictures."""
    with write_folder_atomically(folder) as temporary:
        markdown = re.sub(r"\n{3,}", "\n\n", write_markdown(temporary)).strip() + "\n"
        (temporary / REPORT_MD).write_text(markdown, encoding="utf-8")
        (temporary / REPORT_HTML).write_text(to_html(markdown, temporary), encoding="utf-8")
        write_manifest(temporary, sorted(path.name for path in temporary.iterdir()), **facts)


def format_value(value: str | float | Sequence[int | float | str] | None) -> str:
    """Write a setting or a count as a person does, safe as Markdown."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def escape(text: str) -> str:
    """Keep text from outside from being read as Markdown: as code, stress, a link or a tag."""
    return re.sub(r"([\\`*<]|(?<=\])\()", r"\\\1", text)


# Markdown is no REPORT_HTML: `to_html` escapes all that it does not know.
TEMPLATE = Environment(
    loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATE.globals |= {"HEADLINE": HEADLINE, "METRICS": METRICS, "PROTOCOL": PROTOCOL, "paper": paper}
TEMPLATE.filters |= {
    "cell": lambda text: text.replace("|", "\\|").replace("\n", " "),
    "duration": format_duration,
    "signed": lambda value, digits: f"{value:+.{digits}f}".replace("-", "−"),
    "value": format_value,
}
