import math

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxsqueeze.errors import MeasureError
from onnxsqueeze.tasks.metrics import primary, scores
from onnxsqueeze.tasks.rows import TaskInfo

BINARY = TaskInfo("own", ("no", "yes"), ("matthews", "accuracy", "f1"), "matthews")
BINARY_F1 = TaskInfo("own", ("no", "yes"), ("f1",), "f1", positive="yes")
SCORE = TaskInfo("own", (), ("spearman", "pearson"), "spearman")


def logits(predicted: list[int], classes: int = 2) -> NDArray[np.float32]:
    return np.eye(classes, dtype=np.float32)[predicted]


def test_class_metrics_equal_the_values_counted_by_hand() -> None:
    # 3 true yes, 1 false yes, 2 missed, 4 true no
    truth = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    got = scores(BINARY, logits([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]), truth)
    assert list(got) == ["matthews", "accuracy", "f1"]
    assert got["accuracy"] == pytest.approx(7 / 10)
    assert got["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert got["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert primary(BINARY, logits([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]), truth) == got["matthews"]


def test_f1_is_that_of_the_class_named_positive_wherever_it_stands() -> None:
    truth, said = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    no = TaskInfo("own", ("no", "yes"), ("f1",), "f1", positive="no")
    assert primary(no, logits(said), truth) == pytest.approx(2 * 4 / (2 * 4 + 2 + 1))
    turned = TaskInfo("own", ("yes", "no"), ("f1",), "f1", positive="yes")
    assert primary(turned, logits([1 - i for i in said]), [1 - i for i in truth]) == primary(BINARY_F1, logits(said), truth)
    assert primary(turned, logits([0, 0]), [0, 0]) == 1.0
    assert primary(turned, logits([1, 1]), [1, 1]) == 0.0


def test_correlations_equal_the_values_worked_out_by_hand() -> None:
    outputs = np.array([[1], [2], [3], [10]], np.float32)
    got = scores(SCORE, outputs, [1.0, 2.0, 4.0, 3.0])
    assert got["spearman"] == pytest.approx(0.8)  # 1 - 6·2 / (4·15)
    assert got["pearson"] == pytest.approx(7 / math.sqrt(50 * 5))  # sums of products of deviations


def test_values_that_divide_by_zero_are_zero() -> None:
    assert scores(BINARY, logits([0, 0, 0]), [0, 1, 0]) == {"matthews": 0.0, "accuracy": pytest.approx(2 / 3), "f1": 0.0}
    assert scores(BINARY, logits([0, 0]), [0, 0])["f1"] == 0.0
    assert scores(SCORE, np.ones((3, 1), np.float32), [1, 2, 3]) == {"spearman": 0.0, "pearson": 0.0}


def test_of_equal_logits_the_first_class_is_predicted() -> None:
    assert scores(BINARY, np.zeros((2, 2), np.float32), [0, 1])["accuracy"] == 0.5


def test_more_than_two_classes_have_accuracy_and_matthews() -> None:
    info = TaskInfo("own", ("a", "b", "c"), ("accuracy", "matthews"), "accuracy")
    assert scores(info, logits([0, 1, 2], 3), [0, 1, 2]) == {"accuracy": 1.0, "matthews": pytest.approx(1.0)}


@pytest.mark.parametrize("outputs", [np.zeros((2, 2), np.float32), np.zeros((3, 1), np.float32), np.zeros(3, np.float32)])
def test_logits_of_another_shape_are_refused(outputs: NDArray[np.float32]) -> None:
    with pytest.raises(MeasureError, match=r"must have the shape \(3, 2\)"):
        primary(BINARY, outputs, [0, 1, 0])


def test_logits_that_are_not_finite_are_refused_instead_of_counted_as_a_class() -> None:
    outputs = logits([0, 1, 0])
    outputs[1, 0] = np.nan
    with pytest.raises(MeasureError, match="1 of 3 rows have logits that are not finite"):
        primary(BINARY, outputs, [0, 1, 0])
