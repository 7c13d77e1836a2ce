"""Sizes are those of the files that are there, external data included."""

from __future__ import annotations

import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import onnx
import pytest

from onnxsqueeze.errors import MeasureError
from onnxsqueeze.measure.size import measure_size
from test_backends import classifier


def folder(path: Path, *, external: bool = False) -> Path:
    path.mkdir()
    classifier(path / "model.onnx", width=512)
    if external:
        model = onnx.load(str(path / "model.onnx"))
        onnx.save(model, str(path / "model.onnx"), save_as_external_data=True, location="model.onnx_data", size_threshold=64)
    (path / "config.json").write_text('{"vocab_size": 50}', encoding="utf-8")
    (path / "tokenizer.json").write_text("{}" * 21, encoding="utf-8")
    return path


def test_size_is_the_file_and_the_tokenizer_is_apart(tmp_path: Path) -> None:
    path = folder(tmp_path / "target")
    size = measure_size(path)

    assert size.size_bytes == (path / "model.onnx").stat().st_size
    assert size.tokenizer_bytes == 42
    assert [f.path for f in size.files] == ["config.json", "model.onnx", "tokenizer.json"]
    content = (path / "model.onnx").read_bytes()
    assert (size.files[1].sha256, size.files[1].bytes) == (sha256(content).hexdigest(), len(content))


def test_external_data_counts(tmp_path: Path) -> None:
    whole, split = measure_size(folder(tmp_path / "whole")), measure_size(folder(tmp_path / "split", external=True))

    assert split.size_bytes == sum((tmp_path / "split" / name).stat().st_size for name in ("model.onnx", "model.onnx_data"))
    assert split.size_bytes == pytest.approx(whole.size_bytes, rel=0.05)
    assert split.size_gzip_bytes == pytest.approx(whole.size_gzip_bytes, rel=0.05)


def test_a_file_beside_the_model_that_no_tensor_names_does_not_count(tmp_path: Path) -> None:
    path = folder(tmp_path / "target")
    before = measure_size(path)
    (path / "model.onnx_backup").write_bytes(b"x" * 1000)
    after = measure_size(path)

    assert after.size_bytes == before.size_bytes
    assert len(after.files) == len(before.files) + 1


@pytest.mark.skipif(shutil.which("gzip") is None, reason="no gzip program here")
def test_gzip_size_is_that_of_the_gzip_program(tmp_path: Path) -> None:
    path = folder(tmp_path / "target") / "model.onnx"
    squeezed = subprocess.run(["gzip", "-9", "-n", "-c", str(path)], capture_output=True, check=True).stdout

    assert measure_size(path.parent).size_gzip_bytes == pytest.approx(len(squeezed), abs=18)
    assert len(squeezed) < path.stat().st_size


def test_a_folder_without_a_model_or_without_its_external_data_is_an_error(tmp_path: Path) -> None:
    path = folder(tmp_path / "target", external=True)
    (path / "model.onnx_data").unlink()

    with pytest.raises(MeasureError, match=r"its weights are in model\.onnx_data, which is not there"):
        measure_size(path)
    (path / "model.onnx").unlink()
    with pytest.raises(MeasureError, match=r"target: has no model\.onnx"):
        measure_size(path)


def test_a_target_without_a_tokenizer_has_no_tokenizer_size(tmp_path: Path) -> None:
    path = folder(tmp_path / "target")
    (path / "tokenizer.json").unlink()

    assert measure_size(path).tokenizer_bytes is None
