"""The sections of an experiment and of a cluster, as frozen dataclasses.

The types say what a key may hold (`checks` reads them); `find_problems` compares several keys.
The settings of the science (diffusion, model, train) stand beside the code that they configure, in `ddpm`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from ddpm.config import LEARNED, Count, Decoder, DiffusionConfig, Problems, Range, Sampler, Share, TrainConfig
from ddpm.networks import TAKES_LABELS, UNTRAINED
from ddpm.networks.config import NetworkConfig
from pipeline.errors import PipelineError, suggest

TRACKING = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
SPLITS = ("train", "test")
FILE_NAME = r"(?!(data|sweeps|comparisons|extractors|mlartifacts)$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NAME_RULE = (
    "it names a folder: up to 100 letters, digits, '.', '_', '-', none of the storage root's own (data, ...)"
)
LARGEST_BATCH = 2**34  # pixels

Problem = tuple[str, str]  # key, what is wrong with it
CANDIDATES = 2**31  # the first index of candidates' samples: the selected one is scored on others
FromZero = Annotated[int, Range(ge=0, le=10**9)]
CountOrNull = Annotated[int | None, Range(ge=1, le=10**9)]
Seed = Annotated[int, Range(ge=0, lt=2**63)]
FixedVariance = Literal["fixedlarge", "fixedsmall"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class DataConfig:
    """Settings of the images: their source and their shape.

    labels: the number of classes, 0 for none.
    test_images: so many are held out where the source has no test split of its own.
    background: what shows through transparent pixels; null = no image may have any.
    image_column: the column of the images in parquet files; null = the only one.
    limit: so many training images, no two alike, drawn by a fixed permutation; null = all.
    """

    source: str
    path: str | None
    image_size: Annotated[int, Range(ge=2, le=2**14)]
    channels: Literal[1, 3]
    labels: Annotated[int, Range(ge=0, le=10**5)]
    images_per_shard: Count
    test_images: FromZero
    resize: Literal["crop", "refuse"]
    max_undecodable: FromZero
    background: Literal["white", "black"] | None = None
    image_column: str | None = None
    limit: CountOrNull = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.channels, self.image_size, self.image_size

    def find_problems(self) -> Iterator[Problem]:
        if self.source == "digits" and self.path is not None:
            yield "path", "is given, but the digits come with scikit-learn; set it to null, or data.source"
        if self.source not in ("cifar10", "digits") and self.path is None:
            yield "path", f"is null; data.source={self.source} needs the place of the images"


@dataclass(frozen=True)
class TrainStageConfig(TrainConfig):
    """Settings of training (`TrainConfig`), and of what the train stage writes meanwhile.

    Of the checkpoints stay the `keep` newest and every `keep_every`-th step; of `keep_steps`, which are saved too, the
    EMA. sample_every: 0 for no sample grids.
    """

    compile: bool
    deterministic: bool
    checkpoint_every: Count
    sample_every: FromZero
    keep: Count
    keep_every: CountOrNull
    log_every: Count
    keep_steps: tuple[Count, ...] = ()

    def find_problems(self) -> Problems:
        found = super().find_problems()
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            need = f"must be a multiple of checkpoint_every={self.checkpoint_every} or null"
            found.append(("keep_every", need))
        return found


@dataclass(frozen=True)
class PublishedConfig:
    """Settings of published weights that replace training; both null = the network is trained here.

    path: a folder in the diffusers layout; weights: what its authors say they are.
    """

    path: str | None
    weights: Literal["raw", "ema", "unknown"] | None

    def find_problems(self) -> Iterator[Problem]:
        if self.path is not None and self.weights is None:
            yield "weights", "is null; say what the published weights are: raw, ema or unknown"


@dataclass(frozen=True)
class SampleConfig:
    """Settings of the sampler.

    first_index: sample i is a function of first_index + i. batch_size: the images of one unit.
    steps: null = all T; eta: 0 is deterministic, 1 ancestral; variance: null = diffusion.variance.
    ema_decay: which of train.ema_decay's averages, null = the first.
    checkpoint: a step, `last` (step train.steps), or `best` (of evaluate.checkpoints).
    label: null (no class), a class, or `cycle` (image i gets class i modulo data.labels).
    guidance_scale: 1 is the plain conditional network, more exaggerates.
    compile, precision: of the network.
    """

    num_images: Count
    first_index: Annotated[int, Range(ge=0, lt=CANDIDATES)]
    sampler: Sampler
    steps: CountOrNull
    eta: Share
    variance: FixedVariance | None
    batch_size: Count
    weights: Literal["ema", "raw"]
    ema_decay: Annotated[float | None, Range(ge=0, lt=1)]
    checkpoint: int | Literal["last", "best"]
    label: int | Literal["cycle"] | None
    guidance_scale: Annotated[float, Range(ge=0, le=10**6)]
    compile: bool
    precision: Precision


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the scores and their protocol.

    reference: a split of the data, or the path of an .npz with the mu and sigma of somebody's features.
    nll_images: the first of nll_split, null = all; precision: of the network in the NLL.
    nll_timesteps: of each image t = 0 and so many draws of t, weighted back; null = all T.
    checkpoints: null, all or every:N; these candidates are scored with `checkpoint_images` samples each.
    """

    metrics: tuple[str, ...]
    features: Literal["inception-v3-compat", "efficientnet-lite0", "classifier", "projection"]
    extractor_weights: str | None
    reference: str
    nll_split: Literal["test", "train"]
    nll_images: CountOrNull
    nll_timesteps: CountOrNull
    nll_batch_size: Count
    decoder: Decoder
    variance: FixedVariance | None
    precision: Precision
    checkpoints: str | None
    checkpoint_images: Annotated[int, Range(ge=2, le=10**9)]

    @property
    def checkpoint_interval(self) -> int | None:
        """The N of checkpoints=every:N; None otherwise."""
        every = re.fullmatch(r"every:([1-9]\d*)", self.checkpoints or "")
        return int(every[1]) if every else None

    @property
    def reference_file(self) -> Path | None:
        """The path of the user's statistics; None where the reference is a split of the data."""
        return None if self.reference in SPLITS else Path(self.reference).expanduser()

    def find_problems(self) -> Iterator[Problem]:
        if self.checkpoints not in (None, "all") and self.checkpoint_interval is None:
            yield "checkpoints", f"is '{self.checkpoints}'; use null, all or every:N, with N in steps"
        if not self.metrics:
            yield "metrics", "is []; name one or several, as in [fid,nll]"
        needs_images = [metric for metric in ("kid", "prc") if metric in self.metrics]
        if self.reference_file and self.reference_file.suffix != ".npz":
            hint = suggest(self.reference, SPLITS)
            yield "reference", f"is '{self.reference}'{hint}; use train, test or the path of an .npz"
        elif self.reference_file and needs_images:
            metrics = " and ".join(needs_images)
            yield "reference", f"names statistics, and {metrics} need images: use train or test"


