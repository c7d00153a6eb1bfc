"""1,000-step ancestral sampling, images per second with everything around the network.

On a GPU the whole chain is timed once per turn; on a CPU a few steps are, and the rate of 1,000 is projected from
them (each costs the same): the table says so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import subjects
from benchmarks.harness import FLOOR, OURS, Outcome, Settings, offered, race
from benchmarks.subjects import FASTEST, Way, contender, list_precisions, ways
from ddpm import Diffusion, run_image_chains
from ddpm.precision import use_deterministic, use_precision

STEPS = 1000


def run(settings: Settings) -> Outcome:
    outcome, batch, steps = Outcome(), *_size(settings)
    images = batch * steps / STEPS  # finished images that the timed steps amount to
    measured = f"projected from {steps} steps" if steps < STEPS else "measured"
    for precision in list_precisions(settings):
        with use_precision(precision), use_deterministic(False):
            makers = []
            if settings.on_gpu and precision == FASTEST.precision:
                body = partial(_ours, settings, FASTEST, batch, steps)
                makers.append(contender(settings, f"{OURS} {FASTEST}", body, images))
            for way in ways(settings, precision):
                makers += [
                    contender(settings, f"{OURS} {way}", partial(_ours, settings, way, batch, steps), images),
                    contender(settings, f"diffusers {way}", partial(_diffusers, settings, way, batch, steps), images),
                    contender(settings, f"{FLOOR}: the network of {OURS} alone, {way}",
                              partial(_network_alone, settings, way, batch, steps), images),
                ]  # fmt: skip
            found = offered(outcome, *makers)
            case = f"{STEPS} steps {precision}, batch {batch}, {measured}"
            outcome.rows += race(case, found, settings, "images/s", found[0].name if found else "")
    return outcome


def _size(settings: Settings) -> tuple[int, int]:
    """Batch, and steps that are timed."""
    if settings.on_gpu:
        return 256, 50 if settings.quick else 250
    return (4, 2) if settings.quick else (32, 4)


def _ours(settings: Settings, way: Way, batch: int, steps: int) -> Callable[[], Any]:
    """The chain as the sample stage runs it: x_T and every z from the counter-based generator."""
    network, diffusion = subjects.make_sampler(settings, way), Diffusion().to(settings.device)
    index = torch.arange(batch, device=settings.device)

    def chain() -> None:
        for _ in run_image_chains(
            diffusion, network, index=index, shape=(3, subjects.SIDE, subjects.SIDE), seed=0,
            steps=steps,
        ):  # fmt: skip
            pass

    return chain


def _diffusers(settings: Settings, way: Way, batch: int, steps: int) -> Callable[[], Any]:
    from diffusers import DDPMPipeline, DDPMScheduler

    net = way.place(subjects.diffusers_network(), settings.device).eval().requires_grad_(False)
    pipeline = DDPMPipeline(way.call(net), DDPMScheduler(num_train_timesteps=STEPS))
    pipeline.set_progress_bar_config(disable=True)

    def chain() -> None:
        with way.autocast(settings.device):
            pipeline(batch_size=batch, num_inference_steps=steps, output_type="np")

    return chain


def _network_alone(settings: Settings, way: Way, batch: int, steps: int) -> Callable[[], Any]:
    forward = subjects.our_forward(settings, way, batch)

    def calls() -> None:
        for _ in range(steps):
            forward()

    return calls
