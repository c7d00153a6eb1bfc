"""The program's own code: version, commit, uncommitted patch, and a hash of the code that moves numbers.

It imports little, since `ddpm --version` uses it.
"""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import tomllib
from functools import lru_cache
from importlib import metadata
from pathlib import Path

# The folder of both packages; that of a checkout has a pyproject.toml.
ROOT = Path(__file__).resolve().parents[2]


def find_version() -> str:
    """Find the program's version: that of its checkout, or of the installed package."""
    if (project := ROOT / "pyproject.toml").is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("ddpm-pipeline")


def find_commit() -> str | None:
    """Return the commit of the code, with '+' and 8 digits of the patch if the tree differs from it.

    None if this program is no checkout, even if it is inside another repository.
    """
    commit, patch = read_commit()
    return f"{commit}+{hash_patch(patch)}" if patch else commit


def hash_patch(patch: str) -> str:
    return hashlib.sha256(patch.encode()).hexdigest()[:8]


@lru_cache
def read_commit() -> tuple[str | None, str]:
    """Return the commit and the uncommitted patch, untracked Python files included."""
    if (mark := ROOT / "pipeline" / "COMMIT").is_file():
        return mark.read_text().strip() or None, ""  # a job or a wheel has the code without its history
    try:
        return _read_git()
    except (OSError, subprocess.SubprocessError):
        return None, ""


def _read_git() -> tuple[str | None, str]:
    """Read commit and patch from the checkout by git."""
    # A hook of another repository sets variables that lead git there.
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}

    def git(*words: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, env=own, capture_output=True, timeout=60, encoding="utf-8",
            errors="backslashreplace",
        )  # fmt: skip
        if done.returncode not in codes:
            raise subprocess.SubprocessError(done.stderr)
        return done.stdout

    if not (ROOT / "pyproject.toml").is_file() or Path(git("rev-parse", "--show-toplevel").strip()) != ROOT:
        return None, ""
    untracked = git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py").split("\0")
    plain = ("diff", "--no-ext-diff", "--no-color", "--binary")
    added = [git(*plain, "--no-index", "--", "/dev/null", name, codes=(0, 1)) for name in untracked if name]
    return git("rev-parse", "HEAD").strip(), git(*plain, "HEAD") + "".join(added)


@lru_cache
def hash_code(network: str = "unet") -> str:
    """Return a hash of the code that moves numbers, without comments: `ddpm/` and a custom network, as syntax trees."""
    from ddpm.networks.custom import make_config_class
    from pipeline.store.keys import hash_content

    folder = ROOT / "ddpm"
    trees = {path.relative_to(folder).as_posix(): _read_tree(path) for path in folder.rglob("*.py")}
    for path in map(Path, make_config_class(network).list_code() if ":" in network else ()):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.is_file():  # an editor's lock is a link to nowhere
                trees[f"own {file.relative_to(path.parent)}"] = _read_tree(file)
    return f"code-{hash_content(trees)}"


def _read_tree(file: Path) -> object:
    """Return the syntax tree of a file as plain containers; a hash if it is none, as a template beside a network."""
    try:
        return _simplify(ast.parse(content := file.read_bytes()))
    except (SyntaxError, ValueError):
        return hashlib.sha256(content).hexdigest()


def _simplify(node: object) -> object:
    """Return a syntax tree as plain containers that are equal under every version of Python."""
    if isinstance(node, list):
        return [_simplify(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    match fields.get("body"):
        case [ast.Expr(ast.Constant(str())), *statements]:
            fields["body"] = statements
    return [
        type(node).__name__,
        {key: _simplify(value) for key, value in fields.items() if value not in (None, [])},
    ]
