"""Pages over one run or several, made from the files of the runs alone.

`run_page` and `comparison` compute the values of `templates/run.md` and `templates/comparison.md`; `page` writes both
files of a page, the HTML from the Markdown. `paper` holds the paper's numbers.
"""
