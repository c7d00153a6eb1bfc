"""Running units and training: in this process, or on Ray."""
