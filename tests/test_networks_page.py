"""The examples in docs/networks.md work: the images are made, and the commands read them."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline import config
from pipeline.data.sources import open_source

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "networks.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS
    for line in text.replace("\\\n", " ").splitlines()
    if not language and line.startswith("ddpm ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which every snippet of the page was run."""
    root = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for snippet in SNIPPETS:
            exec(snippet, {})
    return root


def test_every_command_is_a_valid_experiment_on_images_that_the_page_makes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(COMMANDS) >= 3
    seen = set()
    for _, _, name, *overrides in COMMANDS:
        own = [item for item in overrides if not item.startswith("cluster.")]
        experiment = config.load_experiment(name, own)
        seen.add(experiment.data.source)
        source = open_source(experiment.data)
        assert source.splits["train"] > 1000 and source.splits["test"] >= 100
        (record,) = source.read_records("train", 0, 1)
        assert (record.label is None) == (experiment.data.labels == 0)
    assert seen == {"digits", "npy", "folder"}
