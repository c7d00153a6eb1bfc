"""Sources of images, and the batches of training."""
