"""What a GPU is asked to do in each phase: transfers, types, layouts, launches, traffic and memory, on fake tensors."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pipeline.compute.memory import estimate_step_memory
from pipeline.config import load_experiment

FOLDER = Path(__file__).parent
NO_COMPILER = 77  # as fakecuda.py has it

# Network, precision, phase: at most so many launches, GB read and written, GiB alive at once. Batches: those of
# conf/cifar10.yaml and conf/celebahq256.yaml (the latter in 8 parts); 250 images where no network is trained.
BUDGETS = {
    ("unet", "bf16"): {
        "step": (960, 30, 3.65), "warm_up": (940, 29, 3.65), "reverse": (460, 18, 0.87), "nll": (1080, 36.6, 0.88),
        "features": (50, 0.2, 0.1),
    },
    ("unet", "fp32"): {"step": (955, 53, 6.5), "reverse": (455, 35.5, 1.73)},
    ("context_unet", "bf16"): {"step": (510, 4.6, 0.81), "reverse": (260, 3.9, 0.19), "nll": (680, 8.4, 0.21)},
    ("mha_unet", "bf16"): {"step": (610, 7.3, 1.06), "reverse": (330, 5, 0.47), "nll": (820, 11, 0.48)},
    ("annotated_unet", "bf16"): {"step": (1050, 24.3, 4.5), "reverse": (465, 10, 0.6)},
    ("api_unet", "bf16"): {"step": (1250, 23, 3.13), "reverse": (490, 17, 0.62)},
    ("recomputing unet", "bf16"): {"step": (1630, 41.6, 1.6)},
    ("fused unet", "bf16"): {"step": (940, 19.3, 2.83), "reverse": (390, 13.9, 0.75)},
    ("celebahq256", "bf16"): {"step": (10750, 530, 10.8), "warm_up": (1110, 64.7, 10.3)},
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
def test_a_steps_memory_is_known_without_a_gpu(network, precision):
    """Within 10 %, by fake tensors of the CPU, for the experiments that conf/ has."""
    if network not in ("unet", "celebahq256"):
        return
    experiment = load_experiment(
        "cifar10" if network == "unet" else network, [f"train.precision={precision}"]
    )
    parts = 1 if network == "unet" else 8
    estimate = estimate_step_memory(experiment, experiment.train.batch_size, parts) / 2**30
    assert estimate == pytest.approx(run_phases(network, precision)["step"]["gib"], rel=0.1)


@cases
def test_the_host_waits_for_the_device_only_where_it_must(network, precision):
    for phase, found in run_phases(network, precision).items():
        assert sum(found["waits"].values()) <= WAITS[phase], (phase, found["waits"])


@cases
def test_types_layouts_and_attention(network, precision):
    for phase, found in run_phases(network, precision).items():
        assert all(norm.startswith("bfloat16") for norm in found["norms"]) or precision != "bf16", phase
        if phase in ("step", "reverse"):  # float64: the tables, where timesteps index them
            assert all(line.startswith("ddpm/diffusion.py") for line in found["float64"]), found["float64"]
        if phase != "features":  # the image comes as NCHW
            assert found["convolutions"].get("NCHW", 0) * 8 <= found["convolutions"]["NHWC"], phase
            assert not any("math" in op or op == "bmm" for op in found["attention"]), (
                phase,
                found["attention"],
            )
