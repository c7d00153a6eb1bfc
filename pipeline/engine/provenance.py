"""The provenance of a run: commit, versions, hardware."""

from __future__ import annotations

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "mlflow", "webdataset", "torch-fidelity", "pyyaml", "numpy")


def collect_provenance() -> dict[str, Any]:
    """Collect the commit, the versions of libraries and the driver's machine, in words."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpus = f"{len(os.sched_getaffinity(0))} CPUs ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "commit": find_commit(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "hardware": f"{cpus}, {', '.join(gpus) or 'no GPU'}",
    }


def find_commit() -> str | None:
    """Return the commit of the code, with '+' where the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent.parent
    if (here / "COMMIT").is_file():  # the code came with a job, without its history
        return (here / "COMMIT").read_text()
    try:
        commit, changed = (
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
