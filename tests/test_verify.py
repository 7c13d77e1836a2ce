"""`onnxsqueeze verify` on a real run (see conftest.py): what was measured passes; a changed weight, a slower file and a worse score are named."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from models import silent
from onnxsqueeze import graph
from onnxsqueeze.errors import DataError
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.verify import Finding, verify, verify_server
from runs import Command
from servers import serving


def found(path: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in verify(path, data_dir=None, progress=silent, reader=lambda: None)}


def edit(folder: Path, **fields: Any) -> None:
    """Put values into the record's only target of this name, by dotted path."""
    file = folder.parent / "results.json"
    record = json.loads(file.read_text())
    target = next(t for t in record["targets"] if t["name"] == folder.name)
    for path, value in fields.items():
        *parents, last = path.split("__")
        here = target
        for part in parents:
            here = here[part]
        here[last] = value
    file.write_text(json.dumps(record))


@pytest.fixture
def copy(ran: Outcome, tmp_path: Path) -> Path:
    shutil.copytree(ran.out, tmp_path / "out", ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "out" / "int8-ort"


@pytest.mark.parametrize("name", ["fp32", "int8-ort"])
def test_what_was_measured_answers_and_scores_as_recorded(copy: Path, name: str) -> None:
    edit(copy.parent / "fp32", latency=None)
    findings = found(copy.parent / name)
    assert [findings[what].passed for what in ("files", "outputs", "metric")] == [True, True, True]
    assert "largest difference of a logit 0 " in findings["outputs"].text
    assert findings["latency"].passed is not False
    assert "a full batch moves logits by up to" in findings["invariance"].text


def test_golden_sentences_are_generated_and_travel_with_the_model(ran: Outcome, tmp_path: Path) -> None:
    golden = json.loads((ran.out / "int8-ort" / "golden.json").read_text())
    assert len(golden["sentences"]) == len(golden["logits"]) == 16
    assert golden["batch_spread"] > 0, "int8 with ranges taken at run time depends on what shares a call"
    shutil.copytree(ran.out / "int8-ort", tmp_path / "alone")
    findings = found(tmp_path / "alone" / "model.onnx")
    assert findings["outputs"].passed
    assert findings["record"].passed is None
    assert "latency" not in findings


def test_a_file_changed_by_one_weight_is_named(onnxsqueeze: Command, copy: Path, tmp_path: Path) -> None:
    model = graph.load(copy / "model.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "classifier.weight" or t.name.startswith("classifier.weight_quantized"))
    values = numpy_helper.to_array(weight).copy()
    values.reshape(-1)[0] += np.array(40, values.dtype)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    files, outputs = itertools.islice(verify(copy, data_dir=None, progress=silent, reader=lambda: None), 2)
    assert (files.what, files.passed) == ("files", False)
    assert "model.onnx: not what was measured" in files.text
    assert (outputs.what, outputs.passed) == ("outputs", False)
    shutil.move(copy, tmp_path / "alone")  # without a record, so that nothing is timed
    shown = onnxsqueeze("verify", tmp_path / "alone", cwd=tmp_path)
    assert shown.returncode == 1
    assert "FAILED files: model.onnx" in shown.stdout


def test_a_model_that_was_faster_when_measured_is_told(copy: Path) -> None:
    edit(copy, vs_baseline__speedup=40.0, vs_baseline__speedup_ci95=[39.0, 41.0])
    finding = found(copy)["latency"]
    if "the times drifted" in finding.text:
        pytest.skip("this machine's speed changed by more than a quarter within the test")
    assert (finding.passed, finding.exit_code) == (False, 3)
    assert "recorded 40.00×" in finding.text


def test_another_machines_latency_is_not_judged(copy: Path) -> None:
    edit(copy, vs_baseline__speedup_ci95=[39.0, 41.0])
    file = copy.parent / "results.json"
    record = json.loads(file.read_text())
    record["environment"]["cpu"] = "Another CPU"
    file.write_text(json.dumps(record))
    finding = found(copy)["latency"]
    assert finding.passed is None
    assert "the record is of Another CPU" in finding.text


def test_a_worse_score_than_recorded_is_told_with_exit_code_3(onnxsqueeze: Command, copy: Path) -> None:
    edit(copy, metrics__validation__accuracy={"value": 0.99, "ci95": [0.98, 1.0], "n": 1000}, latency=None)
    shown = onnxsqueeze("verify", copy, cwd=copy)
    assert shown.returncode == 3
    assert "FAILED metric" in shown.stdout
    assert "recorded 0.9900" in " ".join(shown.stdout.split())


def test_a_folder_without_golden_answers_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"golden\.json: cannot be read"):
        list(verify(tmp_path, data_dir=None, progress=silent))
    (tmp_path / "golden.json").write_text("{}")
    with pytest.raises(DataError, match=r"golden\.json: sha256: Field required"):
        list(verify(tmp_path, data_dir=None, progress=silent))


@pytest.fixture(scope="module")
def served(ran: Outcome) -> Iterator[str]:
    """The URL of a server of the int8 model."""
    with serving(ran.out / "int8-ort", "--threads", 1) as server:
        yield f"http://{server.host}:{server.port}"


def test_a_server_of_the_measured_model_answers_and_scores_as_recorded(ran: Outcome, served: str) -> None:
    findings = {one.what: one for one in verify_server(served, ran.out / "int8-ort", data_dir=None, progress=silent)}
    assert [findings[what].passed for what in ("outputs", "metric")] == [True, True]
    assert "largest difference of a logit 0 " in findings["outputs"].text
    assert "not known what computes there" in findings["outputs"].text
    assert "from request to answer" in findings["latency"].text
    assert findings["latency"].passed, findings["latency"].text


def test_a_server_of_another_model_is_found_out(onnxsqueeze: Command, ran: Outcome, served: str) -> None:
    done = onnxsqueeze("verify", served, "--record", ran.out / "fp32", cwd=ran.out)
    assert done.returncode == 1
    assert "FAILED outputs" in done.stdout
    assert "ok     metric" in done.stdout, "int8 scores about the same: outputs alone tell them apart"


def test_a_url_is_compared_with_a_folder_that_has_to_be_named(onnxsqueeze: Command, ran: Outcome) -> None:
    alone = onnxsqueeze("verify", "http://localhost:1", cwd=ran.out)
    assert alone.returncode == 2
    assert "--record DIR" in alone.stderr
    both = onnxsqueeze("verify", ran.out / "fp32", "--record", ran.out / "fp32", cwd=ran.out)
    assert both.returncode == 2
    assert "goes with a URL" in both.stderr


def test_a_server_that_is_slow_or_scores_worse_than_recorded_is_told(copy: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxsqueeze.verify._SERVED_LIMIT", (0.0, 0.0))
    value = json.loads((copy.parent / "results.json").read_text())["targets"][1]["metrics"]["validation"]["accuracy"] | {"ci95": [1.0, 1.0]}
    edit(copy, metrics__validation__accuracy=value)
    findings = {one.what: one for one in verify_server(served, copy, data_dir=None, progress=silent)}
    assert findings["outputs"].passed
    assert [(findings[what].passed, findings[what].exit_code) for what in ("latency", "metric")] == [(False, 3), (False, 3)]


def test_the_time_of_a_server_is_not_judged_by_the_record_of_another_machine(copy: Path, served: str) -> None:
    file = copy.parent / "results.json"
    record = json.loads(file.read_text())
    record["environment"]["cpu"] = "another CPU"
    file.write_text(json.dumps(record))
    findings = {one.what: one for one in verify_server(served, copy, data_dir=None, progress=silent)}
    assert findings["latency"].passed is None
    assert "the record is of another CPU" in findings["latency"].text
