"""Shared by all tests: one thread, and the smallest experiment that is still the real pipeline."""

import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from pipeline import config, tracking
from pipeline.compute.units import LocalExecutor, Worker
from pipeline.drawing import charts
from pipeline.engine.find import make_place
from pipeline.stages import shard
from pipeline.store.run import Place

ROOT = Path(__file__).parent.parent

# A network of a few thousand parameters on the digits; every stage is the real one.
UNNAMED = [
    "diffusion.timesteps=20", "model.channels=8", "model.norm_groups=4", "train.steps=6",
    "train.batch_size=16", "train.warmup_steps=2", "train.checkpoint_every=2", "train.sample_every=0",
    "train.log_every=1", "sample.num_images=12", "sample.batch_size=6", "sample.steps=null",
    "evaluate.nll_images=6", "evaluate.nll_timesteps=null", "evaluate.nll_batch_size=4",
    "evaluate.checkpoint_images=6", "evaluate.metrics=[nll]",
]  # fmt: skip
TINY = ["name=tiny", *UNNAMED]

# A study of four trials, for the sweep file of a test, and what makes each of them that small.
GRID = """
experiment: digits
space:
  diffusion.beta_schedule: [linear, cosine]
  model.dropout: [0.0, 0.2]
rank: {metric: nll_bpd}
"""
TRIAL = [*UNNAMED, "figures.which=[samples]"]

ONE_CPU = ["cluster.workers=0", "cluster.cpus_per_worker=1"]


class FilesInTurn(LoadScopeScheduling):
    """Keeps each file in one process of `make test`, and all files that start Ray in the same one.

    Two clusters at once would fight for the cores. Tests that are processes of their own (`make device`) are spread.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file.startswith("tests/device/"):
            return nodeid
        return "ray" if "mark.ray" in (ROOT / file).read_text() else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return FilesInTurn(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start Ray, which take longest, so that both processes end at about the same time."""
    items.sort(key=lambda item: "mark.ray" not in item.path.read_text())


@cache  # reading yaml takes longer than most of what is done with it
def tiny_experiment(*overrides: str) -> config.Experiment:
    return config.load_experiment("digits", [*TINY, *overrides])


def renamed(run: Place, ending: str) -> Place:
    experiment = run.experiment
    return dataclasses.replace(run, experiment=dataclasses.replace(experiment, name=experiment.name + ending))


def one_cpu() -> LocalExecutor:
    return LocalExecutor(Worker(torch.device("cpu"), cpus=1))


def blank_charts() -> Any:
    """A context without charts: they take half of a small run's time, and few tests look at them."""
    return patch.object(charts, "save_panels", lambda panels, file: file.write_text("<svg></svg>"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(happened: Callable[[], object], limit: float = 300, running: Any = None) -> None:
    """Raises AssertionError where it did not happen within so many seconds, or before the process ended."""
    end = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < end, f"it did not happen within {limit:.0f} s"
        assert running is None or running.poll() is None, running.communicate()
        time.sleep(0.05)


def flip_bit(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def read_files(root: Path, *patterns: str) -> dict[str, bytes]:
    """The content of all files of a folder, or of those, by their paths in it."""
    found = [path for pattern in patterns or ("**/*",) for path in root.glob(pattern) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def read_losses(run: Path) -> list[tuple[int, float]]:
    points = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(point["step"], point["metrics"]["train/loss"]) for point in points]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def undrawn():
    with blank_charts():
        yield


@pytest.fixture(scope="session")
def sharded_storage(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    experiment = tiny_experiment()
    for units in shard.STAGE.work(make_place(experiment, root)):
        one_cpu().run_units(units, lambda unit: None)
    return root


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A new store of MLflow, to be copied: making its tables takes seconds."""
    root = tmp_path_factory.mktemp("empty")
    tracking.check_server(tracking.find_default_uri(root))
    return root / "mlflow.db"


@pytest.fixture
def tiny_run(sharded_storage, request) -> Place:
    """The tiny experiment under a name of its own, so that no test sees another's run directory."""
    name = request.node.name.translate({ord("["): "-", ord("]"): None})
    place = make_place(dataclasses.replace(tiny_experiment(), name=name), sharded_storage)
    place.path.mkdir(parents=True, exist_ok=True)
    return place


@pytest.fixture(scope="session")
def sampled_folder(sharded_storage) -> Path:
    from staged import run_stage, with_weights  # beside the tests that ask for this

    from pipeline.stages import sample

    place = make_place(tiny_experiment("name=sampled"), sharded_storage)
    with_weights(place)
    run_stage(sample, place)
    return place.path


@pytest.fixture
def sampled(tiny_run, sampled_folder) -> Place:
    shutil.copytree(sampled_folder, tiny_run.path, dirs_exist_ok=True)
    return tiny_run
