"""The evaluate stage: scores of the samples, the NLL bound of the test split, each with its protocol.

`stage` decides what is missing and seals the scores, `images` makes those of samples (FID, IS, KID, precision and
recall), `ahead` their features while others are drawn, `bound` the NLL of any denoiser, `protocol` says how they
came about and what of that is not the paper's.
"""

from pipeline.stages.evaluate.ahead import ahead
from pipeline.stages.evaluate.stage import (
    METRICS,
    check,
    directory,
    is_done,
    needs_samples,
    sample_shards,
    work,
)

__all__ = ["METRICS", "ahead", "check", "directory", "is_done", "needs_samples", "sample_shards", "work"]
