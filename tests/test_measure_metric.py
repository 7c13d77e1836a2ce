"""Metrics through a real .onnx, their intervals, and the paired comparison."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from scipy.stats import binomtest

from models import random_checkpoint, silent, toy_rows
from onnxsqueeze.errors import MeasureError
from onnxsqueeze.measure.metric import compare, evaluate, predict, quality
from onnxsqueeze.results import MetricDelta
from onnxsqueeze.tasks.rows import SplitRows, TaskInfo

CLASSES = TaskInfo(name="words", labels=("negative", "positive"), metrics=("accuracy", "f1", "matthews"), primary="matthews", max_length=24)
SCORES = TaskInfo(name="alike", labels=(), metrics=("pearson", "spearman"), primary="spearman", max_length=24)


def split(n: int, *, pairs: bool = False) -> SplitRows:
    return SplitRows(name="dev", rows=toy_rows(n, 3, pairs=pairs), source="generated", sha256="0" * 64, role="dev")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from optimum.exporters.onnx import main_export

    out = tmp_path_factory.mktemp("metric") / "fp32"
    checkpoint = random_checkpoint(out.parent / "checkpoint", "bert")
    with contextlib.redirect_stdout(io.StringIO()):
        main_export(str(checkpoint), out, task="text-classification", opset=18, do_validation=False)
    return out


def alone(folder: Path, rows: SplitRows, max_length: int) -> NDArray[np.float32]:
    """One row a call without padding, by nothing of the project."""
    import onnxruntime as ort
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = []
    for row in rows.rows:
        one = tokenizer.encode(row.text) if row.text_pair is None else tokenizer.encode(row.text, row.text_pair)
        parts = {"input_ids": one.ids, "attention_mask": one.attention_mask, "token_type_ids": one.type_ids}
        found.append(session.run(None, {i.name: np.array([parts[i.name]], np.int64) for i in session.get_inputs()})[0])
    return np.concatenate(found)


@pytest.mark.parametrize("pairs", [False, True])
def test_logits_are_those_of_a_stock_session_in_the_rows_order(exported: Path, pairs: bool) -> None:
    rows = split(33, pairs=pairs)
    expected = alone(exported, rows, 10)

    ours = predict(exported, "cpu", rows, 10, 1, 1, silent)
    np.testing.assert_array_equal(ours, expected)  # batch 1: nothing is padded, so every bit
    assert ours.dtype == np.float32
    together = predict(exported, "cpu", rows, 10, 8, 1, silent)
    np.testing.assert_allclose(together, expected, atol=1e-5)
    assert len(np.unique(expected[:, 0])) > 20


def test_progress_reaches_the_number_of_rows(exported: Path) -> None:
    told: list[tuple[int, int]] = []
    predict(exported, "cpu", split(7), 24, 2, 1, lambda done, total, _note="": told.append((done, total)))

    assert told[0] == (0, 7)
    assert told[-1] == (7, 7)


def instead(exported: Path, folder: Path, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], shape: list[str | int]) -> Path:
    """A copy of the exported folder with another graph."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((exported / name).read_bytes())
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(folder / "model.onnx"))
    return folder


def test_logits_that_are_not_finite_name_the_row(exported: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["x", "one"], ["sum"]),
        helper.make_node("Exp", ["sum"], ["logits"]),  # overflows float32 at sums of ids above 88
    ]
    folder = instead(exported, tmp_path / "overflows", nodes, [helper.make_tensor("one", TensorProto.INT64, [1], [1])], ["batch", 1])

    with pytest.raises(MeasureError, match=r"overflows/model.onnx: row 1 of dev gives logits that are not finite"):
        predict(folder, "cpu", split(3), 24, 1, 1, silent)


def test_logits_per_token_are_refused(exported: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["x", "two"], ["logits"]),
    ]
    folder = instead(exported, tmp_path / "tokens", nodes, [helper.make_tensor("two", TensorProto.INT64, [1], [2])], ["batch", "tokens", 1])

    with pytest.raises(MeasureError, match=r"logits of 1 rows have shape \[1, \d+, 1\], expected \[1, outputs\]"):
        predict(folder, "cpu", split(3), 24, 1, 1, silent)


