"""The nine GLUE tasks: from a folder in GLUE's own TSV layout, or from the Hub.

Source: Wang et al. 2019, "GLUE: A Multi-Task Benchmark", table 1 (tasks and metrics); file names and columns as GLUE ships them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks.rows import Row, SplitRows, TaskInfo, rows_sha256
from onnxsqueeze.tasks.tables import Faults, read_bytes, read_tsv

FOLDER_VARIABLE = "ONNXSQUEEZE_GLUE_DIR"
HUB_NAME = "nyu-mll/glue"
_HUB_TIMEOUT_S = 5  # huggingface_hub alone tries for 24 s before it says that there is no network
_TRAIN_FILES = ("train.tsv", "train_sample.tsv")
_HELD_OUT = "train_sample_heldout.tsv"
_HELD_OUT_NOTE = "QQP is scored on rows held out of GLUE's training split: this is not a score on GLUE's dev set"


@dataclass(frozen=True)
class Glue:
    """One GLUE task. ``columns`` are (text, text_pair or None, label): names, or positions where the files have no header.

    ``written`` is how the TSV spells the label of each class, in the order of ``labels``; both empty for a score from 0 to 5.
    """

    name: str
    folder: str
    columns: tuple[str | int, str | int | None, str | int]
    labels: tuple[str, ...]
    written: tuple[str, ...]
    metrics: tuple[str, ...]  # the first one decides
    dev: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)  # (split, file)
    width: int | None = None  # fields a line, where there is no header
    hub: tuple[str, str | None] = ("sentence1", "sentence2")
    positive: str | None = None  # the class that f1 is of

    def info(self, max_length: int, note: str = "") -> TaskInfo:
        """What stages and measurements are told."""
        return TaskInfo(self.name, self.labels, self.metrics, self.metrics[0], max_length, note=note, positive=self.positive)


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
SPECS: Mapping[str, Glue] = {
    spec.name: spec
    for spec in (
        Glue("sst2", "SST-2", ("sentence", None, "label"), ("negative", "positive"), ("0", "1"), ("accuracy",), hub=("sentence", None)),
        Glue(
            "cola",
            "CoLA",
            (3, None, 1),
            ("unacceptable", "acceptable"),
            ("0", "1"),
            ("matthews", "accuracy"),
            width=4,
            hub=("sentence", None),
        ),
        Glue(
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String", "Quality"),
            ("not_equivalent", "equivalent"),
            ("0", "1"),
            ("accuracy", "f1"),
            positive="equivalent",
        ),
        Glue("stsb", "STS-B", (*_PAIR, "score"), (), (), ("spearman", "pearson")),
        Glue(
            "qqp",
            "QQP",
            ("question1", "question2", "is_duplicate"),
            ("not_duplicate", "duplicate"),
            ("0", "1"),
            ("accuracy", "f1"),
            hub=("question1", "question2"),
            positive="duplicate",
        ),
        Glue(
            "mnli",
            "MNLI",
            (*_PAIR, "gold_label"),
            ("entailment", "neutral", "contradiction"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            (("validation_matched", "dev_matched.tsv"), ("validation_mismatched", "dev_mismatched.tsv")),
            hub=("premise", "hypothesis"),
        ),
        Glue("qnli", "QNLI", ("question", "sentence", "label"), _ENTAILMENT, _ENTAILMENT, ("accuracy",), hub=("question", "sentence")),
        Glue("rte", "RTE", (*_PAIR, "label"), _ENTAILMENT, _ENTAILMENT, ("accuracy",)),
        Glue("wnli", "WNLI", (*_PAIR, "label"), ("not_entailment", "entailment"), ("0", "1"), ("accuracy",)),
    )
}


@dataclass(frozen=True)
class GlueFolder:
    """One task's folder below a GLUE directory. Making it checks that every file is there; it opens none."""

    spec: Glue
    train_file: Path
    dev_files: tuple[tuple[str, Path], ...]
    note: str

    def train(self) -> SplitRows:
        """Every training row, in the order of the file. Raises DataError."""
        return self._split("train", self.train_file, "train")

    def dev(self) -> tuple[SplitRows, ...]:
        """The dev splits, read now. Raises DataError."""
        return tuple(self._split(name, path, "dev") for name, path in self.dev_files)

    def _split(self, name: str, path: Path, role: Literal["train", "dev"]) -> SplitRows:
        data = read_bytes(path)
        return SplitRows(
            name, rows_of_tsv(self.spec, path, data), f"{self.spec.folder}/{path.name}", hashlib.sha256(data).hexdigest(), role
        )


@dataclass(frozen=True)
class GlueHub:
    """One task from the Hub. Its library fetches and converts all splits of a task together; only the one asked for is read here."""

    spec: Glue
    note: str = ""

    def train(self) -> SplitRows:
        """Every training row. Raises DataError where the Hub and its cache do not have it."""
        return self._split("train", "train")

    def dev(self) -> tuple[SplitRows, ...]:
        """The dev splits, read now. Raises DataError."""
        return tuple(self._split(name, "dev") for name, _ in self.spec.dev)

    def _split(self, name: str, role: Literal["train", "dev"]) -> SplitRows:
        rows = rows_of_hub(self.spec, _load_from_hub(self.spec.name, name))
        return SplitRows(name, rows, f"{HUB_NAME}/{self.spec.name}", rows_sha256(rows), role)


