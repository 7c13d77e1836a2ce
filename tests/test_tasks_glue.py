import hashlib
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from glue_files import LAYOUT, table, write_task
from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks import glue
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.rows import Row
from onnxsqueeze.tasks.settings import GLUE_NAMES, TaskSettings
from onnxsqueeze.tasks.tables import read_bytes

EXPECTED = {  # classes, metrics (the first one decides)
    "sst2": (("negative", "positive"), ("accuracy",)),
    "cola": (("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "mrpc": (("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": ((), ("spearman", "pearson")),
    "qqp": (("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": (("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": (("entailment", "not_entailment"), ("accuracy",)),
    "rte": (("entailment", "not_entailment"), ("accuracy",)),
    "wnli": (("not_entailment", "entailment"), ("accuracy",)),
}


@pytest.fixture(autouse=True)
def no_folder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(glue.FOLDER_VARIABLE, raising=False)


def rows_of(task: str, text: str | bytes) -> tuple[Row, ...]:
    return glue.rows_of_tsv(glue.SPECS[task], Path("train.tsv"), text if isinstance(text, bytes) else text.encode())


def message(task: str, text: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(task, text)
    assert caught.value.remedy
    return caught.value.message


@pytest.mark.parametrize("name", GLUE_NAMES)
def test_every_task_is_read_from_glues_layout_with_its_classes_and_metrics(tmp_path: Path, name: str) -> None:
    folder = write_task(tmp_path, name)
    task = open_task(TaskSettings(name=name), data_dir=tmp_path, seed=0)
    labels, metrics = EXPECTED[name]
    assert (task.info.labels, task.info.metrics, task.info.primary) == (labels, metrics, metrics[0])
    assert (len(task.train.rows), len(task.selection.rows)) == (540, 60)
    assert task.train.source == task.selection.source == f"{folder.name}/train.tsv"
    assert task.train.sha256 == hashlib.sha256((folder / "train.tsv").read_bytes()).hexdigest()
    pair = None if name in ("sst2", "cola") else "a train thing {} ."
    space = " " if name == "sst2" else ""  # SST-2's sentences end in a space, and stay so
    steps = (0.0, 2.5, 5.0) if name == "stsb" else tuple(range(len(labels)))
    all_rows = {Row(f"the train item {i} .{space}", pair and pair.format(i), steps[i % len(steps)]) for i in range(600)}
    assert {*task.train.rows, *task.selection.rows} == all_rows
    dev = task.dev()
    files = ("dev_matched.tsv", "dev_mismatched.tsv") if name == "mnli" else ("dev.tsv",)
    assert [split.name for split in dev] == (["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"])
    assert [split.source for split in dev] == [f"{folder.name}/{file}" for file in files]
    assert [len(split.rows) for split in dev] == [12] * len(files)


def test_columns_are_found_by_name_in_any_order() -> None:
    assert rows_of("mnli", "gold_label\tx\tsentence2\tsentence1\nneutral\t-\tb\ta\n") == (Row("a", "b", 1),)


def test_quotes_are_literal_and_a_missing_final_newline_and_windows_line_ends_do_no_harm() -> None:
    assert rows_of("sst2", 'sentence\tlabel\r\n"so ""good\t1\r\nthe "end"\t0') == (Row('"so ""good', None, 1), Row('the "end"', None, 0))


def test_line_separators_other_than_newline_stay_inside_a_text() -> None:
    assert rows_of("sst2", "sentence\tlabel\na\u2028b\x85c\t1\n") == (Row("a\u2028b\x85c", None, 1),)


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("sst2", "", "train.tsv: the file is empty"),
        ("sst2", "sentence\tlabel\n", "train.tsv: holds a header and no rows"),
        ("sst2", "sentense\tlabel\na\t1\n", "train.tsv:1: has no column 'sentence'; did you mean 'sentense'?"),
        ("sst2", "sentence\tlabel\na\t1\nb\tpositive\n", "train.tsv:3: the label must be one of 0, 1, got 'positive'"),
        (
            "rte",
            "sentence1\tsentence2\tlabel\na\tb\tentails\n",
            "train.tsv:2: the label must be one of entailment, not_entailment, got 'entails'",
        ),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "train.tsv:2: the label must be a number from 0 to 5, got '5.1'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "train.tsv:2: the label must be a number from 0 to 5, got 'nan'"),
        ("sst2", "sentence\tlabel\na\t1\nb and n", "train.tsv:3: must have 2 fields between tabs, got 1; the file looks cut off here"),
        ("sst2", "sentence\tlabel\na\tb\t1\nc\t1\n", "train.tsv:2: must have 2 fields between tabs, got 3"),
        ("cola", "x\t1\t\tfine\ny\t1\tbad\n", "train.tsv:2: must have 4 fields between tabs, got 3; the file looks cut off here"),
        ("sst2", b"sentence\tlabel\na\t1\nb\xff\t1\n", "train.tsv:3: is not UTF-8: byte 0xff at column 2"),
        ("sst2", b"sentence\tlabel\na\0b\t1\n", "train.tsv:2: holds a NUL byte"),
        ("sst2", "sentence\tlabel\n \t1\n", "train.tsv:2: has no text"),
    ],
)
def test_a_broken_file_is_refused_with_file_and_line(tmp_path: Path, task: str, text: str | bytes, said: str) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        glue.rows_of_tsv(glue.SPECS[task], path, read_bytes(path))
    assert f"{tmp_path}/{said}" in caught.value.message
    assert caught.value.remedy


def test_faults_are_collected_and_the_fifth_ends_the_reading() -> None:
    lines = message("sst2", "sentence\tlabel\n" + "a\t7\n" * 50).splitlines()
    assert [line.split(":")[1] for line in lines[:5]] == ["2", "3", "4", "5", "6"]
    assert len(lines) == 6
    assert lines[5].endswith("reading stopped here")


def test_a_training_sample_is_taken_only_where_the_full_file_is_absent(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "qnli", train_file="train_sample.tsv")
    assert open_task(TaskSettings(name="qnli"), data_dir=tmp_path, seed=0).train.source == "QNLI/train_sample.tsv"
    (folder / "train.tsv").write_text(table("qnli", 700, "full"), encoding="utf-8")
    assert open_task(TaskSettings(name="qnli"), data_dir=tmp_path, seed=0).train.source == "QNLI/train.tsv"


def test_the_heldout_file_of_qqp_is_never_called_glues_dev_set(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "qqp", train_file="train_sample.tsv")
    assert open_task(TaskSettings(name="qqp"), data_dir=tmp_path, seed=0).info.note == ""
    (folder / "dev.tsv").rename(folder / "train_sample_heldout.tsv")
    task = open_task(TaskSettings(name="qqp"), data_dir=tmp_path, seed=0)
    assert [(split.name, split.source) for split in task.dev()] == [("train_heldout", "QQP/train_sample_heldout.tsv")]
    assert "not a score on GLUE's dev set" in task.info.note


def test_the_folder_named_on_the_command_line_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "env", "rte", train=600)
    write_task(tmp_path / "line", "rte", train=700)
    monkeypatch.setenv(glue.FOLDER_VARIABLE, str(tmp_path / "env"))
    found = [len(source.train().rows) for source in (glue.find("rte", tmp_path / "line"), glue.find("rte", None))]
    assert found == [700, 600]


@pytest.mark.parametrize("missing", ["train.tsv", "dev_mismatched.tsv", ""])
def test_a_named_folder_without_the_tasks_files_is_an_error_and_nothing_else_is_tried(tmp_path: Path, missing: str) -> None:
    folder = write_task(tmp_path, "mnli")
    if missing:
        (folder / missing).unlink()
    else:
        folder.rename(tmp_path / "mnli")
    with pytest.raises(DataError) as caught:
        open_task(TaskSettings(name="mnli"), data_dir=tmp_path, seed=0)
    assert str(folder) in caught.value.message
    assert "MNLI/train.tsv, MNLI/dev_matched.tsv, MNLI/dev_mismatched.tsv" in str(caught.value.remedy)


def test_hub_rows_get_the_projects_class_order_by_name() -> None:
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["equivalent", "not_equivalent"]),
        }
    )
    data = datasets.Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}, features=features)
    assert glue.rows_of_hub(glue.SPECS["mrpc"], data) == (Row("a", "c", 1), Row("b", "d", 0))


