"""Pages over one run or several, made from the files of the runs alone.

`run` and `compare` compute what `templates/run.md` and `templates/comparison.md` say; `page` writes both files of a
page, `html` makes one of the other. `paper` holds the paper's numbers.
"""
