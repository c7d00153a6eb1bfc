"""The doors between the rooms, read from the syntax trees, so that lazy imports count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each imports only those below it.
ORDER = [
    "__main__", "cli", "sweep", "jobs", "engine", "stages", "report", "scores", "data", "tracking", "compute",
    "drawing", "store", "config", "console", "errors",
]  # fmt: skip
ONLY_IMPORTER = {
    "ray": {"compute", "sweep", "jobs"},
    "mlflow": {"tracking"},
    "webdataset": {"store"},
    "torch_fidelity": {"scores"},
    "jinja2": {"report"},
    "markdown_it": {"report"},
    "omegaconf": {"config"},
    "yaml": {"config", "jobs"},
    "pydantic": {"config", "store"},
    "pyarrow": {"data", "store"},
    "boto3": set(),
}
FILES_OF_A_RUN = {
    "experiment.yaml", "commits.json", "spent.json", "timings.json", "tracking.json", "log.jsonl", "metrics.json",
    "nll.json", "evaluate.yaml", "selection.json", "grid.png", "sample.yaml", "report.html", "classifier.json",
    ".stop", ".step", ".failure",
}  # fmt: skip
SCIENCE_MAY_IMPORT = {"torch", "numpy", "ddpm"} | set(sys.stdlib_module_names)
WITHOUT_IO = {"io", "os", "pathlib", "logging", "time", "datetime", "json", "random", "shutil", "tempfile"}


# Names that are found when they are first used, and classes that a user names.
LOOKS_UP = {"ddpm/__init__.py", "ddpm/networks/custom.py"}


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


def room(path: Path) -> str:
    """The module or sub-package directly below the top."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def neighbours(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported(path) if name.startswith("pipeline.")}
    return names - {room(path)}


@pytest.mark.parametrize("path", modules("ddpm"), ids=lambda p: p.stem)
def test_science_imports_torch_numpy_and_the_standard_library_only(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops <= SCIENCE_MAY_IMPORT
    assert not tops & WITHOUT_IO


@pytest.mark.parametrize("path", modules("ddpm"), ids=lambda p: p.stem)
def test_only_training_and_the_trained_model_join_network_and_diffusion(path):
    names = imported(path)
    networks = any(name.startswith("ddpm.networks") for name in names)
    diffusion = any(name.startswith("ddpm.diffusion") for name in names)
    assert not (networks and diffusion) or path.name in ("training.py", "model.py", "__init__.py")


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda p: str(p.relative_to(ROOT / "pipeline")))
def test_each_library_has_one_importer(path):
    tops = {name.split(".")[0] for name in imported(path)}
    for library, rooms in ONLY_IMPORTER.items():
        assert library not in tops or room(path) in rooms, f"{library} is imported by {sorted(rooms)} alone"


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda p: str(p.relative_to(ROOT / "pipeline")))
def test_a_folder_imports_only_those_below_it(path):
    if path.name == "__init__.py" and path.parent == ROOT / "pipeline":
        return
    for name in neighbours(path):
        assert ORDER.index(name) > ORDER.index(room(path)), f"{room(path)} must not import {name}"


def test_every_folder_stands_in_the_order():
    found = {path.name.removesuffix(".py") for path in (ROOT / "pipeline").iterdir()}
    assert found - {"__init__", "__pycache__", "conf", "COMMIT", "py.typed"} == set(ORDER)


@pytest.mark.parametrize("path", modules("pipeline/stages"), ids=lambda p: "-".join(p.parts[-2:]))
def test_stages_import_no_other_stage(path):
    own = path.relative_to(ROOT / "pipeline" / "stages").parts[0].removesuffix(".py")
    names = {name.split(".")[2] for name in imported(path) if name.startswith("pipeline.stages.")}
    assert names <= {own, "stage"}


OUTSIDE_STORE = [path for path in modules("pipeline") if path.parts[-2] != "store"]


@pytest.mark.parametrize("path", OUTSIDE_STORE, ids=lambda p: str(p.relative_to(ROOT / "pipeline")))
def test_the_store_alone_spells_file_names_of_a_run_directory(path):
    strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not strings & FILES_OF_A_RUN


def test_the_names_of_files_and_stages_here_are_those_of_the_store():
    from pipeline.engine import plan
    from pipeline.store import run

    spelled = (ROOT / "pipeline" / "store" / "run.py").read_text()
    assert all(f'{name}"' in spelled for name in FILES_OF_A_RUN)
    assert tuple(stage.name for stage in plan.STAGES) == run.STAGES


def loaded_by(code: str) -> set[str]:
    """The modules that a new interpreter has loaded after this code."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(command, check=True, cwd=ROOT, stdout=-1, text=True).stdout.split())


def test_the_science_loads_no_pipeline_library():
    loaded = loaded_by("import ddpm\nfor name in ddpm.__all__: getattr(ddpm, name)")
    assert "torch" in loaded
    assert not {"ray", "mlflow", "webdataset", "omegaconf", "yaml", "pipeline"} & loaded


def test_settings_and_names_of_networks_load_no_torch():
    assert "torch" not in loaded_by(
        "from ddpm import NETWORKS, DiffusionConfig, TrainConfig, UNetConfig\n"
        "assert not DiffusionConfig().find_problems()\n"
        "assert not any(config().find_problems(64) for config in NETWORKS.values())"
    )
