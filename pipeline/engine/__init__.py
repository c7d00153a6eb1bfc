"""The engine: plans the stages of a run and executes them."""
