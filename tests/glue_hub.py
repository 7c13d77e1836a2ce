"""GLUE as the Hub has it, with invented rows: a folder of Parquet files a task, and a card that names them with their classes.

Source: the README.md of https://huggingface.co/datasets/nyu-mll/glue.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

REPO = "datasets/nyu-mll/glue"
_CLASSES = {  # by their number there
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "mnli": ("entailment", "neutral", "contradiction"),
}
_TEXTS = {"sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
_SPLITS = {
    task: ("train", *dev, *(split.replace("validation", "test") for split in dev))
    for task, dev in {
        "sst2": ("validation",),
        "mrpc": ("validation",),
        "mnli": ("validation_matched", "validation_mismatched"),
    }.items()
}


def repository(rows: Mapping[str, int] | None = None) -> dict[str, bytes]:
    """Three tasks; a split has as many rows as ``rows`` says, else 12. Row i is "the SPLIT item i ." of class i, in turn; test rows have class -1."""
    files: dict[str, bytes] = {}
    configs, infos = [], []
    for task, splits in _SPLITS.items():
        names = [*_TEXTS[task], "label", "idx"]
        for split in splits:
            n = (rows or {}).get(split, 12)
            columns: dict[str, list[Any]] = {column: [f"the {split} {column} {i} ." for i in range(n)] for column in _TEXTS[task]}
            columns["label"] = [-1 if split.startswith("test") else i % len(_CLASSES[task]) for i in range(n)]
            columns["idx"] = list(range(n))
            written = io.BytesIO()
            schema = pa.schema(
                [(name, pa.string() if name in _TEXTS[task] else pa.int64() if name == "label" else pa.int32()) for name in names]
            )
            pq.write_table(pa.table(columns, schema=schema), written)
            files[f"{task}/{split}-00000-of-00001.parquet"] = written.getvalue()
        classes = {str(i): name for i, name in enumerate(_CLASSES[task])}
        features: list[dict[str, Any]] = [{"name": name, "dtype": "string"} for name in _TEXTS[task]]
        features += [{"name": "label", "dtype": {"class_label": {"names": classes}}}, {"name": "idx", "dtype": "int32"}]
        counted = [{"name": split, "num_examples": (rows or {}).get(split, 12)} for split in splits]
        infos.append({"config_name": task, "features": features, "splits": counted})
        configs.append({"config_name": task, "data_files": [{"split": split, "path": f"{task}/{split}-*"} for split in splits]})
    card = yaml.safe_dump({"dataset_info": infos, "configs": configs}, sort_keys=False)
    return files | {"README.md": f"---\n{card}---\n# GLUE\n".encode()}
