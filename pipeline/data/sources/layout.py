"""One rule for all sources: where their files are, and which split the name of a folder means."""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pipeline.data.sources.base import translate_read_errors

WORDS = {
    "train": {"train", "training", "trainset"},
    "test": {"test", "testing", "testset"},
    "val": {"val", "valid", "validation", "dev", "valset"},
}
_WORD = re.compile(r"[^\W\d_]+")
_CAMEL_CASE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def find_split(name: str) -> str | None:
    """Return train, test or val if that is a whole word of `name`; None if both train and another one are."""
    words = {word.lower() for rule in (_WORD, _CAMEL_CASE) for word in rule.findall(name)}
    found = [split for split, known in WORDS.items() if words & known]
    return None if found[:1] == ["train"] and len(found) > 1 else next(iter(found), None)


def remove_split_words(name: str) -> str:
    """Remove the words that `find_split` knows from `name`, to compare the names of two splits."""
    return _WORD.sub(lambda word: "" if find_split(word[0]) else word[0], name)


def list_files(root: Path, is_wanted: Callable[[Path], bool]) -> tuple[list[Path], Counter[str]]:
    """List the wanted files at any depth, sorted by path, and count the skipped ones by kind.

    Links are followed, but each folder is read once. Hidden files, pipes and devices are skipped.
    """
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    folders = [root]
    links: list[Path] = []
    while folders or (links := sorted(links)):
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            skipped[f"folder that lies here under another name ({folder.name})"] += 1
            continue
        seen.add(real)
        with translate_read_errors():
            for entry in os.scandir(folder):
                path = Path(entry.path)
                if entry.name.startswith("."):
                    skipped["hidden"] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif not entry.is_file() and path.exists():
                    skipped[f"no regular file ({entry.name})"] += 1
                elif is_wanted(path):
                    found.append(path)
                else:
                    skipped[path.suffix.lower() or "without extension"] += 1
    return sorted(found), skipped
