from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context
from onnxsqueeze.nn.checkpoint import changed_tensors, has_trained_head
from onnxsqueeze.stages.finetune import Finetune

QUICK = Finetune(epochs=1, batch_size=16)


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


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"learning_rate": 0}, {"batch_size": 0}, {"warmup": 1}, {"precision": "fp16"}, {"epoch": 3}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Finetune.model_validate({"kind": "finetune", **wrong})
