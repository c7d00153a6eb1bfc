"""The report stage: one self-contained page and its Markdown twin, made from a run's files alone.

`source` is the files, `stage` puts the sections together, each of which has a module (`scores`, `pictures`,
`training`, `likelihood`, `made`); `paper` holds the paper's numbers. `page` is what a page consists of, `web` and
`markdown` write it, `plots` draws, `style` is how it looks.
"""

from pipeline.report.stage import is_done, work

__all__ = ["is_done", "work"]
