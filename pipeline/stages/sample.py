"""The sample stage: draws images and writes them as shards, one unit for each shard.

Every draw is a function of (seed, image index, t), so an image does not depend on who makes it, or when. A shard
that was drawn by another protocol is drawn again.
"""

import logging
from collections.abc import Iterator
from itertools import chain, islice

import torch

from ddpm.diffusion import Diffusion
from ddpm.images import to_uint8
from ddpm.sampler import explain_few_steps
from pipeline.compute.units import Unit, UnitKind, Worker
from pipeline.config import Experiment, to_yaml
from pipeline.config.checks import Tree
from pipeline.drawing.grids import save_grid
from pipeline.errors import PipelineError
from pipeline.stages.stage import Stage
from pipeline.store import tars
from pipeline.store.checkpoint import load_model
from pipeline.store.files import try_read, write_text
from pipeline.store.run import Place
from pipeline.store.tars import Shard

log = logging.getLogger(__name__)

SPLIT = "samples"
GRID_SIDE = 10


def make_sample_protocol(experiment: Experiment) -> Tree:
    """Return the protocol of a sample set, which a shard must have to be kept; that of its scores repeats it."""
    config, timesteps = experiment.sample, experiment.diffusion.timesteps
    ancestral = config.sampler == "ancestral"
    return {
        "checkpoint": experiment.checkpoint_step,
        "weights": experiment.weights_kind,
        "sampler": config.sampler + (f", {config.spacing} steps" if config.spacing != "uniform" else ""),
        "steps": config.steps or timesteps,
        "timesteps": timesteps,
        "eta": None if ancestral else config.eta,
        "variance": config.variance or experiment.diffusion.variance if ancestral else None,
        "label": config.label,
        "guidance_scale": config.guidance_scale,
        "seed": experiment.seed,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "rounding": "nearest",
    }


class SampleStage(Stage):
    """Draws the sample set of the checkpoint that sample.checkpoint means."""

    name = "sample"
    uses_checkpoint = adds_to_run = True

    def list_required_stages(self, experiment: Experiment) -> tuple[str, ...]:
        return ("shard", "train", "select") if experiment.sample.checkpoint == "best" else ("shard", "train")

    def is_done(self, place: Place) -> bool:
        """Return whether the sample set is sealed, with its grid, its protocol and at least num_images."""
        manifest = try_read(tars.read_shard_manifest, place.samples)
        if manifest is None or {place.samples_grid.name, place.samples_yaml.name} - manifest["files"].keys():
            return False
        wanted = place.experiment.sample.num_images
        return SPLIT in manifest["splits"] and manifest["splits"][SPLIT]["count"] >= wanted

    def work(self, place: Place) -> Iterator[list[Unit]]:
        """Yield the units of missing shards, then seal the sample set with its grid and protocol."""
        experiment, config, data = place.experiment, place.experiment.sample, place.experiment.data
        protocol = make_sample_protocol(experiment)
        if config.sampler == "ancestral":
            diffusion = Diffusion(experiment.diffusion)
            if warning := explain_few_steps(diffusion, config.steps, config.variance):
                log.warning("sample: %s", warning)
        size = min(config.batch_size, config.num_images)  # a smaller set is one shard
        shards = [
            Shard(place.samples, f"{start // size:05d}.tar", SPLIT, start, start + size)
            for start in range(0, config.num_images, size)
        ]
        yield [
            Unit(
                UnitKind.SAMPLES, write_sample_shard, (place, shard), f"samples {shard.start}-{shard.stop - 1}",
                shard.count, needs_gpu=True,
            )
            for shard in shards
            if shard.read_facts(protocol=protocol) is None
        ]  # fmt: skip
        written = [shard.require_facts(protocol=protocol) for shard in shards]
        records = chain.from_iterable(tars.read_records(shard.path) for shard in shards)
        pixels = [torch.tensor(tars.decode_png(record.png)) for record in islice(records, GRID_SIDE**2)]
        save_grid(torch.stack(pixels), GRID_SIDE, place.samples_grid)
        protocol |= {"compiled": config.compile}  # it moves the order of sums only
        write_text(place.samples_yaml, to_yaml(protocol))
        tars.write_shard_manifest(
            place.samples, {SPLIT: written}, [place.samples_grid.name, place.samples_yaml.name],
            image_size=data.image_size, channels=data.channels,
            labels=0 if config.label is None else data.labels, protocol=protocol,
        )  # fmt: skip


STAGE = SampleStage()


def write_sample_shard(ctx: Worker, place: Place, shard: Shard) -> None:
    """Draw the images of one shard and write it, then its facts (body of a unit)."""
    experiment, config = place.experiment, place.experiment.sample
    model = load_model(place, ctx.device, config.precision, config.compile, config.graph)
    labels = model.make_context(config.label, torch.arange(shard.start, shard.stop, device=ctx.device))
    first = shard.start + config.first_index
    images = model.sample(shard.count, first=first, batch_size=shard.count, label=labels)
    if not bool(images.isfinite().all()):
        remedy = "get others" if experiment.published.weights else "name an earlier step in sample.checkpoint"
        raise PipelineError(
            f"samples {shard.start}-{shard.stop - 1} of {place.path} are not finite: the weights of step "
            f"{experiment.checkpoint_step} have diverged; {remedy}"
        )
    pixels = to_uint8(images).cpu().numpy().transpose(0, 2, 3, 1)
    classes = [None] * len(pixels) if labels is None else labels.tolist()
    records = (
        tars.Record(f"{number:08d}", tars.encode_png(image), label)
        for number, image, label in zip(range(shard.start, shard.stop), pixels, classes, strict=True)
    )
    shard.write(records, protocol=make_sample_protocol(experiment), compiled=config.compile)
