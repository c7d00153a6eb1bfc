"""A run of this program in a temporary storage root, on CIFAR-10 or on as many images of noise."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Settings
from pipeline.config import Experiment, load_experiment
from pipeline.engine.find import make_place
from pipeline.store.run import Place


@dataclass(frozen=True)
class Workspace:
    """`images` says what the tars will hold, for the table."""

    root: Path
    overrides: tuple[str, ...]
    images: str

    def experiment(self, *overrides: str) -> Experiment:
        return load_experiment("cifar10", [*self.overrides, *overrides])

    def run_of(self, experiment: Experiment) -> Place:
        return make_place(experiment, self.root)


@contextmanager
def workspace(settings: Settings) -> Iterator[Workspace]:
    """CIFAR-10 from `--data`; else uint8 noise, which PNG cannot make smaller, so that it costs a little more."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        root = Path(folder)
        if settings.data is not None:
            yield Workspace(root / "runs", (f"data.path={settings.data.absolute()}",), "CIFAR-10")
            return
        generator = np.random.default_rng(0)
        counts = {"train": 2_000, "test": 500} if settings.quick else {"train": 50_000, "test": 10_000}
        (root / "npy").mkdir()
        for split, count in counts.items():
            images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            np.save(root / "npy" / f"{split}_images.npy", images)
            np.save(root / "npy" / f"{split}_labels.npy", generator.integers(0, 10, count))
        source = ("data.source=npy", f"data.path={root / 'npy'}")
        yield Workspace(root / "runs", source, f"{counts['train']} + {counts['test']} images of noise")
