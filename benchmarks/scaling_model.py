"""A model of the step time of training, fed with and checked against measured steps; see docs/cluster.md.

    python -m benchmarks.scaling_model [--batch 8] [--workers 1 2] [--steps 5]

One process per worker, one GPU each where there are GPUs, else one thread each. Measured: the step of N workers that
train alone beside each other, at batch / N; the all-reduce of all gradients; the step of N workers together. Predicted
for the last: the sum of the first two. That DDP sends gradients while it still computes others is left out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which it would keep alive to the exit
from torch import multiprocessing, nn

from ddpm.diffusion import Diffusion
from ddpm.training import TrainState, train_step
from pipeline.config import load_experiment
from pipeline.stages.train import slice_batch
from pipeline.store import checkpoint

# Projected, not measured. One GPU: 5.8 steps/s on CIFAR-10, as an RTX 4090 is reported to do; 256x256 by the ratio of
# the paper's own steps on a TPU v3-8 (21 to 2.2). Assumed: what a step costs whatever its batch, and links as of PCIe 4
# within hosts and 100 Gb/s between them.
PROJECTED = {
    "CIFAR-10, batch 128": (1 / 5.8, 143e6),
    "256x256, batch 64": (21 / 2.2 / 5.8, 455e6),
}  # s, bytes
FIXED, BANDWIDTH, LATENCY = 0.02, 10e9, 30e-6  # s, bytes/s, s


def allreduce_seconds(workers: int, volume: float, bandwidth: float, latency: float) -> float:
    """A ring passes 2 (N - 1) / N of the volume (bytes) through every link, in 2 (N - 1) messages."""
    return 2 * (workers - 1) / workers * volume / bandwidth + 2 * (workers - 1) * latency


def project(workers: int, step: float, volume: float) -> tuple[float, float]:
    """Efficiency of `workers` at a fixed global batch: all-reduce after the computing, and hidden behind it."""
    computing = FIXED + (step - FIXED) / workers
    passing = allreduce_seconds(workers, volume, BANDWIDTH, LATENCY)
    return step / workers / (computing + passing), step / workers / max(computing, passing)


def measure(rank: int, workers: int, batch: int, steps: int, results: multiprocessing.SimpleQueue) -> None:
    """Median seconds of a training step of `workers` together at a global batch, and of the all-reduce of its
    gradients, with their bytes. workers 0: of one that trains alone, beside others that do."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    experiment = load_experiment("cifar10", [f"train.batch_size={batch}"])
    net = checkpoint.create_network(experiment).to(device).to(memory_format=torch.channels_last)
    state = TrainState(experiment.train, net, experiment.diffusion)
    diffusion = Diffusion(experiment.diffusion).to(device)
    rows = slice_batch(batch, rank, workers) if workers else slice_batch(batch, 0, 1)
    images = torch.randint(0, 256, (len(rows), *experiment.data.shape), dtype=torch.uint8, device=device)
    forward: nn.Module = state.net
    if workers > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=workers)
        forward = nn.parallel.DistributedDataParallel(net, device_ids=[device] if on_gpu else None)
    gradients = torch.zeros(sum(p.numel() for p in net.parameters()), device=device)

    def step() -> None:
        train_step(
            state, diffusion, images, rows,
            config=experiment.train, seed=0, world_size=max(1, workers), forward=forward,
        )  # fmt: skip

    def reduce() -> None:
        if workers > 1:
            dist.all_reduce(gradients)

    times = [_seconds(work, steps, device) for work in (step, reduce)]
    if rank == 0:
        results.put((*times, gradients.numel() * 4))
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def _seconds(work: Callable[[], None], steps: int, device: torch.device) -> float:
    taken = []
    for i in range(steps + 2):  # two to warm up: DDP rebuilds its buckets after the first
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken += [time.perf_counter() - began] if i >= 2 else []
    return median(taken)


def measured(processes: int, batch: int, steps: int, together: bool) -> tuple[float, float, int]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(measure, (processes if together else 0, batch, steps, results), processes)
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="the global batch (default: 8)")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="groups to check (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (default: 5)")
    options = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    lone = {n: measured(n, options.batch // n, options.steps, False)[0] for n in (1, *options.workers)}
    print(f"1 worker, batch {options.batch}: {lone[1]:.3f} s a step")
    for n in options.workers:
        together, reduce, volume = measured(n, options.batch, options.steps, True)
        predicted = lone[n] + reduce
        print(
            f"{n} workers: lone step at batch {options.batch // n} {lone[n]:.3f} s, all-reduce of "
            f"{volume / 1e6:.0f} MB {reduce:.3f} s; step predicted {predicted:.3f} s, measured {together:.3f} s; "
            f"efficiency predicted {lone[1] / (n * predicted):.0%}, measured {lone[1] / (n * together):.0%}"
        )
    print("\nprojected efficiency, all-reduce after the computing to hidden behind it")
    for name, (step, gradients) in PROJECTED.items():
        shares = {n: project(n, step, gradients) for n in (1, 2, 4, 8, 16, 32, 64)}
        print(
            f"{name}: " + ", ".join(f"{n} GPUs {low:.0%} to {high:.0%}" for n, (low, high) in shares.items())
        )


if __name__ == "__main__":
    main()
