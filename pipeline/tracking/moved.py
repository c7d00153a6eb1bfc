"""The embedded store writes absolute artifact paths; a storage root that was moved takes them along."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)


def follow_move(store: Path) -> None:
    """Where the artifacts of `store`, a sqlite file in a storage root, are gone from their place and lie beside
    it, make their paths say so. Anything else is left as it is."""
    here = (store.parent / ARTIFACTS).resolve()
    if not (store.exists() and here.is_dir()):
        return
    with closing(sqlite3.connect(store)) as db, db:
        said = {row[0] for row in db.execute("select artifact_location from experiments")}
        for old in {_root_of(place) for place in said} - {None, here.as_uri()}:
            if old and not Path(unquote(urlsplit(old).path)).exists():
                for table, column in PLACES:
                    db.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                        (f"{here.as_uri()}/", len(old) + 2, len(old) + 1, f"{old}/"),
                    )


def _root_of(place: str | None) -> str | None:
    """file:///root/mlartifacts of an artifact path below it."""
    if not place or not place.startswith("file://") or f"/{ARTIFACTS}/" not in place:
        return None
    return place.rpartition(f"/{ARTIFACTS}/")[0] + f"/{ARTIFACTS}"
