"""The figures stage: the paper's figures of any checkpoint, as pictures beside their captions.

`stage` decides what is drawn and seals it, `figure` says what a figure is, `chains` holds the samples and
those that run the reverse process, `curves` those that plot numbers, `nearest` those that look up training images.
"""

from pipeline.stages.figures.stage import STAGE

__all__ = ["STAGE"]
