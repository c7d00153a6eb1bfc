"""What a user adds: the changes of docs/extend.md in a copy of the code, and examples outside of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_CPU, ROOT, UNNAMED

from pipeline.cli.program import main
from pipeline.engine.code import hash_code

PAGE = (ROOT / "docs" / "extend.md").read_text()
SETTINGS = [
    "data.source=csv", "data.test_images=4", "diffusion.beta_schedule=logistic", "sample.sampler=mean",
    "evaluate.features=histogram", "evaluate.metrics=[fid,distance]", "figures.which=[average]",
]  # fmt: skip


def apply_changes(page: str, tree: Path) -> None:
    """Write the new files of a page, and replace the lines that its diffs name, which must stand there once."""
    for language, text in re.findall(r"```(python|diff)\n(.*?)```", page, flags=re.DOTALL):
        if language == "python":
            name, _, content = text.removeprefix("# file: ").partition("\n")
            (tree / name).write_text(content)
            continue
        for name, changes in re.findall(r"^--- (\S+)\n((?:(?!--- ).*\n)*)", text, flags=re.MULTILINE):
            for change in changes.split("@@\n"):
                lines = change.splitlines(keepends=True)
                before = "".join(line[1:] for line in lines if line[0] != "+")
                content = (tree / name).read_text()
                assert content.count(before) == 1, f"docs/extend.md, {name}: not there once:\n{before}"
                after = "".join(line[1:] for line in lines if line[0] != "-")
                (tree / name).write_text(content.replace(before, after))


def test_one_experiment_uses_all_that_the_page_adds(tmp_path, empty_store):
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs")
    tree = tmp_path / "tree"
    for package in ("ddpm", "pipeline", "conf"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    apply_changes(PAGE, tree)
    digits = (tree / "conf" / "digits.yaml").read_text()
    model = re.compile(r"^model:.*?(?=^\w)", re.MULTILINE | re.DOTALL)
    (tree / "conf" / "parts.yaml").write_text(model.sub("model: {name: plain_net, channels: 8}\n\n", digits))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64))
    np.savetxt(tmp_path / "images.csv", np.column_stack([np.arange(40) % 10, pixels]), "%d", ",")
    common = [word for word in UNNAMED if not word.startswith("model.")]
    words = ["run", "parts", *common, *SETTINGS, *ONE_CPU]
    words += [f"data.path={tmp_path / 'images.csv'}", f"cluster.storage={tmp_path / 'runs'}"]
    command = [sys.executable, "-m", "pipeline", *words]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    outcome = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    (run,) = (tmp_path / "runs").glob("parts-*")
    (metrics,) = run.glob("evaluation/*/metrics.json")
    found = json.loads(metrics.read_text())
    assert found["scores"]["mean_distance"] > 0 and found["protocol"]["sampler"] == "mean"
    assert found["protocol"]["extractor"].startswith("histogram-")
    assert list(run.glob("figures/*/average.png"))
    assert "distance of means" in (run / "report" / "report.html").read_text()


WORDS = [word for word in UNNAMED if not word.startswith(("model.", "evaluate.metrics"))]
WORDS += [*ONE_CPU, "model.width=8", "evaluate.metrics=[nll]", "figures.which=[samples,optimum]"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = shutil.copytree(ROOT / "examples" / "custom_network", tmp_path / "custom")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return folder


def test_the_example_goes_through_every_stage_and_its_source_counts_as_code(
    folder, empty_store, undrawn, capsys
):
    (folder / "runs").mkdir()
    shutil.copy(empty_store, folder / "runs")
    start = "import sys; from pipeline.__main__ import main; sys.exit(main())"  # as the script `ddpm` does
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", start, "show", "custom.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "width: 48" in done.stdout, done.stderr
    assert main(["run", "custom.yaml", *WORDS, "sample.guidance_scale=2"]) == 0
    (run,) = (folder / "runs").glob("custom-*")
    assert (run / "report" / "report.html").exists()
    assert "depth: 6" in (run / "experiment.yaml").read_text(), "the class's default is recorded"
    source = folder / "small_net.py"
    source.write_text(source.read_text().replace("silu", "gelu"))
    hash_code.cache_clear()
    assert main(["train", "custom.yaml", *WORDS, "train.steps=8"]) == 1
    assert "--accept-code" in "".join(capsys.readouterr())
