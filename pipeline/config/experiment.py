"""The experiment: all sections that may change a number, and the checks between them."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddpm.config import LEARNED, DiffusionConfig
from ddpm.networks import LABELLED, UNTRAINED
from ddpm.networks.config import NetworkConfig
from pipeline.config import sections
from pipeline.errors import PipelineError

LARGEST_BATCH = 2**34  # pixels


@dataclass(frozen=True)
class SelectedCheckpoint:
    """Step of the selected checkpoint, number of candidates, and the rule of the selection as text."""

    step: int
    candidates: int
    rule: str


@dataclass(frozen=True)
class Experiment:
    """Everything that may change a number.

    selected: the checkpoint that sample.checkpoint=best means, once it is known; no file holds it.
    """

    name: str
    seed: sections.Seed
    data: sections.DataConfig
    diffusion: DiffusionConfig
    model: NetworkConfig
    train: sections.TrainStageConfig
    published: sections.PublishedConfig
    sample: sections.SampleConfig
    evaluate: sections.EvaluateConfig
    figures: sections.FiguresConfig
    selected: SelectedCheckpoint | None = field(default=None, metadata={"in_file": False})

    def find_problems(self) -> Iterator[sections.Problem]:
        """Find problems between the keys of several sections, each with its full key."""
        sample, evaluate, timesteps = self.sample, self.evaluate, self.diffusion.timesteps
        if not re.fullmatch(sections.FILE_NAME, self.name):
            yield "name", f"is {self.name!r}; {sections.NAME_RULE}"
        parts: dict[str, Iterable[sections.Problem]] = {
            "data": self.data.find_problems(),
            "diffusion": self.diffusion.find_problems(),
            "model": self.model.find_problems(self.data.image_size),
            "train": self.train.find_problems(),
            "published": self.published.find_problems(),
            "evaluate": evaluate.find_problems(),
        }
        for name, problems in parts.items():
            yield from ((f"{name}.{key}", problem) for key, problem in problems)
        if (sample.steps or 0) > timesteps:
            yield "sample.steps", f"is {sample.steps}, more than diffusion.timesteps={timesteps}"
        if sample.spacing != "uniform" and sample.steps is None:
            yield "sample.spacing", f"is {sample.spacing}, which is for less than T steps: set sample.steps"
        if sample.spacing == "logsnr" and self.diffusion.beta_schedule == "jsd" and not self.diffusion.betas:
            yield "sample.spacing", "is logsnr, but jsd leaves no signal in x_T: use uniform or quadratic"
        if (evaluate.nll_timesteps or 0) > timesteps:
            limit = f"diffusion.timesteps={timesteps}; null evaluates each of them once"
            yield "evaluate.nll_timesteps", f"is {evaluate.nll_timesteps}, more than {limit}"
        variance = sample.variance or self.diffusion.variance
        is_respaced = sample.steps not in (None, timesteps)
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
                yield key, f"is {images}: a batch takes more than {4 * LARGEST_BATCH >> 30} GiB; lower it"
        if self.model.name in UNTRAINED:
            if self.data.limit is None:
                yield "data.limit", "is null; model.name=exact needs the number of images that it knows"
            if self.diffusion.variance in LEARNED or self.published.weights:
                remedy = "use a fixed diffusion.variance and no published weights"
                yield "model.name", f"is exact, which learns nothing: {remedy}"
        yield from self._find_label_problems()
        yield from self._find_checkpoint_problems()

    def _find_label_problems(self) -> Iterator[sections.Problem]:
        label, scale, labels = self.sample.label, self.sample.guidance_scale, self.data.labels
        if self.model.name == "unet" and self.model.takes_labels and not labels:
            yield "model.class_conditional", "is true, but data.labels=0: set it to the number of classes"
        if not self.model.takes_labels:
            if label is not None or scale != 1 or self.train.label_dropout > 0:
                yield "sample.label", f"is for networks that take labels ({LABELLED})"
            return
        if isinstance(label, int) and not 0 <= label < labels:
            yield "sample.label", f"is {label}; data.labels={labels}, so classes are 0 to {labels - 1}"
        if scale != 1 and (label is None or self.train.label_dropout == 0):
            need = "needs a sample.label, and a network trained with train.label_dropout"
            yield "sample.guidance_scale", need

    def _find_checkpoint_problems(self) -> Iterator[sections.Problem]:
        sample, evaluate, train = self.sample, self.evaluate, self.train
        averages = () if self.published.weights or sample.weights != "ema" else train.ema_decay
        if sample.ema_decay is not None and sample.ema_decay not in averages:
            known = f"among train.ema_decay={list(train.ema_decay)}, with sample.weights=ema"
            yield "sample.ema_decay", f"is {sample.ema_decay}; choose null or one {known}"
        if isinstance(sample.checkpoint, int) and not 0 <= sample.checkpoint <= train.steps:
            limit = f"between 0 and train.steps={train.steps}"
            yield "sample.checkpoint", f"is {sample.checkpoint}; it must lie {limit}"
        if sample.checkpoint == "best" and not evaluate.checkpoints:
            yield "sample.checkpoint", "is best; set evaluate.checkpoints=all or every:N"
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
        """Return a line for each file in the settings that is not on this machine.

        Scores that were made with it stay readable, but a key that contains its hash cannot be computed.
        """
        evaluate = self.evaluate
        files = {"extractor_weights": evaluate.extractor_weights, "reference": evaluate.reference_file}
        return [
            f"evaluate.{key} '{file}' is not a file; see `ddpm doctor`"
            for key, file in files.items()
            if file is not None and not Path(file).is_file()
        ]

    @property
    def num_classes(self) -> int:
        """The number of classes that the network is built with; 0 if it takes no labels."""
        return self.data.labels if self.model.takes_labels else 0

    @property
    def is_trained(self) -> bool:
        """True if the network is trained here, and neither published nor a posterior mean of images."""
        return not self.published.weights and self.model.name not in UNTRAINED

    @property
    def checkpoint_step(self) -> int:
        """The training step whose weights are sampled and scored. Raises PipelineError until the best one is known."""
        which = self.sample.checkpoint
        if isinstance(which, int):
            return which
        if which == "last":
            return self.train.steps
        if self.selected is None:
            raise PipelineError(
                "sample.checkpoint=best is not known before evaluate.checkpoints are scored: run `ddpm sample` first"
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
        """The position in train.ema_decay of the average that is sampled and scored."""
        decay = self.sample.ema_decay
        return 0 if decay is None else self.train.ema_decay.index(decay)

    def make_candidate(self, step: int) -> "Experiment":
        """Return the experiment that scores the checkpoint of `step` for the selection: fewer images, FID only."""
        images = self.evaluate.checkpoint_images
        sample = replace(self.sample, checkpoint=step, num_images=images, first_index=sections.CANDIDATES)
        evaluate = replace(self.evaluate, metrics=("fid",), checkpoints=None)
        return replace(self, sample=sample, evaluate=evaluate)

    def select_checkpoint(self, step: int, candidates: int) -> "Experiment":
        """Return the experiment with `step` as its selected checkpoint, the best of `candidates`."""
        images, weights = self.evaluate.checkpoint_images, self.weights_kind
        rule = f"best of {candidates} checkpoints by FID on {images} other images, {weights} weights"
        return replace(self, selected=SelectedCheckpoint(step, candidates, rule))

    def keeps_checkpoint(self, step: int) -> bool:
        """Return whether `train.keep_every` or `evaluate.checkpoints` keeps the checkpoint of `step` for ever."""
        every = (self.train.keep_every, self.evaluate.checkpoint_interval)
        return any(number is not None and step % number == 0 for number in every)
