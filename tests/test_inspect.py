"""`onnxsqueeze inspect`: what it shows of a real run's file, and what it says of files that are something else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from onnxsqueeze import graph
from onnxsqueeze.artifact import file_sha256
from onnxsqueeze.errors import ModelError
from onnxsqueeze.inspection import inspect
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.recipe import load
from runs import STEADY, Command, small


def test_it_shows_signature_operators_digests_and_provenance(onnxsqueeze: Command, ran: Outcome) -> None:
    file = ran.out / "int8-ort" / "model.onnx"
    target = next(t for t in ran.results.targets if t.name == "int8-ort")
    done = onnxsqueeze("inspect", "int8-ort", cwd=ran.out)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for part in (
        f"file model.onnx, {file.stat().st_size:,} bytes, sha256 {file_sha256(file)}",
        "input input_ids int64 [batch_size, sequence_length]",
        "output logits float32 [batch_size, 2]",
        f"{target.operators['MatMul']} MatMul" if "MatMul" in target.operators else f"{target.operators['DynamicQuantizeLinear']} DynamicQuantizeLinear",
        f"provenance ({target.size_provenance_bytes:,} bytes of the .onnx)",
        f"recipe q (sha256 {ran.results.recipe_sha256}), target int8-ort, seed 0",
        "set task.max_length=32",
        "stages finetune → export → quantize-dynamic",
        f"model tiny (sha256 {ran.results.model_sha256}), licence mit",
        f"metric accuracy {target.metrics['validation']['accuracy'].value:.4f} (95 %: ",
        "backend cpu, measured with onnxruntime ",
    ):  # fmt: skip
        assert part in said, done.stdout
    found = inspect(file)
    assert found.provenance_bytes == target.size_provenance_bytes
    assert found.operators == target.operators


def test_the_recipe_that_it_prints_is_the_one_that_was_run(onnxsqueeze: Command, ran: Outcome, tmp_path: Path) -> None:
    done = onnxsqueeze("inspect", ran.out / "fp32" / "model.onnx", "--recipe", cwd=tmp_path)
    (tmp_path / "back.yaml").write_text(done.stdout)
    assert onnxsqueeze("check", "back.yaml", cwd=tmp_path).returncode == 0
    assert load(tmp_path / "back.yaml").recipe == load(ran.out.parent / "q.yaml", [*small("q"), *STEADY, "model=tiny"]).recipe


def test_files_that_are_no_onnx_are_told(onnxsqueeze: Command, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("this is a page that says 404\n")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("pytorch_model.bin", "is no ONNX file"),
        ("empty.onnx", "is no ONNX file: it holds no graph"),
        ("text.onnx", "is no ONNX file"),
        ("absent.onnx", "absent.onnx: cannot be read: No such file"),
        ("folder", "there is no model.onnx in this folder"),
    ):
        done = onnxsqueeze("inspect", name, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "remedy: " in done.stderr
        assert "Traceback" not in done.stderr


def plain(folder: Path, location: str | None = None) -> Path:
    """A model of somebody else's: one Add, its weight inside or, with ``location``, said to lie there."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    if location is None:
        weight.raw_data = np.ones(4, np.float32).tobytes()
    else:
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializer=[weight],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    (folder / "plain.onnx").write_bytes(model.SerializeToString())
    return folder / "plain.onnx"


def test_a_file_without_provenance_is_shown_but_has_no_recipe(onnxsqueeze: Command, tmp_path: Path) -> None:
    plain(tmp_path)
    done = onnxsqueeze("inspect", "plain.onnx", cwd=tmp_path)
    assert done.returncode == 0
    assert "provenance: none" in done.stdout
    assert "input      x float32 [n, 4]" in done.stdout
    done = onnxsqueeze("inspect", "plain.onnx", "--recipe", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "plain.onnx: carries no provenance of onnxsqueeze" in done.stderr


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    file = plain(tmp_path / "in", location)
    with pytest.raises(ModelError, match="outside its folder"):
        graph.files_of(file)
    with pytest.raises(ModelError, match="outside its folder"):
        inspect(file)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its weights are in weights, which is not there"):
        inspect(plain(tmp_path, "weights"))
    (tmp_path / "weights").write_bytes(bytes(16))
    assert [name for name, _, _ in inspect(tmp_path / "plain.onnx").files] == ["plain.onnx", "weights"]


def test_a_damaged_provenance_is_an_error(ran: Outcome, tmp_path: Path) -> None:
    shutil.copy(ran.out / "fp32" / "model.onnx", tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    model.metadata_props[-1].value = "AAAA"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="its provenance cannot be read"):
        inspect(tmp_path)
