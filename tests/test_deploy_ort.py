"""`deploy --ort`: files for older versions of ONNX Runtime. The version here stands for an old one in quick tests; real old ones are pip's, and full."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from models import silent
from onnxsqueeze import graph
from onnxsqueeze.artifact import file_sha256
from onnxsqueeze.deploy import older
from onnxsqueeze.deploy.source import Source
from onnxsqueeze.deploy.write import deploy
from onnxsqueeze.errors import MeasureError, ModelError, Unavailable, UsageError
from onnxsqueeze.inspection import inspect
from onnxsqueeze.provenance import decode
from onnxsqueeze.results import read_results
from onnxsqueeze.verify import verify
from runs import command
from sources import RECIPE, exported, source_of

HERE_IR, HERE_OPSET = older.limits(sys.executable)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Source:
    place = tmp_path_factory.mktemp("older")
    return source_of(exported(place, "bert"), place / "tried")


def at(source: Source, folder: Path, *, ir: int | None = None, opset: int | None = None) -> Source:
    """``source`` in ``folder`` with another IR version or opset said in the file: its operators are those of these versions, too."""
    folder.mkdir()
    for name in (*source.model, *source.beside):
        (folder / name).write_bytes((source.folder / name).read_bytes())
    model = onnx.load(folder / "model.onnx")
    model.ir_version = ir or model.ir_version
    model.opset_import[0].version = opset or model.opset_import[0].version
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return replace(source, folder=folder)


def one_node(operator: str, opset: int, inputs: int, **attributes: Any) -> onnx.ModelProto:
    names = [f"x{i}" for i in range(inputs)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in names]
    node = helper.make_node(operator, names, ["y"], name="one", **attributes)
    whole = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", opset)])


def test_a_runtime_says_itself_what_it_takes() -> None:
    assert onnx.load_from_string(older._identity(8, 13)).ir_version <= HERE_IR
    ort.InferenceSession(older._identity(HERE_IR, HERE_OPSET), providers=["CPUExecutionProvider"])
    for ir, opset in ((HERE_IR + 1, 13), (8, HERE_OPSET + 1)):
        with pytest.raises(Exception, match=r"(?i)unsupported model IR version|opset"):
            ort.InferenceSession(older._identity(ir, opset), providers=["CPUExecutionProvider"])


def test_a_new_ir_version_is_lowered_by_two_bytes_and_nothing_else(plain: Source, tmp_path: Path) -> None:
    new = at(plain, tmp_path / "new", ir=HERE_IR + 1)
    with pytest.raises(Exception, match="Unsupported model IR version"):
        ort.InferenceSession(str(new.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    with older.made_for(new, ort.__version__, sys.executable) as made:
        before, after = (folder.joinpath("model.onnx").read_bytes() for folder in (new.folder, made.folder))
        assert after == before + bytes([0x08, HERE_IR]), "the field ir_version once more: protobuf takes the last"
        found = made.target.older
        assert found is not None
        assert found.changed == (f"IR version {HERE_IR + 1} → {HERE_IR}",)
        assert found.measured[0].sha256 == file_sha256(new.folder / "model.onnx")
        assert found.max_abs_diff <= found.tolerance
        assert decode(graph.read(made.folder / "model.onnx"), "m")[1] == RECIPE
        deploy(made, "folder", tmp_path / "out")
        deploy(made, "triton", tmp_path / "models")
    for out, folder in ((tmp_path / "out", tmp_path / "out"), (tmp_path / "models", tmp_path / "models" / "tiny-words-tried")):
        (target,) = read_results(folder).targets
        assert target.model
        recorded = next(file for file in target.files if file.path == target.model)
        assert (
            recorded.sha256
            == file_sha256(folder / target.model)
            == json.loads((folder / "golden.json").read_text())["sha256"]["model.onnx"]
        )
        assert target.older == found
        findings = {one.what: one for one in list_of_two(out)}
        assert findings["files"].passed
        assert findings["files"].text.startswith(f"the files that were made for onnxruntime {ort.__version__} out of the measured ones")
        assert findings["outputs"].passed
        said = (out / "README.md").read_text()
        assert "The file here is not the one that was measured" in said
        assert found.measured[0].sha256 in said
        shown = inspect(out)
        assert (shown.ir_version, shown.recipe) == (HERE_IR, RECIPE)
    assert not made.folder.exists()


def list_of_two(path: Path) -> list[Any]:
    """Files and outputs."""
    found = verify(path, data_dir=None, progress=silent)
    return [next(found), next(found)]


def test_a_version_that_takes_the_file_gets_the_measured_one(plain: Source, tmp_path: Path) -> None:
    with older.made_for(plain, ".".join(ort.__version__.split(".")[:2]), sys.executable) as made:
        deploy(made, "folder", tmp_path / "out")
    (target,) = read_results(tmp_path / "out").targets
    assert target.older
    assert target.older.changed == ()
    assert file_sha256(tmp_path / "out" / "model.onnx") == file_sha256(plain.folder / "model.onnx")
    assert (
        f"which takes the measured file as it is. In onnxruntime {ort.__version__} it gives" in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_an_opset_is_lowered_where_every_operator_is_the_same(opset: int, plain: Source, tmp_path: Path) -> None:
    new = at(plain, tmp_path / "new", opset=21)
    model = graph.load(new.folder / "model.onnx")
    older.lower_opset(model, opset, "m")
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == opset
    feed = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    outputs = [
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for one in (graph.load(new.folder / "model.onnx"), model)
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    ("model", "opset", "said"),
    [
        (one_node("Attention", 23, 3), 21, r"Attention \(one\) is an operator of opset 23"),
        (one_node("LayerNormalization", 17, 2), 16, r"is an operator of opset 17"),
        (one_node("GroupNormalization", 21, 3, num_groups=1), 20, r"of opset 21 is not known to be the one of opset 18"),
        (one_node("DequantizeLinear", 21, 2, block_size=16), 19, r"has block_size, which the one of opset 19 has not"),
        (one_node("ReduceMean", 18, 2), 17, r"has 2 inputs, the one of opset 13 1"),
        (one_node("Reshape", 21, 2, allowzero=1), 13, r"has allowzero, which the one of opset 13 has not"),
        (one_node("Identity", 99, 1), 13, r"has opset 99; the onnx here knows"),
    ],
)
def test_an_operator_that_is_another_one_there_is_refused_by_its_name(model: onnx.ModelProto, opset: int, said: str) -> None:
    before = model.SerializeToString()
    with pytest.raises(ModelError, match=said):
        older.lower_opset(model, opset, "tried: onnxruntime 1.17.3 takes opset 20 at most")
    assert model.SerializeToString() == before


def test_operators_inside_branches_are_looked_at_too() -> None:
    inner = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["z"])], "then", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    values = [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
    whole = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    with pytest.raises(ModelError, match="Gelu is an operator of opset 20"):
        older.lower_opset(helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)]), 19, "m")


def test_a_file_that_does_not_load_there_is_refused_in_that_versions_words(plain: Source, tmp_path: Path) -> None:
    new = at(plain, tmp_path / "new")
    model = onnx.load(new.folder / "model.onnx")
    next(node for node in model.graph.node if node.op_type == "MatMul").domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    (new.folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"does not run in onnxruntime .*com\.microsoft.*MatMul"), older.made_for(new, ort.__version__, sys.executable):  # fmt: skip
        pass


def test_other_answers_there_are_an_error(plain: Source) -> None:
    golden = plain.golden.model_copy(update={"logits": tuple((a + 1, b) for a, b in plain.golden.logits)})
    with pytest.raises(MeasureError, match="its answers are 1 from the golden ones"), older.made_for(replace(plain, golden=golden), ort.__version__, sys.executable):  # fmt: skip
        pass


def test_a_wrong_version_or_python_stops_before_anything_is_made(plain: Source, tmp_path: Path) -> None:
    for version, python, said in (
        ("latest", None, "is no version of ONNX Runtime"),
        ("1.2", sys.executable, f"--ort 1.2: that Python has onnxruntime {ort.__version__}"),
        (ort.__version__, str(tmp_path / "python"), "--ort-python: that Python cannot be used"),
    ):
        with pytest.raises(UsageError, match=said), older.made_for(plain, version, python):
            pass
    done = command("deploy", tmp_path, "--target", "x", "--to", "folder", "--out", "o", "--ort-python", sys.executable, cwd=tmp_path)
    assert done.returncode == 2
    assert "--ort-python goes with --ort" in done.stderr
    done = command("deploy", tmp_path, "--target", "x", "--to", "folder", "--out", "o", "--ort", "1.18", "--text", cwd=tmp_path)
    assert done.returncode == 2
    assert "--text goes without --ort" in done.stderr


@pytest.mark.full
def test_a_version_that_pip_does_not_have_is_unavailable(plain: Source) -> None:
    with pytest.raises(Unavailable, match=r"onnxruntime==1\.0\.99 cannot be installed"), older.made_for(plain, "1.0.99"):
        pass


@pytest.mark.full
@pytest.mark.parametrize(("version", "ir", "opset"), [("1.17.3", 9, 20), ("1.18", 10, 21), ("1.20.1", 10, 21)])
def test_a_new_file_runs_in_an_old_runtime_of_its_own_environment(version: str, ir: int, opset: int, plain: Source, tmp_path: Path) -> None:
    new = at(plain, tmp_path / "new", ir=11, opset=23)
    with older.made_for(new, version) as made:
        deploy(made, "folder", tmp_path / "out")
    shown = inspect(tmp_path / "out")
    assert (shown.ir_version, shown.opsets["ai.onnx"]) == (ir, opset)
    assert shown.recipe == RECIPE
    (target,) = read_results(tmp_path / "out").targets
    assert target.older
    assert target.older.runtime.startswith(f"onnxruntime {version}")
    assert target.older.max_abs_diff < 1e-5
    assert [one.passed for one in list_of_two(tmp_path / "out")] == [True, True]