def test_hub_rows_with_other_classes_or_without_a_label_are_refused() -> None:
    def sst2(names: list[str], label: int) -> datasets.Dataset:
        features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict({"sentence": ["a"], "label": [label]}, features=features)

    with pytest.raises(DataError, match="the classes must be negative, positive, got bad, good"):
        glue.rows_of_hub(glue.SPECS["sst2"], sst2(["bad", "good"], 0))
    with pytest.raises(DataError, match="row 0 has the label -1"):
        glue.rows_of_hub(glue.SPECS["sst2"], sst2(["negative", "positive"], -1))


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_files_and_without_the_hub_the_error_comes_fast_and_says_what_to_do(tmp_path: Path, variables: dict[str, str]) -> None:
    code = (
        "from onnxsqueeze.tasks.open import open_task\nfrom onnxsqueeze.tasks.settings import TaskSettings\n"
        "from onnxsqueeze.errors import DataError\n"
        "try:\n    open_task(TaskSettings(name='rte'), data_dir=None, seed=0)\nexcept DataError as error:\n    print(error)\n"
    )
    environment = {**os.environ, **variables, "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.startswith("task rte: no --data-dir is given, and ")
    for way_out in ("--data-dir", glue.FOLDER_VARIABLE, "HF_HUB_OFFLINE=1", "--task toy"):
        assert way_out in done.stdout


def test_every_task_has_a_layout_in_these_tests() -> None:
    assert set(LAYOUT) == set(GLUE_NAMES) == set(glue.SPECS)