@dataclass(frozen=True)
class FiguresConfig:
    """Settings of the paper's figures: which are drawn, with how many rows of images each."""

    which: tuple[str, ...]
    images: Count


@dataclass(frozen=True)
class SelectedCheckpoint:
    """The step of the selected checkpoint, the number of candidates, and the rule of the selection in words."""

    step: int
    candidates: int
    rule: str


@dataclass(frozen=True)
class Experiment:
    """Everything that may change a number.

    selected: the checkpoint that sample.checkpoint=best means, once it is known; no file holds it.
    """

    name: str
    seed: Seed
    data: DataConfig
    diffusion: DiffusionConfig
    model: NetworkConfig
    train: TrainStageConfig
    published: PublishedConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    figures: FiguresConfig
    selected: SelectedCheckpoint | None = field(default=None, metadata={"in_file": False})

    def find_problems(self) -> Iterator[Problem]:
        """Find what is wrong between keys, each problem with its full key."""
        sample, evaluate = self.sample, self.evaluate
        if not re.fullmatch(FILE_NAME, self.name):
            yield "name", f"is {self.name!r}; {NAME_RULE}"
        sections: dict[str, Iterable[Problem]] = {
            "data": self.data.find_problems(),
            "diffusion": self.diffusion.find_problems(),
            "model": self.model.find_problems(self.data.image_size),
            "train": self.train.find_problems(),
            "published": self.published.find_problems(),
            "evaluate": evaluate.find_problems(),
        }
        for name, problems in sections.items():
            yield from ((f"{name}.{key}", problem) for key, problem in problems)
        if (sample.steps or 0) > self.diffusion.timesteps:
            limit = f"diffusion.timesteps={self.diffusion.timesteps}"
            yield "sample.steps", f"is {sample.steps}, more than {limit}"
        if (evaluate.nll_timesteps or 0) > self.diffusion.timesteps:
            limit = f"diffusion.timesteps={self.diffusion.timesteps}; null evaluates each of them once"
            yield "evaluate.nll_timesteps", f"is {evaluate.nll_timesteps}, more than {limit}"
        variance = sample.variance or self.diffusion.variance
        is_respaced = sample.steps not in (None, self.diffusion.timesteps)
        if variance == "learned" and sample.sampler == "ancestral" and is_respaced:
            rule = "diffusion.variance=learned holds for the whole chain"
            remedy = "set it to null, or sample.variance to fixedlarge or fixedsmall"
            yield "sample.steps", f"is {sample.steps}, but {rule}; {remedy}"
        if evaluate.features == "classifier" and not self.data.labels:
            need = "needs labels; for images without any use efficientnet-lite0 or projection"
            yield "evaluate.features", f"is classifier, which {need}"
        batches = {
            "train.batch_size": self.train.batch_size,
            "sample.batch_size": sample.batch_size,
            "evaluate.nll_batch_size": evaluate.nll_batch_size,
        }
        for key, images in batches.items():
            if images * math.prod(self.data.shape) > LARGEST_BATCH:
                yield key, f"is {images}: such a batch takes more than {4 * LARGEST_BATCH >> 30} GiB"
        if self.model.name in UNTRAINED:
            if self.data.limit is None:
                yield "data.limit", "is null; model.name=exact needs the number of images that it knows"
            if self.diffusion.variance in LEARNED or self.published.weights:
                yield (
                    "model.name",
                    "is exact, which knows images alone: use a fixed diffusion.variance, nothing published",
                )
        yield from self._find_label_problems()
        yield from self._find_checkpoint_problems()

    def _find_label_problems(self) -> Iterator[Problem]:
        label, scale, labels = self.sample.label, self.sample.guidance_scale, self.data.labels
        if not self.takes_labels:
            if label is not None or scale != 1 or self.train.label_dropout > 0:
                able = " or ".join(sorted(TAKES_LABELS))
                yield "sample.label", f"is for networks that take labels: model.name={able}"
            return
        if isinstance(label, int) and not 0 <= label < labels:
            yield "sample.label", f"is {label}; data.labels={labels}, so classes are 0 to {labels - 1}"
        if scale != 1 and (label is None or self.train.label_dropout == 0):
            need = "needs a sample.label, and a network trained with train.label_dropout"
            yield "sample.guidance_scale", need

    def _find_checkpoint_problems(self) -> Iterator[Problem]:
        sample, evaluate, train = self.sample, self.evaluate, self.train
        averages = () if self.published.weights or sample.weights != "ema" else train.ema_decay
        if sample.ema_decay is not None and sample.ema_decay not in averages:
            known = f"among train.ema_decay={list(train.ema_decay)}, with sample.weights=ema"
            yield "sample.ema_decay", f"is {sample.ema_decay}; choose null or one {known}"
        if isinstance(sample.checkpoint, int) and not 0 <= sample.checkpoint <= train.steps:
            limit = f"between 0 and train.steps={train.steps}"
            yield "sample.checkpoint", f"is {sample.checkpoint}; it must lie {limit}"
        if sample.checkpoint == "best" and not evaluate.checkpoints:
            yield "sample.checkpoint", "is best; say among which: evaluate.checkpoints=all or every:N"
        if evaluate.checkpoints and not self.is_trained:
            need = "is for networks that are trained here; this one has a single checkpoint"
            yield "evaluate.checkpoints", need
        interval = evaluate.checkpoint_interval
        if interval and (interval % train.checkpoint_every or interval > train.steps):
            limit = f"train.checkpoint_every={train.checkpoint_every}, up to train.steps={train.steps}"
            remedy = "or evaluate.checkpoints=null sample.checkpoint=last"
            yield "evaluate.checkpoints", f"is {evaluate.checkpoints}; N is a multiple of {limit}; {remedy}"

    def list_warnings(self) -> list[str]:
        """Return a warning for each allowed combination that was found harmful."""
        found = self.diffusion.list_warnings()
        groups, width = (getattr(self.model, key, None) for key in ("norm_groups", "channels"))
        if width and width == groups:
            harm = "normalises each alone, so that a short run does not learn the colours (docs/results/short-runs.md)"
            found.append(f"model.norm_groups={groups} of {width} channels {harm}: use {width // 4}")
        return found

    def find_missing_files(self) -> list[str]:
        """Return a line for each named file that is not on this machine.

        Scores made with it stay readable, but no key that hashes it can be computed.
        """
        evaluate = self.evaluate
        files = {"extractor_weights": evaluate.extractor_weights, "reference": evaluate.reference_file}
        return [
            f"evaluate.{key} '{file}' is not a file; see `ddpm doctor`"
            for key, file in files.items()
            if file is not None and not Path(file).is_file()
        ]

    @property
    def takes_labels(self) -> bool:
        """True if the network gets the label of an image."""
        return self.model.name in TAKES_LABELS

    @property
    def is_trained(self) -> bool:
        """True if the network is trained here: it is neither published nor made of images."""
        return not self.published.weights and self.model.name not in UNTRAINED

    @property
    def checkpoint_step(self) -> int:
        """The training step whose weights are sampled and scored. Raises PipelineError while the best is not known."""
        which = self.sample.checkpoint
        if isinstance(which, int):
            return which
        if which == "last":
            return self.train.steps
        if self.selected is None:
            raise PipelineError(
                "sample.checkpoint=best is known once evaluate.checkpoints are scored; `ddpm sample` does that first"
            )
        return self.selected.step

    @property
    def checkpoint_rule(self) -> str | None:
        """The rule by which the checkpoint was selected, a part of the protocol of every score; None for a step."""
        return self.selected.rule if self.sample.checkpoint == "best" and self.selected else None

    @property
    def weights_kind(self) -> str:
        """The kind of weights that are sampled and scored, as in protocols: ema, raw or unknown."""
        kind, decay = self.published.weights or self.sample.weights, self.sample.ema_decay
        return kind if decay is None else f"{kind} {decay:g}"

    @property
    def ema_number(self) -> int:
        """The place in train.ema_decay of the average that is sampled and scored."""
        decay = self.sample.ema_decay
        return 0 if decay is None else self.train.ema_decay.index(decay)

    def make_candidate(self, step: int) -> Experiment:
        """Return the experiment that scores the checkpoint of `step` for the selection: fewer images, FID only."""
        images = self.evaluate.checkpoint_images
        sample = replace(self.sample, checkpoint=step, num_images=images, first_index=CANDIDATES)
        evaluate = replace(self.evaluate, metrics=("fid",), checkpoints=None)
        return replace(self, sample=sample, evaluate=evaluate)

    def select_checkpoint(self, step: int, candidates: int) -> Experiment:
        """Return the experiment with `step` as its selected checkpoint, the best of `candidates`."""
        images, weights = self.evaluate.checkpoint_images, self.weights_kind
        rule = f"best of {candidates} checkpoints by FID on {images} other images, {weights} weights"
        return replace(self, selected=SelectedCheckpoint(step, candidates, rule))

    def choose_label(self, index: int) -> int | None:
        """Return the label of sample `index`; None without labels."""
        label = self.sample.label
        return index % self.data.labels if label == "cycle" else label

    def keeps_checkpoint(self, step: int) -> bool:
        """Return whether the checkpoint of `step` is never deleted."""
        every = (self.train.keep_every, self.evaluate.checkpoint_interval)
        return any(number is not None and step % number == 0 for number in every)


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of the cluster where an experiment runs. Null = what it has; workers: 0 = this process, no Ray."""

    workers: Annotated[int | None, Range(ge=0, le=10**5)]
    min_workers: CountOrNull
    cpus_per_worker: CountOrNull
    gpus_per_worker: Annotated[float | None, Range(ge=0, le=1000)]
    cpus_per_task: Count
    gpus_per_task: Annotated[float | None, Range(ge=0, le=1000)]
    image_memory: Annotated[float, Range(ge=0, le=2**20)]
    retries: FromZero
    ray_address: str | None
    storage: str
    tracking_uri: str | None

    @property
    def storage_root(self) -> Path:
        """The absolute path below which runs lie."""
        return Path(self.storage).expanduser().absolute()

    def find_problems(self) -> Iterator[Problem]:
        if self.min_workers and self.workers is not None and self.min_workers > self.workers:
            limit = f"cluster.workers={self.workers} is the most that train"
            yield "min_workers", f"is {self.min_workers}; {limit}"
        scheme, _, rest = (self.tracking_uri or "").partition("://")
        if self.tracking_uri is not None and not (rest and scheme.split("+")[0] in TRACKING):
            known = ", ".join(f"{known}://" for known in TRACKING)
            yield "tracking_uri", f"begins with '{scheme if rest else '...'}'; MLflow's stores are {known}"


def require_images_for_workers(config: TrainConfig, workers: int) -> None:
    """Raise PipelineError unless every worker gets an image of each batch."""
    if workers > config.batch_size:
        raise PipelineError(
            f"{workers} workers cannot share train.batch_size={config.batch_size}: use fewer workers"
        )
