"""Peak memory of training at batch 128, each contender in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import subjects
from benchmarks.harness import OURS, Outcome, Row, Settings
from benchmarks.subjects import Way

CONTENDERS = {
    f"{OURS} fp32": (subjects.our_train_step, Way("fp32")),
    f"{OURS} bf16": (subjects.our_train_step, Way("bf16")),
    "diffusers default fp32": (subjects.diffusers_train_step, Way("fp32", channels_last=False, default=True)),
    "diffusers bf16": (subjects.diffusers_train_step, Way("bf16")),
    "denoising-diffusion-pytorch bf16": (subjects.lucidrains_train_step, Way("bf16")),
}


def run(settings: Settings) -> Outcome:
    outcome, batch = Outcome(), 8 if settings.quick else 128
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.memory", name, str(settings.device), str(batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            outcome.skipped.append(f"{name}: {(done.stderr.strip().splitlines() or ['died'])[-1][:120]}")
            continue
        for kind, gib in json.loads(done.stdout.splitlines()[-1]).items():
            outcome.rows.append(Row(f"train, batch {batch}, peak {kind}", name, gib, "GiB"))
    return outcome


def _measure(name: str, device: str, batch: int) -> dict[str, float]:
    """Two steps; what the process, and the GPU, held at most, GiB."""
    make, way = CONTENDERS[name]
    settings = Settings(torch.device(device), quick=False, rounds=1)
    step = make(settings, way, batch)
    step()
    step()
    peak = {"resident": _peak_resident()}
    if settings.on_gpu:
        peak["GPU"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def _peak_resident() -> float:
    """GiB. Of this program alone: a child's getrusage() begins with the peak of the process that started it."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
