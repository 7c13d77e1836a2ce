from __future__ import annotations

import dataclasses
import json
import logging
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from exports import build, export
from models import FAMILIES, FamilyName, artifact, random_checkpoint, toy_context
from onnxsqueeze import graph
from onnxsqueeze.errors import ModelError, StageError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.export import Export

STAGE = Export(kind="export")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_in_onnx_what_it_says_in_pytorch(tmp_path: Path, family: FamilyName) -> None:
    import torch

    context = toy_context(tmp_path)
    parent = artifact(random_checkpoint(tmp_path / "model", family))
    exported, changed = build(STAGE, parent, tmp_path / "out", context)
    graph.check(exported.onnx)
    model, described = checkpoint.load(parent.path, context.task)
    feeds = list(calibration.feeds(exported.onnx, context, 64, batch=5))
    assert set(feeds[0]) == set(described.inputs())
    for feed, logits in zip(feeds, calibration.logits(exported.onnx, feeds, 1), strict=True):
        with torch.inference_mode():
            expected = model(**{name: torch.from_numpy(ids) for name, ids in feed.items()}).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert changed.count == sum(graph.operators(exported.onnx).values()) > 100
    assert changed.details["max_abs_diff"] <= changed.details["tolerance"] < 1e-3
    assert changed.details["compared_shapes"][2] == [2, context.task.max_length]
    assert (exported.path / "tokenizer.json").read_bytes() == (parent.path / "tokenizer.json").read_bytes()
    assert json.loads((exported.path / "config.json").read_text())["model_type"] == described.model_type


def test_names_types_and_dynamic_axes_are_those_that_servers_expect(tmp_path: Path) -> None:
    import onnx

    exported, _ = export(tmp_path, "bert")
    model = onnx.load(str(exported.onnx))
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)}
    ids = ["batch_size", "sequence_length"]
    assert axes == {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids, "logits": ["batch_size", 2]}
    assert {name: dtype for name, (_, dtype) in graph.signature(exported.onnx).items()} == {
        "input_ids": "int64",
        "attention_mask": "int64",
        "token_type_ids": "int64",
        "logits": "float32",
    }
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not {"Dropout", "Identity"} & set(graph.operators(exported.onnx))


def test_an_export_that_lost_something_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = toy_context(tmp_path)
    parent = artifact(random_checkpoint(tmp_path / "model", "bert"))
    save = graph.save

    def damage(model: Any, folder: Path) -> Path:
        weight = next(t for t in model.graph.initializer if t.name == "classifier.bias")
        weight.raw_data = np.full(2, 0.01, np.float32).tobytes()
        return save(model, folder)

    monkeypatch.setattr(graph, "save", damage)
    with pytest.raises(StageError, match="more than float32 noise explains"):
        build(STAGE, parent, tmp_path / "out", context)


def test_export_needs_no_network_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    handlers = list(logging.root.handlers)
    export(tmp_path, "roberta")
    assert capfd.readouterr() == ("", "")
    assert logging.root.handlers == handlers


def test_a_parent_without_weights_and_a_task_without_rows_are_named(tmp_path: Path) -> None:
    context = toy_context(tmp_path)
    folder = random_checkpoint(tmp_path / "model", "bert")
    empty = dataclasses.replace(context, train=dataclasses.replace(context.train, rows=[]))
    with pytest.raises(StageError, match="no training rows"):
        build(STAGE, artifact(folder), tmp_path / "out", empty)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no model"):
        build(STAGE, artifact(folder), tmp_path / "other", context)


def test_an_opset_that_was_not_tried_is_refused_before_anything_runs() -> None:
    for opset in (13, 21):
        with pytest.raises(ValidationError):
            Export(kind="export", opset=opset)


@pytest.mark.parametrize("opset", [14, 20])
def test_the_oldest_and_the_newest_opset_work_too(tmp_path: Path, opset: int) -> None:
    parent = artifact(random_checkpoint(tmp_path / "model", "electra"))
    exported, changed = build(Export(kind="export", opset=opset), parent, tmp_path / "out", toy_context(tmp_path))
    graph.check(exported.onnx)
    assert changed.details["opset"] == opset
