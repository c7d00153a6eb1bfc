"""docs/extend.md: its changes, made in a copy of the code, give one experiment that uses all seven new parts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import ONE_CPU, UNNAMED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text()
SETTINGS = [
    "data.source=csv", "data.test_images=4", "diffusion.beta_schedule=sigmoid", "sample.sampler=mean",
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
