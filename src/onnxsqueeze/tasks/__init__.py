"""Tasks: data and metric. `open.open_task` gives the rows, `metrics.scores` the figures."""
