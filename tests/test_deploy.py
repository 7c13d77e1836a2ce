"""`onnxsqueeze deploy`: folders as others load them, from a real run; their READMEs' code is run as it stands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import yaml
from huggingface_hub import ModelCard

from models import silent
from onnxsqueeze import graph
from onnxsqueeze.artifact import file_sha256
from onnxsqueeze.deploy.source import Source, find
from onnxsqueeze.deploy.write import deploy
from onnxsqueeze.errors import ModelError, UsageError
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.recipe import load
from onnxsqueeze.results import read_results
from onnxsqueeze.tokens import Encoder, pad
from onnxsqueeze.verify import Finding, verify
from runs import Command, command

TEXTS = ["a great film , said the woman", "dull", "the plot was not good and the music was very old"]


@pytest.fixture(scope="module")
def source(ran: Outcome) -> Source:
    return find(ran.out, "int8-ort")


@pytest.fixture
def folder(source: Source, tmp_path: Path) -> Path:
    deploy(source, "folder", tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def hub(source: Source, tmp_path: Path) -> Path:
    deploy(source, "hf", tmp_path / "hub")
    return tmp_path / "hub"


def logits(source: Source, text: str) -> list[float]:
    """What the run's own file says to one text."""
    encoder = Encoder(source.folder, source.record.task.max_length)
    session = ort.InferenceSession(str(source.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found: list[float] = session.run(None, pad(encoder.encode([text], [None]), encoder.pad_id))[0][0].tolist()
    return found


def findings(path: Path, *, all_of_them: bool = False) -> dict[str, Finding]:
    """What verify finds; without ``all_of_them`` the files and the outputs, which take no time."""
    found = verify(path, data_dir=None, progress=silent, reader=lambda: None)
    return {finding.what: finding for finding in (found if all_of_them else islice(found, 2))}


def test_a_plain_folder_holds_what_a_server_needs_and_its_record(folder: Path, source: Source) -> None:
    held = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
    assert held >= {"model.onnx", "tokenizer.json", "config.json", "golden.json", "results.json", "README.md"}
    assert file_sha256(folder / "model.onnx") == file_sha256(source.folder / "model.onnx")
    (target,) = read_results(folder).targets
    assert (target.name, target.model, target.size_bytes) == ("int8-ort", "model.onnx", (folder / "model.onnx").stat().st_size)
    assert {f.path: f.sha256 for f in target.files} == {name: file_sha256(folder / name) for name in held - {"results.json", "README.md"}}
    assert target.vs_baseline == source.target.vs_baseline


@pytest.mark.full
@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_the_code_in_the_readme_runs_as_it_stands(kind: str, source: Source, tmp_path: Path) -> None:
    deploy(source, kind, tmp_path / "served")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "served" / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "served", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [source.labels[int(np.argmax(logits(source, text)))] for text in ("a text", "and another one")]
    if kind == "folder":
        assert done.stdout.split("\n")[-2] == repr(expected)
    else:
        assert f"'label': '{expected[0]}'" in done.stdout


def test_a_hugging_face_folder_loads_in_optimum_and_in_a_pipeline_and_says_the_same(hub: Path, source: Source) -> None:
    import transformers
    from optimum.onnxruntime import ORTModelForSequenceClassification

    hf: Any = transformers  # these have no types

    assert {file.relative_to(hub).as_posix() for file in hub.rglob("*") if file.is_file()} >= {
        "onnx/model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md",
    }  # fmt: skip
    model = ORTModelForSequenceClassification.from_pretrained(hub)
    tokenizer = hf.AutoTokenizer.from_pretrained(hub)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}
    classify = hf.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text in TEXTS:
        expected = logits(source, text)
        np.testing.assert_array_equal(model(**tokenizer(text, return_tensors="np"))["logits"][0], np.array(expected, np.float32))
        chances = np.exp(expected) / np.exp(expected).sum()
        scores = {said["label"]: said["score"] for said in classify([text])[0]}
        assert scores == pytest.approx({"negative": chances[0], "positive": chances[1]}, abs=1e-6)


def test_the_model_card_is_what_the_hub_reads(hub: Path, source: Source, tmp_path: Path) -> None:
    card = ModelCard.load(hub / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.model_name) == ("mit", "text-classification", "tiny-toy-int8-ort")
    assert card.data.base_model is None, "a folder of somebody's is no model of the Hub"
    assert {"onnx", "onnxruntime"} <= set(card.data.tags)
    assert card.data.metrics == ["accuracy"]
    (score,) = card.data.eval_results
    assert (score.dataset_name, score.dataset_split, score.metric_type) == ("toy", "validation", "accuracy")
    assert score.metric_value == pytest.approx(source.metric.value, abs=1e-4)
    assert f"{100 * source.metric.value:.1f} [" in card.content
    assert "| fp32 (the baseline) |" in card.content
    assert "Its rows are generated" in card.content
    (recipe,) = re.findall(r"````yaml\n(.*?)````", card.content, re.DOTALL)
    (tmp_path / "back.yaml").write_text(recipe)
    assert load(tmp_path / "back.yaml").recipe.name == "q"


def test_a_model_of_the_hub_is_named_as_the_base(source: Source) -> None:
    from dataclasses import replace

    from onnxsqueeze.deploy.card import model_card

    provenance = source.provenance.model_copy(update={"model": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0"})
    front = yaml.safe_load(model_card(replace(source, provenance=provenance), "onnx/model.onnx").split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("sentence-transformers/all-MiniLM-L6-v2", "quantized")
    assert front["license"] == "apache-2.0"
    glue = source.record.model_copy(update={"task": source.record.task.model_copy(update={"name": "sst2"})})
    front = yaml.safe_load(model_card(replace(source, record=glue), "onnx/model.onnx").split("---\n")[1])
    assert front["datasets"] == ["nyu-mll/glue"]
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "GLUE sst2", "type": "nyu-mll/glue", "config": "sst2", "split": "validation"}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_a_deployed_folder_is_verified_wherever_it_is(kind: str, source: Source, tmp_path: Path) -> None:
    deploy(source, kind, tmp_path / "served")
    served = tmp_path / "elsewhere"
    shutil.move(tmp_path / "served", served)
    onnx = next(served.rglob("*.onnx"))
    for path in (served, onnx):
        found = findings(path, all_of_them=True)
        assert [found[what].passed for what in ("files", "outputs", "metric")] == [True, True, True]
        assert "no baseline beside it" in found["latency"].text or "not judged" in found["latency"].text
    tokenizer = json.loads((served / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (served / "tokenizer.json").write_text(json.dumps(tokenizer))
    shown = command("verify", served, cwd=tmp_path)
    assert shown.returncode == 1
    assert "FAILED files: tokenizer.json: not what was measured" in shown.stdout


def test_another_model_in_a_deployed_folder_is_found(hub: Path, ran: Outcome) -> None:
    shutil.copy(ran.out / "fp32" / "model.onnx", hub / "onnx" / "model.onnx")
    assert findings(hub)["files"].passed is False


def test_what_is_deployed_names_no_path_of_this_machine(folder: Path, hub: Path, ran: Outcome) -> None:
    for place in (folder, hub):
        for file in (place / "README.md", place / "results.json", place / "config.json", place / "tokenizer_config.json"):
            text = file.read_text()
            assert str(ran.out.parent) not in text
            assert not re.search(r"(?<![\w/.:<])/(home|root|tmp|usr|work|mnt)/", text), file


def test_external_data_goes_along(ran: Outcome, tmp_path: Path) -> None:
    shutil.copytree(ran.out, tmp_path / "run")
    split = tmp_path / "run" / "fp32"
    model = graph.load(split / "model.onnx")
    graph.save(model, split, external_above_bytes=1000)
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    target = next(t for t in record["targets"] if t["name"] == "fp32")
    target["files"] = [
        {"path": f"fp32/{f.name}", "sha256": file_sha256(f), "bytes": f.stat().st_size} for f in split.iterdir() if f.is_file()
    ]
    (tmp_path / "run" / "results.json").write_text(json.dumps(record))
    golden = json.loads((split / "golden.json").read_text())
    golden["sha256"] = {name: file_sha256(split / name) for name in ("model.onnx", "model.onnx_data")}
    (split / "golden.json").write_text(json.dumps(golden))
    target["files"] = [f for f in target["files"] if f["path"] != "fp32/golden.json"]
    (tmp_path / "run" / "results.json").write_text(json.dumps(record))
    deploy(find(tmp_path / "run", "fp32"), "hf", tmp_path / "hub")
    assert (tmp_path / "hub" / "onnx" / "model.onnx_data").is_file()
    assert findings(tmp_path / "hub")["outputs"].passed


def test_the_command_says_what_it_wrote_and_what_was_wrong(onnxsqueeze: Command, ran: Outcome, tmp_path: Path) -> None:
    done = onnxsqueeze("deploy", ran.out, "--target", "int8-ort", "--to", "folder", "--out", "a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote a/b: README.md, config.json, golden.json, model.onnx, results.json, ")
    for words, message in (
        (("--target", "int8", "--to", "folder", "--out", "c"), "the run has no such target; did you mean 'int8-ort'?"),
        (("--target", "int8-ort", "--to", "huggingface", "--out", "c"), "--to huggingface: unknown kind of folder"),
        (("--target", "int8-ort", "--to", "folder", "--out", "a/b"), "--out a/b: is there already, and not empty"),
    ):
        done = onnxsqueeze("deploy", ran.out, *words, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "c").exists()


def test_a_file_that_is_not_the_measured_one_is_not_deployed(ran: Outcome, tmp_path: Path) -> None:
    shutil.copytree(ran.out, tmp_path / "run")
    with (tmp_path / "run" / "fp32" / "config.json").open("a") as handle:
        handle.write("\n")
    with pytest.raises(UsageError, match=r"fp32: config\.json: not what was measured"):
        find(tmp_path / "run", "fp32")
    (tmp_path / "run" / "fp32" / "model.onnx").unlink()
    with pytest.raises(UsageError, match=r"model\.onnx: is not there"):
        find(tmp_path / "run", "fp32")


def test_a_target_that_was_not_measured_is_not_deployed(ran: Outcome, tmp_path: Path) -> None:
    shutil.copytree(ran.out, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    record["targets"][0] |= {"status": "skipped", "reason": "no GPU", "remedy": "buy one"}
    (tmp_path / "run" / "results.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"was not measured \(skipped: no GPU\)") as raised:
        find(tmp_path / "run", "fp32")
    assert raised.value.remedy == "buy one"


def test_a_student_that_transformers_does_not_know_is_refused_for_hugging_face(source: Source, tmp_path: Path) -> None:
    from dataclasses import replace

    shutil.copytree(source.folder, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text()) | {"model_type": "onnxsqueeze-cnn"}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="transformers has no model of type 'onnxsqueeze-cnn'"):
        deploy(replace(source, folder=tmp_path / "small"), "hf", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
