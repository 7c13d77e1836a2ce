"""Packed tensors are the tensors, by every coder, and no larger than they say."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxsqueeze.packing import coding, files


def tensor(seed: int, shape: tuple[int, ...], dtype: str, kinds: int, zeros: float, spread: float) -> NDArray[np.generic]:
    """Values of which ``zeros`` are 0, and the others at most ``kinds`` different ones, small ones more often."""
    rng = np.random.default_rng(seed)
    codes = np.clip(np.round(rng.standard_normal(shape) * spread), -(kinds // 2), kinds // 2)
    codes[rng.random(shape) < zeros] = 0
    made: NDArray[np.generic] = codes * 0.37 if dtype.startswith("float") else codes + 128 * (dtype == "uint8")
    return made.astype(dtype)


DTYPES = ["int8", "uint8", "float32", "float16", "int16", "uint16", "int32", "int64", "float64"]
shapes = st.one_of(st.tuples(st.integers(1, 70), st.integers(1, 70)), st.tuples(st.integers(1, 3000)), st.tuples(*[st.integers(1, 9)] * 3))


@given(
    st.integers(0, 999), shapes, st.sampled_from(DTYPES), st.integers(1, 250), st.floats(0, 1),
    st.floats(0.1, 120),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_what_is_packed_is_what_comes_out(seed: int, shape: tuple[int, ...], dtype: str, kinds: int, zeros: float, spread: float) -> None:
    values = tensor(seed, shape, dtype, kinds, zeros, spread)
    packed = coding.pack(values)
    if packed is not None:
        again = coding.unpack(packed)
        assert (again.dtype, again.shape) == (values.dtype, values.shape)
        assert again.tobytes() == values.tobytes()
        assert packed.bytes < values.nbytes + coding.TENSOR_BYTES


def model_of(*tensors: NDArray[np.generic]) -> onnx.ModelProto:
    """A model that gives its initializers ``w0``, ``w1``, … back as ``y0``, ``y1``, …, behind an input that only makes it a model."""
    inits = [numpy_helper.from_array(values, f"w{i}") for i, values in enumerate(tensors)]
    nodes = [helper.make_node("Identity", [one.name], [f"y{i}"]) for i, one in enumerate(inits)]
    outputs = [helper.make_tensor_value_info(f"y{i}", one.data_type, one.dims) for i, one in enumerate(inits)]
    made = helper.make_graph(nodes, "g", [], outputs, initializer=inits)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", files.OPSET)], ir_version=9)


def run(model: onnx.ModelProto) -> list[NDArray[np.generic]]:
    """Its outputs in a stock session."""
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})  # type: ignore[no-any-return]


@given(
    st.integers(0, 999), shapes, st.sampled_from(DTYPES), st.integers(1, 250), st.floats(0, 1),
    st.floats(0.1, 120),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_stock_session_rebuilds_the_bits(seed: int, shape: tuple[int, ...], dtype: str, kinds: int, zeros: float, spread: float) -> None:
    values = tensor(seed, shape, dtype, kinds, zeros, spread)
    model = model_of(values, values + np.ones(1, dtype))
    packed = onnx.ModelProto.FromString(model.SerializeToString())
    found = files.pack(packed)
    assert {tensor.name for tensor in packed.graph.initializer}.isdisjoint(found)
    again = onnx.ModelProto.FromString(model.SerializeToString())
    files.pack(again)
    assert again.SerializeToString(deterministic=True) == packed.SerializeToString(deterministic=True)
    for a, b in zip(run(model), run(packed), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert files.unpack(packed) == bool(found)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in packed.graph.initializer}
    assert {name: array.tobytes() for name, array in stored.items()} == {
        one.name: numpy_helper.to_array(one).tobytes() for one in model.graph.initializer
    }
    assert [node.op_type for node in packed.graph.node] == ["Identity", "Identity"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32"])
@pytest.mark.parametrize("zeros", [0.3, 0.95])
def test_zeros_among_values_that_differ_take_a_bit_each(dtype: str, zeros: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((100, 200)) * 2**10).astype(dtype)
    values[rng.random(values.shape) < zeros] = 0
    packed = coding.pack(values)
    assert packed is not None
    assert packed.bytes < 1.02 * (np.count_nonzero(values) * values.itemsize + values.size / 8) + 500
    model = model_of(values)
    files.pack(model)
    assert run(model)[0].tobytes() == values.tobytes()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_with_values_of_their_own_take_their_bits_and_their_list(bits: int, dtype: str) -> None:
    rng = np.random.default_rng(bits)
    lowest = np.zeros(40) if dtype == "int8" else np.arange(40) * 0.37
    books = np.stack([rng.choice(np.arange(-128, 128), 2**bits, replace=False) + low for low in lowest]).astype(dtype)
    values = np.take_along_axis(books, rng.integers(0, 2**bits, (40, 1000)), 1)
    for made in (values, np.ascontiguousarray(values.T)):
        packed = coding.pack(made)
        if dtype == "int8" and bits >= 7:
            assert packed is None, "the lists are longer than what codes save"
            continue
        assert isinstance(packed, coding.Levels)
        assert packed.bytes < made.size * bits / 8 + books.nbytes + 1000
        model = model_of(made)
        files.pack(model)
        assert run(model)[0].tobytes() == made.tobytes()


def test_a_tensor_that_saves_too_little_stays() -> None:
    values = tensor(3, (200, 200), "int8", 250, 0.0, 28.0)
    packed = coding.pack(values)
    assert packed is not None
    saved = 1 - packed.bytes / (values.nbytes + coding.TENSOR_BYTES)
    assert 0.02 < saved < 0.2
    assert coding.pack(values, saved - 0.001) is not None
    assert coding.pack(values, saved + 0.001) is None


def test_values_between_zeros_are_listed_where_codes_save_too_little() -> None:
    values = tensor(3, (200, 200), "int8", 250, 0.5, 28.0)
    small, quick = coding.pack(values), coding.pack(values, 0.15)
    assert small is not None
    assert quick is not None
    assert small.bytes < quick.bytes < 1.1 * small.bytes
    assert coding.unpack(quick).tobytes() == values.tobytes()
    streams = [one.stream.further for one in (small, quick) if isinstance(one, coding.Flat) and isinstance(one.stream, coding.Coded)]
    assert [type(one) for one in streams] == [coding.Coded, coding.Raw]


def test_the_fewer_values_stand_between_zeros_the_less_their_codes_have_to_save() -> None:
    for zeros, coded in ((0.5, False), (0.9, True)):
        values = tensor(3, (1000, 400), "int8", 250, zeros, 28.0)
        small, quick = coding.pack(values), coding.pack(values, 0.1)
        assert small is not None
        assert quick is not None
        assert (quick.bytes == small.bytes) == coded, (zeros, quick.bytes / small.bytes)
        assert coding.unpack(quick).tobytes() == values.tobytes()
