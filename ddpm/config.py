"""The settings of the diffusion process and of training. Importing it loads no torch: configurations are read fast."""

import math
import operator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

BetaSchedule = Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"]
Predict = Literal["eps", "x0", "mean", "v"]  # v is not the paper's (Salimans and Ho 2022)
Variance = Literal["fixedlarge", "fixedsmall", "learned", "learned_range"]
Loss = Literal["simple", "vlb", "hybrid"]
TSampling = Literal["uniform", "importance"]
Decoder = Literal["tanh", "erf"]
Sampler = Literal["ancestral", "ddim", "dpm++"]
Precision = Literal["fp32", "tf32", "bf16"]
Spacing = Literal["uniform", "quadratic", "logsnr"]  # of the timesteps that a sampler visits

LEARNED = ("learned", "learned_range")
MOST_SIGNAL = 1e-3  # alpha_bar_T above which x_T differs from the noise at the start of sampling
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # names of functions in `operator`

Problems = list[tuple[str, str]]  # (key, message); f"{key} {message}" is one readable line


@dataclass(frozen=True)
class Range:
    """Allowed range of a number, as in `Annotated[int, Range(ge=1)]`; None means no limit."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        limits = vars(self).items()
        return all(limit is None or getattr(operator, name)(value, limit) for name, limit in limits)

    def __str__(self) -> str:
        limits = vars(self).items()
        return " and ".join(f"{LIMITS[name]} {limit}" for name, limit in limits if limit is not None)


def find_value_problems(config: Any) -> Problems:
    """Find every value of a dataclass that is outside the choices or the range of its field's type."""
    hints = get_type_hints(type(config), include_extras=True)
    return [
        (field.name, fault)
        for field in fields(config)
        for fault in _find_field_problems(hints[field.name], getattr(config, field.name))
    ]


def refuse_problems(problems: Problems) -> None:
    """Raise ValueError that names every problem, if there is one."""
    if problems:
        raise ValueError("; ".join(f"{key}: {message}" for key, message in problems))


def _find_field_problems(hint: Any, value: Any) -> list[str]:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is tuple:
        return [fault for item in value for fault in _find_field_problems(arguments[0], item)][:1]
    if kind is Literal and value not in arguments:
        return [f"is {value!r}; choose one of {', '.join(map(str, arguments))}"]
    if kind is Annotated and value is not None and value not in arguments[1]:
        return [f"is {value}; it must be {arguments[1]}"]
    return []


Share = Annotated[float, Range(ge=0, le=1)]
Beta = Annotated[float, Range(ge=1e-12, lt=1)]  # below it, rounding decides what 1 - beta is
Count = Annotated[int, Range(ge=1, le=10**9)]
Width = Annotated[int, Range(ge=4, le=2**14)]  # of a layer
Few = Annotated[int, Range(ge=1, le=64)]  # blocks of a level, multiples of a width


@dataclass(frozen=True)
class DiffusionConfig:
    """Settings of the diffusion process and its loss; the defaults are the paper's for CIFAR-10.

    betas: a custom schedule, one value for each timestep, in place of the three keys before it.
    """

    timesteps: Annotated[int, Range(ge=2, le=10**6)] = 1000
    beta_schedule: BetaSchedule = "linear"
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    betas: tuple[Beta, ...] = ()
    predict: Predict = "eps"
    variance: Variance = "fixedlarge"
    loss: Loss = "simple"
    t_sampling: TSampling = "uniform"

    def find_problems(self) -> Problems:
        found = find_value_problems(self)
        if self.betas and len(self.betas) != self.timesteps:
            found.append(("betas", f"has {len(self.betas)} values; timesteps={self.timesteps} needs as many"))
        if self.beta_start > self.beta_end and self.beta_schedule not in ("const", "jsd", "cosine"):
            found.append(("beta_start", f"{self.beta_start} exceeds beta_end {self.beta_end}: swap them"))
        if self.beta_schedule == "jsd" and self.predict == "eps" and not self.betas:
            found.append(
                ("predict", "eps cannot be turned into x_0 under the jsd schedule, whose alpha_bar_T is 0: "
                 "use predict=x0 or predict=mean")
            )  # fmt: skip
        if self.loss == "hybrid" and self.variance not in LEARNED:
            found.append(("loss", f"hybrid trains a learned variance, not {self.variance}: use loss=simple"))
        if self.loss == "simple" and self.variance in LEARNED:
            found.append(("loss", f"simple leaves variance={self.variance} untrained: use vlb or hybrid"))
        return found

    def list_warnings(self) -> list[str]:
        """Return a warning for each allowed combination that the paper found harmful."""
        found = []
        if (self.predict, self.loss) == ("mean", "simple"):
            found.append("predict=mean with loss=simple was unstable in the paper (Table 2)")
        if self.predict == "eps" and self.loss == "vlb" and self.variance == "learned":
            found.append("predict=eps with loss=vlb and variance=learned was unstable in the paper (Table 2)")
        if self.predict == "x0":
            found.append("predict=x0 gave worse samples in the paper's early experiments (Sec. 3.2)")
        if (kept := self.compute_last_alpha_bar()) > MOST_SIGNAL:
            start, end = 0.1 / self.timesteps, 20 / self.timesteps  # 1e-4 and 0.02 times 1000 / T
            ends = f"beta_start={start:.4g} beta_end={end:.4g} is the paper's schedule at T={self.timesteps}"
            remedy = ends if end < 1 else "raise diffusion.timesteps"
            found.append(f"x_T keeps {100 * kept:.2g}% of the signal's variance; sampling has none: {remedy}")
        return found

    def compute_last_alpha_bar(self) -> float:
        """Compute alpha_bar_T, the share of an image's variance that is left in x_T."""
        if self.beta_schedule == "linear" and not self.betas:  # without torch, whose import takes a second
            slope = (self.beta_end - self.beta_start) / max(1, self.timesteps - 1)
            return math.prod(1 - self.beta_start - slope * t for t in range(self.timesteps))
        from ddpm.schedules import get_betas

        return float((1 - get_betas(self)).prod())


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training, by default the paper's for CIFAR-10; all counts are over all workers together.

    accumulate: parts into which a worker's slice is cut, None for 1; grad_clip: largest norm of the averaged gradient;
    label_dropout: share of labels replaced by NO_LABEL; steps matters if the learning rate decays over them.
    """

    steps: Count = 800_000
    batch_size: Count = 128
    accumulate: Count | None = None
    random_flip: bool = True
    lr: Annotated[float, Range(gt=0, lt=math.inf)] = 2e-4
    lr_decay: Literal["none", "linear"] = "none"
    warmup_steps: Annotated[int, Range(ge=0, le=10**9)] = 5000
    grad_clip: Annotated[float | None, Range(gt=0)] = 1.0
    ema_decay: tuple[Annotated[float, Range(ge=0, lt=1)], ...] = (0.9999,)
    ema_warmup: bool = False
    label_dropout: Share = 0.0
    precision: Precision = "fp32"

    def find_problems(self) -> Problems:
        found = find_value_problems(self)
        if not self.ema_decay:
            found.append(("ema_decay", "must hold one or several values"))
        if self.accumulate and self.accumulate > self.batch_size:
            found.append(("accumulate", f"cannot cut {self.batch_size} images into {self.accumulate} parts"))
        return found
