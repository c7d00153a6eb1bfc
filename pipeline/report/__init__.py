"""Pages over one run or several, made from the files of the runs alone.

`source` is the files; each section of the page has a module (`scores`, `pictures`, `training`, `likelihood`, `made`);
`paper` holds the paper's numbers. `page` is what a page consists of, `web` and `markdown` write it, `plots` draws.
"""
