from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from onnx import helper, numpy_helper
from pydantic import ValidationError

from dequantize import errors, matrices
from exports import build, distance, export
from models import FAMILIES, FamilyName, artifact
from onnxsqueeze import graph
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.stages.quantize_inc import QuantizeInc

needs_inc = pytest.mark.skipif(importlib.util.find_spec("neural_compressor") is None, reason="the extra 'inc' is not installed")


def stage(**settings: Any) -> QuantizeInc:
    return QuantizeInc.model_validate({"kind": "quantize-inc", "reduce_range": False, **settings})


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@needs_inc
@pytest.mark.parametrize(
    ("approach", "product"),
    [("dynamic", "MatMulInteger"), ("static", "QLinearMatMul"), ("static", "MatMul")],
    ids=["dynamic", "static", "qdq"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_within_half_a_step_and_logits_stay_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: FamilyName, approach: Literal["dynamic", "static"], product: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parent, context = export(tmp_path / "work", family)
    settings = stage(approach=approach, format="qdq" if product == "MatMul" else "qoperator")
    small, changed = build(settings, parent, tmp_path / "work" / "int8", context)
    graph.check(small.onnx, like=parent.onnx)
    found = errors(small.onnx, parent.onnx)
    assert set(found) == {name for name, values in matrices(parent.onnx).items() if values.ndim == 2 and values.dtype.kind == "f"}
    for name, (error, step) in found.items():  # tables too: neural-compressor's own would wrap rows that calibration did not read
        assert (error <= step * 0.501).all(), name
    assert changed.details["integer_weights"] == {"Gather": 2 if family == "distilbert" else 3, product: 15 if family == "electra" else 14}
    assert changed.details["float_matrices_left"] == 0
    assert distance(parent, small, context) < (0.1 if approach == "dynamic" else 0.2)
    assert names(tmp_path) == {"work"}, "neural-compressor's workspace was left in the working directory"
    assert names(small.path) == names(parent.path)


def smoothing(written: Path, original: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Of every smoothed product by its name: weight[in, out] of ``original``, s[in] that divides its inputs, and the weight stored for it, in float."""
    before, after, found = matrices(original), matrices(written), {}
    for node in graph.load(written).graph.node:
        if node.name.endswith("_smooth_mul"):
            name = node.name.removesuffix("_smooth_mul")
            product = next(n for n in graph.load(original).graph.node if n.name == name.removesuffix("_MatMul") or n.name == name)
            stored = f"{product.input[1]}_quantized"
            turned = product.op_type == "Gemm"  # [out, in] in the export
            weight = before[product.input[1]].T if turned else before[product.input[1]]
            scale = after[f"{product.input[1]}_scale"]
            assert not after[f"{product.input[1]}_zero_point"].any()
            found[name] = weight, 1 / after[node.input[1]], after[stored] * scale
    return found


@needs_inc
@pytest.mark.parametrize("format", ["qoperator", "qdq"])
def test_smoothquant_moves_the_scale_of_each_input_into_the_weight_as_its_paper_says(tmp_path: Path, format: str) -> None:  # noqa: A002, the setting's name
    parent, context = export(tmp_path, "bert")
    log_s = {}
    for alpha in (0.25, 0.5, 0.75):
        settings = stage(approach="static", format=format, smooth=alpha)
        small, changed = build(settings, parent, tmp_path / str(alpha), context)
        found = smoothing(small.onnx, parent.onnx)
        assert len(found) == changed.details["smoothed"] == 14
        for name, (weight, s, stored) in found.items():
            smoothed = weight * s[:, None]
            steps = np.abs(smoothed).max(axis=0) / 127
            assert (np.abs(stored - smoothed) <= 0.501 * steps).all(), name
        log_s[alpha] = {name: np.log(s) for name, (_, s, _) in found.items()}
        assert distance(parent, small, context) < 0.2
    for name, (weight, _, _) in found.items():  # s = max|X|^alpha / max|W|^(1 - alpha)
        low, middle, high = (log_s[alpha][name] for alpha in (0.25, 0.5, 0.75))
        np.testing.assert_allclose(middle, (low + high) / 2, atol=1e-4)
        np.testing.assert_allclose(low - (high - low) / 2, -np.log(np.abs(weight).max(axis=1)), atol=1e-4)


def with_an_outlier(parent: Artifact, folder: Path) -> Artifact:
    """The same function, but one channel of what the first layer's last product reads is 100 times larger."""
    model = graph.load(parent.onnx)
    product = next(node for node in model.graph.node if node.name == "/bert/encoder/layer.0/output/dense/MatMul")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    values = numpy_helper.to_array(weight)
    factor = np.ones(len(values), np.float32)
    factor[0] = 100
    weight.CopyFrom(numpy_helper.from_array(values / factor[:, None], weight.name))
    model.graph.initializer.append(numpy_helper.from_array(factor, "factor"))
    model.graph.node.insert(
        list(model.graph.node).index(product), helper.make_node("Mul", [product.input[0], "factor"], ["large"], "larger")
    )
    product.input[0] = "large"
    folder.mkdir()
    copy_side_files(parent.path, folder)
    graph.save(model, folder)
    return artifact(folder, "onnx")


@needs_inc
def test_smoothquant_holds_the_outputs_where_one_channel_is_far_larger_than_the_others(tmp_path: Path) -> None:
    plain, context = export(tmp_path, "bert")
    parent = with_an_outlier(plain, tmp_path / "outlier")
    assert distance(plain, parent, context) < 1e-4
    settings = {"approach": "static", "format": "qdq"}
    rough, _ = build(stage(**settings), parent, tmp_path / "rough", context)
    small, _ = build(stage(**settings, smooth=0.5), parent, tmp_path / "small", context)
    assert distance(parent, small, context) < 0.5 * distance(parent, rough, context)


@needs_inc
def test_smoothquant_takes_any_number_of_rows_and_writes_equal_bytes_again(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "distilbert")
    settings = stage(approach="static", smooth=0.5, samples=18)  # neural-compressor's own fails where the last batch is shorter
    one, other = (build(settings, parent, tmp_path / name, context)[0] for name in ("one", "other"))
    assert one.onnx.read_bytes() == other.onnx.read_bytes()


@needs_inc
def test_what_neural_compressor_says_is_shown_only_when_it_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parent, context = export(tmp_path, "bert")
    build(stage(), parent, tmp_path / "int8", context)
    assert capfd.readouterr() == ("", "")
    short = tmp_path / "short"  # fewer rows in the vocabulary than the tokenizer has tokens: calibration cannot run
    short.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (short / file).write_bytes((parent.path / file).read_bytes())
    model = graph.load(parent.onnx)
    words = next(t for t in model.graph.initializer if t.name == "bert.embeddings.word_embeddings.weight")
    words.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(words)[:5], words.name))
    graph.save(model, short)
    with pytest.raises(StageError, match=r"(?s)gave no model.*File \"\w+\.py\", line .*out of data bounds") as failure:
        build(stage(approach="static"), artifact(short, "onnx"), tmp_path / "again", context)
    assert not any(place in str(failure.value) for place in (str(tmp_path), "site-packages/", "/onnxruntime_src"))


@contextmanager
def interrupted_in(function: str) -> Iterator[None]:
    """Send SIGINT to this process, once, from another thread, as soon as the main thread is in this function of neural-compressor."""
    over, sent, main = threading.Event(), threading.Event(), threading.main_thread().ident

    def watch() -> None:
        while not over.wait(0.001):
            frame = sys._current_frames()[main or 0]
            while frame is not None:
                if frame.f_code.co_name == function and "neural_compressor" in frame.f_code.co_filename:
                    sent.set()
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                frame = frame.f_back  # type: ignore[assignment]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        assert sent.is_set(), f"neural-compressor was never in {function}"


@needs_inc
def test_an_interrupt_at_any_moment_ends_the_stage_as_one(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    before = signal.getsignal(signal.SIGINT)
    for moment in ("fit", "traverse", "quantize", "get_intermediate_outputs", "convert"):
        out = tmp_path / moment
        with pytest.raises(KeyboardInterrupt), interrupted_in(moment):
            build(stage(approach="static"), parent, out, context)
        assert names(out) == set()
        assert signal.getsignal(signal.SIGINT) is before


@needs_inc
def test_where_interrupts_are_ignored_or_the_work_is_in_another_thread_they_stay_so(tmp_path: Path) -> None:
    parent, context = export(tmp_path, "bert")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupted_in("traverse"):
            build(stage(), parent, tmp_path / "ignored", context)
    finally:
        signal.signal(signal.SIGINT, before)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(build, stage(), parent, tmp_path / "threaded", context).result()
    assert (tmp_path / "ignored" / "model.onnx").read_bytes() == (tmp_path / "threaded" / "model.onnx").read_bytes()


@needs_inc
def test_the_users_gpu_settings_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, context = export(tmp_path, "bert")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    build(stage(), parent, tmp_path / "int8", context)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_DEVICE_ORDER" not in os.environ


def test_a_missing_neural_compressor_is_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005, as where the extra is not installed
    assert stage().unavailable() == ("neural-compressor is not installed", "pip install 'onnxsqueeze[inc]'")


def test_cuda_is_refused_with_the_reason() -> None:
    reason = stage().refuses("cuda")
    assert reason is not None
    assert "no kernel for DynamicQuantizeLinear" in reason
    assert stage(approach="static").refuses("cuda") is not None
    assert stage(approach="static", format="qdq").refuses("cuda") is None


@pytest.mark.parametrize("alpha", [0, 1.5])
def test_an_alpha_that_smooths_nothing_or_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(ValidationError, match="smooth"):
        stage(approach="static", smooth=alpha)


def test_smoothing_with_ranges_taken_at_run_time_is_refused() -> None:
    with pytest.raises(ValidationError, match="smooth needs approach: static, got dynamic"):
        stage(smooth=0.5)


def test_qdq_with_ranges_taken_at_run_time_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"format: qdq needs approach: static, got dynamic"):
        stage(format="qdq")
