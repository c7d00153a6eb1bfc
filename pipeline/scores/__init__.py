"""Features and scores of images; the only folder that imports torch_fidelity.

`metrics` is the registry of scores, `ranking` the order of runs by one of them. `extractors` turns images into
features (`inception`, `efficientnet`, `classifier` and `projection` are its networks), `image_sets` keeps these in
files, `distances` turns them into FID, IS, KID, precision and recall. `reference` has the statistics that samples are
compared with, `preparations` the classifier and the Gaussian of the training images.
"""
