"""scikit-learn's 1,797 handwritten digits: real images inside a package, 8x8, one channel, ten classes."""

import importlib.util
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.sources.base import ArraySource, make_fixed_permutation
from pipeline.errors import PipelineError
from pipeline.store.files import hash_file

TEST_PER_CLASS = 36
LEVELS = 16


class DigitsSource(ArraySource):
    """scikit-learn's digits; 36 images of each class are the test split (360), the others are for training (1,437).

    Grey level v = 0..16 becomes round(v * 255 / 16). The test images are the first in a fixed permutation; both splits
    keep the order of the set.
    """

    def __init__(self, data: DataConfig):
        super().__init__(data)
        spec = importlib.util.find_spec("sklearn")  # does not import it: a fingerprint takes milliseconds
        if spec is None or not spec.submodule_search_locations:
            raise PipelineError("data.source=digits needs scikit-learn: pip install scikit-learn")
        self.root = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
        self.files = [self.root]
        if not self.root.is_file():
            raise PipelineError(f"{self.root} is missing from scikit-learn; reinstall scikit-learn")

    def compute_fingerprint(self) -> str:
        return hash_file(self.root)

    @cached_property
    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        table = np.loadtxt(self.root, delimiter=",")  # as scikit-learn reads it, whose import takes a second
        grey, labels = table[:, :-1].reshape(-1, 8, 8, 1), table[:, -1].astype(int)
        images = np.rint(grey * 255 / LEVELS).astype(np.uint8)
        order = make_fixed_permutation(len(labels))
        firsts = np.concatenate([order[labels[order] == digit][:TEST_PER_CLASS] for digit in range(10)])
        test = np.isin(np.arange(len(labels)), firsts)
        return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}