def find(name: str, data_dir: Path | None) -> GlueFolder | GlueHub:
    """Where a task's rows are: below ``data_dir``, else below $ONNXSQUEEZE_GLUE_DIR, else on the Hub.

    A folder that was named and lacks the task's files is an error: other data is never taken in its place. Raises DataError.
    """
    spec = SPECS[name]
    given = data_dir or (Path(os.environ[FOLDER_VARIABLE]) if os.environ.get(FOLDER_VARIABLE) else None)
    return GlueHub(spec) if given is None else _find_folder(spec, given, "--data-dir" if data_dir else FOLDER_VARIABLE)


def _find_folder(spec: Glue, given: Path, named_by: str) -> GlueFolder:
    folder = given / spec.folder
    files = ", ".join(f"{spec.folder}/{file}" for file in (_TRAIN_FILES[0], *(file for _, file in spec.dev)))
    remedy = f"give {named_by} the folder that holds {spec.folder}/ in GLUE's TSV layout ({files})"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder ({named_by} is {given})", remedy=remedy)
    train = next((folder / file for file in _TRAIN_FILES if (folder / file).is_file()), None)
    if train is None:
        raise DataError(f"{folder}: has neither {' nor '.join(_TRAIN_FILES)}", remedy=remedy)
    dev, note = tuple((split, folder / file) for split, file in spec.dev), ""
    if spec.name == "qqp" and not dev[0][1].is_file() and (folder / _HELD_OUT).is_file():
        dev, note = (("train_heldout", folder / _HELD_OUT),), _HELD_OUT_NOTE
    for _, path in dev:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file", remedy=remedy)
    return GlueFolder(spec, train, dev, note)


def rows_of_tsv(spec: Glue, path: Path, data: bytes) -> tuple[Row, ...]:
    """The rows of one of GLUE's files, texts as they are written there. Raises DataError naming up to five faulty lines."""
    text, pair, label = spec.columns
    columns = [text, label] if pair is None else [text, label, pair]
    classes = {written: index for index, written in enumerate(spec.written)}
    faults, rows = Faults(path), []
    for line, (first, written, *second) in read_tsv(data, columns, faults, spec.width):
        value = _score(written) if not classes else classes.get(written)
        if value is None:
            allowed = f"one of {', '.join(classes)}" if classes else "a number from 0 to 5"
            faults.add(line, f"the label must be {allowed}, got {written!r}")
        elif not first.strip() and not any(part.strip() for part in second):
            faults.add(line, "has no text")
        else:
            rows.append(Row(first, second[0] if second else None, value))
    faults.raise_any()
    if not rows:
        raise DataError(f"{path}: holds a header and no rows", remedy="fetch the file again")
    return tuple(rows)


def _score(written: str) -> float | None:
    try:
        value = float(written)
    except ValueError:
        return None
    return value if 0 <= value <= 5 else None


def rows_of_hub(spec: Glue, dataset: Any) -> tuple[Row, ...]:
    """The rows of a `datasets.Dataset`; classes are matched by their names. Raises DataError where the names are not GLUE's."""
    text, pair = spec.hub
    if spec.labels:
        names = list(dataset.features["label"].names)
        if sorted(names) != sorted(spec.labels):
            raise DataError(
                f"{HUB_NAME}/{spec.name}: the classes must be {', '.join(spec.labels)}, got {', '.join(names)}",
                remedy="take the task from files: --data-dir",
            )
        index = {number: spec.labels.index(name) for number, name in enumerate(names)}
    texts: Iterable[str] = dataset[text]
    pairs: Iterable[str | None] = dataset[pair] if pair else [None] * len(dataset)
    rows = []
    for number, (first, second, label) in enumerate(zip(texts, pairs, dataset["label"], strict=True)):
        if spec.labels and label not in index:
            raise DataError(
                f"{HUB_NAME}/{spec.name}: row {number} has the label {label}, which is no class",
                remedy="take the task from files: --data-dir",
            )
        rows.append(Row(first, second, index[label] if spec.labels else float(label)))
    return tuple(rows)


def _load_from_hub(config: str, split: str) -> Any:
    remedy = (
        f"give a folder in GLUE's TSV layout: --data-dir DIR, or {FOLDER_VARIABLE}=DIR; or go online once"
        f" (a copy that the Hub's cache holds already is used with HF_HUB_OFFLINE=1); or try `--task toy`, which needs no files"
    )
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _ask_hub(config, remedy)
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(HUB_NAME, config, split=split)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"task {config}: no --data-dir is given, and the Hub's {HUB_NAME} cannot be loaded: {reason}", remedy=remedy
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _ask_hub(config: str, remedy: str) -> None:
    """Fail within seconds where the Hub cannot be reached (through the user's proxy, if there is one)."""
    import requests
    from huggingface_hub import constants

    try:
        requests.head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except requests.RequestException as error:
        cause = type(error).__name__
        raise DataError(
            f"task {config}: no --data-dir is given, and {constants.ENDPOINT} cannot be reached ({cause})", remedy=remedy
        ) from error
