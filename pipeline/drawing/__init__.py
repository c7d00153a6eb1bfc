"""Charts, grids and colours."""
