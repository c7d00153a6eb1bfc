"""The settings of training and the learning rate they give each update."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. Values live in the experiment's yaml; all counts are global, not per worker.

    accumulate: parts into which a worker's slice is cut; grad_clip: largest norm of the averaged gradient,
    or of each group of grad_clip_group consecutive images before averaging (authors' code: 16);
    label_dropout: share of labels replaced by NO_LABEL; compile, deterministic, checkpoint_every, sample_every (0:
    never), keep, keep_every and log_every are read by the training loop around `train_step`.
    """

    steps: int
    batch_size: int
    accumulate: int
    random_flip: bool
    lr: float
    lr_decay: Literal["none", "linear"]
    warmup_steps: int
    grad_clip: float | None
    grad_clip_group: int | None
    ema_decay: tuple[float, ...]
    ema_warmup: bool
    label_dropout: float
    precision: Literal["fp32", "bf16"]
    compile: bool
    deterministic: bool
    checkpoint_every: int
    sample_every: int
    keep: int
    keep_every: int | None
    log_every: int

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with these settings: (key, message) pairs; f"{key} {message}" is one line."""
        found = [
            (key, f"must be at least 1, not {getattr(self, key)}")
            for key in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every")
            if getattr(self, key) < 1
        ]
        found += [
            (key, f"must be at least 0, not {getattr(self, key)}")
            for key in ("warmup_steps", "sample_every")
            if getattr(self, key) < 0
        ]
        if self.keep_every is not None and (
            self.keep_every < 1 or self.keep_every % max(1, self.checkpoint_every)
        ):
            found.append(
                (
                    "keep_every",
                    f"must be a multiple of checkpoint_every={self.checkpoint_every} or null, not {self.keep_every}",
                )
            )
        if self.lr_decay not in ("none", "linear"):
            found.append(("lr_decay", f"must be none or linear, not {self.lr_decay}"))
        if self.precision not in ("fp32", "bf16"):
            found.append(("precision", f"must be fp32 or bf16, not {self.precision}"))
        if not (self.lr > 0 and math.isfinite(self.lr)):
            found.append(("lr", f"must be positive, not {self.lr}"))
        if not 0 <= self.label_dropout <= 1:
            found.append(("label_dropout", f"must lie in [0, 1], not {self.label_dropout}"))
        if not self.ema_decay or not all(0 <= decay < 1 for decay in self.ema_decay):
            found.append(("ema_decay", "must be one or several values in [0, 1)"))
        if self.accumulate > self.batch_size:
            found.append(("accumulate", f"cannot cut {self.batch_size} images into {self.accumulate} parts"))
        return found + self._clip_problems()

    def _clip_problems(self) -> list[tuple[str, str]]:
        found = []
        if self.grad_clip is not None and not self.grad_clip > 0:
            found.append(("grad_clip", f"must be positive or null, not {self.grad_clip}"))
        group = self.grad_clip_group
        if group is None:
            return found
        if self.grad_clip is None:
            found.append(("grad_clip_group", "needs grad_clip, the norm each group is clipped to"))
        if group < 1 or self.batch_size % group:
            found.append(("grad_clip_group", f"{group} does not divide the batch of {self.batch_size}"))
        if self.accumulate > 1:
            found.append(("grad_clip_group", "already runs group by group: set accumulate to 1"))
        return found


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of update step = 0, 1, ...: lr min(step / warmup_steps, 1), so the first one is 0 (authors' code).

    lr_decay="linear" multiplies by 1 - step / steps.
    """
    warmup = min(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    decay = max(1 - step / config.steps, 0.0) if config.lr_decay == "linear" else 1.0
    return config.lr * warmup * decay
