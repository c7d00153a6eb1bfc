"""The figures stage: the paper's figures, drawn for one checkpoint.

`stage` plans what is drawn and seals it, `figure` defines a figure, `chains` has the samples and the figures
that run the reverse process, `curves` those that plot numbers, `nearest` those that look up training images.
"""

from pipeline.stages.figures.stage import STAGE

__all__ = ["STAGE"]
