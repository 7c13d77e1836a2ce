import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks.files import sort_labels
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.rows import Row
from onnxsqueeze.tasks.settings import TaskSettings

Rows = Sequence[dict[str, Any]]


def invented(n: int, labels: Sequence[Any] = ("spam", "ham")) -> list[dict[str, Any]]:
    return [{"id": i, "body": f'message "{i}", or so', "answer": f"line {i}\u00e9", "kind": labels[i % len(labels)]} for i in range(n)]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join("\t".join(map(str, fields)) for fields in [rows[0], *(row.values() for row in rows)]), encoding="utf-8")
    return path


def settings(tmp_path: Path, train: Rows, dev: Rows, ends: tuple[str, str] = (".csv", ".jsonl"), **more: Any) -> TaskSettings:
    files = {"train": write(tmp_path / f"mail{ends[0]}", train), "dev": write(tmp_path / f"held{ends[1]}", dev)}
    return TaskSettings.model_validate({**files, "text": "body", "label": "kind", **more})


@pytest.mark.parametrize("ends", [(".csv", ".tsv"), (".tsv", ".csv"), (".jsonl", ".parquet"), (".parquet", ".jsonl")])
def test_own_rows_are_the_same_from_every_file_format(tmp_path: Path, ends: tuple[str, str]) -> None:
    task = open_task(settings(tmp_path, invented(600), invented(9), ends, text_pair="answer"), data_dir=None, seed=0)
    assert {*task.train.rows, *task.selection.rows} == {Row(f'message "{i}", or so', f"line {i}\u00e9", (i + 1) % 2) for i in range(600)}
    assert (task.info.name, task.info.labels, task.info.primary) == ("mail", ("ham", "spam"), "accuracy")
    (dev,) = task.dev()
    assert (dev.name, dev.source, dev.role) == ("validation", f"held{ends[1]}", "dev")
    assert dev.rows[0] == Row('message "0", or so', "line 0\u00e9", 1)


def test_a_quoted_line_break_in_a_csv_is_part_of_the_text_and_later_faults_name_the_right_line(tmp_path: Path) -> None:
    rows = [{"body": "one\ntwo", "kind": "a"}, *({"body": f"text {i}", "kind": "ab"[i % 2]} for i in range(600))]
    task = open_task(settings(tmp_path, rows, rows[:3], (".csv", ".csv")), data_dir=None, seed=0)
    assert task.dev()[0].rows[0].text == "one\ntwo"
    with (tmp_path / "held.csv").open("a", encoding="utf-8") as handle:
        handle.write("only one field\n")
    with pytest.raises(DataError, match=r"held\.csv:6: must have 2 fields, got 1; the file looks cut off here"):
        task.dev()


def test_whole_numbers_sort_as_numbers_and_names_in_natural_order() -> None:
    assert sort_labels({"10", "2", "-1"}) == ("-1", "2", "10")
    assert sort_labels({"step 10", "Step 2", "apple"}) == ("apple", "Step 2", "step 10")


def test_labels_in_the_recipe_give_the_order_of_the_classes(tmp_path: Path) -> None:
    task = open_task(settings(tmp_path, invented(600), invented(4), labels=["spam", "ham"]), data_dir=None, seed=0)
    assert task.info.labels == ("spam", "ham")
    assert [row.label for row in task.dev()[0].rows] == [0, 1, 0, 1]


@pytest.mark.parametrize(("stated", "positive"), [(None, "spam"), (["ham", "spam"], "spam"), (["spam", "ham"], "ham")])
def test_f1_is_of_the_second_class_of_the_tasks_own_order_and_stays_with_it(
    tmp_path: Path, stated: list[str] | None, positive: str
) -> None:
    task = open_task(settings(tmp_path, invented(600), invented(4), metric=["accuracy", "f1"], labels=stated), data_dir=None, seed=0)
    assert (task.info.positive, task.info.positive_index) == (positive, 1)
    other = task.in_order_of({0: positive, 1: task.info.labels[0]})
    assert (other.info.positive, other.info.positive_index) == (positive, 0)


def test_without_f1_no_class_of_own_files_is_the_positive_one(tmp_path: Path) -> None:
    assert open_task(settings(tmp_path, invented(600), invented(4)), data_dir=None, seed=0).info.positive is None


