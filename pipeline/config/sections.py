"""What an experiment and a cluster consist of: frozen dataclasses, and what makes their values wrong.

The sections of the science (diffusion, model, train) stand beside the code that they configure, in `ddpm`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddpm.config import DiffusionConfig, TrainConfig
from ddpm.networks import TAKES_LABELS
from pipeline.config.checks import Problems, among, at_least, suggestion
from pipeline.errors import ConfigError, PipelineError

PUBLISHED_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

TRACKING = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
METRICS = ("fid", "fid_test", "is", "kid", "prc", "nll")
SPLITS = ("train", "test")
FIGURES = (
    "samples", "progressive", "interpolation", "coarse_to_fine", "shared_latents", "rate_distortion",
    "scores_along", "nearest_pixels", "nearest_features",
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and what shape they have. `labels` is the number of classes, 0 for none;
    `test_images` are held out where the source has no test split of its own."""

    source: Literal["cifar10", "digits", "folder", "lmdb", "npy", "parquet"]
    path: str | None
    image_size: int
    channels: int
    labels: int
    images_per_shard: int
    test_images: int
    resize: Literal["crop", "refuse"]
    max_undecodable: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.channels, self.image_size, self.image_size

    def problems(self) -> Problems:
        found = at_least(self, image_size=2, labels=0, images_per_shard=1, test_images=0, max_undecodable=0)
        if self.channels not in (1, 3):
            found.append(("channels", f"is {self.channels}; images are grey (1) or colour (3)"))
        if self.source == "digits" and self.path is not None:
            found.append(
                ("path", "is given, but the digits come with scikit-learn; set it to null, or data.source")
            )
        if self.source not in ("cifar10", "digits") and self.path is None:
            found.append(("path", f"is null; data.source={self.source} needs the place of the images"))
        return found


@dataclass(frozen=True)
class PublishedConfig:
    """Weights that stand in for training: `path` is a folder in the diffusers layout, `weights` what its authors
    say they are. Both null = the network is trained here."""

    path: str | None
    weights: Literal["raw", "ema", "unknown"] | None

    def problems(self) -> Problems:
        if self.path is not None and self.weights is None:
            return [("weights", "is null; say what the published weights are: raw, ema or unknown")]
        return []

    @property
    def file(self) -> Path | None:
        """The file of the weights; None where the network is trained here. Raises ConfigError where it is missing."""
        if self.weights is None:
            return None
        if self.path is None:
            raise ConfigError("published.path is null; set it to the folder of the published weights")
        folders = (Path(self.path), Path(self.path) / "unet")
        for file in (folder / name for folder in folders for name in PUBLISHED_FILES):
            if file.is_file():
                return file
        raise ConfigError(
            f"published.path: {self.path} holds no {' or '.join(PUBLISHED_FILES)}, nor does its unet/"
        )


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn. `steps` null = all T; `variance` null = diffusion.variance; `checkpoint` is
    `last` (step train.steps), a step, or `best` (of evaluate.checkpoints; `pipeline.config.variants.chosen`
    is the experiment that knows which one that is). A work unit is `batch_size` images. `label` is null (no
    class), a class, or `cycle` (image i gets class i modulo data.labels), for networks that take labels;
    `guidance_scale` 1 is the plain conditional network; `compile` and `precision` are the network's."""

    num_images: int
    sampler: Literal["ancestral", "ddim"]
    steps: int | None
    eta: float
    variance: Literal["fixedlarge", "fixedsmall"] | None
    batch_size: int
    weights: Literal["ema", "raw"]
    checkpoint: str
    label: str | None
    guidance_scale: float
    compile: bool
    precision: Literal["fp32", "bf16"]

    def problems(self) -> Problems:
        found = at_least(self, num_images=1, steps=1, batch_size=1)
        if not 0 <= self.eta <= 1:
            found.append(("eta", f"is {self.eta}; it lies in [0, 1]: 0 is deterministic, 1 ancestral"))
        if self.checkpoint not in ("last", "best") and not self.checkpoint.isdigit():
            found.append(("checkpoint", f"is '{self.checkpoint}'; use last, best or a step number"))
        if self.label is not None and self.label != "cycle" and not self.label.isdigit():
            found.append(("label", f"is '{self.label}'; use null, cycle or the number of a class"))
        if self.guidance_scale < 0:
            found.append(
                ("guidance_scale", f"is {self.guidance_scale}; 1 is the plain network, more exaggerates")
            )
        return found


