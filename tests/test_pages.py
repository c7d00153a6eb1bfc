"""The README and the pages of docs/: what they name exists, and what they show works as it stands there."""

import re
import shlex

import pytest
import torch
from conftest import ROOT

from benchmarks.scaling_model import PROJECTED, allreduce_seconds, project
from pipeline import config
from pipeline.cli.program import COMMANDS
from pipeline.data.sources import open_source
from pipeline.engine.preflight import GIB, estimate_requirements

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *sorted(ROOT.glob("[A-Z]*.md")), *DOCS]
CODE = "\n".join(file.read_text() for top in ("ddpm", "pipeline") for file in (ROOT / top).rglob("*.py"))
FOLDERS = ("ddpm/", "pipeline/", "conf/", "tests/", "deploy/", "docs/", "benchmarks/", ".ci/", ".github/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    assert f"- {page.relative_to(ROOT)}\n" in (ROOT / "mkdocs.yml").read_text(), "every page is in the site"
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), f"a link leads to {target}"
    quoted = set(re.findall(r"`([^`\n]+)`", text))
    for path in (word for word in quoted if word.startswith(FOLDERS) and " " not in word):
        assert "*" in path or (ROOT / path).exists(), f"{path} is not there"
    for name in (word.removesuffix("()") for word in quoted if re.fullmatch(r"\w+\(\)", word)):
        assert re.search(rf"\b(def|class) {name}\b|^{name} = ", CODE, re.MULTILINE), f"{name}() is not there"
    commands = {command.name for command in COMMANDS}
    assert set(re.findall(r"`ddpm ([a-z]+)", text)) <= commands


def test_the_tree_of_the_architecture_page_is_that_of_the_code():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    listed = [line.split()[0].rstrip("/") for line in tree.splitlines() if re.match(r"  \w+/ ", line)]
    rooms = {path.parent.name for top in ("ddpm", "pipeline") for path in (ROOT / top).glob("*/__init__.py")}
    assert set(listed) == rooms and len(listed) == len(rooms)


def test_the_snippet_of_the_library_page_trains_and_draws():
    snippet = (ROOT / "docs" / "library.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    torch.manual_seed(0)
    exec(snippet, names)
    assert torch.isfinite(names["loss"])
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["images"].abs().max() <= 1


def test_the_commands_of_the_page_of_networks_read_the_images_that_it_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs" / "networks.md").read_text(), flags=re.DOTALL)
    for snippet in [text for language, text in blocks if language == "python"]:
        exec(snippet, {})
    shown = "".join(text.replace("\\\n", " ") for language, text in blocks if not language)
    lines, seen = shown.splitlines(), set()
    for _, _, name, *overrides in [shlex.split(line) for line in lines if line.startswith("ddpm ")]:
        experiment = config.load_experiment(name, [w for w in overrides if not w.startswith("cluster.")])
        seen.add(experiment.data.source)
        source = open_source(experiment.data)
        assert source.splits["train"] > 1000 and source.splits["test"] >= 100
        (record,) = source.read_records("train", 0, 1)
        assert (record.label is None) == (experiment.data.labels == 0)
    assert seen == {"digits", "npy", "folder"}


def cells(first: str) -> list[str]:
    """The cells of a row of docs/cluster.md, whose figures are computed."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def test_the_all_reduce_of_a_ring():
    assert allreduce_seconds(1, 143e6, 1e9, 1e-3) == 0
    assert allreduce_seconds(2, 143e6, 1e9, 0) == pytest.approx(0.143)  # each half once out and once back
    assert allreduce_seconds(64, 143e6, 1e9, 0) == pytest.approx(0.286, rel=0.02)
    assert allreduce_seconds(4, 0, 1e9, 1e-3) == pytest.approx(6e-3)


@pytest.mark.parametrize("network", PROJECTED)
def test_projected_efficiencies_are_the_model_s(network):
    step, gradients = PROJECTED[network]
    ranges = [project(n, step, gradients) for n in map(int, cells("GPUs"))]
    shown = [f"{100 * low:.0f}-{high:.0%}" if low < high else f"{low:.0%}" for low, high in ranges]
    assert [cell.replace(" %", "%") for cell in cells(network)] == shown


def test_sizes_are_those_that_a_run_prints():
    for i, name in enumerate(("cifar10", "lsun_church", "lsun_bedroom_large")):
        experiment = config.load_experiment(name, ["evaluate.checkpoints=null", "sample.checkpoint=last"])
        wanted = estimate_requirements(experiment)
        one = wanted.checkpoints / (wanted.checkpoint_count + 1) / GIB
        for row, size in (
            ("one checkpoint (weights, Adam, EMA twice)", one),
            ("memory of a training worker, without images and activations", wanted.memory / GIB),
            (f"{wanted.checkpoint_count} checkpoints and one being written", wanted.checkpoints / GIB),
            (f"{wanted.images:,} samples, at most", wanted.samples / GIB),
            ("features of samples, real images and baselines", wanted.features / GIB),
        ):
            shown = cells(row)[i].removesuffix(" GiB")
            rounding = 0.51 * 10 ** -len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(size, abs=rounding), (row, name)
