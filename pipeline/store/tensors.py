"""Safe loading of weights from untrusted files, and copies of arrays to a device."""

import os
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.store.files import require_regular_file

Tensors = dict[str, torch.Tensor]


def load_tensors(path: Path, remedy: str) -> Tensors:
    """Load named tensors from .safetensors or a PyTorch file, without running pickled code.

    Raises PipelineError, ending in the remedy, if the file is broken or holds anything else.
    """
    with require_regular_file(path).open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise PipelineError(f"{path} is a Git LFS pointer, not the file: `git lfs pull` fetches it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads to
        # Without torch's own message, which may advise to load it unsafely.
        kind = type(error).__name__
        raise PipelineError(
            f"{path} is broken or holds more than plain tensors ({kind}); {remedy}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise PipelineError(f"{path} holds no plain table of tensors; {remedy}")
    return found


def save_tensors(tensors: Tensors, path: Path, header: dict[str, str] | None = None) -> None:
    """Write safetensors; raise its disk errors as OSError."""
    try:
        save_file(tensors, path, header)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def read_header(path: Path) -> dict[str, str]:
    """Read the metadata of a .safetensors file; empty for another or a broken file."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # `load_tensors` tells
        return {}


def copy_to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device. The host does not wait for the copy, nor for the earlier work of a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
