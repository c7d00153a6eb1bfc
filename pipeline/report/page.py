"""A page in its folder: Markdown from a template, the HTML made from it, and the pictures beside both."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.console import format_duration
from pipeline.report import paper
from pipeline.report.html import TEMPLATES, convert_to_html
from pipeline.scores.metrics import HEADLINE, METRICS
from pipeline.store.files import write_atomically, write_manifest
from pipeline.store.run import REPORT_HTML, REPORT_MD

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
