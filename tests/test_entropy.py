"""The entropy of a file's weights, against scipy's and against what is known of made ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from scipy.stats import entropy

from onnxsqueeze.entropy import entropy_bytes


def bytes_of(folder: Path, *tensors: NDArray[Any]) -> int:
    """What the module says of a file with these initializers."""
    named = [numpy_helper.from_array(values, f"w{i}") for i, values in enumerate(tensors)]
    outputs = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in named]
    graph = helper.make_graph([], "g", [], outputs, initializer=named)
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    return entropy_bytes(folder / "model.onnx")


@given(st.integers(0, 99), st.integers(2, 200), st.floats(0.2, 0.95))
@settings(max_examples=30, deadline=None)
def test_a_vector_of_codes_has_the_entropy_of_scipy_and_its_list(tmp_path_factory: Any, seed: int, kinds: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    codes = np.where(rng.random(20_000) < share, 0, rng.integers(0, kinds, 20_000)).astype(np.uint8)
    counts = np.unique(codes, return_counts=True)[1]
    expected = entropy(counts, base=2) * codes.size / 8 + len(counts)

    assert bytes_of(tmp_path_factory.mktemp("one"), codes) == pytest.approx(min(expected, codes.nbytes), abs=1)


def test_floats_that_are_all_different_stay_as_large_as_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((500, 300)).astype(np.float32)
    assert bytes_of(tmp_path, values) == values.nbytes


def test_zeros_among_floats_leave_the_others_and_their_places(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((400, 500)).astype(np.float32)
    values[np.random.default_rng(1).random(values.shape) < 0.9] = 0
    left = int((values != 0).sum())
    found = bytes_of(tmp_path, values)

    assert 4 * left < found < values.nbytes / 4


@pytest.mark.parametrize("axis", [0, 1])
def test_levels_of_each_row_or_column_are_coded_by_rank(tmp_path: Path, axis: int) -> None:
    """Four levels a row, equally often, and no two rows with one in common: two bits a weight, and the levels."""
    levels = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    rows = np.take_along_axis(levels, np.tile(np.arange(4), (64, 250)), axis=1)
    assert bytes_of(tmp_path, rows if axis else np.ascontiguousarray(rows.T)) == pytest.approx(rows.size * 2 / 8 + levels.nbytes, rel=0.01)


def test_tensors_add_up_and_empty_ones_are_nothing(tmp_path: Path) -> None:
    one, other = np.zeros(8_000, np.int8), np.array([], np.float32)
    assert bytes_of(tmp_path, one, one, other, one.reshape(1, -1), one.reshape(-1, 1), one[0]) == 5
