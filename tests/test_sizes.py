"""What a record says of a file's bytes: its dense twin, what they are, and the bound; against the file, numpy and the programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from crossed import first
from exports import build
from onnxsqueeze import graph, weights
from onnxsqueeze.artifact import Artifact
from onnxsqueeze.entropy import bound_bytes
from onnxsqueeze.measure.size import dense_twin, measure_size
from onnxsqueeze.packing import files
from onnxsqueeze.results import SizeParts
from onnxsqueeze.stages.pack import Pack
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from test_graph import one_node
from test_stage_pack import FORMS, sparse

SCALES = ("_scale", "_zero_point")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """A sparse int8 BERT, and the same packed."""
    folder = tmp_path_factory.mktemp("sizes")
    parent, context = sparse(folder, "bert")
    parent, _ = build(QuantizeDynamic(), parent, folder / "int8", context)
    return parent, build(Pack(), parent, folder / "packed", context)[0]


def tensors(file: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}


@first("form", sorted(FORMS, key=lambda form: form != "dynamic in its best form"))
def test_parts_sum_to_the_file_and_its_graph_is_what_is_left_without_initializers(tmp_path: Path, form: str) -> None:
    parent, context = sparse(tmp_path, "bert")
    for i, stage in enumerate(FORMS[form]):
        parent, _ = build(stage, parent, tmp_path / str(i), context)
    packed, _ = build(Pack(), parent, tmp_path / "packed", context)
    before, after = weights.by_part(parent.onnx), weights.by_part(packed.onnx)

    for file, parts in ((parent.onnx, before), (packed.onnx, after)):
        assert sum(parts.model_dump().values()) == file.stat().st_size
        model = onnx.load(file)
        del model.graph.initializer[:]
        assert 0 <= parts.graph - model.ByteSize() <= 4, "the length of the graph has fewer digits then"
    assert before.decoders == 0 < after.decoders
    assert after.layers < before.layers
    assert after.graph > before.graph, "decoders"


def test_parts_are_told_apart(int8: tuple[Artifact, Artifact]) -> None:
    held = tensors(int8[0].onnx)
    data = {name: len(tensor.raw_data) for name, tensor in held.items()}
    parts = weights.by_part(int8[0].onnx)
    names = {name: len(name) + 40 for name in held}  # a tensor's name, shape and type take no more

    def near(part: int, *chosen: str) -> bool:
        own = sum(data[name] for name in chosen)
        return own < part < own + sum(names[name] for name in chosen)

    scales = [name for name in held if name.endswith(SCALES)]
    matrices = [
        name for name in held if len(held[name].dims) == 2 and held[name].data_type != onnx.TensorProto.INT64 and name not in scales
    ]
    embeddings = [name for name in matrices if "embeddings" in name]
    vectors = [name for name in held if len(held[name].dims) == 1 and name not in scales and held[name].data_type == onnx.TensorProto.FLOAT]
    assert len(embeddings) == 3
    assert len(matrices) == 3 + 2 * 6 + 2, "six in each layer, pooler and head"
    assert near(parts.scales, *scales)
    assert near(parts.embeddings, *embeddings)
    assert near(parts.layers, *(name for name in matrices if name not in embeddings))
    assert near(parts.biases_and_norms, *vectors)


ALONE: dict[str, tuple[str, str, NDArray[Any], str]] = {
    "bias of an LSTM": ("LSTM", "x i r t", np.ones((1, 800), np.float32), "biases_and_norms"),
    "bias in int32": ("DequantizeLinear", "t x", np.ones(800, np.int32), "biases_and_norms"),
    "positions in int32": ("Gather", "t x", np.ones((1, 800), np.int32), "constants"),
    "shape": ("Reshape", "x t", np.ones(800, np.int64), "constants"),
    "kernel of a convolution": ("Conv", "x t", np.ones((20, 10, 4), np.float32), "layers"),
}


@pytest.mark.parametrize("name", ALONE)
def test_tensors_that_look_like_others(tmp_path: Path, name: str) -> None:
    operator, inputs, tensor, part = ALONE[name]
    parts = weights.by_part(one_node(helper.make_node(operator, inputs.split(), ["w"]), {"t": tensor}, tmp_path)).model_dump()
    assert tensor.nbytes < parts.pop(part) < tensor.nbytes + 30
    assert {name for name, size in parts.items() if size} == {"graph"}


def test_external_data_counts_in_the_parts(int8: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    whole = weights.by_part(int8[0].onnx)
    graph.save(graph.load(int8[0].onnx), tmp_path, external_above_bytes=1)
    parts = weights.by_part(tmp_path / "model.onnx")

    assert sum(parts.model_dump().values()) == sum(file.stat().st_size for file in tmp_path.iterdir())
    for part in SizeParts.model_fields:
        assert getattr(parts, part) == pytest.approx(getattr(whole, part), rel=0.1, abs=6000), "offsets take room; data is aligned"


def test_the_twin_of_a_packed_file_has_the_parents_weights_and_sizes(int8: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    parent, packed = int8
    twin = dense_twin(packed.onnx, tmp_path)
    assert twin is not None
    assert {n: numpy_helper.to_array(t).tobytes() for n, t in tensors(twin).items()} == {
        n: numpy_helper.to_array(t).tobytes() for n, t in tensors(parent.onnx).items()
    }
    of_parent, of_packed = measure_size(parent.path), measure_size(packed.path)
    assert of_packed.size_bytes < of_packed.size_dense_bytes
    assert 0 <= of_packed.size_dense_bytes - of_parent.size_bytes <= 2 * len(tensors(twin)), "an empty note is two bytes"
    assert of_packed.size_dense_gzip_bytes == pytest.approx(of_parent.size_gzip_bytes, rel=0.01), "tensors stand in another order"
    assert of_packed.size_dense_zstd_bytes == pytest.approx(of_parent.size_dense_zstd_bytes, rel=0.01)


def test_the_twin_of_a_file_without_packed_weights_is_the_file(int8: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    size = measure_size(int8[0].path)

    assert dense_twin(int8[0].onnx, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert (size.size_dense_bytes, size.size_dense_gzip_bytes) == (size.size_bytes, size.size_gzip_bytes)


def test_zstd_is_that_of_level_12(int8: tuple[Artifact, Artifact]) -> None:
    content = int8[0].onnx.read_bytes()
    found = measure_size(int8[0].path).size_dense_zstd_bytes
    assert found == len(pyarrow.Codec("zstd", compression_level=12).compress(content))
    if program := shutil.which("zstd"):
        squeezed = subprocess.run([program, "-12", "-c", str(int8[0].onnx)], capture_output=True, check=True).stdout
        assert found == pytest.approx(len(squeezed), rel=0.01)


def test_the_bound_is_the_entropy_of_the_integers_and_the_scales(int8: tuple[Artifact, Artifact]) -> None:
    total = 0.0
    for name, tensor in tensors(int8[0].onnx).items():
        values = numpy_helper.to_array(tensor)
        if name.endswith(SCALES):
            total += values.nbytes
        elif values.dtype in (np.int8, np.uint8):
            shares = np.bincount(values.astype(np.int64).ravel() + 128) / values.size
            total += values.size * -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() / 8

    assert bound_bytes(int8[0].onnx) == bound_bytes(int8[1].onnx) == pytest.approx(total, abs=1)
    assert files.stored_bytes(graph.load(int8[1].onnx))
    assert total < sum(weights.by_part(int8[1].onnx).model_dump(include={"layers", "embeddings", "scales"}).values())


def test_a_file_of_floats_has_no_bound(tmp_path: Path) -> None:
    assert bound_bytes(sparse(tmp_path, "bert")[0].onnx) is None
