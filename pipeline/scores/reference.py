"""What samples are compared with: the statistics of a split of the data, or those of a user's file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import SPLITS
from pipeline.errors import PipelineError
from pipeline.scores.distances import Statistics
from pipeline.scores.extractors import Extractor
from pipeline.scores.image_sets import ImageSet, hash_shards
from pipeline.store.files import hash_file, read_arrays, write_arrays
from pipeline.store.run import Place
from pipeline.store.tars import open_shards


@dataclass(frozen=True)
class Reference:
    """A file of statistics. `content` is the hash of the images that they have to be of, so they are never stale
    and never mixed; None for a user's file."""

    file: Path
    content: str | None

    @staticmethod
    def of(place: Place, extractor: Extractor, reference: str) -> "Reference":
        """Find what evaluate.reference names: a split, or a file."""
        if reference not in SPLITS:
            return Reference(Path(reference), None)
        file = place.references / f"{extractor.name}-{reference}.npz"
        return Reference(file, hash_shards(open_shards(place.data).list_shards(reference)))

    def load(self) -> Statistics | None:
        """Load what is on disk, if it is of these images. Raises PipelineError where a user's file is none."""
        if self.content is None:
            return load_statistics(self.file)
        arrays = read_arrays(self.file) if self.file.exists() else None
        if arrays is None or arrays["content"].item() != self.content:
            return None
        return Statistics(int(arrays["n"]), arrays["mu"], arrays["sigma"])

    def make(self, images: ImageSet) -> Statistics:
        """Sum up the features of the whole split, and keep the result."""
        found = images.sum_features().moments.statistics()
        kept = {"n": np.array(found.n), "content": np.array(self.content)}
        write_arrays(self.file, mu=found.mu, sigma=found.sigma, **kept)
        return found


def load_statistics(file: Path, width: int | None = None) -> Statistics:
    """Load a user's .npz: mu (d,), sigma (d, d) and, where it says so, n.

    Raises PipelineError, in a line, where they are not those of features (of that width).
    """
    try:
        arrays = read_arrays(file)
        fault = _find_fault(arrays, width)
    except PipelineError as error:
        fault = f"is no .npz of plain arrays ({error.__cause__})"
    if fault:
        raise PipelineError(f"evaluate.reference: {file} {fault}; give mu (d,) and sigma (d, d) of features")
    n = int(arrays["n"]) if "n" in arrays else None
    return Statistics(n, arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))


def _find_fault(arrays: dict[str, np.ndarray], width: int | None) -> str | None:
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        return f"has no {' and no '.join(missing)}, only {', '.join(arrays) or 'nothing'}"
    mu, sigma = arrays["mu"], arrays["sigma"]
    for name, array in (("mu", mu), ("sigma", sigma)):
        if array.dtype not in (np.float32, np.float64):
            return f"has {name} of type {array.dtype}, not float64 or float32"
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        return f"has mu of shape {mu.shape} and sigma of shape {sigma.shape}"
    if width not in (None, len(mu)):
        return f"is of {len(mu)} features, where evaluate.features has {width}"
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "holds values that are not finite"
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * np.abs(sigma).max()):
        return "has a sigma that is not symmetric"
    if "n" in arrays and (arrays["n"].size != 1 or not np.issubdtype(arrays["n"].dtype, np.integer)):
        return "has an n that is no whole number"
    return None


def name_reference(reference: str) -> str:
    """Name evaluate.reference for a protocol: content, never place."""
    if reference in SPLITS:
        return reference
    return f"{Path(reference).name} (sha256 {hash_file(Path(reference))[:8]})"
