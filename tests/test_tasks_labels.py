from pathlib import Path

import pytest

from glue_files import write_task
from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks.labels import labels_in_model_order
from onnxsqueeze.tasks.open import Task, open_task
from onnxsqueeze.tasks.rows import TaskInfo
from onnxsqueeze.tasks.settings import TaskSettings

RTE = TaskInfo("rte", ("entailment", "not_entailment"), ("accuracy",), "accuracy")


def truth(task: Task) -> dict[str, str]:
    """Class name by text, over all rows."""
    splits = (task.train, task.selection, *task.dev())
    return {row.text: task.info.labels[int(row.label)] for split in splits for row in split.rows}


def test_names_match_whatever_their_case_and_separators() -> None:
    assert labels_in_model_order(RTE, {1: "ENTAILMENT", 0: "Not-Entailment"}) == ("not_entailment", "entailment")


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("yes", "no"), ("entailment", "entailment")])
def test_an_order_that_cannot_be_proven_is_an_error_that_shows_both_orders(names: tuple[str, str]) -> None:
    with pytest.raises(DataError) as caught:
        labels_in_model_order(RTE, dict(enumerate(names)))
    assert "0: entailment, 1: not_entailment" in caught.value.message
    assert f"0: {names[0]}, 1: {names[1]}" in caught.value.message
    assert "labels: [entailment, not_entailment]" in str(caught.value.remedy)
    assert "id2label" in str(caught.value.remedy)


def test_a_stated_order_is_taken_where_names_prove_nothing_and_never_for_another_number_of_classes() -> None:
    assert labels_in_model_order(RTE, {0: "LABEL_0", 1: "LABEL_1"}, stated=True) == RTE.labels
    with pytest.raises(DataError, match=r"the task has 2 classes .* but the model has 3"):
        labels_in_model_order(RTE, {0: "a", 1: "b", 2: "c"}, stated=True)


def test_classes_that_differ_by_a_sign_alone_are_not_mixed_up() -> None:
    signs = TaskInfo("own", ("-1", "1"), ("accuracy",), "accuracy")
    assert labels_in_model_order(signs, {0: "1", 1: "-1"}) == ("1", "-1")
    with pytest.raises(DataError, match="cannot be proven"):
        labels_in_model_order(signs, {0: "_1", 1: "1"})


def test_a_score_needs_a_model_with_one_output() -> None:
    stsb = TaskInfo("stsb", (), ("spearman",), "spearman")
    assert labels_in_model_order(stsb, {0: "LABEL_0"}) == ()
    with pytest.raises(DataError, match="its label is a score"):
        labels_in_model_order(stsb, {0: "LABEL_0", 1: "LABEL_1"})


def test_another_order_renumbers_every_row_and_changes_no_rows_class(tmp_path: Path) -> None:
    write_task(tmp_path, "mnli")
    task = open_task(TaskSettings(name="mnli"), data_dir=tmp_path, seed=0)
    turned = task.in_order_of({0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"})
    assert turned.info.labels == ("contradiction", "entailment", "neutral")
    assert truth(turned) == truth(task)
    assert [row.label for row in turned.train.rows] != [row.label for row in task.train.rows]
    assert turned.with_label_order(task.info.labels).train == task.train


def test_labels_in_the_recipe_reorder_a_named_task_and_count_as_stated(tmp_path: Path) -> None:
    write_task(tmp_path, "rte")
    task = open_task(TaskSettings(name="rte", labels=("not_entailment", "entailment")), data_dir=tmp_path, seed=0)
    assert task.in_order_of({0: "LABEL_0", 1: "LABEL_1"}).info.labels == ("not_entailment", "entailment")
    assert truth(task) == truth(open_task(TaskSettings(name="rte"), data_dir=tmp_path, seed=0))
    with pytest.raises(DataError, match="labels: must be the task's classes"):
        open_task(TaskSettings(name="rte", labels=("yes", "no")), data_dir=tmp_path, seed=0)
