"""What the sections check their values with, and how a wrong word is answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

Problems = list[tuple[str, str]]  # (key below the section, what is wrong with it)


def at_least(section: Any, **least: float) -> Problems:
    """Values below their bound; null, where a key admits it, is below none."""
    values = {key: getattr(section, key) for key in least}
    return [
        (key, f"is {value}; it must be at least {least[key]}")
        for key, value in values.items()
        if value is not None and value < least[key]
    ]


def among(section: Any, key: str, known: tuple[str, ...]) -> Problems:
    return [
        (key, f"has '{value}', which is unknown{suggestion(value, known)}; known: {', '.join(known)}")
        for value in getattr(section, key)
        if value not in known
    ]


def suggestion(word: str, known: Iterable[str]) -> str:
    """' (did you mean x?)', or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
