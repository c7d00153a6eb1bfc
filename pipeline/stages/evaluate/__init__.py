"""The evaluate stage: scores of the samples, the NLL bound of the test split, each with its protocol.

`stage` plans what is missing and seals the scores, `images` makes those of samples (FID, IS, KID, precision and
recall), `bound` the NLL, `protocol` describes how they were computed, and what differs from the paper.
"""

from pipeline.stages.evaluate.stage import STAGE

__all__ = ["STAGE"]
