"""The doors between the rooms, read from the syntax trees, so that lazy imports count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.engine import plan
from pipeline.store import run

# Each imports only those below it.
ORDER = [
    "__main__", "cli", "sweep", "jobs", "engine", "stages", "report", "scores", "data", "tracking", "compute",
    "drawing", "store", "config", "console", "errors",
]  # fmt: skip
ONLY_IMPORTER = {
    "ray": {"compute", "sweep", "jobs"}, "mlflow": {"tracking"}, "webdataset": {"store"}, "jinja2": {"report"},
    "torch_fidelity": {"scores"}, "markdown_it": {"report"}, "omegaconf": {"config"}, "yaml": {"config", "jobs"},
    "pydantic": {"config", "store"}, "pyarrow": {"data", "store"}, "boto3": set(),
}  # fmt: skip
FILES_OF_A_RUN = {
    "experiment.yaml", "commits.json", "spent.json", "timings.json", "tracking.json", "log.jsonl", "metrics.json",
    "nll.json", "evaluate.yaml", "selection.json", "grid.png", "sample.yaml", "report.html", "classifier.json",
    ".stop", ".step", ".failure",
}  # fmt: skip
SCIENCE_MAY_IMPORT = {"torch", "triton", "numpy", "ddpm"} | set(sys.stdlib_module_names)
WITHOUT_IO = {"io", "os", "pathlib", "logging", "time", "datetime", "json", "random", "shutil", "tempfile"}


# Names that are found when they are first used, and classes that a user names.
LOOKS_UP = {"ddpm/__init__.py", "ddpm/networks/custom.py", "pipeline/tracking/__init__.py"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything that the module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            assert str(path.relative_to(ROOT)) in LOOKS_UP, f"{path}: imports are written in full"
    return found


@pytest.mark.parametrize("path", modules("ddpm"), ids=lambda p: p.stem)
def test_science_imports_few_libraries_and_joins_network_and_diffusion_in_training(path):
    names = imported(path)
    tops = {name.split(".")[0] for name in names}
    assert tops <= SCIENCE_MAY_IMPORT
    assert not tops & WITHOUT_IO
    joined = [part for part in ("networks", "diffusion") if any(n.startswith(f"ddpm.{part}") for n in names)]
    assert len(joined) < 2 or path.name in ("training.py", "model.py", "__init__.py")


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda p: str(p.relative_to(ROOT / "pipeline")))
def test_each_library_has_one_importer_and_a_folder_imports_only_those_below_it(path):
    names, own = imported(path), path.relative_to(ROOT).parts[1].removesuffix(".py")
    tops = {name.split(".")[0] for name in names}
    for library, rooms in ONLY_IMPORTER.items():
        assert library not in tops or own in rooms, f"{library} is imported by {sorted(rooms)} alone"
    if own == "__init__":
        return
    for name in {name.split(".")[1] for name in names if name.startswith("pipeline.")} - {own}:
        assert ORDER.index(name) > ORDER.index(own), f"{own} must not import {name}"
    if path.is_relative_to(ROOT / "pipeline" / "stages"):
        stages = {name.split(".")[2] for name in names if name.startswith("pipeline.stages.")}
        stage = path.relative_to(ROOT / "pipeline" / "stages").parts[0].removesuffix(".py")
        assert stages <= {stage, "stage"}, "stages import no other stage"
    if own != "store":
        nodes = ast.walk(ast.parse(path.read_text()))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert not texts & FILES_OF_A_RUN, "the store alone spells file names of a run directory"


def test_the_names_of_folders_files_and_stages_here_are_those_of_the_code():
    found = {path.name.removesuffix(".py") for path in (ROOT / "pipeline").iterdir()}
    assert found - {"__init__", "__pycache__", "conf", "COMMIT", "py.typed"} == set(ORDER)
    spelled = (ROOT / "pipeline" / "store" / "run.py").read_text()
    assert all(f'{name}"' in spelled for name in FILES_OF_A_RUN)
    assert tuple(stage.name for stage in plan.STAGES) == run.STAGES


def test_settings_and_names_of_networks_load_no_torch_and_the_science_no_library_of_the_pipeline():
    code = (
        "import sys; from ddpm import NETWORKS, DiffusionConfig, TrainConfig, UNetConfig\n"
        "assert not DiffusionConfig().find_problems()\n"
        "assert not any(config().find_problems(64) for config in NETWORKS.values())\n"
        "assert 'torch' not in sys.modules\n"
        "import ddpm; assert all(getattr(ddpm, name) for name in ddpm.__all__)\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'ray', 'mlflow', 'webdataset', 'omegaconf', 'yaml', 'pipeline'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