def test_numbers_truth_values_and_their_texts_are_the_same_class_in_every_format(tmp_path: Path) -> None:
    task = open_task(settings(tmp_path, invented(600, ("0", "1")), invented(4, (0, 1.0))), data_dir=None, seed=0)
    assert [row.label for row in task.dev()[0].rows] == [0, 1, 0, 1]
    task = open_task(settings(tmp_path, invented(600, ("false", "true")), invented(2, (True, False))), data_dir=None, seed=0)
    assert [row.label for row in task.dev()[0].rows] == [1, 0]


def test_a_correlation_makes_the_label_a_score(tmp_path: Path) -> None:
    task = open_task(
        settings(tmp_path, invented(600, ("-1.5", "3")), invented(2, (0.25, 7)), metric=["pearson", "spearman"]), data_dir=None, seed=0
    )
    assert (task.info.labels, task.info.outputs, task.info.primary) == ((), 1, "pearson")
    assert {row.label for row in task.train.rows} == {-1.5, 3.0}
    assert [row.label for row in task.dev()[0].rows] == [0.25, 7.0]


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ({}, {"text": "boddy"}, "mail.csv:1: has no column 'boddy'; did you mean 'body'?"),
        ({"body": " "}, {}, "mail.csv:2: has no text"),
        ({"kind": ""}, {}, "mail.csv:2: kind: must be a class name or a whole number, got ''"),
        ({"kind": "x"}, {"labels": ["spam", "ham"]}, "mail.csv:2: unknown class 'x'; allowed: spam, ham"),
        ({"kind": "x"}, {"metric": "f1"}, "metric f1 needs two classes, got 3: ham, spam, x"),
        ({}, {"metric": "pearson"}, "mail.csv:2: kind: must be a finite number, got 'spam'"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_work_begins(
    tmp_path: Path, change: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    rows = invented(600)
    rows[0].update(change)
    with pytest.raises(DataError) as caught:
        open_task(settings(tmp_path, rows, invented(3), **more), data_dir=None, seed=0)
    assert said in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"body": "a"', "held.jsonl:2: is no JSON"),
        ("[1]", "held.jsonl:2: must be a JSON object, got '[1]'"),
        ('{"bodi": "a", "kind": "ham"}', "held.jsonl:2: has no key 'body'; did you mean 'bodi'?"),
        ('{"body": null, "kind": "ham"}', "held.jsonl:2: body: must be a text, got None"),
        ('{"body": "\\ud800", "kind": "ham"}', "held.jsonl:2: body: holds half of a surrogate pair"),
        ('{"body": "a", "kind": 0.5}', "held.jsonl:2: kind: must be a class name or a whole number, got 0.5"),
        ('{"body": "a", "kind": "eggs"}', "held.jsonl:2: unknown class 'eggs'; allowed: ham, spam"),
    ],
)
def test_broken_dev_rows_are_named_when_the_dev_set_is_read(tmp_path: Path, line: str, said: str) -> None:
    given = settings(tmp_path, invented(600), invented(1))
    with (tmp_path / "held.jsonl").open("a", encoding="utf-8") as handle:
        handle.write(line + "\n")
    task = open_task(given, data_dir=None, seed=0)
    with pytest.raises(DataError) as caught:
        task.dev()
    assert said in caught.value.message


def test_a_damaged_parquet_file_and_an_open_quote_are_refused(tmp_path: Path) -> None:
    given = settings(tmp_path, invented(600), invented(2), (".parquet", ".csv"))
    held, mail = tmp_path / "held.csv", tmp_path / "mail.parquet"
    held.write_text('body,kind\n"never closed,ham\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"held\.csv:2: is no CSV"):
        open_task(given, data_dir=None, seed=0).dev()
    mail.write_bytes(mail.read_bytes()[:500])
    with pytest.raises(DataError, match=r"mail\.parquet: is no readable Parquet file"):
        open_task(given, data_dir=None, seed=0)


def test_one_class_a_missing_file_and_an_unknown_ending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every row has the label 'ham'"):
        open_task(settings(tmp_path, invented(600, ["ham"]), invented(2)), data_dir=None, seed=0)
    (tmp_path / "held.jsonl").rename(tmp_path / "held.json")
    with pytest.raises(DataError, match="there is no such file"):
        open_task(TaskSettings(train=tmp_path / "mail.csv", dev=tmp_path / "held.jsonl"), data_dir=None, seed=0)
    with pytest.raises(DataError, match=r"unknown ending '\.json'; did you mean '\.jsonl'\?"):
        open_task(TaskSettings(train=tmp_path / "mail.csv", dev=tmp_path / "held.json"), data_dir=None, seed=0)
