"""train-quantized: what training saw is what the int8 file computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from crossed import crossed
from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_rows, toy_task
from onnxsqueeze.nn import checkpoint, fake
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.training import predict
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.stages.train_quantized import TrainQuantized
from onnxsqueeze.tasks.rows import Row
from onnxsqueeze.tokens import Encoder, pad

QUICK = TrainQuantized(epochs=1, batch_size=16, learning_rate=1e-3, precision="fp32")


def int8_logits(file: Path, rows: int, seed: int) -> tuple[NDArray[np.float32], Sequence[Row]]:
    """Logits of toy rows, each alone, by a stock session; and the rows."""
    texts = toy_rows(rows, seed=seed)
    encoder = Encoder(file.parent, 32)
    encoded = encoder.encode([row.text for row in texts], [None] * rows)
    return np.concatenate(calibration.logits(file, [pad([row], encoder.pad_id) for row in encoded], 1)), texts


@crossed("name, per_channel", FAMILIES, [True, False])
def test_the_int8_file_computes_what_training_saw(tmp_path: Path, name: FamilyName, per_channel: bool) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    out, _ = run_stage(QUICK.model_copy(update={"per_channel": per_channel}), parent, tmp_path, teacher=parent)
    exported, _ = run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    quantized, changed = run_stage(QuantizeDynamic(per_channel=per_channel), exported, tmp_path / "int8")
    got, texts = int8_logits(quantized / "model.onnx", 200, seed=5)
    model, family = checkpoint.load(out, toy_task())
    examples = encode(out, texts, 32)
    in_float = predict(model, family, examples)
    with fake.FakeQuantized(model, per_channel=per_channel, bits=7 if changed.details["seven_bits"] else 8):
        seen = predict(model, family, examples)

    assert (got.argmax(1) == seen.argmax(1)).mean() >= 0.995
    # a number on the edge of two codes may fall on the other side in another order of sums, so not to the bit
    assert np.median(np.abs(got - seen)) < 0.05 * np.median(np.abs(in_float - seen))


@crossed("name, per_channel", FAMILIES, [True, False])
def test_the_file_of_fixed_ranges_computes_what_training_saw(tmp_path: Path, name: FamilyName, per_channel: bool) -> None:
    """Also where training drew a part of the rows: ranges are measured among all, as the quantizer does."""
    parent = random_checkpoint(tmp_path / "parent", name)
    stage = QUICK.model_copy(update={"activations": "static", "train_rows": 32, "samples": 40, "per_channel": per_channel})
    out, _ = run_stage(stage, parent, tmp_path, teacher=parent)
    exported, _ = run_stage(Export(), out, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    quantized, changed = run_stage(QuantizeStatic(samples=40, per_channel=per_channel), exported, tmp_path / "int8")
    got, texts = int8_logits(quantized / "model.onnx", 200, seed=5)
    model, family = checkpoint.load(out, toy_task())
    examples = encode(out, texts, 32)
    in_float = predict(model, family, examples)
    rows = calibration.padded_rows(out, toy_context(tmp_path), 40)
    with fake.FakeQuantized(model, per_channel=per_channel, bits=7 if changed.details["seven_bits"] else 8, static=True) as rounded:
        rounded.measure({name: batch[name] for name in family.inputs()} for batch in rows)
        seen = predict(model, family, examples)

    assert changed.details["calibration_rows"] == 40
    assert (got.argmax(1) == seen.argmax(1)).mean() >= 0.995
    assert np.median(np.abs(got - seen)) < 0.05 * np.median(np.abs(in_float - seen))


def test_fixed_ranges_are_the_calibrator_s(tmp_path: Path) -> None:
    """Scale and zero point of each activation in the file are of the ranges that were measured in PyTorch, one for one."""
    parent = random_checkpoint(tmp_path / "parent", "bert")
    exported, _ = run_stage(Export(), parent, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    quantized, _ = run_stage(QuantizeStatic(), exported, tmp_path / "int8")
    written = onnx.load(quantized / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.initializer}
    products = {name for node in written.node if node.op_type in ("MatMul", "Gemm") for name in node.input}
    dequantized = {node.output[0]: node for node in written.node if node.op_type == "DequantizeLinear" and node.output[0] in products}
    scales = {float(stored[node.input[1]]) for node in dequantized.values() if node.input[0] not in stored}
    model, family = checkpoint.load(parent, toy_task())
    with fake.FakeQuantized(model, per_channel=True, bits=8, static=True) as rounded:
        rounded.measure(
            {name: batch[name] for name in family.inputs()} for batch in calibration.padded_rows(parent, toy_context(tmp_path), 128)
        )
    assert rounded.ranges is not None
    own = sorted({float(scale) for scale in ((rounded.ranges.high - rounded.ranges.low) / 255)})  # queries, keys and values share theirs

    np.testing.assert_allclose(own, sorted(scales), rtol=1e-5)


def test_what_lies_outside_a_fixed_range_gets_its_end() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 0.601, 9.0], requires_grad=True)
    found = fake.within(values, torch.tensor(-1.0), torch.tensor(2.0))  # steps of 3/255, so 85 of them below 0 and 170 above
    np.testing.assert_allclose(found.detach(), [-1.0, -1.0, 0.0, 0.6, 2.0], atol=1e-6)


def test_weights_fall_on_the_integers_of_the_file(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    exported, _ = run_stage(Export(), parent, tmp_path / "onnx", context=toy_context(tmp_path / "onnx"))
    quantized, changed = run_stage(QuantizeDynamic(), exported, tmp_path / "int8")
    bits = 7 if changed.details["seven_bits"] else 8
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(quantized / "model.onnx").graph.initializer}
    model, _ = checkpoint.load(parent, toy_task())
    matrices = [
        fake.weight(m.weight, per_channel=True, bits=bits).detach().numpy().T for m in model.modules() if isinstance(m, torch.nn.Linear)
    ]
    tables = [fake.table(m.weight).detach().numpy() for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    found = []
    for name, codes in stored.items():
        if name.endswith("_quantized"):
            stem = name.removesuffix("_quantized")
            found.append((codes.astype(np.float32) - stored[f"{stem}_zero_point"].astype(np.float32)) * stored[f"{stem}_scale"])

    assert len(found) == len(matrices) + len(tables)
    for values in (*matrices, *tables):
        same = [v for v in found for v in (v, v.T) if v.shape == values.shape]
        assert min(float(np.abs(values - v).max()) for v in same) <= 1e-6 * float(np.abs(values).max())


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_an_activation_is_rounded_as_the_operator_rounds_it(rows: int, tokens: int, width: int, seed: int, shift: float) -> None:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    values = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed)) + shift
    found = fake.activation(values, torch.ones(rows, tokens))
    for row, got in zip(values.numpy(), found.numpy(), strict=True):
        codes, scale, zero = (np.asarray(part) for part in ReferenceEvaluator(node).run(None, {"x": row}))
        np.testing.assert_allclose(got, (codes.astype(np.float32) - np.float32(zero)) * scale, atol=1e-6 * (1 + float(np.abs(row).max())))


def test_padding_has_no_part_in_a_row_s_range() -> None:
    values = torch.tensor([[[0.1, 0.2], [100.0, -50.0]]])
    alone = fake.activation(values[:, :1], torch.ones(1, 1))
    padded = fake.activation(values, torch.tensor([[1, 0]]))

    assert torch.equal(padded[:, :1], alone)


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    values = torch.randn(4, 3, requires_grad=True)
    (fake.weight(values, per_channel=True) * torch.arange(3.0)).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert torch.equal(values.grad, torch.arange(3.0).expand(4, 3))


def test_a_model_that_is_left_rounds_no_more(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    model, family = checkpoint.load(folder, toy_task())
    examples = encode(folder, toy_rows(8, seed=1), 32)
    before = predict(model, family, examples)
    with fake.FakeQuantized(model, per_channel=True, bits=8):
        assert not np.array_equal(predict(model, family, examples), before)
    assert np.array_equal(predict(model, family, examples), before)


@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.full((2, 2), 1e-40)])
def test_what_is_constant_or_tiny_stays_finite(values: torch.Tensor) -> None:
    for found in (fake.weight(values, per_channel=True), fake.table(values), fake.activation(values, None)):
        assert torch.isfinite(found).all()
        assert (found - values).abs().max() <= 1e-30


def test_training_lowers_the_loss_of_the_rounded_model(tmp_path: Path) -> None:
    """Of the model as the int8 file computes it, against the same before the training."""
    parent = random_checkpoint(tmp_path / "parent", "bert", hidden=32)
    context = toy_context(tmp_path, rows=128)
    stage = TrainQuantized(epochs=4, batch_size=16, learning_rate=2e-3, per_channel=False, precision="fp32", alpha_hidden=0)
    out, _ = run_stage(stage, parent, tmp_path, context=context)

    def loss(folder: Path) -> float:
        model, family = checkpoint.load(folder, toy_task())
        with fake.FakeQuantized(model, per_channel=False, bits=8):
            logits = torch.tensor(predict(model, family, encode(folder, context.train.rows, 32)))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor([row.label for row in context.train.rows])))

    assert loss(out) < 0.9 * loss(parent)
