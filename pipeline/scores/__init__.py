"""Features and scores: the only room that imports torch_fidelity.

`extractors` turns images into features, `classifier` and `projection` are the extractors of our own, `scores`
turns features into FID and IS, `baselines` makes the images that scores are compared with.
"""
