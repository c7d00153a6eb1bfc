"""The evaluate stage: scores of the samples, the NLL bound of the test split, each with its protocol.

`stage` decides what is missing and seals the scores, `images` makes those of samples (FID, IS, KID, precision and
recall), `bound` the NLL, `protocol` says how they came about and what of that is not the paper's.
"""

from pipeline.stages.evaluate.stage import STAGE, needs_samples

__all__ = ["STAGE", "needs_samples"]
