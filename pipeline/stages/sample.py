"""The sample stage: a checkpoint -> tars of images, one work unit for each range of image indices.

Every draw is a function of (seed, image index, t), so an image does not depend on who makes it, or when.
Beside `00000.tar` stands `00000.json` with its range, protocol and facts, written after it: a tar that lacks
it, or differs from it, is drawn again.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from ddpm.diffusion import Diffusion
from ddpm.images import to_uint8
from ddpm.sampler import few_steps_warning, sample
from pipeline.compute.work import Kind, Unit, WorkerContext
from pipeline.config import Experiment, checkpoint_step, to_yaml, weights_kind
from pipeline.drawing.grids import save_grid
from pipeline.errors import PipelineError
from pipeline.store import tars
from pipeline.store.chain import choose_labels, load_guided
from pipeline.store.files import MANIFEST, check_file, read_json, write_json, write_text
from pipeline.store.run import Place

log = logging.getLogger(__name__)

SPLIT = "samples"
GRID, PROTOCOL = "grid.png", "sample.yaml"
GRID_SIDE = 10


@dataclass(frozen=True)
class Protocol:
    """How a set of samples was drawn, nulls resolved: what stands beside every score of it."""

    checkpoint: int
    weights: str
    sampler: str
    steps: int
    timesteps: int
    eta: float | None
    variance: str | None
    label: int | str | None
    guidance_scale: float
    seed: int
    batch_size: int
    compiled: bool
    precision: str
    rounding: str


def protocol(experiment: Experiment) -> Protocol:
    config, timesteps = experiment.sample, experiment.diffusion.timesteps
    ancestral = config.sampler == "ancestral"
    return Protocol(
        checkpoint=checkpoint_step(experiment),
        weights=weights_kind(experiment),
        sampler=config.sampler,
        steps=config.steps or timesteps,
        timesteps=timesteps,
        eta=None if ancestral else config.eta,
        variance=config.variance or experiment.diffusion.variance if ancestral else None,
        label=config.label,
        guidance_scale=config.guidance_scale,
        seed=experiment.seed,
        batch_size=config.batch_size,
        compiled=config.compile,
        precision=config.precision,
        rounding="nearest",
    )


def directory(experiment: Experiment, run: Place) -> Path:
    return run.of(experiment).samples


def is_done(experiment: Experiment, run: Place) -> bool:
    """Whether at least as many samples as asked for are on disk, and sealed."""
    folder = directory(experiment, run)
    if not (folder / MANIFEST).exists():
        return False
    try:
        index = tars.open_index(folder)
    except PipelineError as error:
        log.warning("%s; its samples are drawn again", error)
        return False
    pictured = (folder / GRID).exists() and (folder / PROTOCOL).exists()
    return pictured and index.count(SPLIT) >= experiment.sample.num_images


def work(experiment: Experiment, run: Place) -> Iterator[list[Unit]]:
    """Yields the ranges that are not on disk, then draws the grid and seals the folder."""
    config, folder = experiment.sample, directory(experiment, run)
    if config.sampler == "ancestral":
        warning = few_steps_warning(Diffusion(experiment.diffusion), config.steps, config.variance)
        if warning:
            log.warning("sample: %s", warning)
    ranges = plan(config.num_images, config.batch_size)
    yield [
        Unit(
            Kind.SAMPLES,
            draw,
            (experiment, run, start, stop),
            f"samples {start}-{stop - 1}",
            stop - start,
            tar=_tar(folder, start, stop),
            needs_gpu=True,
        )
        for start, stop in ranges
        if finished(experiment, folder, start, stop) is None
    ]
    facts = [_finished_or_raise(experiment, folder, start, stop) for start, stop in ranges]
    _seal(experiment, folder, facts)


def plan(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """Ranges of exactly batch_size images that hold the first num_images; a set that is smaller than one
    batch is a single range of its own size."""
    size = min(batch_size, num_images)
    return [(start, start + size) for start in range(0, num_images, size)]


def draw(ctx: WorkerContext, experiment: Experiment, run: Place, start: int, stop: int) -> None:
    """The work unit: images [start, stop) as one tar, then its facts."""
    config = experiment.sample
    index = torch.arange(start, stop, device=ctx.device)
    labels = [experiment.asked_label(number) for number in range(start, stop)]
    images = sample(
        Diffusion(experiment.diffusion), load_guided(run.of(experiment), ctx.device, config.compile),
        index=index, shape=experiment.data.shape,
        seed=experiment.seed, sampler=config.sampler, steps=config.steps, eta=config.eta,
        variance=config.variance, context=choose_labels(experiment, index), device=ctx.device,
    )  # fmt: skip
    if not bool(images.isfinite().all()):
        raise PipelineError(
            f"samples {start}-{stop - 1} of {run.path} are not finite: the weights of step "
            f"{checkpoint_step(experiment)} have diverged; name an earlier step in sample.checkpoint"
        )
    pixels = to_uint8(images).cpu().numpy().transpose(0, 2, 3, 1)
    records = (
        tars.Record(f"{number:08d}", tars.encode_png(image), label)
        for number, image, label in zip(range(start, stop), pixels, labels, strict=True)
    )
    tar = _tar(directory(experiment, run), start, stop)
    facts = tars.write_shard(tar, records)
    write_json(tar.with_suffix(".json"), {**_identity(experiment, start, stop), **facts})


def finished(experiment: Experiment, folder: Path, start: int, stop: int) -> dict[str, Any] | None:
    """The facts of a range that is on disk, whole and drawn by this very protocol, else None."""
    tar = _tar(folder, start, stop)
    if not tar.with_suffix(".json").exists():
        return None
    try:
        facts = read_json(tar.with_suffix(".json"))
        check_file(tar, facts)
    except PipelineError:
        return None
    return facts if _identity(experiment, start, stop).items() <= facts.items() else None


def _identity(experiment: Experiment, start: int, stop: int) -> dict[str, Any]:
    return {"start": start, "stop": stop, "protocol": asdict(protocol(experiment))}


def _tar(folder: Path, start: int, stop: int) -> Path:
    return folder / f"{start // (stop - start):05d}.tar"


def _finished_or_raise(experiment: Experiment, folder: Path, start: int, stop: int) -> dict[str, Any]:
    facts = finished(experiment, folder, start, stop)
    if facts is None:
        raise PipelineError(f"{_tar(folder, start, stop)} changed under our hands; run the command again")
    return facts


def _seal(experiment: Experiment, folder: Path, facts: list[dict[str, Any]]) -> None:
    """The grid and the protocol, then the manifest, without which nobody believes the folder."""
    how, data = protocol(experiment), experiment.data
    first = chain.from_iterable(tars.read_shard(folder / shard["name"]) for shard in facts)
    pixels = [torch.tensor(tars.decode_png(record.png)) for record in islice(first, GRID_SIDE**2)]
    save_grid(torch.stack(pixels), GRID_SIDE, folder / GRID)
    write_text(folder / PROTOCOL, to_yaml(how))
    shape = {
        "image_size": data.image_size,
        "channels": data.channels,
        "labels": 0 if experiment.sample.label is None else data.labels,
    }
    tars.write_index(folder, {SPLIT: facts}, **shape, protocol=asdict(how))
