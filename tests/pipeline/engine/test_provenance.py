"""Code is an input: what made a run is recorded exactly, and other code does not go on with it unasked."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ONE_CPU, TINY
from mlflow import MlflowClient

from pipeline import config
from pipeline.cli.program import main
from pipeline.engine import code, provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that holds a copy of ddpm/, and is where the program looks for its own code."""
    root = tmp_path / "checkout"
    shutil.copytree(code.ROOT / "ddpm", root / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(code.ROOT / "pyproject.toml", root)
    monkeypatch.setattr(code, "ROOT", root)
    for words in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm 1"):
        subprocess.run(["git", *words.split()], cwd=root, check=True)
    clear()
    yield root
    clear()


def clear():
    code.read_commit.cache_clear()
    code.hash_code.cache_clear()


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    clear()


def test_the_difference_is_recorded_and_only_syntax_is_hashed(checkout, tmp_path, monkeypatch):
    clean = code.find_commit()
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):  # as in a hook of another one
        monkeypatch.setenv(name, str(tmp_path / "other"))
    clear()
    assert code.find_commit() == clean
    assert clean and "+" not in clean and len(clean) == 40
    edit(checkout / "ddpm" / "schedules.py", "def ", "# a comment\ndef ")
    edited = code.find_commit()
    (checkout / "ddpm" / "mine.py").write_text("x = 1\n")
    clear()
    marks = {edited, code.find_commit()}
    assert len(marks) == 2 and all(re.fullmatch(rf"{clean}\+\w{{8}}", mark) for mark in marks)
    assert "+x = 1" in code.read_commit()[1], "untracked files of Python are included"
    for old, new, is_other in (
        ("def ", "# a comment\ndef ", False), ('"""The beta schedules', '"""Other words', False),
        ("math.pi", "3.0", True), ("import math", "{{ a template }} (", True),
    ):  # fmt: skip
        before = code.hash_code()
        edit(checkout / "ddpm" / "schedules.py", old, new)
        assert (code.hash_code() != before) == is_other, new


def test_the_repository_around_an_installed_program_is_not_its_commit(checkout):
    subprocess.run(["git", "init", "-q"], cwd=checkout.parent, check=True)
    shutil.rmtree(checkout / ".git")
    clear()
    assert code.find_commit() is None and code.find_version() == "0.1.0"
    (checkout / "pyproject.toml").unlink()
    assert code.find_commit() is None and code.find_version() == "0.1.0"
    found = provenance.collect_provenance(config.load_experiment("digits", []))
    assert found["versions"]["ddpm-pipeline"] == "0.1.0"


def test_other_code_does_not_train_or_draw_unasked(checkout, empty_store, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs")

    def ddpm(verb, *words):
        status = main([verb, "digits", *TINY, *ONE_CPU, f"cluster.storage={tmp_path / 'runs'}", *words])
        return status, "".join(capsys.readouterr())

    assert ddpm("train")[0] == 0
    (run,) = (tmp_path / "runs").glob("tiny-*")
    first = code.find_commit()
    edit(checkout / "ddpm" / "schedules.py", "def ", "# a comment\ndef ")
    status, printed = ddpm("train")
    assert status == 0 and "other code" not in printed, "equal trees stay silent"
    edit(checkout / "ddpm" / "schedules.py", "import math", "import math\n\nOTHER = 1")
    second = code.find_commit()
    status, printed = ddpm("train")
    assert status == 0 and "up to date" in printed and first in printed and second in printed
    status, printed = ddpm("train", "train.steps=8")
    assert status == 1 and "--accept-code" in printed and first in printed and second in printed
    assert not (run / "train" / "step_00000008").exists()
    assert ddpm("evaluate")[0] == 0, "scores go on, and name both"
    (metrics,) = run.glob("evaluation/*/metrics.json")
    assert first in metrics.read_text() and second in metrics.read_text()
    assert ddpm("train", "train.steps=8")[0] == 1, "an evaluation by other code is no consent"
    assert ddpm("train", "train.steps=8", "--accept-code")[0] == 0
    assert list(config.read_provenance(run / "experiment.yaml")["codes"].values())[1] == second
    assert (run / f"{second[-8:]}.patch").read_text().count("OTHER = 1")
    assert ddpm("train", "train.steps=10")[0] == 0, "accepted once"
    noted = json.loads((run / "commits.json").read_text())
    assert noted == {"shard": [first], "train": [first, second], "evaluate": [second]}
    tracked = MlflowClient(f"sqlite:///{run.parent}/mlflow.db").search_runs(["1"])
    assert {first, second} in [{*found.data.tags.get("commit", "").split(", ")} for found in tracked]


def test_the_command_is_recorded_without_a_password_and_none_of_rays(monkeypatch):
    for program, command in (("ddpm", "ddpm run digits a=http://h:5"), ("default_worker.py", "")):
        monkeypatch.setattr("sys.argv", [f"/bin/{program}", "run", "digits", "a=http://u:secret@h:5"])
        assert provenance.collect_provenance(config.load_experiment("digits", []))["command"] == command
