"""Where images come from, and the batches of training."""
