"""The provenance of a run: commit and code, versions, hardware; and whether another code made it so far."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.errors import PipelineError
from pipeline.stages.stage import Stage
from pipeline.store import keys
from pipeline.store.files import write_text
from pipeline.store.run import Place

PACKAGES = ("torch", "ray", "mlflow", "webdataset", "torch-fidelity", "omegaconf", "numpy")
# The folder of both packages; that of a checkout has a pyproject.toml.
ROOT = Path(__file__).resolve().parents[2]


def collect_provenance() -> dict[str, Any]:
    """Collect the commit, the versions of program and libraries, and the driver's machine, in words."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpus = f"{len(os.sched_getaffinity(0))} CPUs ({torch.backends.cpu.get_cpu_capability()})"
    versions = {
        "ddpm-pipeline": find_version(),
        **{package: metadata.version(package) for package in PACKAGES},
    }
    return {
        "commit": find_commit(),
        "code": hash_code(),
        "versions": versions,
        "hardware": f"{cpus}, {', '.join(gpus) or 'no GPU'}",
    }


def find_version() -> str:
    """Return the program's version: that of its checkout, or of the installed package."""
    if (project := ROOT / "pyproject.toml").is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("ddpm-pipeline")


def find_commit() -> str | None:
    """Return the commit of the code, with '+' and 8 digits of the patch where the tree differs from it.

    None where there is no checkout of this program, whatever repository lies around it.
    """
    commit, patch = _read_commit()
    return f"{commit}+{_hash_patch(patch)}" if patch else commit


def _hash_patch(patch: str) -> str:
    return hashlib.sha256(patch.encode()).hexdigest()[:8]


@lru_cache
def _read_commit() -> tuple[str | None, str]:
    """Return the commit and the difference from it, untracked Python files included."""
    if (mark := ROOT / "pipeline" / "COMMIT").is_file():
        return mark.read_text().strip() or None, ""  # code of a job or a wheel came without its history
    try:
        return _read_git()
    except (OSError, subprocess.SubprocessError):
        return None, ""


def _read_git() -> tuple[str | None, str]:
    """Return what `_read_commit` does, of a checkout."""

    def git(*words: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            ["git", *words],
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=60,
        )
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
def hash_code() -> str:
    """Return a hash of the syntax trees of `ddpm/`: what moves numbers, without comments and docstrings."""
    folder = ROOT / "ddpm"
    trees = {
        path.relative_to(folder).as_posix(): _simplify(ast.parse(path.read_bytes()))
        for path in folder.rglob("*.py")
    }
    return f"code-{keys.hash_content(trees)}"


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


def describe_other_code(place: Place) -> str | None:
    """Return a line that names both codes if another one trained the run or drew its samples; None if not."""
    codes = _read_codes(place)
    if not codes or (last := list(codes)[-1]) == (own := hash_code()):
        return None
    return (
        f"{place.name}: trained or drawn by {codes[last]} ({last}), this is {_name_code()} ({own}): "
        "results of other code; name=... for a new run, or --accept-code"
    )


def _name_code() -> str:
    return find_commit() or f"version {find_version()}"


def _read_codes(place: Place) -> dict[str, str]:
    """Return the codes that trained the run and drew its samples, each by its hash, the last one last."""
    try:
        codes = place.read_provenance().get("codes")
    except (PipelineError, OSError):  # a damaged record is written anew
        return {}
    return {str(key): str(name) for key, name in codes.items()} if isinstance(codes, dict) else {}


def write_record(place: Place, todo: Sequence[Stage], accept_code: bool = False) -> None:
    """Write experiment.yaml, the resolved configuration and its provenance, and keep the patch of a changed tree.

    Raises PipelineError where a stage of `todo` would add to what another code made, unless that is accepted.
    """
    codes = _read_codes(place)
    if any(stage.adds_to_run for stage in todo):
        if (problem := describe_other_code(place)) and not accept_code:
            raise PipelineError(problem)
        codes.pop(hash_code(), None)
        codes[hash_code()] = _name_code()
    record = {**collect_provenance(), "codes": codes, "data_key": place.data_key, "keys": keys.VERSION}
    write_text(place.experiment_yaml, config.to_yaml(place.experiment, made_with=record))
    if patch := _read_commit()[1]:
        write_text(place.locate_patch(_hash_patch(patch)), patch)