@dataclass(frozen=True)
class EvaluateConfig:
    """Which scores, and their protocol. `reference` is a split of the data, or the path of an .npz with the mu
    and sigma of somebody's features; `nll_images` null = the whole test split; `precision` is the network's in
    the NLL.

    `checkpoints` (null, all or every:N) are scored with `checkpoint_images` samples each, which shows the way
    and finds the best.
    """

    metrics: tuple[str, ...]
    features: Literal["inception-v3-compat", "classifier", "projection"]
    extractor_weights: str | None
    reference: str
    nll_images: int | None
    nll_batch_size: int
    decoder: Literal["tanh", "erf"]
    variance: Literal["fixedlarge", "fixedsmall"] | None
    precision: Literal["fp32", "bf16"]
    checkpoints: str | None
    checkpoint_images: int

    @property
    def checkpoint_interval(self) -> int | None:
        """The N of checkpoints=every:N; None otherwise."""
        every = re.fullmatch(r"every:([1-9]\d*)", self.checkpoints or "")
        return int(every[1]) if every else None

    def problems(self) -> Problems:
        found = at_least(self, nll_images=1, nll_batch_size=1, checkpoint_images=2)
        found += among(self, "metrics", METRICS)
        if self.checkpoints not in (None, "all") and self.checkpoint_interval is None:
            found.append(
                ("checkpoints", f"is '{self.checkpoints}'; use null, all or every:N, with N in steps")
            )
        return found + self._reference_problems()

    def _reference_problems(self) -> Problems:
        file = self.reference_file
        if file is None:
            return []
        if file.suffix != ".npz":
            hint = suggestion(self.reference, SPLITS)
            return [("reference", f"is '{self.reference}'{hint}; use train, test or the path of an .npz")]
        needs = [metric for metric in ("kid", "prc") if metric in self.metrics]
        if needs:
            return [
                ("reference", f"names statistics, and {' and '.join(needs)} need images: use train or test")
            ]
        return []

    @property
    def reference_file(self) -> Path | None:
        """The user's statistics; None where the reference is a split of the data."""
        return None if self.reference in SPLITS else Path(self.reference).expanduser()

    def missing(self) -> Problems:
        """Named files that are not on this machine: no fault of the values."""
        found: Problems = []
        if self.extractor_weights is not None and not Path(self.extractor_weights).is_file():
            found.append(
                ("extractor_weights", f"'{self.extractor_weights}' is not a file; see `ddpm doctor`")
            )
        if self.reference_file is not None and not self.reference_file.is_file():
            found.append(("reference", f"'{self.reference}' is not a file"))
        return found


@dataclass(frozen=True)
class FiguresConfig:
    """Which figures of the paper are drawn, with how many rows of images each."""

    which: tuple[str, ...]
    images: int

    def problems(self) -> Problems:
        return at_least(self, images=1) + among(self, "which", FIGURES)


