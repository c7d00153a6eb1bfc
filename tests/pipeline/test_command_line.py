"""The command line: what it lists and refuses before anything starts, and the table of the runs."""

import os
import re
from pathlib import Path

import pytest
from synthetic_run import make_run

from pipeline.cli.program import main
from pipeline.store.files import lock_folder, write_json

LAST = ("evaluate.checkpoints=null", "sample.checkpoint=last")


def call(*words: str) -> int | str | None:
    try:
        return main(list(words))
    except SystemExit as end:
        return end.code


def test_without_a_command_there_is_help_and_list_has_every_name(capsys):
    assert call() in (0, None)
    assert "ddpm COMMAND --help" in capsys.readouterr().out
    assert call("--version") == 0 and "ddpm " in capsys.readouterr().out
    assert call("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"digits", "beta_dropout", "kuberay"} <= {line.split()[0] for line in lines if line[0] == " "}
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ui --port 99999", "65535"), ("ui --port -1", "port"), ("ui --port 0", "65535"), ("ui --port ²", "65535"),
        ("export a b --step 1e30", "whole number"), ("rnu", "did you mean 'run'?"), ("list digits", "digits"),
        ("run digits --clustr local", "did you mean '--cluster'?"), ("export a", "DIR"),
        ("jobs foo", "'foo'"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_by_name(words, expected, capsys):
    assert call(*words.split()) == 2
    assert expected in capsys.readouterr().err


def test_more_workers_than_the_machine_has_are_refused_before_anything_is_there(tmp_path, capsys):
    assert main(["shard", "digits", "cluster.workers=99", f"cluster.storage={tmp_path}"]) == 1
    assert "lower cluster.workers" in capsys.readouterr().err
    assert not list(tmp_path.glob("digits-*")) and not (tmp_path / "mlflow.db").exists()


def test_show_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "digits"]) == 0
    assert not list(Path(tmp_path).iterdir())


def test_status_shows_whole_names_the_newest_first_within_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["status", f"cluster.storage={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert str(tmp_path) in told and "cluster.storage=" in told
    runs = []
    for age, (seed, status) in enumerate([(0, "RUNNING"), (1, "FAILED"), (2, "KILLED"), (3, None)]):
        _, run = make_run(tmp_path, "cifar10_vlb_mean_learned", (f"seed={seed}", *LAST))
        if status:
            write_json(run.tracking_json, {"status": status})
        for file in run.path.rglob("*"):
            os.utime(file, (1.7e9 - age, 1.7e9 - age))
        runs.append(run)
    with lock_folder(runs[3].path):
        assert main(["status", f"cluster.storage={tmp_path}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        log = runs[3].log.read_text().splitlines(keepends=True)
        runs[3].log.write_text("".join(log[: len(log) // 2]))
        assert main(["status", f"cluster.storage={tmp_path}"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.endswith(runs[3].name))
    assert re.fullmatch(r"running +\d s +9 h +400000/800000 .*", row), row
    assert all(len(line) <= 80 for line in lines[1:])
    rows = [line.split() for line in lines if line.endswith(tuple(run.name for run in runs))]
    assert [row[0] for row in rows] == ["interrupted", "failed", "interrupted", "stalled"]
    assert [row[-1] for row in rows] == [run.name for run in runs] and rows[0][2] == "d"
