"""The figures stage: the paper's figures of any checkpoint, as pictures beside their captions.

`stage` decides what is drawn and seals it, `figure` says what a figure is, `chains` holds those that run the
reverse process, `scores_along` and `nearest` those that look at features and training images, `curves` plots.
"""

from pipeline.stages.figures.stage import directory, is_done, work

__all__ = ["directory", "is_done", "work"]
