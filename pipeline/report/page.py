"""A page of words, tables and pictures, written twice: one self-contained HTML file, and its Markdown twin.

Text may hold `code`, **strong** words and [links](to a file beside the page). Pictures are PNG or SVG; an SVG
drawn in the light colours of `style.COLOURS` follows the reader's theme in the HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HTML, MARKDOWN = "report.html", "report.md"


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
    """`header` empty: rows of a name and what it is. `strong` rows stand out and `soft` ones stand back; `lead`:
    the first column of values is this run's; `dense` facts share lines."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()
    soft: frozenset[int] = frozenset()
    lead: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Picture:
    """`name` with its suffix .png or .svg; `data` its bytes."""

    name: str
    data: bytes
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Panels share a row where there is room, small ones by three; a wide picture has one of its own."""

    pictures: Sequence[Picture]
    wide: bool = False
    small: bool = False


@dataclass(frozen=True)
class Matrix:
    """Pictures in rows and columns; `across` and `down` are what the columns and the rows are values of, `cells`
    the pictures of (row, column). Captions are shown where their place does not say it all."""

    across: str
    down: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Mapping[tuple[int, int], Sequence[Picture]]
    captions: bool

    @property
    def pictures(self) -> list[Picture]:
        return [picture for spot in sorted(self.cells) for picture in self.cells[spot]]


@dataclass(frozen=True)
class Code:
    summary: str
    text: str


Block = Text | Cards | Table | Pictures | Matrix | Code


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
        return [
            picture for block in blocks if isinstance(block, Pictures | Matrix) for picture in block.pictures
        ]
