"""The sections of an experiment and of a cluster; `conf/cifar10.yaml` and `conf/cluster/local.yaml` explain the keys.

The types say what a key may hold (`checks` reads them); `find_problems` compares several keys of a section.
The settings of the science (diffusion, model, train) stand beside the code that they configure, in `ddpm`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from ddpm.config import Count, Decoder, Precision, Problems, Range, Sampler, Share, Spacing, TrainConfig
from pipeline.errors import PipelineError, suggest

TRACKING = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
SPLITS = ("train", "test")
NEED_IMAGES = ("kid", "prc")  # metrics for which statistics of the reference are not enough
FILE_NAME = r"(?!(data|sweeps|comparisons|extractors|mlartifacts)$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NAME_RULE = (
    "it names a folder: up to 100 letters, digits, '.', '_', '-', none of the storage root's (data, ...)"
)

Problem = tuple[str, str]  # key, what is wrong with it
CANDIDATES = 2**31  # the first index of candidates' samples: the selected one is scored on others
FromZero = Annotated[int, Range(ge=0, le=10**9)]
CountOrNull = Annotated[int | None, Range(ge=1, le=10**9)]
Seed = Annotated[int, Range(ge=0, lt=2**63)]
FixedVariance = Literal["fixedlarge", "fixedsmall"]


@dataclass(frozen=True)
class DataConfig:
    """Settings of the images: their source and their shape."""

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
            yield "path", f"is null; data.source={self.source} needs the path of the images"


@dataclass(frozen=True, kw_only=True)
class TrainStageConfig(TrainConfig):
    """Settings of training (`TrainConfig`), and of the files that the train stage writes."""

    compile: bool
    graph: bool
    deterministic: bool
    checkpoint_every: Count
    sample_every: FromZero
    keep: Count
    keep_every: CountOrNull
    log_every: Count
    keep_steps: tuple[Count, ...] = ()
    checkpoint_minutes: Annotated[float | None, Range(gt=0, le=10**6)] = None

    def find_problems(self) -> Problems:
        found = super().find_problems()
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            need = f"must be a multiple of checkpoint_every={self.checkpoint_every} or null"
            found.append(("keep_every", need))
        return found


@dataclass(frozen=True)
class PublishedConfig:
    """Settings of published weights that replace training; both null = the network is trained here."""

    path: str | None
    weights: Literal["raw", "ema", "unknown"] | None

    def find_problems(self) -> Iterator[Problem]:
        if self.path is not None and self.weights is None:
            yield "weights", "is null; set what the published weights are: raw, ema or unknown"


@dataclass(frozen=True)
class SampleConfig:
    """Settings of the sampler."""

    num_images: Count
    first_index: Annotated[int, Range(ge=0, lt=CANDIDATES)]
    sampler: Sampler
    steps: CountOrNull
    spacing: Spacing
    eta: Share
    variance: FixedVariance | None
    batch_size: Count
    weights: Literal["ema", "raw"]
    ema_decay: Annotated[float | None, Range(ge=0, lt=1)]
    checkpoint: int | Literal["last", "best"]
    label: int | Literal["cycle"] | None
    guidance_scale: Annotated[float, Range(ge=0, le=10**6)]
    compile: bool
    graph: bool
    precision: Precision

    @property
    def is_deterministic(self) -> bool:
        """True if the chain draws no noise after x_T; such noise would correct errors of the network."""
        return self.sampler != "ancestral" and self.eta == 0


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the scores and their protocol."""

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
    compile: bool
    graph: bool
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
        """The path of the user's statistics; None if the reference is a split of the data."""
        return None if self.reference in SPLITS else Path(self.reference).expanduser()

    def find_problems(self) -> Iterator[Problem]:
        if self.checkpoints not in (None, "all") and self.checkpoint_interval is None:
            yield "checkpoints", f"is '{self.checkpoints}'; use null, all or every:N, with N in steps"
        if not self.metrics:
            yield "metrics", "is []; name one or several, as in [fid,nll]"
        needs_images = [metric for metric in NEED_IMAGES if metric in self.metrics]
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
class ClusterConfig:
    """Settings of the cluster where an experiment runs. Null: chosen by its size; workers: 0 = this process, no Ray."""

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
    model_upload: Annotated[float, Range(ge=0, le=2**20)]

    @property
    def largest_model(self) -> float:
        """Bytes of the largest weights that MLflow gets."""
        return self.model_upload * 2**30

    @property
    def storage_root(self) -> Path:
        """The absolute path of the folder that contains the runs."""
        return Path(self.storage).expanduser().absolute()

    def find_problems(self) -> Iterator[Problem]:
        if self.min_workers and self.workers is not None and self.min_workers > self.workers:
            limit = f"cluster.workers={self.workers} is the most that train"
            yield "min_workers", f"is {self.min_workers}; {limit}"
        if self.tracking_uri is not None and (problem := _explain_tracking_uri(self.tracking_uri)):
            yield "tracking_uri", problem


def _explain_tracking_uri(uri: str) -> str:
    """Return why MLflow has no store at this address; '' if it may have one."""
    scheme, mark, rest = uri.partition("://")
    kind = scheme.partition("+")[0]
    if not mark or kind not in TRACKING:
        known = ", ".join(f"{known}://" for known in TRACKING)
        return f"begins with '{scheme if mark else '...'}'; MLflow's stores are {known}"
    try:
        parts = urlsplit(uri)
        place = parts.hostname if kind.startswith("http") else rest.strip("/")
        complete = place and place != ":memory:" and (kind == "sqlite" or parts.port != 0)
    except ValueError:  # its text may have a password
        complete = False
    like = "sqlite:////FOLDER/mlflow.db" if kind == "sqlite" else f"{scheme}://HOST:PORT"
    return "" if complete else f"lacks a host or file, or its port is none; it is like {like}"


def require_images_for_workers(config: TrainConfig, workers: int) -> None:
    """Raise PipelineError unless every worker gets an image of each batch."""
    if workers > (images := config.batch_size):
        raise PipelineError(f"{workers} workers cannot share train.batch_size={images}: use fewer workers")
