"""From a run's output folder to where a model is served: folders that others load, each with its record and what `verify` needs."""
