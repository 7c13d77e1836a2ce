"""distill-small: students that are no transformers, whose files say what PyTorch says whatever the padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from pydantic import ValidationError

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_rows
from onnxsqueeze import graph
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import small
from onnxsqueeze.nn.small import Architecture, SmallStudent
from onnxsqueeze.stages.distill_small import DistillSmall
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.tokens import Encoder, pad

QUICK = DistillSmall(epochs=2, batch_size=16, rank=8, width=12)
BOTH: tuple[Architecture, ...] = ("cnn", "bilstm")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("architecture", BOTH)
def test_the_file_runs_in_a_stock_session_and_padding_changes_nothing(tmp_path: Path, name: FamilyName, architecture: Architecture) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    out, changed = run_stage(QUICK.model_copy(update={"architecture": architecture}), parent, tmp_path, teacher=parent)
    encoder = Encoder(out, 32)
    rows = encoder.encode([row.text for row in toy_rows(9, seed=2)], [None] * 9)
    session = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])

    def ask(some: list, width: int | None = None) -> np.ndarray:  # type: ignore[type-arg]
        feed = pad(some, encoder.pad_id, width)
        found: np.ndarray = session.run(None, {k: feed[k] for k in ("input_ids", "attention_mask")})[0]  # type: ignore[type-arg]
        return found

    alone = np.concatenate([ask([row]) for row in rows])
    np.testing.assert_allclose(ask(rows), alone, atol=1e-5)
    np.testing.assert_allclose(ask(rows, 32), alone, atol=1e-5)
    assert list(graph.signature(out / "model.onnx")) == ["input_ids", "attention_mask", "logits"]
    assert changed.count == changed.details["weights"] > 0
    assert json.loads((out / "config.json").read_text())["vocab_size"] == json.loads((parent / "config.json").read_text())["vocab_size"]
    assert ("LSTM" in graph.operators(out / "model.onnx")) == (architecture == "bilstm")


@pytest.mark.parametrize("architecture", BOTH)
def test_it_learns_what_the_teacher_says_and_can_be_quantized(tmp_path: Path, architecture: Architecture) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    stage = QUICK.model_copy(update={"architecture": architecture, "epochs": 8, "alpha_task": 0.0, "learning_rate": 1e-2, "dropout": 0.0})
    out, changed = run_stage(stage, parent, tmp_path, teacher=parent, context=toy_context(tmp_path, rows=128))
    losses = [epoch["loss"] for epoch in changed.details["history"]]
    quantized, _ = run_stage(QuantizeDynamic(), out, tmp_path / "int8")

    assert losses[-1] < 0.5 * losses[0]
    assert (quantized / "model.onnx").stat().st_size < (out / "model.onnx").stat().st_size


def test_the_backward_network_reads_each_row_from_its_own_end() -> None:
    """Against torch's bidirectional LSTM on packed rows."""
    torch.manual_seed(0)
    student = SmallStudent(small.Shape("bilstm", 4, 5, (2,), 2), torch.randn(20, 4), 0.0).eval()
    both = torch.nn.LSTM(4, 5, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(both, f"{kind}_l0").copy_(getattr(student.forwards, f"{kind}_l0"))
            getattr(both, f"{kind}_l0_reverse").copy_(getattr(student.backwards, f"{kind}_l0"))
        ids, lengths = torch.randint(20, (3, 7)), torch.tensor([7, 4, 1])
        mask = (torch.arange(7)[None] < lengths[:, None]).long()
        packed = torch.nn.utils.rnn.pack_padded_sequence(student.words(ids), lengths, batch_first=True)
        states, _ = torch.nn.utils.rnn.pad_packed_sequence(both(packed)[0], batch_first=True, padding_value=-1e4)
        wanted = student.out(states.amax(1))
        torch.testing.assert_close(student(ids, mask).logits, wanted, atol=1e-5, rtol=1e-4)


def test_the_table_starts_as_the_strongest_directions_of_the_parents() -> None:
    table = torch.randn(50, 3) @ torch.randn(3, 16)
    found = small.narrowed(table, 3)
    torch.testing.assert_close(found @ found.T, table @ table.T, atol=1e-3, rtol=1e-3)


def test_without_a_teacher_and_with_hidden_states_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has no teacher"):
        run_stage(QUICK, random_checkpoint(tmp_path / "parent", "bert"), tmp_path)
    refused: tuple[dict[str, object], ...] = ({"alpha_hidden": 1.0}, {"kernels": []}, {"rank": 0}, {"architecture": "transformer"})
    for wrong in refused:
        with pytest.raises(ValidationError):
            DistillSmall.model_validate({"kind": "distill-small", **wrong})
