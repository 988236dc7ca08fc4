"""Each head in each engine, compared with one process in plain torch: the table of docs/scale.md."""
