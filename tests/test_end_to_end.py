"""Whole runs on a random two-layer model: every number in the record is looked up in the files that were written."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from models import random_checkpoint
from onnxsqueeze import pipeline, prepare
from onnxsqueeze.artifact import Artifact, folder_digest
from onnxsqueeze.backends import Backends
from onnxsqueeze.errors import RecipeError
from onnxsqueeze.measurements import Measurements
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.record import Measurer
from onnxsqueeze.results import read_results
from onnxsqueeze.store import Store
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.settings import TaskSettings
from onnxsqueeze.tokens import Encoder, pad
from runs import RECIPES, TIMED, Silent, command, run, small

WHOLE = (*small("qdp"), *TIMED, "measure.task_lengths=true", "measure.profile=true")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store and one model for all runs of this module."""
    folder = tmp_path_factory.mktemp("runs")
    random_checkpoint(folder / "model", "bert", layers=2, head=False)
    return folder


@pytest.fixture(scope="module")
def qdp(place: Path) -> tuple[Outcome, list[str]]:
    return run("qdp", place / "qdp", model=place / "model", store=place / "store", overrides=WHOLE)


def targets(outcome: Outcome) -> dict[str, Any]:
    return {target.name: target for target in outcome.results.targets}


def test_qdp_makes_every_target_and_skips_cuda_with_a_remedy(qdp: tuple[Outcome, list[str]]) -> None:
    outcome, _ = qdp
    rows = targets(outcome)
    assert list(rows) == ["fp32", "int8-ort", "int8-inc", "qdp-ort", "qdp-inc", "cuda-fp32", "cuda-fp16", "cuda-w8"]
    assert {name for name, row in rows.items() if row.status == "ok"} >= {"fp32", "int8-ort", "int8-inc", "qdp-ort", "qdp-inc"}
    if rows["cuda-fp16"].status == "skipped":
        assert "CUDA" in rows["cuda-fp16"].reason
        assert "onnxruntime-gpu" in rows["cuda-fp16"].remedy
    assert outcome.exit_code == 0


def test_the_record_says_what_lies_in_the_files(qdp: tuple[Outcome, list[str]]) -> None:
    outcome, _ = qdp
    for target in outcome.results.targets:
        file = outcome.out / str(target.model)
        content = file.read_bytes()
        recorded = {f.path: f for f in target.files}
        assert recorded[str(target.model)].sha256 == hashlib.sha256(content).hexdigest()
        assert target.size_parts_bytes is not None
        assert target.size_bytes == len(content) == sum(target.size_parts_bytes.model_dump().values())
        assert target.size_gzip_bytes == pytest.approx(
            len(gzip.compress(content, 9)), rel=0.05
        )  # gzip's programs differ by as much on files this small
        assert target.tokenizer_bytes == (file.parent / "tokenizer.json").stat().st_size
        assert (file.parent / "config.json").is_file()


def test_every_target_runs_in_a_stock_session_and_scores_what_the_record_says(qdp: tuple[Outcome, list[str]]) -> None:
    outcome, _ = qdp
    task = open_task(TaskSettings(name="toy", max_length=32), data_dir=None, seed=0)
    (dev,) = task.dev()
    for target in outcome.results.targets:
        if target.backend != "cpu":
            continue
        folder = outcome.out / target.name
        session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        names = {given.name for given in session.get_inputs()}
        encoder = Encoder(folder, 32)
        right = 0
        for row in dev.rows:
            feed = pad(encoder.encode([row.text], [row.text_pair]), encoder.pad_id)
            right += int(np.argmax(session.run(None, {k: v for k, v in feed.items() if k in names})[0])) == row.label
        recorded = target.metrics["validation"]["accuracy"]
        assert recorded.n == len(dev.rows)
        assert recorded.value == pytest.approx(right / len(dev.rows))
        assert recorded.ci95[0] <= recorded.value <= recorded.ci95[1]


