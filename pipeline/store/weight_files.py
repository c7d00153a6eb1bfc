"""Finds published weights in the folders that diffusers, its trainer and the Hub's cache write."""

import re
from pathlib import Path

from pipeline.config.sections import PublishedConfig
from pipeline.errors import ConfigError

# diffusers' save_pretrained: with a variant, in several files, as safetensors or pickled.
FILE = re.compile(
    r"diffusion_pytorch_model(\.[a-z]\w*)?(-\d+-of-(\d+))?(\.[a-z]\w*)?\.(?P<kind>safetensors|bin)"
)


def find_weight_files(published: PublishedConfig) -> list[Path]:
    """Find the files of published weights; none if the network is trained here. Raises ConfigError."""
    if published.weights is None:
        return []
    if published.path is None:
        raise ConfigError("published.path is null; set it to the folder of the published weights")
    path = Path(published.path)
    if not path.exists():
        raise ConfigError(f"{path} is not here: download it first (`hf download NAME --local-dir FOLDER`)")
    folder = path.parent if path.is_file() else _find_folder(path, published.weights)
    if published.weights == "ema" and folder.name == "unet" and _holds_weights(folder.parent / "unet_ema"):
        raise ConfigError(f"published.weights is ema, but {folder} holds the raw weights beside unet_ema/")
    sets: dict[tuple[bool, str, str], list[Path]] = {}
    for file in sorted(folder.glob("*")):
        if match := FILE.fullmatch(file.name):
            # safetensors before pickles, plain files before variants and shards
            order = (match["kind"] == "bin", match[1] or match[4] or "", match[3] or "")
            sets.setdefault(order, []).append(file)
    if path.is_file():
        sets = {order: files for order, files in sets.items() if path in files}
    for (_, _, count), files in sorted(sets.items()):
        if len(files) == int(count or 1):
            return files
    found = ", ".join(sorted(file.name for file in folder.glob("*"))[:8])
    raise ConfigError(
        f"published.path: {path} holds no complete diffusion_pytorch_model.safetensors or .bin, nor does its unet/ "
        f"or unet_ema/; found: {found or 'nothing'}"
    )


def _find_folder(path: Path, weights: str) -> Path:
    snapshots = path / "snapshots"
    if snapshots.is_dir():  # of the Hub's cache
        main = path / "refs" / "main"
        known = sorted(folder.name for folder in snapshots.iterdir())
        name = main.read_text().strip() if main.is_file() else known[0] if len(known) == 1 else ""
        if name not in known:
            raise ConfigError(f"published.path: {snapshots} holds {len(known)} versions; name one's folder")
        path = snapshots / name
    both = [name for name in ("unet", "unet_ema") if _holds_weights(path / name)]
    if len(both) == 2 and weights == "unknown":
        raise ConfigError(f"{path} holds unet/ and unet_ema/; say which: published.weights=raw or ema")
    if weights != "raw" and "unet_ema" in both:
        return path / "unet_ema"
    return path / "unet" if "unet" in both and not _holds_weights(path) else path


def _holds_weights(folder: Path) -> bool:
    return any(FILE.fullmatch(file.name) for file in folder.glob("*"))
