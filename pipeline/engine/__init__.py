"""Which stages are to do, doing them, what is recorded, checks before the start."""
