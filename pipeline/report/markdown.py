"""A page as Markdown: pictures are links to files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.page import Block, Cards, Code, Matrix, Page, Picture, Pictures, Table, Text


def to_markdown(page: Page) -> str:
    """Pictures are links to files beside it, named as the pictures are."""
    parts = [f"# {page.title}", page.subtitle, f"> {page.verdict}", *map(_markdown, page.head)]
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
        case Matrix():
            return _markdown_matrix(block)
        case Code(summary, text):
            return f"{summary}:\n\n```yaml\n{text.rstrip()}\n```"


def _markdown_matrix(matrix: Matrix) -> str:
    def cell(pictures: Sequence[Picture]) -> str:
        return " ".join(f"![{picture.caption}]({picture.name})" for picture in pictures) or "–"

    rows = [
        [row, *(cell(matrix.cells.get((i, j), ())) for j in range(len(matrix.columns)))]
        for i, row in enumerate(matrix.rows)
    ]
    return _markdown_table((f"{matrix.down} \\ {matrix.across}", *matrix.columns), rows)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:" if len(header) > 2 else "---"] * (len(header) - 1)
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
