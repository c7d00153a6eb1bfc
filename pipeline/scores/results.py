"""The types of the contents of metrics.json and nll.json."""

from typing import Required

from typing_extensions import TypedDict

Scores = dict[str, float]


class ScoreProtocol(TypedDict, total=False):
    """The protocol of scores. What does not apply is missing or None; samples add the keys of their own protocol."""

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
    splits: int | None
    is_shuffle_seed: int
    kid: str
    prc: str
    decoder: str
    nll_variance: str
    nll_precision: str
    nll_split: str
    nll_images: int
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


class Bound(TypedDict):
    """The contents of nll.json, averaged over n images of the split.

    terms (T,) and prior in bits/dim, the MSE (T,) of x_0, and the rows of rate and distortion after k reverse steps.
    """

    terms: list[float]
    mse: list[float]
    prior: float
    n: int
    rate_distortion: list[dict[str, float]]
