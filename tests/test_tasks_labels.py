from pathlib import Path

import numpy as np
import pytest

from glue_files import write_task
from models import random_checkpoint
from onnxsqueeze.errors import DataError
from onnxsqueeze.nn.checkpoint import id2label
from onnxsqueeze.tasks.labels import labels_in_model_order
from onnxsqueeze.tasks.metrics import scores
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
    assert "force: true" in str(caught.value.remedy)


def test_a_stated_order_is_taken_where_names_prove_nothing_and_never_for_another_number_of_classes() -> None:
    assert labels_in_model_order(RTE, {0: "LABEL_0", 1: "LABEL_1"}, stated=True) == RTE.labels
    with pytest.raises(DataError, match=r"the task has 2 classes .* but the model has 3") as caught:
        labels_in_model_order(RTE, {0: "a", 1: "b", 2: "c"}, stated=True)
    assert "force: true" in str(caught.value.remedy)


def test_a_classifier_whose_config_names_no_classes_needs_the_order_stated_and_nothing_more(tmp_path: Path) -> None:
    write_task(tmp_path, "rte")
    names = id2label(random_checkpoint(tmp_path / "model", "bert"))
    with pytest.raises(DataError, match=r"0: entailment, 1: not_entailment; the model's are 0: LABEL_0, 1: LABEL_1"):
        open_task(TaskSettings(name="rte"), data_dir=tmp_path, seed=0).in_order_of(names)
    for order in (("entailment", "not_entailment"), ("not_entailment", "entailment")):
        stated = open_task(TaskSettings(name="rte", labels=order), data_dir=tmp_path, seed=0)
        assert stated.in_order_of(names).info.labels == order


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


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_is_of_the_same_class_in_whatever_order_a_model_has_the_classes(tmp_path: Path, name: str) -> None:
    write_task(tmp_path, name)
    task = open_task(TaskSettings(name=name), data_dir=tmp_path, seed=0)
    positive = {"mrpc": "equivalent", "qqp": "duplicate"}[name]
    turned = task.in_order_of({0: positive, 1: f"not_{positive}"})
    stated = open_task(TaskSettings(name=name, labels=(positive, f"not_{positive}")), data_dir=tmp_path, seed=0)
    for other in (turned, stated):
        assert other.info.labels == tuple(reversed(task.info.labels))
        assert scores_of_one_answer(other, positive) == scores_of_one_answer(task, positive)
        assert scores_of_one_answer(other, f"not_{positive}") == scores_of_one_answer(task, f"not_{positive}")
    n, true = len(task.selection.rows), sum(row.label == 1 for row in task.selection.rows)
    assert scores_of_one_answer(turned, positive)["f1"] == pytest.approx(2 * true / (n + true))


def scores_of_one_answer(task: Task, answer: str) -> dict[str, float]:
    """The task's metrics on the selection rows where every row is said to be ``answer``."""
    labels = [row.label for row in task.selection.rows]
    return scores(task.info, np.eye(2, dtype=np.float32)[[task.info.labels.index(answer)] * len(labels)], labels)


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
