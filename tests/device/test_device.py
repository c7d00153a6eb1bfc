"""What a GPU is asked to do in each phase: transfers, types, layouts, launches, traffic and memory, on fake tensors."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NO_COMPILER = 77  # as fakecuda.py has it

# Network, precision, phase: at most so many launches, GB read and written, GiB alive at once. Batches: those of
# conf/cifar10.yaml and conf/celebahq256.yaml (the latter in 8 parts); 250 images where no network is trained.
BUDGETS = {
    ("unet", "bf16"): {
        "step": (2900, 60, 6.1), "warm_up": (2900, 60, 6.1), "reverse": (950, 38, 1.3), "nll": (2100, 76, 1.4),
        "features": (50, 0.2, 0.2),
    },
    ("unet", "fp32"): {"step": (2200, 61, 6.9), "reverse": (660, 34, 1.4)},
    ("context_unet", "bf16"): {"step": (2100, 5.3, 0.9), "reverse": (490, 4.7, 0.3), "nll": (1150, 10, 0.3)},
    ("mha_unet", "bf16"): {"step": (2060, 11.5, 1.5), "reverse": (620, 9, 0.6), "nll": (1410, 19, 0.7)},
    ("annotated_unet", "bf16"): {"step": (3200, 40, 5.8), "reverse": (940, 21, 1.1)},
    ("api_unet", "bf16"): {"step": (3110, 42, 4.9), "reverse": (940, 35, 1)},
    ("celebahq256", "bf16"): {"step": (19600, 1025, 17), "warm_up": (3000, 130, 17)},
}  # fmt: skip
# Copies that the host waits for: tables, timesteps and rows of a whole NLL, and what comes back; features and logits.
WAITS = {"step": 0, "warm_up": 0, "reverse": 0, "nll": 6, "features": 2}

cases = pytest.mark.parametrize(
    ("network", "precision"),
    [pytest.param(*case, marks=pytest.mark.device if i else ()) for i, case in enumerate(BUDGETS)],
)


@cache
def run_phases(network: str, precision: str) -> dict[str, dict]:
    """Return what each phase was found to ask for, from a process of its own."""
    command = [sys.executable, FOLDER / "phases.py", network, precision, *BUDGETS[network, precision]]
    done = subprocess.run(command, cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=300)
    if done.returncode == NO_COMPILER and "CI" not in os.environ:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cases
def test_launches_traffic_and_memory_stay_within_their_budgets(network, precision):
    for phase, found in run_phases(network, precision).items():
        used = found["launches"], found["gigabytes"], found["gib"]
        budget = BUDGETS[network, precision][phase]
        assert all(x <= y for x, y in zip(used, budget, strict=True)), (phase, used, found["by line"])


@cases
def test_the_host_waits_for_the_device_only_where_it_must(network, precision):
    for phase, found in run_phases(network, precision).items():
        assert sum(found["waits"].values()) <= WAITS[phase], (phase, found["waits"])


@cases
def test_types_layouts_and_attention(network, precision):
    for phase, found in run_phases(network, precision).items():
        if phase in ("step", "reverse"):  # float64: the tables, where timesteps index them
            assert all(line.startswith("ddpm/diffusion.py") for line in found["float64"]), found["float64"]
        if phase != "features":  # the image comes as NCHW
            assert found["convolutions"].get("NCHW", 0) * 8 <= found["convolutions"]["NHWC"], phase
            assert not any("math" in op or op == "bmm" for op in found["attention"]), (
                phase,
                found["attention"],
            )
