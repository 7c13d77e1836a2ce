"""`deploy --to triton`: what stands in the repository, read by Triton's own protobuf, and what a session makes of it. Triton itself runs nowhere here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from models import FamilyName, random_checkpoint, silent
from onnxsqueeze import graph
from onnxsqueeze.artifact import file_sha256
from onnxsqueeze.backends import HERE
from onnxsqueeze.deploy import batching, pbtxt, triton
from onnxsqueeze.deploy.source import Source, find
from onnxsqueeze.deploy.write import deploy
from onnxsqueeze.errors import MeasureError, ModelError, UsageError
from onnxsqueeze.inspection import inspect
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.results import Target, read_results
from onnxsqueeze.tokens import Encoder, pad
from onnxsqueeze.verify import Finding, verify
from records import latency, load, measured
from runs import command, run
from sources import exported, named, source_of

RECIPE = """
schema: 1
name: tried
task: {name: toy, train_rows: 256, max_length: 32}
targets:
  - {name: fp32, baseline: true, after: model, stages: [{kind: export}]}
  - {name: int8-ort, after: model, stages: [{kind: export}, {kind: quantize-dynamic}]}
measure: {sequence: 32, shapes: [], sweep: {batch: [1, 2, 4], sequence: [32]}, processes: 2, min_runs: 20, min_seconds: 0, task_lengths: false, profile: false}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A random model as it is and in int8, with a sweep of batches."""
    place = tmp_path_factory.mktemp("triton")
    (place / "tried.yaml").write_text(RECIPE)
    model = named(random_checkpoint(place / "tiny", "bert", layers=1), ("negative", "positive"))
    outcome, _ = run(place / "tried.yaml", place / "out", model=model, store=place / "store")
    assert outcome.exit_code == 0
    return outcome


@pytest.fixture(scope="module")
def repository(ran: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "models"
    deploy(find(ran.out, "int8-ort"), "triton", out)
    return out


def config_in(folder: Path) -> Any:
    """config.pbtxt as Triton's protobuf reads it."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def findings(path: Path, *, all_of_them: bool = False) -> dict[str, Finding]:
    """What verify finds; without ``all_of_them`` the files and the outputs, which take no time."""
    found = verify(path, data_dir=None, progress=silent, reader=lambda: None)
    return {finding.what: finding for finding in (found if all_of_them else islice(found, 2))}


def test_the_repository_has_the_layout_that_triton_reads(repository: Path) -> None:
    held = {file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file()}
    model = "tiny-toy-int8-ort"
    assert {name.split("/")[0] for name in held} == {model, "README.md", "model_analyzer.yaml", "perf_input.json"}
    for name in ("config.pbtxt", "1/model.onnx", "labels.txt", "tokenizer.json", "config.json", "golden.json", "results.json"):
        assert f"{model}/{name}" in held
    assert (repository / model / "labels.txt").read_text() == "negative\npositive\n"
    assert [file.name for file in (repository / model / "1").iterdir()] == ["model.onnx"]


