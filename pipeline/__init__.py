"""The orchestration: reads conf/, calls ddpm/, writes runs/. `load` returns a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing torch takes seconds
    import torch

    from ddpm.model import Model


def load(name: str | Path, device: torch.device | str = "cpu", storage: str | Path = "runs") -> Model:
    """Load a trained model, ready to draw: a run, a models:/ address, or a folder in the layout of `ddpm export`.

    name: a path, or the name of a run below `storage`, or the start of that name. The weights are the EMA, unless the
    run samples raw ones. Raises PipelineError.
    """
    from ddpm.model import build_model
    from pipeline.engine.load import read_named_model

    settings, tensors = read_named_model(str(name), Path(storage).expanduser().absolute())
    return build_model(settings, tensors, device)
