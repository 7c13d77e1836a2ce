"""The same files in onnxruntime-node, in onnxruntime-web's WebAssembly in a real Chromium, and in transformers.js.

Tolerances: what `verify` allows on another machine (`measure.golden.tolerance`). Float kernels add in another order: 2**-10 of the largest logit is far above
that. An int8 file quantizes activations as it runs: where a sum in another order falls on the other side of a half, a value moves by a whole quantum, which what shares
a call does, too: four times `golden.spread`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import javascript
from models import random_checkpoint
from onnxsqueeze.deploy.source import Source, find
from onnxsqueeze.deploy.write import deploy
from onnxsqueeze.graph import operators
from onnxsqueeze.measure import golden
from onnxsqueeze.tokens import Encoder, pad
from runs import run

pytestmark = pytest.mark.full

RECIPE = """
schema: 1
name: elsewhere
task: toy
model: minilm
stages: [{kind: finetune}]
targets:
  - {name: fp32, backend: cpu, baseline: true, stages: [{kind: export}]}
  - {name: int8, backend: cpu, stages: [{kind: export}, {kind: quantize-dynamic}]}
  - {name: packed, backend: cpu, stages: [{kind: export}, {kind: quantize-dynamic}, {kind: pack, least_saving: 0}]}
"""
OVERRIDES = ("task.train_rows=256", "task.max_length=32", "stages.finetune.epochs=1", "measure.latency=false")

Elsewhere = Callable[[Path, Path, Path], dict[str, Any]]  # (node_modules' folder, model, feeds) → what answer.mjs gives
RUNTIMES: dict[str, Elsewhere] = {
    "onnxruntime-node": lambda place, model, feeds: javascript.node("node.mjs", place, model, feeds),
    "onnxruntime-web in Chromium": javascript.chromium,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "elsewhere.yaml").write_text(RECIPE)
    model = random_checkpoint(place / "tiny", "bert", layers=2, hidden=128, head=False)
    return run(place / "elsewhere.yaml", place / "out", model=model, store=place / "store", overrides=OVERRIDES)[0].out


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return javascript.modules(tmp_path_factory.mktemp("npm"))


def feeds_of(source: Source, file: Path) -> Path:
    """Each golden sentence alone, as tokenizer.json has it."""
    encoder = Encoder(source.folder, source.golden.max_length)
    rows = encoder.encode([a for a, _ in source.golden.sentences], [b for _, b in source.golden.sentences])
    file.write_text(json.dumps([{name: array.tolist() for name, array in pad([row], encoder.pad_id).items()} for row in rows]))
    return file


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("target", ["fp32", "int8", "packed"])
def test_the_golden_sentences_get_the_golden_answers(target: str, runtime: str, out: Path, modules: Path, tmp_path: Path) -> None:
    source = find(out, target)
    deploy(source, "folder", tmp_path / "served")
    if target == "packed":
        counted = operators(tmp_path / "served" / "model.onnx")
        assert sum(counted.values()) > sum(operators(find(out, "int8").folder / "model.onnx").values()), "its decoders are in the graph"
    found = RUNTIMES[runtime](modules, tmp_path / "served" / "model.onnx", feeds_of(source, tmp_path / "feeds.json"))
    assert found["isolated"] in (None, True)
    logits = tuple(tuple(row) for rows in found["outputs"] for row in rows)
    now = source.golden.model_copy(update={"logits": logits, "runtime": f"{runtime} {found['version']}"})
    off, turned = golden.distance(source.golden, now)
    limit = golden.tolerance(source.golden, now)
    assert turned == 0
    assert off <= limit
    if target == "fp32":
        assert off <= 2**-16 * max(abs(x) for row in source.golden.logits for x in row), "float noise"


@pytest.mark.parametrize("target", ["fp32", "int8", "packed"])
def test_a_hugging_face_folder_is_a_pipeline_of_transformers_js(target: str, out: Path, modules: Path, tmp_path: Path) -> None:
    source = find(out, target)
    deploy(source, "hf", tmp_path / "mine")
    texts = [text for text, _ in source.golden.sentences] + ["A great Film, said the woman!", "Élise: nothing"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    said = javascript.node("pipeline.mjs", modules, tmp_path / "mine", tmp_path / "texts.json")["found"]
    longest = json.loads((tmp_path / "mine" / "tokenizer_config.json").read_text())["model_max_length"]  # where transformers.js cuts
    encoder = Encoder(source.folder, longest)
    session = ort.InferenceSession(str(source.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    limit = golden.tolerance(source.golden, source.golden.model_copy(update={"runtime": "transformers.js"}))
    for text, scores in zip(texts, said, strict=True):
        (logits,) = session.run(None, pad(encoder.encode([text], [None]), encoder.pad_id))[0]
        chances = np.exp(logits) / np.exp(logits).sum()
        assert {one["label"]: one["score"] for one in scores} == pytest.approx(dict(zip(source.labels, chances, strict=True)), abs=limit)
