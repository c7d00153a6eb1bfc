"""Training step and forward pass of the 35.7 M network beside its peers, and beside its products alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from unittest import mock

import torch

from benchmarks import subjects
from benchmarks.floor import floor_of
from benchmarks.harness import FLOOR, OURS, Contender, Outcome, Settings, offered, race
from benchmarks.subjects import FASTEST, Way, contender, list_precisions, ways
from ddpm.config import Precision
from ddpm.kernels import winograd
from ddpm.precision import use_deterministic, use_precision

TRAIN = {
    OURS: subjects.our_train_step,
    "diffusers": subjects.diffusers_train_step,
    "denoising-diffusion-pytorch": subjects.lucidrains_train_step,
}
FORWARD = {
    OURS: subjects.our_forward,
    "diffusers": subjects.diffusers_forward,
    "denoising-diffusion-pytorch": subjects.lucidrains_forward,
}


def run(settings: Settings) -> Outcome:
    outcome = Outcome()
    for batch, precision in product(batches(settings), list_precisions(settings)):
        for what, subject in (("train", TRAIN), ("forward", FORWARD)):
            case = f"{what} {precision}, batch {batch}"
            with use_precision(precision), use_deterministic(False):
                found = _contenders(outcome, settings, subject, precision, batch)
                outcome.rows += race(case, found, settings, "images/s", found[0].name if found else "")
            del found  # their weights and graphs go before the next ones come
            _free(settings)
    return outcome


def batches(settings: Settings) -> tuple[int, ...]:
    if settings.on_gpu:
        return (128,) if settings.quick else (128, 512)
    return (4,) if settings.quick else (16, 64)


def _contenders(
    outcome: Outcome, settings: Settings, subject: dict[str, Callable], precision: Precision, batch: int
) -> list[Contender]:
    """Return the networks to compare: ours first, then each peer in its best and in its default setting, fp32.

    At the second batch only the plain setting of each.
    """
    makers = []
    for name, make in subject.items():
        found = ways(settings, precision)
        if name != OURS:
            found.append(Way("fp32", channels_last=False, default=True))
        elif settings.on_gpu and precision == "bf16":
            found = [FASTEST, replace(FASTEST, graph=False), *found]
            found += [Way(precision, deterministic=True)] if subject is TRAIN else []
        if batch != batches(settings)[0]:  # long ones, for the same comparison
            found = [way for way in found if way == Way(precision)]
        makers += [
            contender(settings, f"{name} {way}", partial(make, settings, way, batch), batch) for way in found
        ]

    def floor() -> list[Contender]:
        call = subject[OURS](settings, Way(precision), batch)
        # Of plain convolutions, whatever way this network goes.
        with mock.patch.object(winograd, "choose_basis", return_value=None):
            return [Contender(f"{FLOOR}: products alone", floor_of(call), batch)]

    return offered(outcome, *makers, floor)


def _free(settings: Settings) -> None:
    torch.compiler.reset()
    if settings.on_gpu:
        torch.cuda.empty_cache()
