from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from pydantic import ValidationError

from crossed import crossed
from dequantize import errors, matrices
from exports import build, distance, export, near
from models import FAMILIES, FamilyName, artifact
from onnxsqueeze import graph, weights
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import MeasureError, StageError
from onnxsqueeze.measure.metric import predict
from onnxsqueeze.stage import Context
from onnxsqueeze.stages.int8 import seven_bits
from onnxsqueeze.stages.quantize_inc import QuantizeInc
from onnxsqueeze.stages.scoring import selection_score

needs_inc = pytest.mark.skipif(importlib.util.find_spec("neural_compressor") is None, reason="the extra 'inc' is not installed")


def stage(**settings: Any) -> QuantizeInc:
    return QuantizeInc.model_validate({"kind": "quantize-inc", "reduce_range": seven_bits("auto"), **settings})


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


KINDS = {"dynamic": ("dynamic", "MatMulInteger"), "static": ("static", "QLinearMatMul"), "qdq": ("static", "MatMul")}  # approach, product


@needs_inc
@crossed("family, kind", FAMILIES, list(KINDS))
def test_every_weight_is_within_half_a_step_and_logits_stay_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: FamilyName, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parent, context = export(tmp_path / "work", family)
    approach, product = KINDS[kind]
    settings = stage(approach=approach, format="qdq" if kind == "qdq" else "qoperator")
    small, changed = build(settings, parent, tmp_path / "work" / "int8", context)
    graph.check(small.onnx, like=parent.onnx)
    found = errors(small.onnx, parent.onnx)
    assert set(found) == {name for name, values in matrices(parent.onnx).items() if values.ndim == 2 and values.dtype.kind == "f"}
    for name, (error, step) in found.items():  # tables too: neural-compressor's own would wrap rows that calibration did not read
        assert (error <= step * 0.501).all(), name
    assert changed.details["integer_weights"] == {"Gather": 2 if family == "distilbert" else 3, product: 15 if family == "electra" else 14}
    assert changed.details["float_matrices_left"] == 0
    assert distance(parent, small, context) < near(0.1 if approach == "dynamic" else 0.2)
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
@pytest.mark.parametrize("kind", KINDS)
def test_tables_keep_8_bits_beside_weights_of_7(tmp_path: Path, kind: str) -> None:
    parent, context = export(tmp_path, "bert")
    settings = stage(approach=KINDS[kind][0], format="qdq" if kind == "qdq" else "qoperator", reduce_range=True)
    small, _ = build(settings, parent, tmp_path / "int8", context)
    stored, exact = matrices(small.onnx), matrices(parent.onnx)
    found = errors(small.onnx, parent.onnx)
    assert sum("embeddings" in name for name in found) == 3
    for name, (error, step) in found.items():
        assert (error <= step * 0.501).all(), name
        spread = int(np.ptp(stored[f"{name}_quantized"].astype(np.int32)))
        if "embeddings" in name:
            assert step.max() <= 2 * np.abs(exact[name]).max() / 254 * 1.001, name
        else:
            assert spread <= 128, name


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
            steps = np.abs(smoothed).max(axis=0) / (64 if seven_bits("auto") else 127)
            assert (np.abs(stored - smoothed) <= 0.501 * steps).all(), name
        log_s[alpha] = {name: np.log(s) for name, (_, s, _) in found.items()}
        assert distance(parent, small, context) < near(0.2)
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


def faithful(folder: Path) -> tuple[Artifact, Context]:
    """A small export, and a context that selects by how near the logits come to the float model's: no two configurations score alike."""
    parent, context = export(folder, "bert")
    exact = predict(parent.path, "cpu", context.selection, context.task.max_length, 1, 1, context.progress)
    return parent, replace(context, select=lambda logits: 1 - float(np.abs(logits - exact).max()))


