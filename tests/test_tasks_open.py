import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glue_files import write_task
from onnxsqueeze.tasks import glue
from onnxsqueeze.tasks.open import Task, open_task
from onnxsqueeze.tasks.rows import Row, rows_sha256
from onnxsqueeze.tasks.selection import inside, text_of
from onnxsqueeze.tasks.settings import GLUE_NAMES, TaskSettings

opened: list[str] = []
listening = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if listening and event == "open":
        opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else "")


sys.addaudithook(_note)  # cannot be taken away again: `listening` turns it off


@pytest.fixture
def opens() -> Iterator[list[str]]:
    global listening  # noqa: PLW0603 - the hook outlives the test
    opened.clear()
    listening = True
    yield opened
    listening = False


def names(paths: list[str]) -> set[str]:
    return {Path(path).name for path in paths if path.endswith((".tsv", ".csv", ".jsonl"))}


@pytest.mark.parametrize("name", ["sst2", "mnli"])
def test_opening_a_glue_task_opens_no_dev_file(tmp_path: Path, opens: list[str], name: str) -> None:
    folder = write_task(tmp_path, name)
    opens.clear()
    task = open_task(TaskSettings(name=name), data_dir=tmp_path, seed=0).in_order_of(dict(enumerate(glue.SPECS[name].labels)))
    assert names(opens) == {"train.tsv"}
    task.dev()
    assert names(opens) == {path.name for path in folder.iterdir()}


def test_opening_own_files_opens_no_dev_file(tmp_path: Path, opens: list[str]) -> None:
    for file, rows in (("a.csv", 600), ("b.csv", 4)):
        (tmp_path / file).write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(rows)), encoding="utf-8")
    opens.clear()
    task = open_task(TaskSettings(train=tmp_path / "a.csv", dev=tmp_path / "b.csv"), data_dir=None, seed=0)
    assert names(opens) == {"a.csv"}
    task.dev()
    assert names(opens) == {"a.csv", "b.csv"}


def test_settings_and_task_modules_import_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime', 'sklearn', 'scipy', 'datasets', 'pandas', 'pyarrow', 'numpy'}"
    code = f"import sys, onnxsqueeze.tasks.open, onnxsqueeze.tasks.metrics; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_digest_of_rows_follows_text_pair_label_and_order() -> None:
    a, b = Row("a", None, 0), Row("a", "b", 1)
    digests = {rows_sha256(rows) for rows in ([a, b], [b, a], [a], [Row("a", None, 1)], [Row("a", None, 0.5)], [Row("a", "", 0)])}
    assert len(digests) == 6
    assert rows_sha256([a, b]) == rows_sha256((Row("a", None, 0), Row("a", "b", 1)))


GLUE_ROWS = {  # (training file, dev splits), as published
    "sst2": (67_349, [872]),
    "cola": (8_551, [1_043]),
    "mrpc": (3_668, [408]),
    "stsb": (5_749, [1_500]),
    "rte": (2_490, [277]),
    "wnli": (635, [71]),
    "qnli": (8_999, [5_463]),
    "mnli": (8_999, [9_815, 9_832]),
    "qqp": (8_999, [1_000]),
}


def real(name: str, seed: int = 0) -> Task:
    folder = os.environ.get(glue.FOLDER_VARIABLE)
    if not folder:
        pytest.skip(f"{glue.FOLDER_VARIABLE} names no folder of GLUE's files")
    return open_task(TaskSettings(name=name), data_dir=Path(folder), seed=seed)


@pytest.mark.full
@pytest.mark.parametrize("name", GLUE_NAMES)
def test_the_real_files_hold_the_published_number_of_rows_and_nothing_leaks(name: str) -> None:
    task = real(name)
    train, dev = GLUE_ROWS[name]
    assert len(task.train.rows) + task.train.dropped + len(task.selection.rows) == train
    assert [len(split.rows) for split in task.dev()] == dev
    held = {text_of(row) for row in task.selection.rows}
    left = [text_of(row) for row in task.train.rows]
    assert not held & set(left)
    assert max((sum(len(part.split()) for part in text) for text in inside(left, held)), default=0) < 3


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_sst2_loses_the_phrases_of_its_selection_sentences_within_seconds(seed: int) -> None:
    start = time.perf_counter()
    task = real("sst2", seed)
    assert time.perf_counter() - start < 20
    assert len(task.selection.rows) == 688
    assert 4_500 < task.train.dropped < 5_500
    held = [f" {' '.join(row.text.lower().split())} " for row in task.selection.rows]
    whole = "|".join(held)
    short = [row.text for row in task.train.rows if len(row.text.split()) >= 3 and f" {' '.join(row.text.lower().split())} " in whole]
    assert short == []
