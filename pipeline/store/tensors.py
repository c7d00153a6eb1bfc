"""Safe loading of weights from untrusted files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.errors import PipelineError

Tensors = dict[str, torch.Tensor]


def load_tensors(path: Path, remedy: str) -> Tensors:
    """Load named tensors from .safetensors or a PyTorch file, without running pickled code.

    Raises PipelineError, ending in the remedy, where the file is broken or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"{path} is broken or holds more than plain tensors ({reason})"
        raise PipelineError(f"{problem}; {remedy}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise PipelineError(f"{path} holds no plain table of tensors; {remedy}")
    return found
