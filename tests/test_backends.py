"""Backends start for real, or say why not; nothing runs quietly elsewhere."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsqueeze import backends
from onnxsqueeze.backends import Backend, Runtime, Session, Shared
from onnxsqueeze.errors import MeasureError, Unavailable, UsageError


def classifier(path: Path, *, ids: int = TensorProto.INT64, product: str = "MatMul", outputs: int = 2, width: int = 8) -> Path:
    """input_ids, attention_mask → logits: the mean of one-hot rows times a weight. Also reads its own shape, as real exports do."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((width, outputs)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["rows", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["sum"], keepdims=0),
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["n"]),
        helper.make_node("Concat", ["n", "minus"], ["rows_by_width"], axis=0),
        helper.make_node("Reshape", ["sum", "rows_by_width"], ["flat"]),
        helper.make_node(product, ["flat", "weight"], ["logits"]),
    ]
    constants = [
        numpy_helper.from_array(random.standard_normal((50, width)).astype(np.float32), "table"),
        numpy_helper.from_array(weight, "weight"),
        *(
            helper.make_tensor(name, TensorProto.INT64, [1], [value])
            for name, value in (("last", 2), ("tokens", 1), ("first", 0), ("minus", -1))
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info(name, ids, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", outputs])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


FEED = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}


def test_a_session_feeds_only_the_inputs_that_the_graph_has(tmp_path: Path) -> None:
    session = backends.get("cpu").open(classifier(tmp_path / "model.onnx"), 1)
    logits = session.run(FEED)

    assert session.inputs == ("input_ids", "attention_mask")
    assert logits.shape == (2, 2)
    assert logits.dtype == np.float32
    assert session.load_s > 0


def test_ids_are_cast_where_the_graph_wants_int32(tmp_path: Path) -> None:
    wide = backends.get("cpu").open(classifier(tmp_path / "wide.onnx"), 1)
    narrow = backends.get("cpu").open(classifier(tmp_path / "narrow.onnx", ids=TensorProto.INT32), 1)

    np.testing.assert_array_equal(narrow.run(FEED), wide.run(FEED))


def test_a_shared_session_is_opened_by_the_first_and_closed_by_none_of_its_callers(tmp_path: Path) -> None:
    opened: list[Session] = []

    def opener() -> Session:
        opened.append(backends.get("cpu").open(classifier(tmp_path / "model.onnx"), 1))
        return opened[-1]

    Shared(opener).close()
    assert not opened, "nobody asked"
    with closing(Shared(opener)) as shared:
        said = []
        for _ in range(2):
            with closing(shared.open("cpu", tmp_path / "model.onnx", 1)) as session:
                said.append(session.run(FEED))
    np.testing.assert_array_equal(said[0], said[1])
    assert len(opened) == 1
    with pytest.raises((MeasureError, ValueError)):
        opened[0].run(FEED)


def test_an_input_that_nobody_gives_is_named(tmp_path: Path) -> None:
    session = backends.get("cpu").open(classifier(tmp_path / "model.onnx"), 1)

    with pytest.raises(MeasureError, match="attention_mask"):
        session.run({"input_ids": FEED["input_ids"]})


def test_a_file_that_is_no_model_is_a_message_without_the_path(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a model")

    with pytest.raises(MeasureError, match="cannot load it") as caught:
        backends.get("cpu").open(broken, 1)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(MeasureError, match="cannot load it") as caught:
        backends.get("cpu").open(tmp_path / "absent.onnx", 1)
    assert str(tmp_path) not in str(caught.value)


def test_a_run_that_the_model_cannot_do_is_a_measure_error(tmp_path: Path) -> None:
    session = backends.get("cpu").open(classifier(tmp_path / "model.onnx"), 1)

    with pytest.raises(MeasureError, match="stopped while running"):
        session.run({**FEED, "input_ids": np.full((2, 5), 10_000, np.int64)})


def test_the_full_name_of_a_provider_is_the_same_backend() -> None:
    assert backends.get("CUDAExecutionProvider") is backends.get("cuda")
    assert backends.get("TensorRTExecutionProvider") is backends.get("tensorrt"), "ONNX Runtime's own spelling is TensorrtExecutionProvider"
    assert [backends.get(name).name for name in backends.known()] == list(backends.known())


def test_any_execution_provider_is_a_backend() -> None:
    other = backends.get("DnnlExecutionProvider")

    assert (other.name, other.provider) == ("DnnlExecutionProvider", "DnnlExecutionProvider")
    absent = other.unavailable()
    assert absent is not None
    assert "no DnnlExecutionProvider in this onnxruntime" in absent[0]


def test_operators_without_kernels_are_refused_with_the_reason() -> None:
    dynamic = ("DynamicQuantizeLinear", "MatMul", "MatMulInteger")

    assert backends.get("cuda").refusal(dynamic) == (
        "CUDAExecutionProvider has no kernel for DynamicQuantizeLinear: such nodes would run on another provider, with copies in between; use float16 or quantize-weights"
    )
    assert "DynamicQuantizeLinear, MatMulInteger" in (backends.get("tensorrt").refusal(dynamic) or "")
    for name in backends.known():
        assert backends.get(name).refusal(("MatMul", "QuantizeLinear", "DequantizeLinear")) is None
    assert backends.get("cuda").refusal(("com.microsoft.MatMulNBits",)) is None
    assert backends.get("tensorrt").refusal(("com.microsoft.MatMulNBits",)) is not None
    assert backends.get("cpu").refusal(dynamic) is None


def test_an_unknown_backend_is_told_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'cdua'; did you mean 'cuda'\?"):
        backends.get("cdua")


def test_the_cpu_starts_a_session() -> None:
    assert backends.get("cpu").unavailable() is None
    assert "CPUExecutionProvider" in backends.HERE.started_providers()


def test_a_provider_that_this_onnxruntime_lacks_is_unavailable_with_reason_and_remedy(tmp_path: Path) -> None:
    lacking = Backend("npu", "NoSuchExecutionProvider", "onnxruntime-npu")

    absent = lacking.unavailable()

    assert absent is not None
    reason, remedy = absent
    assert "no NoSuchExecutionProvider in this onnxruntime" in reason
    assert "pip install numpy onnxruntime-npu" in remedy
    assert "--python npu=" in remedy
    with pytest.raises(Unavailable, match="no NoSuchExecutionProvider") as caught:
        lacking.open(classifier(tmp_path / "model.onnx"), 1)
    assert caught.value.remedy == remedy


def azure() -> str:
    """A provider of the plain CPU wheel that has no kernel for any ONNX operator: all falls back."""
    import onnxruntime as ort

    name = "AzureExecutionProvider"
    if name not in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has no {name}")
    return name


def test_a_provider_that_runs_nothing_itself_does_not_count_as_started() -> None:
    absent = Backend("azure", azure(), "onnxruntime").unavailable()

    assert absent is not None
    assert "does not start" in absent[0]


def test_nodes_that_fall_back_are_an_error_that_counts_them_but_not_the_arithmetic_on_shapes(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="fell back: ") as caught:
        Session(classifier(tmp_path / "model.onnx"), azure(), 1)

    assert "1 MatMul" in caught.value.message
    assert "1 ReduceSum" in caught.value.message
    assert "Shape" not in caught.value.message
    assert "Concat" not in caught.value.message


def test_threads_of_an_idle_session_do_not_spin(tmp_path: Path) -> None:
    session = backends.get("cpu").open(classifier(tmp_path / "model.onnx", width=2048), 2)
    session.hold([{name: np.ones((64, 64), np.int64) for name in FEED}])
    idle = 0.0
    for _ in range(5):
        session.time(1, 0)
        before = session.cpu_s()
        time.sleep(0.05)  # a stock session's thread spins for some 30 ms of these
        after = session.cpu_s()
        assert before is not None
        assert after is not None
        idle += after - before

    assert idle < 0.2 * 5 * 0.05


def test_two_wheels_of_onnxruntime_over_each_other_are_told() -> None:
    wheels = ("onnxruntime 1.31.1", "onnxruntime-gpu 1.31.1")

    assert Runtime("1.31.1", wheels[:1], ()).clash is None
    assert (
        Runtime("1.31.1", wheels, ()).clash
        == "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed and overwrite each other's files"
    )
