"""A page in its folder: Markdown from a template, the HTML made from it, and the pictures beside both."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report.html import TEMPLATES, to_html
from pipeline.store.files import atomic_directory, write_manifest

HTML, MARKDOWN = "report.html", "report.md"


def write_page(folder: Path, write_markdown: Callable[[Path], str], **facts: str) -> None:
    """Write the page atomically and seal it with `facts`. `write_markdown` is handed the folder for its pictures."""
    with atomic_directory(folder) as temporary:
        markdown = re.sub(r"\n{3,}", "\n\n", write_markdown(temporary)).strip() + "\n"
        (temporary / MARKDOWN).write_text(markdown, encoding="utf-8")
        (temporary / HTML).write_text(to_html(markdown, temporary), encoding="utf-8")
        write_manifest(temporary, sorted(path.name for path in temporary.iterdir()), **facts)


def format_value(value: str | int | float | bool | list[int] | None) -> str:
    """Write a setting or a count as a person does, safe as Markdown."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def escape(text: str) -> str:
    """Keep text from outside from being read as Markdown: as code, stress, a link or a tag."""
    return re.sub(r"([\\`*<]|(?<=\])\()", r"\\\1", text)


def _format_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# Markdown is no HTML: `html` escapes all that the parser does not know.
MARKDOWN_TEMPLATES = Environment(
    loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
MARKDOWN_TEMPLATES.filters |= {"cell": _format_cell, "value": format_value}