def test_the_configuration_is_the_graphs_signature_and_the_record(repository: Path, ran: Outcome) -> None:
    config = config_in(repository / "tiny-toy-int8-ort")
    target = next(target for target in ran.results.targets if target.name == "int8-ort")
    session = ort.InferenceSession(str(ran.out / "int8-ort" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert (config.name, config.platform, config.backend) == ("tiny-toy-int8-ort", "onnxruntime_onnx", "onnxruntime")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        (given.name, model_config_pb2.TYPE_INT64, [-1]) for given in session.get_inputs()
    ]
    (output,) = config.output
    assert (output.name, output.data_type, list(output.dims), output.label_filename) == (
        "logits",
        model_config_pb2.TYPE_FP32,
        [2],
        "labels.txt",
    )
    assert config.max_batch_size == 4
    swept = {one.batch: 1000 * one.batch / one.p50_ms for one in (target.latency, *target.latencies) if one and one.sequence == 32}
    for size in config.dynamic_batching.preferred_batch_size:
        assert swept[size] >= 1.05 * max(rate for batch, rate in swept.items() if batch < size)
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    given = {key: value.string_value for key, value in config.parameters.items()}
    assert given == {"intra_op_thread_count": "1", "inter_op_thread_count": "1", "execution_mode": "0"}
    assert config.version_policy.latest.num_versions == 1
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator


def test_the_warm_up_is_real_sentences_that_the_model_takes(repository: Path) -> None:
    folder = repository / "tiny-toy-int8-ort"
    config, golden = config_in(folder), json.loads((folder / "golden.json").read_text())
    session = ort.InferenceSession(str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    rows = Encoder(folder, 32).encode([first for first, _ in golden["sentences"]], [None] * 16)
    assert {sample.batch_size for sample in config.model_warmup} == {1, 4}
    lengths = {sample.inputs["input_ids"].dims[0] for sample in config.model_warmup}
    assert lengths == {min(map(len, rows)), max(map(len, rows)), 32}
    for sample in config.model_warmup:
        feed = {}
        for name, one in sample.inputs.items():
            content = (folder / "warmup" / one.input_data_file).read_bytes()
            assert len(content) == 8 * one.dims[0], "a row, which Triton repeats up to batch_size"
            feed[name] = np.tile(np.frombuffer(content, "<i8"), (sample.batch_size, 1))
        assert feed["attention_mask"].all()
        assert session.run(None, feed)[0].shape == (sample.batch_size, 2)
    shortest = min(rows, key=len)
    held = np.frombuffer((folder / "warmup" / f"input_ids-{len(shortest)}_tokens").read_bytes(), "<i8")
    assert tuple(held) == shortest.ids


def test_the_record_and_verify_go_with_the_model(repository: Path, ran: Outcome, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(repository, moved)
    folder = moved / "tiny-toy-int8-ort"
    (target,) = read_results(folder).targets
    assert target.model == "1/model.onnx"
    assert all(file_sha256(folder / file.path) == file.sha256 for file in target.files)
    for path in (moved, folder, folder / "1" / "model.onnx"):
        assert [finding.passed for finding in findings(path).values()] == [True, True]
    (folder / "config.pbtxt").write_text((folder / "config.pbtxt").read_text().replace("count: 1", "count: 2"))
    assert findings(moved)["files"].passed, "the configuration is there to be tuned"
    assert inspect(moved).files[0][2] == file_sha256(ran.out / "int8-ort" / "model.onnx")
    (folder / "warmup" / "input_ids-32_tokens").write_bytes(b"")
    assert "warmup/input_ids-32_tokens" in findings(moved)["files"].text
    shutil.copytree(folder, moved / "another")
    with pytest.raises(UsageError, match="holds 2 models"):
        findings(moved)
    with pytest.raises(ModelError, match="holds 2 models"):
        inspect(moved)


@pytest.mark.full
def test_the_metric_and_the_latency_are_verified_in_a_repository(repository: Path) -> None:
    found = findings(repository, all_of_them=True)
    assert found["metric"].passed
    assert "p50" in found["latency"].text


def test_model_analyzer_gets_instances_delays_and_requests_of_the_measured_length(repository: Path, ran: Outcome) -> None:
    settings = yaml.safe_load((repository / "model_analyzer.yaml").read_text())
    assert set(settings["objectives"]) == {"perf_latency_p99", "perf_throughput"}
    (profiled,) = settings["profile_models"].items()
    assert profiled[0] == "tiny-toy-int8-ort"
    assert set(profiled[1]["parameters"]) == {"batch_sizes", "concurrency"}
    groups = profiled[1]["model_config_parameters"]["instance_group"]
    assert [group[0]["count"] for group in groups][:2] == [1, 2]
    assert profiled[1]["perf_analyzer_flags"]["shape"] == ["input_ids:32", "attention_mask:32", "token_type_ids:32"]
    data = json.loads((repository / "perf_input.json").read_text())["data"]
    ids = np.array([row["input_ids"]["content"] for row in data])
    session = ort.InferenceSession(str(ran.out / "int8-ort" / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {name: np.array([row[name]["content"] for row in data]) for name in data[0]}
    assert ids.shape == (16, 32)
    assert np.isfinite(session.run(None, feed)[0]).all()


def test_the_readme_says_how_it_is_tried_and_names_no_place(repository: Path) -> None:
    for file in (repository / "README.md", repository / "model_analyzer.yaml", *repository.rglob("*.pbtxt")):
        assert not re.search(r"(?<![\w/.:<\"$])/(home|root|tmp|usr|work|mnt)/", file.read_text()), file
    said = (repository / "README.md").read_text()
    assert "tritonserver --model-repository=/models --exit-on-error=true" in said
    assert "curl -f localhost:8000/v2/models/tiny-toy-int8-ort/ready" in said


@pytest.mark.parametrize(
    ("family", "outputs", "inputs"),
    [
        ("distilbert", 2, 2),
        ("bert", 1, 3),
        pytest.param("roberta", 1, 2, marks=pytest.mark.full),
        pytest.param("electra", 3, 3, marks=pytest.mark.full),
    ],
)
def test_every_signature_is_written_read_and_driven(family: FamilyName, outputs: int, inputs: int, tmp_path: Path) -> None:
    source = source_of(exported(tmp_path / "made", family, outputs=outputs), tmp_path / "tried", pairs=outputs == 3)
    deploy(source, "triton", tmp_path / "out")
    config = config_in(tmp_path / "out" / "tiny-words-tried")
    assert len(config.input) == inputs
    assert list(config.output[0].dims) == [outputs]
    assert bool(config.output[0].label_filename) == (tmp_path / "out" / "tiny-words-tried" / "labels.txt").is_file() == (outputs > 1)
    assert findings(tmp_path / "out")["outputs"].passed


def test_a_model_that_embeds_has_vectors_and_no_labels(tmp_path: Path) -> None:
    made = exported(tmp_path / "made", "bert", outputs=3)
    model = graph.load(made.onnx)  # vectors are another name and another reading of the same form
    for node in model.graph.node:
        node.output[:] = ["sentence_embedding" if name == "logits" else name for name in node.output]
    model.graph.output[0].name = "sentence_embedding"
    graph.save(model, made.path)
    deploy(source_of(made, tmp_path / "tried", vectors=True), "triton", tmp_path / "out")
    (output,) = config_in(tmp_path / "out" / "tiny-words-tried").output
    assert (output.name, list(output.dims), output.label_filename) == ("sentence_embedding", [3], "")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Source:
    place = tmp_path_factory.mktemp("plain")
    return source_of(exported(place, "bert"), place / "tried")


@pytest.mark.parametrize(
    ("backend", "provider", "kind", "side", "name"),
    [
        ("cuda", "CUDAExecutionProvider", "KIND_GPU", "gpu_execution_accelerator", []),
        ("tensorrt", "TensorrtExecutionProvider", "KIND_GPU", "gpu_execution_accelerator", ["tensorrt"]),
        ("openvino", "OpenVINOExecutionProvider", "KIND_CPU", "cpu_execution_accelerator", ["openvino"]),
    ],
)
def test_a_backend_becomes_a_kind_of_instance_and_an_accelerator(
    backend: str, provider: str, kind: str, side: str, name: list[str], plain: Source, tmp_path: Path
) -> None:
    target = plain.target.model_copy(update={"backend": backend, "provider": provider})
    deploy(replace(plain, target=target), "triton", tmp_path / "out")  # the golden answers stay the CPU's, so that they can be driven here
    config = config_in(tmp_path / "out" / "tiny-words-tried")
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.Kind.Value(kind)
    assert [one.name for one in getattr(config.optimization.execution_accelerators, side)] == name


def test_another_provider_is_refused(plain: Source, tmp_path: Path) -> None:
    target = plain.target.model_copy(update={"backend": "DmlExecutionProvider", "provider": "DmlExecutionProvider"})
    with pytest.raises(ModelError, match="has no DmlExecutionProvider"):
        deploy(replace(plain, target=target), "triton", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fixed_first_dimension_is_not_batched(plain: Source, tmp_path: Path) -> None:
    shutil.copytree(plain.folder, tmp_path / "one")
    model = onnx.load(tmp_path / "one" / "model.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one" / "model.onnx")
    deploy(replace(plain, folder=tmp_path / "one"), "triton", tmp_path / "out")
    config = config_in(tmp_path / "out" / "tiny-words-tried")
    assert config.max_batch_size == 0
    assert [list(given.dims) for given in config.input] == [[1, -1]] * 3
    assert not config.HasField("dynamic_batching")
    assert {sample.batch_size for sample in config.model_warmup} == {1}
    assert all(sample.inputs["input_ids"].dims[0] == 1 for sample in config.model_warmup)


def test_external_data_lies_in_a_folder_of_the_models_name(plain: Source, tmp_path: Path) -> None:
    shutil.copytree(plain.folder, tmp_path / "split")
    graph.save(graph.load(tmp_path / "split" / "model.onnx"), tmp_path / "split", external_above_bytes=1000)
    golden = plain.golden.model_copy(update={"sha256": {n: file_sha256(tmp_path / "split" / n) for n in ("model.onnx", "model.onnx_data")}})
    (tmp_path / "split" / "golden.json").write_text(golden.to_json())
    split = replace(plain, folder=tmp_path / "split", model=("model.onnx", "model.onnx_data"), golden=golden)
    deploy(split, "triton", tmp_path / "out")
    folder = tmp_path / "out" / "tiny-words-tried" / "1" / "model.onnx"
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "model.onnx_data"]
    found = findings(tmp_path / "out")
    assert (found["files"].passed, found["outputs"].passed) == (True, True)
    assert len(inspect(tmp_path / "out").files) == 2


def test_a_configuration_that_does_not_fit_the_model_is_found(plain: Source) -> None:
    inputs = tuple(pbtxt.Tensor(name, "TYPE_INT64", (-1,)) for name in ("input_ids", "attention_mask", "token_type_ids"))
    right = pbtxt.Config("m", 4, inputs, (pbtxt.Tensor("logits", "TYPE_FP32", (2,)),), "KIND_CPU")
    triton.drive(right, plain, HERE)
    for wrong, said in (
        (replace(right, inputs=inputs[:2]), "a session"),
        (replace(right, inputs=(replace(inputs[0], data_type="TYPE_INT32"), *inputs[1:])), "a session"),
        (replace(right, outputs=(pbtxt.Tensor("scores", "TYPE_FP32", (2,)),)), "a session"),
        (replace(right, outputs=(pbtxt.Tensor("logits", "TYPE_FP32", (3,)),)), "a session gives"),
    ):
        with pytest.raises(ModelError, match=said):
            triton.drive(wrong, plain, HERE)
    other = plain.golden.model_copy(update={"logits": tuple((a + 1, b) for a, b in plain.golden.logits)})
    with pytest.raises(MeasureError, match="from the golden ones"):
        triton.drive(right, replace(plain, golden=other), HERE)


def test_a_text_that_reads_back_otherwise_is_an_error() -> None:
    output = pbtxt.Tensor("logits", "TYPE_FP32", (2,))
    config = pbtxt.Config("m", 4, (pbtxt.Tensor("input_ids", "TYPE_INT64", (-1,)),), (output,), "KIND_CPU")
    assert pbtxt.read(pbtxt.write(config)) == config
    odd = replace(config, name='a "quoted"\n name, ümläut')
    assert pbtxt.read(pbtxt.write(odd)) == odd
    with pytest.raises(ModelError, match="reads back otherwise: parameters"):
        pbtxt.write(replace(config, parameters=(("b", "1"), ("a", "2"), ("b", "3"))))
    with pytest.raises(ModelError, match="Triton cannot read it"):
        pbtxt.read("max_batch: 3")


def timed(p50_ms: dict[int, float], **changes: Any) -> Target:
    found = [latency(p50).model_copy(update={"batch": batch}) for batch, p50 in p50_ms.items()]
    one = measured("int8", size=10**6, p50=10, accuracy=0.8, f1=0.8, stages=(), weight_classes=())
    return one.model_copy(update={"latency": found[0], "latencies": tuple(found[1:]), "load": None, **changes})


def test_batches_are_preferred_where_they_give_more_rows_a_second() -> None:
    found = batching.of(timed({1: 10.0, 2: 15.0, 4: 30.0, 8: 52.0, 16: 120.0}))
    assert found.preferred == (2, 8), "4 gives as many rows a second as 2, and 16 fewer than 8"
    assert (found.max_batch_size, found.delay_us) == (16, 1000)
    assert "100" in found.why["preferred_batch_size"]
    none = batching.of(timed({1: 10.0, 2: 20.0, 4: 41.0}))
    assert (none.preferred, none.delay_us, none.max_batch_size) == ((), 0, 4)
    assert "no batch gives" in none.why["preferred_batch_size"]


def test_a_record_without_a_sweep_says_so() -> None:
    found = batching.of(timed({1: 10.0}))
    assert (found.max_batch_size, found.preferred) == (4, ())
    assert "Triton's own default" in found.why["max_batch_size"]
    loaded = batching.of(timed({1: 10.0}, load=load(10.0)))
    assert (loaded.max_batch_size, loaded.preferred) == (32, ())
    other = timed({1: 10.0, 2: 11.0})
    moved = other.model_copy(update={"latencies": tuple(one.model_copy(update={"sequence": 64}) for one in other.latencies)})
    assert batching.of(moved).preferred == (), "two lengths are no sweep of batches"
    assert batching.of(timed({1: 10.0}, latency=None, latencies=())).max_batch_size == 4


def test_without_the_extra_the_command_says_what_to_install(ran: Outcome, tmp_path: Path) -> None:
    done = command("deploy", ran.out, "--target", "fp32", "--to", "triton", "--out", "models", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote models: README.md, model_analyzer.yaml, perf_input.json, tiny-toy-fp32/1/model.onnx")
    words = ["deploy", str(ran.out), "--target", "fp32", "--to", "triton", "--out", "more"]
    without = f"import sys; sys.modules['tritonclient'] = None; sys.argv[1:] = {words!r}; from onnxsqueeze.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", without], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'onnxsqueeze[triton]'" in done.stderr
    assert not (tmp_path / "more").exists()


def test_rows_of_the_measured_length_are_full(plain: Source) -> None:
    encoder = Encoder(plain.folder, 32)
    rows = triton._long_rows(plain, 500, 3)
    assert [len(row) for row in rows] == [500] * 3
    assert encoder.pad_id not in pad(rows, encoder.pad_id)["input_ids"]


def test_text_is_refused_for_triton_before_anything_is_made(ran: Outcome, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--text: Triton's ONNX Runtime has no operators of onnxruntime-extensions"):
        deploy(find(ran.out, "int8-ort"), "triton", tmp_path / "models", text=True)
    assert not (tmp_path / "models").exists()