def judged(n: int, right: float, seed: int) -> tuple[NDArray[np.float32], list[int | float]]:
    """Logits of a model that is right in about that share of the rows."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=n)
    said = np.where(random.random(n) < right, labels, 1 - labels)
    logits: NDArray[np.float32] = np.eye(2)[said].astype(np.float32) + random.normal(0, 0.1, (n, 2)).astype(np.float32)
    return logits, labels.tolist()


def spoilt(logits: NDArray[np.float32], rows: slice) -> NDArray[np.float32]:
    """The same with the two classes exchanged in some rows."""
    changed = logits.copy()
    changed[rows] = changed[rows, ::-1]
    return changed


def test_every_metric_has_an_interval_around_its_value() -> None:
    logits, labels = judged(400, 0.8, 0)
    found = evaluate(CLASSES, logits, labels)

    assert list(found) == ["accuracy", "f1", "matthews"]
    for value in found.values():
        low, high = value.ci95
        assert low < value.value < high
        assert value.n == 400
    right = round(found["accuracy"].value * 400)
    assert found["accuracy"].ci95 == pytest.approx(tuple(binomtest(right, 400).proportion_ci(0.95, "wilson")), abs=1e-9)


def test_correlations_have_an_interval_and_a_better_model_is_better() -> None:
    random = np.random.default_rng(1)
    labels = random.random(300) * 5
    near, far = ((labels + random.normal(0, s, 300)).astype(np.float32)[:, None] for s in (0.5, 2.0))
    found = evaluate(SCORES, near, labels.tolist())
    delta = compare(SCORES, near, far, labels.tolist())

    for metric in ("pearson", "spearman"):
        low, high = found[metric].ci95
        assert low < found[metric].value < high < 1
        assert quality(delta[metric]) == "better"
        assert delta[metric].ci95[0] < delta[metric].delta < delta[metric].ci95[1]
        assert delta[metric].p_value < 0.01


def test_a_model_against_itself_is_a_tie_in_every_metric() -> None:
    logits, labels = judged(300, 0.8, 2)
    found = compare(CLASSES, logits, logits, labels)

    assert {(delta.delta, delta.p_value, quality(delta)) for delta in found.values()} == {(0.0, 1.0, "tie")}
    assert found["accuracy"].ci95[0] < 0 < found["accuracy"].ci95[1]


def test_a_spoilt_model_is_worse_in_every_metric_and_by_the_right_amount() -> None:
    logits, labels = judged(400, 1.0, 3)
    found = compare(CLASSES, spoilt(logits, slice(0, 40)), logits, labels)

    assert found["accuracy"].delta == pytest.approx(-0.1)
    assert found["accuracy"].p_value == pytest.approx(2 / 2**40)
    assert {quality(delta) for delta in found.values()} == {"worse"}


def test_three_changed_rows_of_a_thousand_are_a_tie_in_every_metric() -> None:
    logits, labels = judged(1000, 1.0, 4)
    found = compare(CLASSES, spoilt(logits, slice(0, 3)), logits, labels)

    assert all(delta.delta < 0 for delta in found.values())
    assert all(delta.p_value == pytest.approx(0.25) for delta in found.values())
    assert {quality(delta) for delta in found.values()} == {"tie"}


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    logits, labels = judged(1000, 0.8, 5)
    right = [i for i in range(1000) if logits[i].argmax() == labels[i]][:15]
    worse = logits.copy()
    worse[right] = worse[right, ::-1]
    separate = evaluate(CLASSES, worse, labels)["accuracy"].ci95, evaluate(CLASSES, logits, labels)["accuracy"].ci95

    assert separate[0][1] > separate[1][0]  # they overlap
    assert quality(compare(CLASSES, worse, logits, labels)["accuracy"]) == "worse"


def test_figures_are_the_same_each_time() -> None:
    logits, labels = judged(200, 0.8, 6)
    other = spoilt(logits, slice(0, 20))

    assert evaluate(CLASSES, logits, labels) == evaluate(CLASSES, logits, labels)
    assert compare(CLASSES, other, logits, labels) == compare(CLASSES, other, logits, labels)


def test_quality_needs_the_whole_interval_and_the_test() -> None:
    assert quality(MetricDelta(delta=-0.01, ci95=(-0.02, -0.001), p_value=0.2)) == "tie"
    assert quality(MetricDelta(delta=-0.01, ci95=(-0.02, 0.001), p_value=0.01)) == "tie"
    assert quality(MetricDelta(delta=-0.01, ci95=(-0.02, -0.001), p_value=0.01)) == "worse"
    assert quality(MetricDelta(delta=0.01, ci95=(0.001, 0.02), p_value=0.01)) == "better"
