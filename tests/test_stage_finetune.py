from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context
from onnxsqueeze.nn.checkpoint import changed_tensors, has_trained_head
from onnxsqueeze.nn.soup import Weights, greedy
from onnxsqueeze.stages.finetune import Finetune

QUICK = Finetune(epochs=1, batch_size=16)
SEVERAL = Finetune(epochs=2, batch_size=16, learning_rate=1e-3, runs=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoder_becomes_a_trained_classifier_that_reloads(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name, head=False)
    out, changed = run_stage(QUICK, parent, tmp_path)
    assert has_trained_head(out)
    assert changed.count == changed_tensors(parent, out) >= len(load_file(out / "model.safetensors"))  # RoBERTa loses its pooler
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert (out / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("outputs", "problem"), [(1, "regression"), (3, "single_label_classification")])
def test_the_head_has_one_output_per_class_or_one_for_a_score(tmp_path: Path, outputs: int, problem: str) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", head=False)
    out, changed = run_stage(QUICK, parent, tmp_path, context=toy_context(tmp_path, outputs=outputs, pairs=True))
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == problem
    assert load_file(out / "model.safetensors")["classifier.weight"].shape[0] == outputs
    assert len(config["id2label"]) == outputs
    assert changed.details["history"][0]["loss"] > 0


def test_a_trained_head_is_the_start_when_forced_to_train_again(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    out, _ = run_stage(Finetune(epochs=1, batch_size=64, learning_rate=1e-6, force=True), parent, tmp_path)
    before, after = load_file(parent / "model.safetensors"), load_file(out / "model.safetensors")
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    torch.testing.assert_close(before["classifier.weight"], after["classifier.weight"], atol=1e-4, rtol=0)


def test_several_runs_start_alike_and_go_other_ways(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", head=False)
    notes: list[str] = []
    heard = toy_context(tmp_path / "several", progress=lambda _done, _total, note="": notes.append(note))
    _, several = run_stage(SEVERAL, parent, tmp_path / "several", context=heard)
    _, alone = run_stage(SEVERAL.model_copy(update={"runs": 1}), parent, tmp_path / "alone")
    losses = [[epoch["loss"] for epoch in run["history"]] for run in several.details["runs"]]

    assert losses[0] == [epoch["loss"] for epoch in alone.details["history"]]
    assert len({tuple(run) for run in losses}) == 3
    assert notes[0].startswith("run 1/3, epoch 1/2")
    assert notes[-1].startswith("run 3/3, epoch 2/2")
    assert "runs" not in alone.details


def test_of_several_runs_the_average_is_kept_that_scores_best_on_the_selection_rows(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", head=False)
    scores = iter([0.1, 0.2, 0.1, 0.4, 0.1, 0.3, 0.5, 0.45])  # two epochs of each run; runs 2 and 3 together, and all
    context = replace(toy_context(tmp_path), select=lambda _: next(scores))
    out, changed = run_stage(SEVERAL, parent, tmp_path / "run", context=context)
    ends = [
        torch.load(tmp_path / "checkpoint" / f"run-{run}" / "training.pt", weights_only=True)["model"]["classifier.weight"]
        for run in (2, 3)
    ]

    assert changed.details["averaged_runs"] == [2, 3]
    assert changed.details["averaged_score"] == 0.5
    torch.testing.assert_close(load_file(out / "model.safetensors")["classifier.weight"], (ends[0] + ends[1]) / 2)


def test_an_average_without_a_finite_score_is_not_kept(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", head=False)
    scores = iter([0.1, 0.2, 0.1, 0.4, 0.1, 0.3, float("nan"), float("nan")])
    _, changed = run_stage(SEVERAL, parent, tmp_path / "run", context=replace(toy_context(tmp_path), select=lambda _: next(scores)))

    assert changed.details["averaged_runs"] == [2]


def test_killed_in_its_second_run_it_resumes_there_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", head=False)
    whole, _ = run_stage(SEVERAL, parent, tmp_path / "whole")
    seen: list[int] = []

    def kill(done: int, total: int, note: str = "") -> None:  # 64 rows in batches of 16, 2 epochs: 8 steps a run
        if "epoch" in note:
            seen.append(done)
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(SEVERAL, parent, tmp_path / "killed", context=toy_context(tmp_path, progress=kill))
    seen.clear()
    again = toy_context(tmp_path, progress=lambda done, _total, _note="": seen.append(done))
    out, changed = run_stage(SEVERAL, parent, tmp_path / "again", context=again)

    assert seen[:4] == [13, 14, 15, 16]
    assert (changed.details["resumed_in_run"], changed.details["resumed_at_epoch"]) == (2, 2)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_soup_takes_what_makes_it_no_worse_and_leaves_integers_alone() -> None:
    trained = [{"w": torch.tensor([value]), "position": torch.tensor([3])} for value in (0.0, 5.0, 2.0)]

    def score(weights: Weights) -> float:
        return -abs(float(weights["w"][0]) - 1.0)

    found = greedy(trained, [score(weights) for weights in trained], score)

    assert found.members == (0, 2)
    assert (float(found.weights["w"][0]), found.score) == (1.0, 0.0)
    assert found.weights["position"].dtype == torch.int64
    assert int(found.weights["position"][0]) == 3


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"learning_rate": 0}, {"batch_size": 0}, {"warmup": 1}, {"precision": "fp16"}, {"epoch": 3}, {"runs": 0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Finetune.model_validate({"kind": "finetune", **wrong})
