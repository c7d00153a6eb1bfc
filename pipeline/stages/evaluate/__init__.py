"""The evaluate stage: scores of the samples, the NLL bound of the test split, each with its protocol.

`stage` plans what is missing and seals the scores, `images` makes those of samples (FID, IS, KID, precision and
recall), `bound` the NLL, `protocol` says how they came about and what of that differs from the paper.
"""

from pipeline.stages.evaluate.stage import STAGE

__all__ = ["STAGE"]
