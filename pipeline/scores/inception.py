"""torch-fidelity's Inception, the network of the published scores, and its weights.

torch-fidelity unpickles any file that it gets, so it gets a copy, which was read as plain tensors first.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.store.files import hash_file, write_atomically
from pipeline.store.run import Place
from pipeline.store.tensors import load_tensors

NAME, WIDTH = "inception-v3-compat", 2048
LAYERS = ("2048", "logits_unbiased")
OFFICIAL_SHA8 = "6726825d"  # of the file at URL, as its name says
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-{OFFICIAL_SHA8}.pth"
REMEDY = f"get {URL} and name it in evaluate.extractor_weights"


class Inception(nn.Module):
    """The network from uint8 images (N,C,H,W) of one or three channels to the outputs of LAYERS."""

    def __init__(self, weights: Path):
        from torch_fidelity.utils import create_feature_extractor

        super().__init__()
        self.net = create_feature_extractor(
            NAME, list(LAYERS), cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.net(images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images)
        return outputs


def find_weights(place: Place) -> tuple[Path, str]:
    """Return a copy of evaluate.extractor_weights, or of torch-fidelity's download, and the sha256."""
    return copy_weights(place.experiment.evaluate.extractor_weights, place.extractor_cache)


def copy_weights(weights: str | None, cache: Path) -> tuple[Path, str]:
    """Copy the tensors of a file (None: the download) into `cache`, once; return the copy and the file's sha256.

    Raises PipelineError naming a file that is not Inception's.
    """
    source = Path(weights) if weights else _download()
    sha256 = hash_file(source)
    copy = cache / f"{NAME}-{sha256[:8]}.pth"
    if not copy.exists():
        tensors = load_tensors(source, REMEDY)
        with write_atomically(copy) as temporary:
            torch.save(tensors, temporary)
            try:
                Inception(temporary)
            except RuntimeError as error:
                what = "; ".join(f"{line.strip():.150}" for line in str(error).splitlines()[1:3])
                raise PipelineError(
                    f"{source} (sha256 {sha256[:8]}) is not Inception: {what}; {REMEDY}"
                ) from error
    return copy, sha256


def locate_download() -> Path:
    """Return where torch-fidelity keeps Inception's weights after the download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]


def _download() -> Path:
    """Download the weights to torch-fidelity's own place, unless they are there; return the file."""
    path = locate_download()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), OFFICIAL_SHA8, progress=False)
        except (OSError, RuntimeError) as error:
            raise PipelineError(
                f"Inception's weights cannot be fetched ({error}); {REMEDY}, or put it at {path}"
            ) from error
    if not hash_file(path).startswith(OFFICIAL_SHA8):
        raise PipelineError(f"{path} is damaged: its sha256 does not begin with {OFFICIAL_SHA8}; delete it")
    return path
