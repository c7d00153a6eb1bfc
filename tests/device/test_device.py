"""What a GPU is asked to do in each phase: transfers, types, layouts, launches, traffic and memory, on fake tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compute.memory import estimate_step_memory
from pipeline.config import load_experiment

FOLDER = Path(__file__).parent
NO_COMPILER = 77  # as fakecuda.py has it

# Network, precision, phase: at most so many launches, GB read and written, GiB alive at once. Batches: that of
# conf/cifar10.yaml; two parts of 8 images of celebahq256; 250 images where no network is trained.
BUDGETS = {
    ("unet", "bf16"): {
        "step": (1115, 33.8, 3.65), "warm_up": (1095, 32.7, 3.65), "reverse": (535, 22.8, 0.87),
        "nll": (1230, 46.2, 0.88), "features": (60, 0.22, 0.1),
    },
    ("celebahq256", "bf16"): {"step": (2930, 152, 10.8), "warm_up": (1320, 73.6, 10.3)},
    ("unet", "fp32"): {"step": (1110, 60.2, 6.5), "reverse": (530, 45.1, 1.73)},
    ("context_unet", "bf16"): {"step": (560, 5.5, 0.81), "reverse": (285, 5, 0.19), "nll": (730, 10.6, 0.21)},
    ("mha_unet", "bf16"): {"step": (655, 7.7, 1.06), "reverse": (350, 5.5, 0.47), "nll": (860, 11.6, 0.48)},
    ("annotated_unet", "bf16"): {"step": (1180, 25.8, 4.5), "reverse": (530, 12, 0.6)},
    ("api_unet", "bf16"): {"step": (1380, 25.3, 3.13), "reverse": (550, 20.2, 0.62)},
    ("recomputing unet", "bf16"): {"step": (1820, 46.9, 1.6)},
    ("fused unet", "bf16"): {"step": (1130, 21.2, 2.83), "reverse": (445, 15.8, 0.75)},
}  # fmt: skip
# Copies that the host waits for: tables, timesteps and rows of a whole NLL, and what comes back; features and logits.
WAITS = {"step": 0, "warm_up": 0, "reverse": 0, "nll": 6, "features": 2}


def run_phases(network: str, precision: str) -> dict[str, dict]:
    """Return what each phase was found to ask for, from a process of its own."""
    command = [sys.executable, FOLDER / "phases.py", network, precision, *BUDGETS[network, precision]]
    done = subprocess.run(command, cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=300)
    if done.returncode == NO_COMPILER and "CI" not in os.environ:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.device
@pytest.mark.parametrize(("network", "precision"), BUDGETS)
def test_what_a_gpu_is_asked_to_do_stays_within_its_budget(network, precision):
    """The host waits for the device only where it must; a step's memory is known without a GPU, within 10 %."""
    phases = run_phases(network, precision)
    for phase, found in phases.items():
        used = found["launches"], found["gigabytes"], found["gib"]
        budget = BUDGETS[network, precision][phase]
        assert all(x <= y for x, y in zip(used, budget, strict=True)), (phase, used, found["by line"])
        assert sum(found["waits"].values()) <= WAITS[phase], (phase, found["waits"])
        assert all(norm.startswith("bfloat16") for norm in found["norms"]) or precision != "bf16", phase
        if phase in ("step", "reverse"):  # float64: the tables, where timesteps index them
            assert all(line.startswith("ddpm/diffusion.py") for line in found["float64"]), found["float64"]
        if phase != "features":  # the image comes as NCHW
            assert found["convolutions"].get("NCHW", 0) * 8 <= found["convolutions"]["NHWC"], phase
            attention = found["attention"]
            assert not any("math" in op or op == "bmm" for op in attention), (phase, attention)
    name, *batch = {"unet": ("cifar10", 128, 1), "celebahq256": (network, 16, 2)}.get(network, (None,))
    if name:  # conf/ has it; here by fake tensors of the CPU
        estimate = estimate_step_memory(load_experiment(name, [f"train.precision={precision}"]), *batch)
        assert estimate / 2**30 == pytest.approx(phases["step"]["gib"], rel=0.1)
