"""Write the commit of this checkout into the wheel, which comes without its history."""

import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds pipeline/COMMIT, unless it is there already, or the sources are no checkout of their own."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root).resolve()

        def git(*words: str) -> str:
            return subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True
            ).stdout

        if version != "standard" or (root / "pipeline" / "COMMIT").exists():
            return
        try:
            if Path(git("rev-parse", "--show-toplevel").strip()) != root:
                return
            commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
        except (OSError, subprocess.CalledProcessError):
            return
        if changes:
            commit += "+" + hashlib.sha256(changes.encode()).hexdigest()[:8]
        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(commit)
        build_data["force_include"][file.name] = "pipeline/COMMIT"
