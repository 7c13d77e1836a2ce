"""`deploy --text`: the tokenizer in the graph gives the ids of tokenizer.json, and the model behind it the logits of model.onnx."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import random_checkpoint, silent
from onnxsqueeze import graph, inspection
from onnxsqueeze.deploy import text_model
from onnxsqueeze.deploy.source import Source, find
from onnxsqueeze.deploy.write import deploy
from onnxsqueeze.errors import MeasureError, ModelError, UsageError
from onnxsqueeze.models import resolve
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.tasks import glue
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.settings import TaskSettings
from onnxsqueeze.text import probe, rules
from onnxsqueeze.text.session import open_text
from onnxsqueeze.tokens import Encoder, pad
from onnxsqueeze.verify import verify
from runs import command, run

MAX_LENGTH = 32
TEXTS = [
    "A great film, said the woman!",
    "",
    "   ",
    "dull\tand\nboring\r\nmovie",
    "Élise didn't like it — «not» at all…",
    "日本の映画x한국어",
    "[MASK] the [SEP] plot [UNK][CLS]",
    "the story " * 60,
    "a" * 100 + " " + "a" * 101,
    "gooǅd \x01\x02\x03 \ufffd \ue000 \u200b \U000f1234 \U0001f600",
    "##ing #ing the##ing",
    "the plotzwx filmß wonderfulß",  # cut short in the middle of a word: unknown as a whole
    "q\u0301\u0327\u0345 I\u0307 \u1e9b\u0323 ﬁ Ω ς İ",
]


@pytest.fixture(scope="module")
def source(ran: Outcome) -> Source:
    return find(ran.out, "int8-ort")


@pytest.fixture(scope="module")
def plain(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text-folder") / "plain"
    deploy(source, "folder", out, text=True)
    return out


def in_graph(folder: Path, max_length: int = MAX_LENGTH) -> probe.InGraph:
    encoder = Encoder(folder, max_length)
    return probe.InGraph(rules.read(folder, max_length, encoder.pad_id), encoder)


def with_tokenizer(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """``out`` with the tokenizer of ``folder``, changed."""
    out.mkdir()
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (out / "tokenizer.json").write_text(json.dumps(data))
    return out


# ── the ids ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("max_length", "lower"), [(MAX_LENGTH, True), (8, True), pytest.param(MAX_LENGTH, False, marks=pytest.mark.full)])
def test_the_ids_mask_and_types_are_those_of_the_tokenizer(source: Source, max_length: int, lower: bool, tmp_path: Path) -> None:
    folder = with_tokenizer(source.folder, tmp_path / "cased", lambda data: data["normalizer"].update(lowercase=lower))
    graph = in_graph(folder, max_length)
    here, there = graph.inputs(TEXTS), graph.expected(TEXTS)
    for name, expected in there.items():
        np.testing.assert_array_equal(here[name], expected)
    assert list(graph.differing(TEXTS)) == []
    assert graph.inputs([])["input_ids"].shape == (0, 2)


def test_the_ids_of_minilms_vocabulary_are_the_same_on_every_assigned_code_point_of_the_first_plane() -> None:
    found = probe.on_code_points(in_graph(resolve("minilm").artifact.path))
    assert found.asked > 50_000
    assert (found.differ, found.blocks) == (0, ())


@pytest.fixture(scope="module")
def minilm() -> probe.InGraph:
    return in_graph(resolve("minilm").artifact.path)


NO_NUL = st.text(st.characters(min_codepoint=1, blacklist_categories=["Cs"]), max_size=40)


@given(st.lists(NO_NUL, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_text_without_nul_gets_the_same_ids(minilm: probe.InGraph, texts: list[str]) -> None:
    assert list(minilm.differing(texts)) == []


@pytest.mark.full
def test_a_tokenizer_that_differs_is_told_by_the_blocks_in_which_it_does(source: Source) -> None:
    encoder = Encoder(source.folder, MAX_LENGTH)
    found = rules.read(source.folder, MAX_LENGTH, encoder.pad_id)
    wrong = replace(found, table={one: other for one, other in found.table.items() if not 0x1E00 <= ord(one) < 0x1F00})
    told = probe.on_code_points(probe.InGraph(wrong, encoder))
    assert told.differ > 100
    assert told.blocks == ("U+1E00",)


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def expected_logits(source: Source, texts: list[str]) -> Any:
    encoder = Encoder(source.folder, source.record.task.max_length)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(source.folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    feed = pad(encoder.encode(texts, [None] * len(texts)), encoder.pad_id)
    return session.run(None, {one.name: feed[one.name] for one in session.get_inputs()})[0]


@pytest.mark.parametrize("batch", [1, 5])
def test_text_in_gives_the_bits_of_the_model_behind_its_tokenizer(plain: Path, source: Source, batch: int) -> None:
    session = open_text((plain / "model_text.onnx").read_bytes())
    for begin in range(0, len(TEXTS), batch):
        some = TEXTS[begin : begin + batch]
        (found,) = session.run(["logits"], {"text": np.array(some, object)})
        assert found.tobytes() == expected_logits(source, some).tobytes()


def test_the_folder_with_text_is_verified_and_the_file_says_what_it_is(plain: Path, source: Source) -> None:
    assert {finding.what: finding.passed for finding in verify(plain, data_dir=None, progress=silent, reader=lambda: None)}["files"]
    found = inspection.inspect(plain / "model_text.onnx")
    assert found.provenance == source.provenance
    assert found.text is not None
    assert found.text.differ == 0
    assert found.text.max_length == source.record.task.max_length
    assert ("input", "text", "string", ("batch_size",)) in found.values
    before = inspection.inspect(plain / "model.onnx")
    assert (found.ir_version, found.opsets) == (before.ir_version, before.opsets | {"ai.onnx.contrib": 1})
    said = "\n".join(inspection.lines(found))
    assert f"0 of {found.text.code_points:,} code points are tokenized otherwise than by tokenizer.json" in said
    assert before.text is None
    (plain / "model_text.onnx").rename(plain / "gone")
    try:
        assert not next(f for f in verify(plain, data_dir=None, progress=silent, reader=lambda: None) if f.what == "files").passed
    finally:
        (plain / "gone").rename(plain / "model_text.onnx")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_the_code_for_text_in_the_readme_runs_as_it_stands(kind: str, source: Source, plain: Path, tmp_path: Path) -> None:
    served = plain
    if kind == "hf":
        served = tmp_path / "hub"
        deploy(source, "hf", served, text=True)
        assert (served / "onnx" / "model_text.onnx").is_file()
    codes = re.findall(r"```python\n(.*?)```", (served / "README.md").read_text(), re.DOTALL)
    code = next(code for code in codes if "get_library_path" in code)
    done = subprocess.run([sys.executable, "-c", code], cwd=served, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(expected_logits(source, ["a text", "and another one"]))


@pytest.mark.full
def test_external_data_is_shared_with_the_model(source: Source, tmp_path: Path) -> None:
    shutil.copytree(source.folder, tmp_path / "split")
    graph.save(graph.load(source.folder / "model.onnx"), tmp_path / "split", external_above_bytes=1000)
    split = replace(source, folder=tmp_path / "split", model=("model.onnx", "model.onnx_data"))
    deploy(split, "hf", tmp_path / "hub", text=True)
    place = tmp_path / "hub" / "onnx"
    assert {file.name for file in place.iterdir()} == {"model.onnx", "model.onnx_data", "model_text.onnx"}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(__import__("onnxruntime_extensions").get_library_path())
    session = ort.InferenceSession(str(place / "model_text.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"text": np.array(TEXTS, object)})
    assert found.tobytes() == expected_logits(source, TEXTS).tobytes()


@pytest.mark.full
def test_a_packed_file_with_a_pruned_vocabulary_takes_text(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "tiny", "bert", layers=1, hidden=128, head=False)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        """
schema: 1
name: small
task: toy
model: minilm
stages:
  - kind: finetune
  - {kind: prune-vocabulary, min_count: 1}
