"""scikit-learn's 1,797 handwritten digits: real images inside a package, 8x8, one channel, ten classes."""

import importlib.util
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.order import shuffled
from pipeline.data.sources.picture import Picture
from pipeline.errors import PipelineError
from pipeline.store.files import sha256_of

TEST_PER_CLASS = 36
LEVELS = 16


class Digits:
    """Grey level v = 0..16 becomes round(v * 255 / 16). The first 36 of each class in a fixed shuffle are the
    test split (360), the others the train split (1,437); both keep the order of the set."""

    def __init__(self, data: DataConfig):
        spec = importlib.util.find_spec("sklearn")  # does not import it: a fingerprint takes milliseconds
        if spec is None or not spec.submodule_search_locations:
            raise PipelineError("data.source=digits needs scikit-learn: pip install scikit-learn")
        self._file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
        if not self._file.is_file():
            raise PipelineError(f"{self._file} is missing from scikit-learn; reinstall scikit-learn")

    def files(self) -> list[Path]:
        return [self._file]

    def digest(self) -> str:
        return sha256_of(self._file)

    @cached_property
    def splits(self) -> dict[str, int]:
        return {split: len(indices) for split, indices in self._indices.items()}

    def pictures(self, split: str, start: int, stop: int) -> Iterator[Picture]:
        images, labels = self._arrays
        for i in self._indices[split][start:stop]:
            yield Picture(f"digit {i}", images[i], int(labels[i]))

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return np.rint(digits.images * 255 / LEVELS).astype(np.uint8)[..., None], digits.target

    @cached_property
    def _indices(self) -> dict[str, np.ndarray]:
        _, labels = self._arrays
        order = shuffled(len(labels))
        test = np.concatenate([order[labels[order] == digit][:TEST_PER_CLASS] for digit in range(10)])
        return {"train": np.setdiff1d(np.arange(len(labels)), test), "test": np.sort(test)}
