"""examples/custom_network, copied to a folder outside the repository: every stage, another source, wrong settings."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ONE_CPU, ROOT, UNNAMED

from pipeline import config
from pipeline.cli.program import main
from pipeline.engine.code import hash_code
from pipeline.errors import ConfigError

WORDS = [word for word in UNNAMED if not word.startswith(("model.", "evaluate.metrics"))]
WORDS += [*ONE_CPU, "model.width=8", "evaluate.metrics=[nll]", "figures.which=[samples,optimum]"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = shutil.copytree(ROOT / "examples" / "custom_network", tmp_path / "custom")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return folder


def test_the_example_goes_through_every_stage_and_its_source_counts_as_code(folder, empty_store, capsys):
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


def test_wrong_settings_of_the_example_are_refused(folder):
    def load(*words):
        with pytest.raises(ConfigError) as caught:
            config.load_experiment("custom.yaml", list(words))
        return str(caught.value)

    assert "model.widht is unknown (did you mean 'width'?)" in load("model.widht=8")
    assert "a whole number is expected" in load("model.depth=x")
    assert "multiple of 4" in load("model.width=6")
    assert "cannot be imported" in load("model.name=nowhere:Net")
