"""The types of the contents of metrics.json and nll.json."""

from typing import Any, Required

from typing_extensions import TypedDict

# {name: value}, and for a name x with an error its standard error x_se: or null for the reason in x_se_reason
Scores = dict[str, Any]


def add_error(scores: Scores, name: str, error: float | None, reason: str = "") -> None:
    scores[f"{name}_se"] = error
    if error is None:
        scores[f"{name}_se_reason"] = reason


class ClassifierFacts(TypedDict, total=False):
    """Content of the classifier's .json: its hash, its accuracy on the test images, its training steps."""

    sha256: str
    test_accuracy: float | None
    steps: int


class ScoreProtocol(TypedDict, total=False):
    """The protocol of scores. Keys that do not apply are missing or None; samples add the keys of their protocol."""

    official_data: bool | None
    schedule: str
    conditional: bool
    checkpoint: int
    checkpoint_rule: str
    minimum_fid: bool
    code: str
    weights: str
    n: int
    first_index: int
    reference: str
    reference_images: int | None
    fid_test_images: int | None
    sampler: str
    steps: int
    timesteps: int
    extractor: str
    official_extractor: bool
    features: int
    classifier_accuracy: float | None
    splits: int | None
    jackknife_groups: int
    is_shuffle_seed: int
    kid: str
    prc: str
    decoder: str
    nll_variance: str
    nll_precision: str
    nll_split: str
    nll_images: int
    nll_timesteps: int | None
    nll_profile: str
    nll_se: str
    test_images: int
    train_images: int
    comparable: bool
    why_not: list[str]


class Results(TypedDict, total=False):
    """The contents of metrics.json.

    reference_points: the scores of the baselines.
    class_shares: the share of each class among the samples, as the classifier sees them.
    """

    scores: Required[Scores]
    protocol: Required[ScoreProtocol]
    reference_points: dict[str, Scores]
    class_shares: list[float]


class Bound(TypedDict, total=False):
    """The contents of nll.json, averaged over n images of the split; `images` (n,) has the bound of each.

    terms (T,) and prior in bits/dim, the MSE (T,) of x_0, and the rows of rate and distortion after k reverse steps.
    An estimate has, instead of terms, MSE and rows, the number of draws, and the standard error set_se of the NLL of
    exactly these images (null for one draw).
    """

    n: Required[int]
    prior: Required[float]
    images: list[float]
    terms: list[float]
    mse: list[float]
    rate_distortion: list[dict[str, float]]
    draws: int
    set_se: float | None