def test_the_student_is_smaller_pruned_and_compared_with_the_untouched_teacher(qdp: tuple[Outcome, list[str]]) -> None:
    rows = targets(qdp[0])
    assert rows["qdp-ort"].size_bytes < rows["int8-ort"].size_bytes < rows["fp32"].size_bytes
    assert rows["qdp-ort"].vs_baseline.baseline == "fp32"
    assert rows["qdp-ort"].vs_baseline.size_ratio == pytest.approx(rows["fp32"].size_bytes / rows["qdp-ort"].size_bytes)
    assert rows["fp32"].vs_baseline is None
    left = {name: sum(w.n for w in rows[name].weights if w.class_ in ("attention", "feed_forward")) for name in ("int8-ort", "qdp-ort")}
    assert left["qdp-ort"] < 0.65 * left["int8-ort"] / 2, "one of two layers, and six tenths of it"
    assert [stage.kind for stage in rows["fp32"].stages] == ["finetune", "export"]
    chain = ["finetune", "distill", "prune-structure", "export", "quantize-dynamic", "optimize-graph", "pack"]
    assert [stage.kind for stage in rows["qdp-ort"].stages] == chain


def test_latency_is_measured_as_the_record_says(qdp: tuple[Outcome, list[str]]) -> None:
    for target in qdp[0].results.targets:
        if target.status == "ok":
            latency = target.latency
            assert latency is not None
            assert latency.n >= 20
            assert latency.p99_ms is None or latency.n >= 459
            assert 0 < latency.min_ms <= latency.p50_ms <= latency.p90_ms <= latency.max_ms
            assert (latency.batch, latency.sequence, latency.threads) == (1, 32, 1)
            (rows,) = target.latencies
            assert (rows.lengths, rows.batch, rows.n) == ("task", 1, 800)
            assert rows.text_p50_ms is not None
            assert rows.whole_p50_ms is not None
            assert 0 < rows.text_p50_ms < rows.whole_p50_ms
            for kept in (latency, rows):
                with np.load(qdp[0].out / str(kept.samples)) as blocks:
                    runs = np.concatenate([blocks[name] for name in blocks])
                assert len(runs) == kept.n
                assert np.sort(runs)[(len(runs) + 1) // 2 - 1] / 1000 == pytest.approx(kept.p50_ms, abs=0.001)
    assert len(list((qdp[0].out / "samples").iterdir())) == 2 * sum(target.status == "ok" for target in qdp[0].results.targets)


def test_the_record_proves_what_ran(qdp: tuple[Outcome, list[str]]) -> None:
    for target in qdp[0].results.targets:
        if target.status == "ok":
            assert target.proof is not None
            assert list(target.proof.nodes_per_provider) == ["CPUExecutionProvider"]
            assert target.proof.memcpy_nodes == 0
            times = [one.ms for one in target.proof.operators]
            assert times == sorted(times, reverse=True)
            assert sum(times) == pytest.approx(target.proof.total_ms)
            assert sum(one.nodes for one in target.proof.operators) == target.proof.nodes_per_provider["CPUExecutionProvider"]
    rows = targets(qdp[0])
    assert any("Integer" in one.operator or "Quantize" in one.operator for one in rows["int8-ort"].proof.operators)
    assert not any("Integer" in one.operator for one in rows["fp32"].proof.operators)


@pytest.mark.full
def test_a_load_is_put_on_every_target_that_asks_for_it(place: Path) -> None:
    overrides = [
        *small("q"),
        *TIMED,
        "measure.load={seconds: 0.2, batch: 8, bound_ms: 50}",
        "measure.sweep={batch: [1, 4], sequence: [16]}",
    ]
    outcome, _ = run("q", place / "load", model=place / "model", store=place / "store", overrides=overrides)
    for target in outcome.results.targets:
        assert target.load is not None
        assert target.load.single_stream_p90_ms > 0
        assert target.load.offline_rows_per_s > 0
        assert target.load.server_rows_per_s is not None
        assert len(target.load.server_trials) == 5
        assert [(x.batch, x.sequence) for x in target.latencies if x.lengths == "fixed"] == [(1, 16), (4, 16)]


def test_no_record_names_a_path_of_this_machine(qdp: tuple[Outcome, list[str]], place: Path) -> None:
    outcome, _ = qdp
    for file in ("results.json", "report.md", "report.html"):
        text = (outcome.out / file).read_text(encoding="utf-8")
        assert str(place) not in text
        assert not re.search(r"(?<![\w/.:<])/(home|root|tmp|usr|work|mnt)/", text)
    assert read_results(outcome.out) == outcome.results


def test_a_second_run_makes_and_measures_nothing(qdp: tuple[Outcome, list[str]], place: Path) -> None:
    before = {f: f.read_bytes() for f in sorted(qdp[0].out.rglob("*.onnx"))}
    again, lines = run("qdp", place / "qdp", model=place / "model", store=place / "store", overrides=WHOLE)
    assert not [line for line in lines if line.endswith("…")], lines
    assert {f: f.read_bytes() for f in before} == before
    assert [t.latency for t in again.results.targets] == [t.latency for t in qdp[0].results.targets]
    assert again.results.task.splits[0].looks == qdp[0].results.task.splits[0].looks


@pytest.mark.parametrize("recipe", ["none", "q", "d", "p"])
def test_one_recipe_per_single_method(recipe: str, qdp: tuple[Outcome, list[str]], place: Path) -> None:
    outcome, lines = run(recipe, place / recipe, model=place / "model", store=place / "store", overrides=small(recipe))
    assert outcome.exit_code == 0, outcome.problems
    assert {target.status for target in outcome.results.targets} == {"ok"}
    assert any(line.startswith("finetune: in the store") for line in lines)  # the teacher is the one that qdp made
    assert read_results(outcome.out) == outcome.results


def test_a_model_with_a_trained_head_is_the_teacher_as_it_is(place: Path) -> None:
    model = random_checkpoint(place / "trained", "bert", layers=2, head=True)
    config = json.loads((model / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "negative", "1": "positive"}, {"negative": 0, "positive": 1}
    (model / "config.json").write_text(json.dumps(config))
    outcome, lines = run("q", place / "trained-q", model=model, store=place / "store", overrides=small("q"))
    assert any(line.startswith("finetune: skipped: the model has a trained head") for line in lines)
    stages = targets(outcome)["int8-ort"].stages
    assert [(stage.id, stage.skipped is not None) for stage in stages] == [
        ("finetune", True),
        ("export", False),
        ("quantize-dynamic", False),
    ]


def test_a_recipe_without_a_baseline_gets_one(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "bare.yaml"
    recipe.write_text(
        "schema: 1\nname: bare\ntask: toy\nstages: [{kind: finetune}, {kind: distill, layers: 1, epochs: 1}]\ntargets: [{name: small, stages: [{kind: export}]}]\n"
    )
    outcome, _ = run(recipe, place / "bare", model=place / "model", store=place / "store", overrides=small(""))
    rows = targets(outcome)
    assert rows["small"].vs_baseline.baseline == "baseline-cpu"
    assert [stage.kind for stage in rows["baseline-cpu"].stages] == ["finetune", "export"]


@pytest.mark.full
def test_a_student_with_a_pruned_vocabulary_is_recorded_and_its_corpus_counts_by_content(place: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the city never made music\n", encoding="utf-8")
    stages = "  - {kind: prune-vocabulary, corpus: corpus.txt}\n  - {kind: distill, layers: 1, epochs: 1}\n"
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n  - {name: small, stages: [{kind: export}]}\n"
    again = {"model": place / "model", "store": place / "store", "overrides": small("")}
    outcome, _ = run(recipe(tmp_path, stages, rows), tmp_path / "out", **again)  # type: ignore[arg-type]  # keywords as a mapping
    assert outcome.exit_code == 0, outcome.problems
    fp32, student = (targets(outcome)[name] for name in ("fp32", "small"))
    pruned = student.stages[1]
    config = json.loads((tmp_path / "out" / "small" / "config.json").read_text())
    assert config["vocab_size"] == pruned.changed["details"]["rows"] == pruned.changed["details"]["rows_before"] - pruned.changed["count"]
    assert student.size_bytes < fp32.size_bytes
    assert student.tokenizer_bytes < fp32.tokenizer_bytes

    (tmp_path / "corpus.txt").rename(tmp_path / "other.txt")
    file = recipe(tmp_path, stages.replace("corpus.txt", "other.txt"), rows)
    _, lines = run(file, tmp_path / "out", **again)  # type: ignore[arg-type]
    assert any(line.startswith("prune-vocabulary: in the store") for line in lines)
    (tmp_path / "other.txt").write_text("the city never made a plot\n", encoding="utf-8")
    _, lines = run(file, tmp_path / "out", **again)  # type: ignore[arg-type]
    assert "prune-vocabulary …" in lines


@pytest.mark.full
def test_a_student_of_its_own_counts_by_content_and_learns_from_the_rows_that_its_stage_asks_for(place: Path, tmp_path: Path) -> None:
    student = random_checkpoint(tmp_path / "student", "distilbert", layers=1, head=False)
    stages = f"  - {{kind: distill, student: {student}, alpha_hidden: 0, epochs: 1, batch_size: 8, train_rows: 40}}\n"
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n  - {name: other, stages: [{kind: export}]}\n"
    again = {"model": place / "model", "store": place / "store", "overrides": small("")}
    outcome, _ = run(recipe(tmp_path, stages, rows), tmp_path / "out", **again)  # type: ignore[arg-type]  # keywords as a mapping
    assert outcome.exit_code == 0, outcome.problems
    distilled = outcome.results.stages[1]
    assert (distilled.changed["details"]["trained_rows"], distilled.changed["details"]["student"]) == (40, "student")
    assert json.loads((tmp_path / "out" / "other" / "config.json").read_text())["model_type"] == "distilbert"

    random_checkpoint(tmp_path / "student", "distilbert", layers=1, head=False, seed=1)
    _, lines = run(recipe(tmp_path, stages, rows), tmp_path / "out", **again)  # type: ignore[arg-type]
    assert "distill …" in lines, "other weights under the same name are another student"
    with pytest.raises(RecipeError, match=r"distill: model .*nowhere: there is no such folder"):
        run(recipe(tmp_path, stages.replace(str(student), str(tmp_path / "nowhere")), rows), tmp_path / "out", **again)  # type: ignore[arg-type]


def test_a_missed_gate_ends_with_3_and_says_which_target_missed_what_by_how_much(place: Path) -> None:
    outcome, _ = run("q", place / "gate", model=place / "model", store=place / "store", overrides=[*small("q"), "gates.min_size_ratio=50"])
    assert outcome.exit_code == 3
    message = str(outcome.problems[0])
    assert re.search(r"target int8-ort missed 1 of its gates: min_size_ratio is [\d.]+, the limit is 50 \(missed by [\d.]+\)", message)


def test_a_target_is_compared_with_the_one_that_holds_the_file_it_was_made_from(place: Path, tmp_path: Path) -> None:
    stages = "  - {kind: distill, layers: 1, epochs: 1, learning_rate: 4.0e-5}\n"  # a student that no other test has measured
    base = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n  - {name: student, stages: [{kind: export}]}\n"
    int8 = "  - {name: int8, stages: [{kind: export}, {kind: quantize-dynamic}]}\n"
    later = "  - {name: packed, stages: [{kind: export}, {kind: quantize-dynamic}, {kind: pack}]}\n"
    again = {"model": place / "model", "store": place / "store", "overrides": [*small(""), *TIMED]}
    outcome, _ = run(recipe(tmp_path, stages, base + int8), tmp_path / "out", **again)  # type: ignore[arg-type]  # keywords as a mapping
    found = targets(outcome)
    versus = found["int8"].vs_parent
    assert versus.parent == "student"
    assert versus.speedup == found["student"].latency.p50_ms / found["int8"].latency.p50_ms
    assert versus.speedup_ci95[0] < versus.speedup < versus.speedup_ci95[1]
    assert (found["fp32"].vs_parent, found["student"].vs_parent) == (None, None), "trained stages lie between them, no file"

    gate = f"{base}{int8}{later}gates: {{min_speedup_vs_parent: 1000}}\n"
    outcome, _ = run(recipe(tmp_path, stages, gate), tmp_path / "out", **again)  # type: ignore[arg-type]
    packed = targets(outcome)["packed"].vs_parent
    assert (packed.parent, packed.speed, packed.speedup_ci95) == ("int8", "unproven", None), "they were not timed in turns"
    assert outcome.exit_code == 3
    assert [str(p).split(":")[0] for p in outcome.problems] == ["target int8 missed 1 of its gates", "target packed missed 1 of its gates"]
    alone = base.replace(
        "stages: [{kind: export}]}\n  - {name: student", "gates: {min_speedup_vs_parent: 1}, stages: [{kind: export}]}\n  - {name: student"
    )
    with pytest.raises(RecipeError, match=r"bare.yaml:8: .*min_speedup_vs_parent: no other target holds a file"):
        run(recipe(tmp_path, stages, alone), tmp_path / "out", **again)  # type: ignore[arg-type]


def test_latency_can_be_left_out_and_a_gate_on_it_is_then_refused(place: Path, tmp_path: Path) -> None:
    stages = "  - {kind: distill, layers: 1, epochs: 1}\n"
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n  - {name: small, stages: [{kind: export}]}\n"
    again = {"model": place / "model", "store": place / "store", "overrides": small("")}
    outcome, _ = run(recipe(tmp_path, stages, f"{rows}gates: {{min_size_ratio: 1.01}}\n"), tmp_path / "out", **again)  # type: ignore[arg-type]
    assert outcome.exit_code == 0, outcome.problems
    found = targets(outcome)["small"]
    assert (found.latency, found.latencies, found.vs_baseline.speedup, found.vs_baseline.speed) == (None, (), None, "unproven")
    assert found.metrics["validation"]["accuracy"].n == 1000
    assert read_results(outcome.out) == outcome.results
    with pytest.raises(RecipeError, match=r"min_speedup: nothing is timed with `measure: \{latency: false\}`"):
        run(recipe(tmp_path, stages, f"{rows}gates: {{min_speedup: 1}}\n"), tmp_path / "out", **again)  # type: ignore[arg-type]


def test_what_stands_above_a_finished_stage_may_be_gone_until_something_else_needs_it(place: Path, tmp_path: Path) -> None:
    stages = "  - {kind: distill, layers: 1, epochs: 1}\n  - {kind: prune-positions}\n"
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n  - {name: small, stages: [{kind: export}]}\n"
    again = {"model": place / "model", "store": tmp_path / "store", "overrides": small("")}
    first, _ = run(recipe(tmp_path, stages, rows), tmp_path / "out", **again)  # type: ignore[arg-type]  # keywords as a mapping
    distilled = next(stage for stage in targets(first)["small"].stages if stage.kind == "distill")
    shutil.rmtree(tmp_path / "store" / "artifacts" / distilled.key / "files")

    second, lines = run(recipe(tmp_path, stages, rows), tmp_path / "out", **again)  # type: ignore[arg-type]
    assert all("in the store" in line for line in lines if line.startswith("distill")), "it is read by nothing that is left to make"
    assert [stage.key for stage in targets(second)["small"].stages] == [stage.key for stage in targets(first)["small"].stages]
    other = rows + "  - {name: wide, after: distill, stages: [{kind: export}]}\n"
    third, lines = run(recipe(tmp_path, stages, other), tmp_path / "out", **again)  # type: ignore[arg-type]
    assert third.exit_code == 0, third.problems
    assert any(line.startswith("distill: ") and "in the store" not in line for line in lines), "now it is made anew"


def test_require_turns_a_skip_into_a_failure(place: Path) -> None:
    outcome, _ = run("qdp", place / "required", model=place / "model", store=place / "store", overrides=small("qdp"), require=["cuda"])
    if targets(outcome)["cuda-fp32"].status == "ok":
        pytest.skip("this machine has CUDA")
    assert outcome.exit_code == 1
    assert "--require cuda" in str(outcome.problems[0])


def test_no_stage_opens_the_dev_file(place: Path, tmp_path: Path) -> None:
    """Real files: the audit hook sees every open of this process while the stages run."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 600), ("dev", 40)):
        lines = [
            f"{'good' if good else 'bad'} {' '.join(rng.choice(['film', 'plot', 'story', 'cat', 'dog', 'day', 'way', 'city'], 5))} {i}\t{good}"
            for i, good in enumerate(rng.integers(0, 2, n))
        ]
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "schema: 1\nname: own\ntask: {train: train.tsv, dev: dev.tsv}\nstages: [{kind: finetune, epochs: 1}]\ntargets: [{name: small, stages: [{kind: export}, {kind: quantize-dynamic}]}]\n"
    )
    watcher = Silent()
    told_before: list[list[str]] = []  # what the watcher had been told when the dev file was opened
    watching = [True]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and watching[0] and str(args[0]).endswith("dev.tsv"):
            told_before.append(list(watcher.lines))

    sys.addaudithook(watch)
    overrides = ["task.max_length=32", "measure={sequence: 16, latency: false}"]
    try:
        _, lines = run(recipe, tmp_path / "out", model=place / "model", store=place / "store", overrides=overrides, watcher=watcher)
    finally:
        watching[0] = False
    finished = [line for line in lines if line.startswith(("finetune:", "export:", "quantize-dynamic:"))]
    assert len(finished) == 3
    assert told_before, "measuring opens it, so the hook sees what it should"
    for told in told_before:
        assert set(finished) <= set(told), "the dev file was opened before the last stage was done"


BARE = "schema: 1\nname: bare\ntask: toy\nstages:\n  - kind: finetune\n{stages}targets:\n{targets}"


def recipe(folder: Path, stages: str, targets: str) -> Path:
    file = folder / "bare.yaml"
    file.write_text(BARE.format(stages=stages, targets=targets))
    return file


def test_a_failing_shared_stage_fails_the_targets_below_it_and_no_others(place: Path, tmp_path: Path) -> None:
    stages = "  - {kind: distill, layers: 1, epochs: 1}\n  - {kind: distill, id: again, layers: 2, epochs: 1}\n"
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n  - {name: late, stages: [{kind: export}]}\n"
    outcome, _ = run(recipe(tmp_path, stages, rows), tmp_path / "out", model=place / "model", store=place / "store", overrides=small(""))
    found = targets(outcome)
    assert (found["fp32"].status, found["late"].status) == ("ok", "failed")
    assert "layers" in found["late"].reason
    assert outcome.exit_code == 1
    assert read_results(tmp_path / "out") == outcome.results


def test_a_failing_branch_is_a_row_and_its_old_folder_is_gone(place: Path, tmp_path: Path) -> None:
    rows = "  - {name: int8, stages: [{kind: export}, {kind: quantize-dynamic}]}\n"
    first, _ = run(recipe(tmp_path, "", rows), tmp_path / "out", model=place / "model", store=place / "store", overrides=small(""))
    assert targets(first)["int8"].status == "ok"
    assert (tmp_path / "out" / "int8" / "model.onnx").is_file()
    twice = rows.replace("{kind: quantize-dynamic}", "{kind: quantize-dynamic}, {kind: quantize-weights, id: again, embeddings: false}")
    outcome, _ = run(recipe(tmp_path, "", twice), tmp_path / "out", model=place / "model", store=place / "store", overrides=small(""))
    row = targets(outcome)["int8"]
    assert (row.status, row.model) == ("failed", None)
    assert str(tmp_path) not in f"{row.reason} {row.remedy}"
    assert outcome.exit_code == 1
    assert not (tmp_path / "out" / "int8").exists(), "a model that the record does not know must not look like its result"
    assert targets(outcome)["baseline-cpu"].status == "ok"


def test_a_file_that_takes_single_rows_alone_is_a_failed_row_and_the_record_is_written(place: Path, tmp_path: Path) -> None:
    """The dev rows go through one by one; the golden sentences also go through together."""
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n  - {name: narrow, stages: [{kind: export}]}\n"
    request = prepare.Request(recipe(tmp_path, "", rows), model=str(place / "model"), out=tmp_path / "out", overrides=small(""))
    prepared = prepare.prepare(request)
    settings, info = prepared.loaded.recipe.measure, prepared.task.info
    store, watcher = Store(place / "store"), Silent()
    made = [pipeline._Maker(prepared, store, watcher).branch(branch) for branch in prepared.plan.branches]
    fp32, narrow = made
    assert narrow.artifact is not None
    folder = tmp_path / "narrow"
    shutil.copytree(narrow.artifact.path, folder)
    model = onnx.load(folder / "model.onnx")
    for given in model.graph.input:
        given.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, folder / "model.onnx")
    narrow = replace(narrow, artifact=Artifact(folder, "onnx", "narrow", folder_digest(folder)))
    measurements = Measurements(store, watcher, settings, info, prepared.task.dev(), Backends(), fresh=False)
    measurer = Measurer(measurements, prepared.plan.baselines, prepared.plan.parents, lambda *_: b"")
    whole, failed = measurer.targets([fp32, narrow], prepared.loaded.recipe.gates)
    assert (whole.status, failed.status) == ("ok", "failed")
    assert "stopped while running" in str(failed.reason)
    assert failed.size_bytes == (folder / "model.onnx").stat().st_size


@pytest.mark.full
def test_other_columns_of_the_same_dev_file_are_measured_anew(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name, n in (("train", 600), ("dev", 60)):
        rows = [f"good film {i} {rng.integers(9)}\tbad film {i}\t{i % 2}" for i in range(n)]
        (tmp_path / f"{name}.tsv").write_text("one\ttwo\tlabel\n" + "\n".join(rows) + "\n")
    model = random_checkpoint(tmp_path / "trained", "bert", layers=2, head=True)
    task = "task: {train: train.tsv, dev: dev.tsv, text: one, labels: ['0', '1']}"
    file = tmp_path / "own.yaml"
    said = []
    for column in ("one", "two"):
        file.write_text(
            f"schema: 1\nname: own\n{task.replace('text: one', f'text: {column}')}\ntargets: [{{name: x, baseline: true, after: model, stages: [{{kind: export}}]}}]\n"
        )
        _, lines = run(
            file,
            tmp_path / "out",
            model=model,
            store=tmp_path / "store",
            overrides=["task.max_length=32", "measure={sequence: 16, latency: false}"],
        )
        said.append([line for line in lines if "accuracy on" in line])
    assert [len(lines) for lines in said] == [1, 1]


def test_force_trains_a_new_head_whatever_classes_the_model_had(place: Path, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "three", "bert", layers=2, head=True, outputs=3)
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n"
    outcome, _ = run(
        recipe(tmp_path, "", rows),
        tmp_path / "out",
        model=model,
        store=tmp_path / "store",
        overrides=[*small(""), "stages.finetune.force=true"],
    )
    assert targets(outcome)["fp32"].status == "ok"


def test_the_recorded_command_names_no_folder_of_this_machine(place: Path, tmp_path: Path) -> None:
    rows = "  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}\n"
    request = prepare.Request(
        recipe(tmp_path, "", rows), model=str(place / "model"), data_dir=tmp_path, overrides=(f"model={place / 'model'}",)
    )
    words = prepare.command_of(request)
    assert words == "onnxsqueeze run bare.yaml --model model --data-dir " + tmp_path.name + " --set model=model"


@pytest.mark.full
def test_what_one_machine_trained_another_one_exports_and_measures(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [word for override in small("d") for word in ("--set", override)]
    there = command(
        *("run", RECIPES / "d.yaml", "--model", place / "model", "--any-machine", "--train-only", "--out", tmp_path / "there", *sets),
        cwd=tmp_path,
        env={"ONNXSQUEEZE_STORE": str(tmp_path / "store")},
    )
    assert there.returncode == 0, there.stderr
    assert not (tmp_path / "there").exists(), "nothing was measured"
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in (tmp_path / "store" / "artifacts").glob("*/entry.json")]
    assert {entry["format"] for entry in entries} == {"checkpoint"}
    assert len(entries) == 2
    assert all("tools" not in entry["causes"] and "machine" not in entry["causes"] for entry in entries)

    monkeypatch.setattr("onnxsqueeze.environment.processors", lambda: {"cpu": "another one", "instruction_set": "another one"})
    monkeypatch.setattr("onnxsqueeze.plan._version", lambda _: "another one")
    here, lines = run("d", tmp_path / "here", model=place / "model", store=tmp_path / "store", overrides=small("d"), any_machine=True)
    assert [line.split(" (")[0] for line in lines if "in the store" in line] == ["finetune: in the store", "distill: in the store"]
    assert "--any-machine" in here.results.command
    made_on = here.results.stages[0].changed["details"]["made_on"]
    assert made_on["torch"] == torch.__version__
    assert made_on["cpu"] != "another one"

    here, lines = run("d", tmp_path / "here", model=place / "model", store=tmp_path / "store", overrides=small("d"))
    assert not [line for line in lines if line.startswith(("finetune: in", "distill: in"))], "unasked, each machine trains its own"