@dataclass(frozen=True)
class Experiment:
    """Everything that may change a number."""

    name: str
    seed: int
    data: DataConfig
    diffusion: DiffusionConfig
    model: Any
    train: TrainConfig
    published: PublishedConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    figures: FiguresConfig

    def problems(self) -> Problems:
        """Faults that only several sections together show, each with its full key."""
        found: Problems = []
        if not 0 <= self.seed < 2**63:
            found.append(("seed", f"is {self.seed}; it lies in [0, 2^63)"))
        found += [(f"model.{key}", fault) for key, fault in self.model.problems(self.data.image_size)]
        if (self.sample.steps or 0) > self.diffusion.timesteps:
            found.append(
                (
                    "sample.steps",
                    f"is {self.sample.steps}, more than diffusion.timesteps={self.diffusion.timesteps}",
                )
            )
        if self.sample.checkpoint.isdigit() and int(self.sample.checkpoint) > self.train.steps:
            found.append(
                ("sample.checkpoint", f"is {self.sample.checkpoint}, beyond train.steps={self.train.steps}")
            )
        found += self._label_problems() + self._selection_problems()
        if self.evaluate.features == "classifier" and not self.data.labels:
            found.append(
                (
                    "evaluate.features",
                    "is classifier, which needs labels; use projection for unlabelled images",
                )
            )
        return found

    def missing(self) -> list[str]:
        """Files that the values name and that are not on this machine, a line each. Scores made with them stay
        readable; no key that hashes them can be told."""
        return [f"evaluate.{key} {fault}" for key, fault in self.evaluate.missing()]

    @property
    def takes_labels(self) -> bool:
        """Whether the network is told the class of an image."""
        return self.model.name in TAKES_LABELS

    def asked_label(self, index: int) -> int | None:
        """The class that sample `index` is asked to be; None where none is."""
        if self.sample.label == "cycle":
            return index % self.data.labels
        return None if self.sample.label is None else int(self.sample.label)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of `step` stays, however many come after it."""
        every = (self.train.keep_every, self.evaluate.checkpoint_interval)
        return any(number is not None and step % number == 0 for number in every)

    def _selection_problems(self) -> Problems:
        sample, evaluate, interval = self.sample, self.evaluate, self.evaluate.checkpoint_interval
        found: Problems = []
        if sample.checkpoint == "best" and not evaluate.checkpoints:
            found.append(
                ("sample.checkpoint", "is best; say among which: evaluate.checkpoints=all or every:N")
            )
        if self.published.weights and evaluate.checkpoints:
            found.append(
                (
                    "evaluate.checkpoints",
                    "is for networks that are trained here; published weights are one set",
                )
            )
        if interval and (interval % max(1, self.train.checkpoint_every) or interval > self.train.steps):
            found.append(
                (
                    "evaluate.checkpoints",
                    f"is {evaluate.checkpoints}; N is a multiple of train.checkpoint_every="
                    f"{self.train.checkpoint_every}, up to train.steps={self.train.steps}",
                )
            )
        units = {min(n, sample.batch_size) for n in (sample.num_images, evaluate.checkpoint_images)}
        if evaluate.checkpoints and len(units) > 1:
            found.append(
                (
                    "evaluate.checkpoint_images",
                    f"is {evaluate.checkpoint_images}: it and sample.num_images={sample.num_images} must both be at "
                    f"least sample.batch_size={sample.batch_size}, so that they are cut into the same units",
                )
            )
        return found

    def _label_problems(self) -> Problems:
        label, scale = self.sample.label, self.sample.guidance_scale
        if not self.takes_labels:
            able = " or ".join(sorted(TAKES_LABELS))
            asked = label is not None or scale != 1 or self.train.label_dropout > 0
            return [("sample.label", f"is for networks that take labels: model.name={able}")] if asked else []
        found: Problems = []
        if label is not None and label.isdigit() and int(label) >= self.data.labels:
            found.append(
                (
                    "sample.label",
                    f"is {label}; data.labels={self.data.labels}, so classes end at {self.data.labels - 1}",
                )
            )
        if scale != 1 and (label is None or self.train.label_dropout == 0):
            found.append(
                (
                    "sample.guidance_scale",
                    "needs a sample.label, and a network trained with train.label_dropout",
                )
            )
        return found


@dataclass(frozen=True)
class ClusterConfig:
    """Where it runs. Null means chosen from what the cluster has; `workers` 0 = this process, without Ray."""

    workers: int | None
    min_workers: int | None
    cpus_per_worker: int | None
    gpus_per_worker: float | None
    cpus_per_task: int
    gpus_per_task: float | None
    image_memory: float
    retries: int
    ray_address: str | None
    storage: str
    tracking_uri: str | None

    def problems(self) -> Problems:
        found = at_least(
            self,
            workers=0,
            min_workers=1,
            cpus_per_worker=1,
            gpus_per_worker=0,
            cpus_per_task=1,
            gpus_per_task=0,
            image_memory=0,
            retries=0,
        )
        if self.min_workers and self.workers is not None and self.min_workers > self.workers:
            found.append(
                (
                    "min_workers",
                    f"is {self.min_workers}; cluster.workers={self.workers} is the most that train",
                )
            )
        scheme, _, rest = (self.tracking_uri or "").partition("://")
        if self.tracking_uri is not None and not (rest and scheme.split("+")[0] in TRACKING):
            known = ", ".join(f"{known}://" for known in TRACKING)
            found.append(("tracking_uri", f"begins with '{scheme}'; MLflow's stores are {known}"))
        return found


def checkpoint_step(experiment: Experiment) -> int:
    """The training step whose weights are sampled and scored. Raises PipelineError where that is the best of
    several and the experiment does not know yet which one (see `variants.chosen`)."""
    which = experiment.sample.checkpoint
    if which == "best":
        raise PipelineError(
            "sample.checkpoint=best is known once evaluate.checkpoints are scored; `ddpm sample` does that first"
        )
    return experiment.train.steps if which == "last" else int(which.split()[0])


def checkpoint_rule(experiment: Experiment) -> str | None:
    """How the step was chosen, where it is the best of several: what `variants.chosen` wrote behind it."""
    _, _, rule = experiment.sample.checkpoint.partition(" ")
    return rule.strip("()") or None


def weights_kind(experiment: Experiment) -> str:
    """What a protocol calls the weights that are sampled and scored: ema, raw or unknown."""
    return experiment.published.weights or experiment.sample.weights
