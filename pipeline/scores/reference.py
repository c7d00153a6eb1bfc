"""The statistics that samples are compared with: of a split of the data, or from a user's file."""

import zipfile
from pathlib import Path

import numpy as np

from pipeline.config.sections import SPLITS
from pipeline.errors import PipelineError
from pipeline.scores.distances import Statistics
from pipeline.scores.extractors import Extractor
from pipeline.scores.image_sets import ImageSet, hash_shards
from pipeline.store.arrays import read_arrays, write_arrays
from pipeline.store.files import try_read
from pipeline.store.run import Place
from pipeline.store.tars import open_shards

LARGEST = 8 * 4096**2 + 1024  # bytes of an array: float64, above the features of any extractor


def locate_statistics(place: Place, extractor: Extractor, split: str) -> tuple[Path, str]:
    """Return the file of the statistics of a split, and the hash of its images.

    The file repeats the hash, so statistics are never stale and never mixed.
    """
    file = place.references / f"{extractor.name}-{split}.npz"
    return file, hash_shards(open_shards(place.data).list_shards(split))


def load_reference(place: Place, extractor: Extractor, reference: str) -> Statistics | None:
    """Load the statistics of a split or of a user's file; None if those of the split are not made yet."""
    if reference not in SPLITS:
        return load_user_statistics(Path(reference))
    file, content = locate_statistics(place, extractor, reference)
    arrays = try_read(read_arrays, file) if file.exists() else None
    if arrays is None or not {"n", "mu", "sigma"} <= arrays.keys() or str(arrays.get("content")) != content:
        return None
    return Statistics(int(arrays["n"]), arrays["mu"], arrays["sigma"])


def write_split_statistics(place: Place, extractor: Extractor, split: str, images: ImageSet) -> Statistics:
    found = images.sum_features().moments.to_statistics()
    file, content = locate_statistics(place, extractor, split)
    write_arrays(file, mu=found.mu, sigma=found.sigma, n=np.array(found.n), content=np.array(content))
    return found


def load_user_statistics(file: Path, width: int | None = None) -> Statistics:
    """Load a user's .npz: mu (d,), sigma (d, d) and, if it has it, n.

    Raises PipelineError, in a line, if it holds no statistics of features (of that width).
    """
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        # Beside them there may be anything: gigabytes of images, pickles.
        names = [name for name in ("mu", "sigma", "n") if name in sizes]
        if big := [name for name in names if sizes[name] > LARGEST]:
            fault: str | None = f"has {big[0]} of more than {LARGEST:,} bytes"
        else:
            with np.load(file, allow_pickle=False) as archive:
                arrays: dict[str, np.ndarray] = {name: archive[name] for name in names}
            fault = _find_problem(arrays, width, list(sizes))
    # Numpy raises many errors for a broken file, some with advice to load it unsafely.
    except Exception as error:
        fault = f"is no .npz of plain arrays ({type(error).__name__})"
    if fault:
        raise PipelineError(f"evaluate.reference: {file} {fault}; give mu (d,) and sigma (d, d) of features")
    n = int(arrays["n"].item()) if "n" in arrays else None
    return Statistics(n, arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))


def _find_problem(arrays: dict[str, np.ndarray], width: int | None, held: list[str]) -> str | None:
    """Return why these arrays are no statistics of features (of that width); None if they are."""
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        return f"has no {' and no '.join(missing)}, only {', '.join(held[:8]) or 'nothing'}"
    mu, sigma, n = arrays["mu"], arrays["sigma"], arrays.get("n")
    for name, array in (("mu", mu), ("sigma", sigma)):
        if array.dtype.newbyteorder("=") not in (np.float32, np.float64):
            return f"has {name} of type {array.dtype}, not float64 or float32"
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        return f"has mu of shape {mu.shape} and sigma of shape {sigma.shape}"
    if width not in (None, len(mu)):
        return f"is of {len(mu)} features, where evaluate.features has {width}"
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "holds values that are not finite"
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * np.abs(sigma).max()):
        return "has a sigma that is not symmetric"
    try:  # a matrix with a negative eigenvalue is no covariance; rounding leaves some near 0
        np.linalg.cholesky(sigma + 1e-5 * max(float(np.abs(sigma).max()), 1e-30) * np.eye(len(mu)))
    except np.linalg.LinAlgError:
        return "has a sigma that is no covariance: an eigenvalue is negative"
    if n is not None and (n.size != 1 or n.dtype.kind not in "iu" or n.item() < 1):
        return "has an n that is no whole number above 0"
    return None