def searched(
    parent: Artifact, context: Context, out: Path, max_drop_pp: float, **settings: Any
) -> tuple[Artifact, dict[str, Any], list[dict[str, Any]]]:
    """The file that a search writes, its record, and the trials in it; what holds for each search is checked."""
    small, changed = build(stage(max_drop_pp=max_drop_pp, **settings), parent, out, context)
    details = dict(changed.details)
    trials = details["trials"]
    graph.check(small.onnx, like=parent.onnx)
    assert names(out) == names(parent.path)
    assert [trial["trial"] for trial in trials] == list(range(1, len(trials) + 1))
    (kept,) = (trial for trial in trials if trial["kept"])
    met = [trial for trial in trials if trial["score"] is not None and details["selection_before"] - trial["score"] <= max_drop_pp / 100]
    assert kept == max(met, key=lambda t: (-t["float_weights"], sum(t["quantized"].values()), t["score"], -t["trial"]))
    assert selection_score(small.path, context) == details["selection_after"] == kept["score"]
    assert (
        sum(part.n for part in weights.by_class(small.onnx) if part.class_ != "other" and part.dtype == "float32") == kept["float_weights"]
    )
    return small, details, trials


def without_times(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in trial.items() if key not in ("seconds", "kept", "why")} for trial in trials]


@needs_inc
def test_a_search_ends_at_the_first_trial_that_loses_little_enough_and_with_time_goes_on_to_the_best(tmp_path: Path) -> None:
    parent, context = faithful(tmp_path)
    settings = {"tune": "basic", "max_trials": 5}
    _, details, every = searched(parent, context, tmp_path / "every", 100, tune_seconds=1000, **settings)
    assert len(every) > 3
    tried = {str((trial["settings"], trial["quantized"], trial["float_weights"])) for trial in every}
    assert len(tried) == len(every), "what it proposes for the second time is no trial; whether it does depends on the scores"
    assert every[0]["quantized"] == {"Gather": 3, "MatMul": 14}
    assert (
        every[1]["to_float"] == ["/bert/encoder/layer.0/attention/self/query/MatMul", "/classifier/Gemm_MatMul"] == every[2]["to_integers"]
    )
    assert every[1]["float_weights"] - every[0]["float_weights"] == 32 * 32 + 32 * 2
    assert every[1]["why"] == f"trial {next(t['trial'] for t in every if t['kept'])} has fewer weights in float"
    best = max(every, key=lambda trial: trial["score"])
    goal = 100 * (details["selection_before"] - best["score"]) + 1e-6
    _, _, again = searched(parent, context, tmp_path / "first", goal, **settings)
    assert without_times(again) == without_times(every)[: best["trial"]]
    assert [trial["kept"] for trial in again] == [False] * (len(again) - 1) + [True]
    assert all(f"more than {goal:g}" in trial["why"] for trial in again[:-1])


@pytest.mark.full
@needs_inc
def test_bayesian_varies_ranges_and_scales_alone_and_the_same_settings_write_the_same_bytes(tmp_path: Path) -> None:
    parent, context = faithful(tmp_path)
    settings = {"tune": "bayesian", "approach": "static", "format": "qdq", "samples": 16, "tune_seconds": 1000, "max_trials": 3}
    one, _, trials = searched(parent, context, tmp_path / "one", 100, **settings)
    assert len(trials) == 3
    assert len({str(trial["settings"]) for trial in trials}) > 1
    assert all(trial["quantized"] == trials[0]["quantized"] and not trial["to_float"] for trial in trials)
    other, _, again = searched(parent, context, tmp_path / "other", 100, **settings)
    assert other.onnx.read_bytes() == one.onnx.read_bytes()
    assert without_times(again) == without_times(trials)


@needs_inc
@pytest.mark.full
def test_mse_v2_leaves_operators_in_float_until_the_goal_is_met(tmp_path: Path) -> None:
    parent, context = faithful(tmp_path)
    plain, _ = build(stage(), parent, tmp_path / "plain", context)
    goal = 60 * (1 - selection_score(plain.path, context))  # six tenths of the loss, in points: other scales alone do not bring that
    _, details, trials = searched(parent, context, tmp_path / "out", goal, tune="mse_v2", samples=8, max_trials=15)
    assert trials[0]["quantized"] == {"Gather": 3, "MatMul": 14}
    assert f"more than {goal:g}" in trials[0]["why"]
    assert details["float_matrices_left"] > 0


