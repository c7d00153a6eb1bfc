"""The report stage: one self-contained page and its Markdown twin, made from a run's files alone.

`stage` gathers what the page says, `page` turns blocks into HTML and Markdown, `plots` draws, `paper` holds
the paper's numbers.
"""

from pipeline.report.stage import is_done, work

__all__ = ["is_done", "work"]
