"""The files of a run directory: their names, how they are written, and how they are read."""
