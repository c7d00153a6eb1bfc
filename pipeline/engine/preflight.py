"""What a run will need, before it starts: its processes and the disk are checked, its memory is printed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

from ddpm.diffusion import Diffusion
from ddpm.networks.build import check_network
from ddpm.networks.custom import CustomConfig
from pipeline.compute.resources import count_local_devices, resolve_resources
from pipeline.compute.units import GIB
from pipeline.config import ClusterConfig, Experiment
from pipeline.errors import PipelineError
from pipeline.scores.extractors import EXTRACTORS
from pipeline.scores.metrics import needs_samples
from pipeline.stages.stage import Stage
from pipeline.store import checkpoint
from pipeline.store.run import Place

FLOAT = 4  # bytes
MEMBERS = 1536  # bytes of a tar that an image takes beside its PNG: headers and padding
CLASSES = 1008  # of Inception, the most that an extractor knows
MARGIN = 2**28  # bytes: logs, pictures, the tracking store


@dataclass(frozen=True)
class Requirements:
    """Bytes of disk and memory that a run needs, and the numbers of checkpoints to keep and of images.

    memory: of a training worker, without images and activations, which are not known before the first step.
    """

    checkpoint_count: int
    checkpoints: int
    images: int
    samples: int
    features: int
    memory: int

    @property
    def disk(self) -> int:
        return self.checkpoints + self.samples + self.features + MARGIN


def estimate_requirements(experiment: Experiment) -> Requirements:
    """Estimate the disk and memory of a whole run; an image counts as its uncompressed pixels."""
    train, evaluate, images = experiment.train, experiment.evaluate, experiment.sample.num_images
    weights = FLOAT * sum(p.numel() for p in checkpoint.create_network(experiment, "meta").parameters())
    state = weights * (3 + len(train.ema_decay))  # the network, Adam's two moments, the EMAs
    # The newest checkpoints, and all that are never deleted: an upper limit.
    steps = range(0, train.steps, train.checkpoint_every)[1:]
    is_kept = train.keep_every or evaluate.checkpoint_interval
    kept = train.keep + (sum(map(experiment.keeps_checkpoint, steps)) if is_kept else 0)
    if evaluate.checkpoints:
        interval = evaluate.checkpoint_interval
        images += (train.steps // interval if interval else kept) * evaluate.checkpoint_images
    width = EXTRACTORS[evaluate.features].width if needs_samples(evaluate.metrics) else 0
    return Requirements(
        checkpoint_count=kept,
        # One more than are kept while a new one is written; the first EMA is stored twice.
        checkpoints=(kept + 1) * (state + weights) + len(train.keep_steps) * weights,
        images=images,
        samples=images * (prod(experiment.data.shape) + MEMBERS),
        # With real images and two baselines, each as many as the samples; an image has its features and its logits.
        features=(images + 3 * experiment.sample.num_images) * FLOAT * (width + min(width, CLASSES)),
        # The state, its gradients, and the copies that a checkpoint is written from.
        memory=2 * (state + weights),
    )


def check_workers(cluster: ClusterConfig) -> None:
    """Raise PipelineError if the workers need more than this machine has; other clusters are checked when joined."""
    if cluster.workers != 0 and cluster.ray_address is None:
        resolve_resources(cluster, [count_local_devices()])


def check_custom_network(experiment: Experiment) -> None:
    """Raise PipelineError if a custom network cannot be built, or its output has a wrong shape or type."""
    if isinstance(experiment.model, CustomConfig):
        try:
            outputs = Diffusion(experiment.diffusion).count_output_channels(experiment.data.channels)
            net = checkpoint.create_network(experiment)
            check_network(net, experiment.data.shape, outputs, experiment.model.takes_labels)
        except (Exception, SystemExit) as error:  # the code of its author may raise anything
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise PipelineError(f"model.name={experiment.model.name} cannot be trained: {reason}") from error


def check_resources(place: Place, todo: Sequence[Stage] = ()) -> str:
    """Return a line on what the run needs. Raises PipelineError if a stage, or the disk, has less than it needs."""
    for stage in todo:
        stage.check_before_start(place)
    check_custom_network(place.experiment)
    wanted = estimate_requirements(place.experiment)
    files = chain(place.path.rglob("*"), place.reference_features.rglob("*"))
    there = sum(file.stat().st_size for file in files if file.is_file())
    left, free = max(0, wanted.disk - there), shutil.disk_usage(place.storage).free
    if left > free:
        raise PipelineError(
            f"{place.storage} has {_format_size(free)} free, the run needs {_format_size(left)} more: "
            f"{_format_size(wanted.checkpoints)} for {wanted.checkpoint_count} checkpoints, "
            f"{_format_size(wanted.samples)} for {wanted.images:,} samples, "
            f"{_format_size(wanted.features)} for features; make room, set "
            "cluster.storage, or lower train.keep or sample.num_images, or raise the N of evaluate.checkpoints=every:N"
        )
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpus, gpus = count_local_devices()
    return (
        f"{_format_size(left)} of disk ({_format_size(free)} free), {_format_size(wanted.memory)} of memory a worker "
        f"beside images and activations ({_format_size(memory)} free here, {cpus} CPUs, {gpus} GPUs)"
    )


def _format_size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
