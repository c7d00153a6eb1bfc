"""Charts, grids and colours: one style for pages and figures."""