@needs_inc
def test_every_trial_is_finished_before_it_is_scored_and_with_smoothquant_there_is_more_than_one(tmp_path: Path) -> None:
    parent, context = faithful(tmp_path)
    settings = {"tune": "mse_v2", "approach": "static", "smooth": 0.5, "samples": 16, "tune_seconds": 1000, "max_trials": 2}
    small, details, trials = searched(parent, context, tmp_path / "out", 100, **settings)
    assert len(trials) == 2
    assert details["smoothed"] == 14
    tables = {name: found for name, found in errors(small.onnx, parent.onnx).items() if "embeddings" in name}
    assert len(tables) == 3
    for error, step in tables.values():  # also of tokens that calibration did not see
        assert (error <= step * 0.501).all()


@needs_inc
def test_a_goal_that_no_trial_meets_is_an_error_that_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parent, context = faithful(tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    message = r"none of 2 trials scores within 0\.001 points of the float model's 100\.00 on the selection split; the nearest, trial [12], scores 9\d\.\d\d, \d\.\d\d points less\n  remedy: raise max_drop_pp"
    with pytest.raises(StageError, match=message):
        build(stage(tune="basic", max_drop_pp=0.001, max_trials=2), parent, tmp_path / "work" / "out", context)
    assert names(tmp_path) == {"work"}
    assert names(tmp_path / "work" / "out") == set()
    assert capfd.readouterr() == ("", "")


@needs_inc
def test_without_time_one_trial_is_made_and_its_progress_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parent, context = faithful(tmp_path)

    def say(done: int, total: int, note: str = "") -> None:
        sys.stderr.write(f"{done} {total} {note}\n")

    _, _, trials = searched(parent, replace(context, progress=say), tmp_path / "out", 100, tune="basic", tune_seconds=0)
    assert len(trials) == 1
    assert "64 64 trial 1" in capfd.readouterr().err.splitlines()
    with pytest.raises(StageError, match=r"none of 1 trials in 0 s scores within 0 points"):
        build(stage(tune="basic", max_drop_pp=0, tune_seconds=0), parent, tmp_path / "again", context)


@needs_inc
def test_a_trial_that_cannot_be_scored_is_none_that_meets_the_goal(tmp_path: Path) -> None:
    parent, context = faithful(tmp_path)

    def select(logits: Any) -> float:
        score = context.select(logits)
        if score < 1:
            raise MeasureError("the logits moved")
        return score

    with pytest.raises(StageError, match="none of 2 trials could be scored: the logits moved"):
        build(stage(tune="basic", max_trials=2), parent, tmp_path / "out", replace(context, select=select))


@needs_inc
def test_a_fault_of_neural_compressor_in_a_search_is_an_error_and_its_strategies_stay_its_own(tmp_path: Path) -> None:
    from neural_compressor.strategy import STRATEGIES

    before = dict(STRATEGIES)
    parent, context = faithful(tmp_path)
    nothing = replace(context, train=replace(context.train, rows=[]))
    with pytest.raises(StageError, match=r"(?s)gave no model.*Error"):
        build(stage(tune="basic", approach="static"), parent, tmp_path / "out", nothing)
    assert dict(STRATEGIES) == before


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
@pytest.mark.parametrize("moment", ["traverse", "quantize", "evaluate"])
def test_an_interrupt_ends_a_search_as_one(tmp_path: Path, moment: str) -> None:
    parent, context = faithful(tmp_path)
    with pytest.raises(KeyboardInterrupt), interrupted_in(moment):  # evaluate: while we score
        build(stage(tune="basic", max_drop_pp=0, max_trials=2), parent, tmp_path / "out", context)
    assert names(tmp_path / "out") == set()


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


@pytest.mark.parametrize("setting", ["max_drop_pp", "max_trials", "tune_seconds"])
def test_a_goal_without_a_search_is_refused(setting: str) -> None:
    with pytest.raises(ValidationError, match=f"{setting}: only with tune"):
        stage(**{setting: 1})


def test_a_search_depends_on_the_measured_call_and_one_that_the_clock_ends_on_the_machine() -> None:
    assert (stage().timed(), stage().machine_bound()) == (False, False)
    assert (stage(tune="basic").timed(), stage(tune="basic").machine_bound()) == (True, False)
    assert stage(tune="basic", tune_seconds=60).machine_bound()


def test_smoothing_with_ranges_taken_at_run_time_is_refused() -> None:
    with pytest.raises(ValidationError, match="smooth needs approach: static, got dynamic"):
        stage(smooth=0.5)


def test_qdq_with_ranges_taken_at_run_time_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"format: qdq needs approach: static, got dynamic"):
        stage(format="qdq")