targets:
  - name: fp32
    backend: cpu
    baseline: true
    after: finetune
    stages: [{kind: export}]
  - name: packed
    backend: cpu
    stages: [{kind: export}, {kind: quantize-dynamic}, {kind: pack}]
"""
    )
    outcome, _ = run(
        recipe,
        tmp_path / "out",
        model=model,
        store=tmp_path / "store",
        overrides=["task.train_rows=256", "task.max_length=32", "stages.finetune.epochs=1", "measure.latency=false"],
    )
    packed = find(outcome.out, "packed")
    deploy(packed, "folder", tmp_path / "plain", text=True)
    session = open_text((tmp_path / "plain" / "model_text.onnx").read_bytes())
    (found,) = session.run(None, {"text": np.array(TEXTS, object)})
    assert found.tobytes() == expected_logits(packed, TEXTS).tobytes()


@pytest.mark.full
def test_the_ids_and_logits_of_20000_real_sentences_are_the_same(plain: Path, source: Source) -> None:
    folder = os.environ.get(glue.FOLDER_VARIABLE)
    if not folder:
        pytest.skip(f"{glue.FOLDER_VARIABLE} names no folder of GLUE's files")
    texts: dict[str, None] = {}
    for name in ("cola", "mrpc", "rte", "stsb", "qnli", "sst2"):
        task = open_task(TaskSettings(name=name), data_dir=Path(folder), seed=0)
        texts |= dict.fromkeys(text for row in task.train.rows for text in (row.text, row.text_pair) if text and text.isascii())
    sentences = list(texts)[:25_000]
    assert len(sentences) >= 20_000
    assert list(in_graph(resolve("minilm").artifact.path, 128).differing(sentences)) == []
    session = open_text((plain / "model_text.onnx").read_bytes())
    for begin in range(0, 20_000, 500):
        some = sentences[begin : begin + 500]
        (found,) = session.run(None, {"text": np.array(some, object)})
        assert found.tobytes() == expected_logits(source, some).tobytes()


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["normalizer"].update(clean_text=False), "its normalizer keeps control characters"),
        (lambda data: data.update(normalizer={"type": "NFC"}), "its normalizer is NFC, not BertNormalizer"),
        (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "its pre_tokenizer is Whitespace"),
        (lambda data: data["model"].update(max_input_chars_per_word=50), "max_input_chars_per_word is 50, not 100"),
        (lambda data: data.update(post_processor=None), "a row is not one special token, the text, and one special token"),
        (lambda data: data["added_tokens"][0].update(single_word=True), r"the added token '\[PAD\]' is looked for in normalized text"),
    ],
)
def test_a_tokenizer_that_is_not_berts_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], None], reason: str, source: Source, tmp_path: Path
) -> None:
    folder = with_tokenizer(source.folder, tmp_path / "other", change)
    with pytest.raises(ModelError, match=f"cannot be put into the graph with the same ids: {reason}"):
        rules.read(folder, MAX_LENGTH, 0)


def test_byte_level_bpe_is_refused(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "roberta", "roberta", layers=1)
    with pytest.raises(ModelError, match="its model is BPE, not WordPiece"):
        rules.read(folder, MAX_LENGTH, 1)


def test_a_pair_task_and_wrong_answers_are_refused_before_anything_is_written(source: Source, tmp_path: Path) -> None:
    pairs = source.golden.model_copy(update={"sentences": tuple((a, a) for a, _ in source.golden.sentences)})
    with pytest.raises(ModelError, match="--text: the task toy is about pairs"):
        deploy(replace(source, golden=pairs), "folder", tmp_path / "out", text=True)
    off = source.golden.model_copy(update={"logits": tuple(tuple(x + 1 for x in row) for row in source.golden.logits)})
    with pytest.raises(MeasureError, match="int8-ort is 1 off the golden answers"):
        deploy(replace(source, golden=off), "folder", tmp_path / "out", text=True)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_command_says_what_to_install(ran: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)  # what Python does where a module may not be imported
    with pytest.raises(UsageError, match="onnxruntime-extensions is not installed") as raised:
        text_model.make(find(ran.out, "int8-ort"))
    assert raised.value.remedy == "pip install 'onnxsqueeze[text]'"


@pytest.mark.full
def test_the_command_writes_the_text_file(ran: Outcome, tmp_path: Path) -> None:
    done = command("deploy", ran.out, "--target", "fp32", "--to", "hf", "--out", "a", "--text", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "onnx/model_text.onnx" in done.stdout
    shown = command("inspect", "a/onnx/model_text.onnx", cwd=tmp_path)
    assert "tokenizer  in the graph, for sessions with onnxruntime-extensions" in shown.stdout
    assert "provenance (" in shown.stdout
