"""early-exit and branch-exits: one stock file that says what the exits and the rest say, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pydantic import ValidationError
from safetensors.torch import load_file

from crossed import first
from models import FAMILIES, random_checkpoint, run_stage, toy_context, toy_rows, toy_task
from onnxsqueeze import graph
from onnxsqueeze.branches import branch
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint, exits, structure
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.stages.branch_exits import BranchExits
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.early_exit import EarlyExit
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.prune_structure import PruneStructure
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.structure_budget import Budget
from onnxsqueeze.tokens import Encoder, pad

QUICK = EarlyExit(after=(0, 2), epochs=1, batch_size=16, learning_rate=1e-3)
Feed = dict[str, NDArray[np.int64]]


def rows(folder: Path, n: int, seed: int = 7) -> list[Feed]:
    """Toy rows, each alone."""
    encoder = Encoder(folder, 32)
    encoded = encoder.encode([row.text for row in toy_rows(n, seed=seed)], [None] * n)
    return [pad([row], encoder.pad_id) for row in encoded]


def batch(folder: Path, n: int) -> Feed:
    """Toy rows in one call, padded."""
    encoder = Encoder(folder, 32)
    return pad(encoder.encode([row.text for row in toy_rows(n, seed=9)], [None] * n), encoder.pad_id)


def session(folder: Path) -> Any:
    return ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def ask(running: Any, feed: Feed, threshold: float | None = None) -> list[NDArray[np.float32]]:
    given = {one.name: feed[one.name] for one in running.get_inputs() if one.name in feed}
    more = {} if threshold is None else {"exit_threshold": np.array(threshold, np.float32)}
    found: list[NDArray[np.float32]] = running.run(None, {**given, **more})
    return found


def largest(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = torch.tensor(logits).softmax(-1).max(-1).values.numpy()
    return found


def by_hand(outputs: list[NDArray[np.float32]], threshold: float) -> NDArray[np.float32]:
    """What a model with these outputs (its logits first, then the exits') says where rows leave at ``threshold``."""
    found = outputs[0].copy()
    for exit_ in reversed(outputs[1:]):
        sure = largest(exit_) >= threshold
        found[sure] = exit_[sure]
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model with two exits, and what the stage changed."""
    folder = tmp_path_factory.mktemp(request.param)
    parent = random_checkpoint(folder / "parent", request.param, layers=4)
    return run_stage(QUICK, parent, folder, teacher=parent)


def chain(folder: Path, *stages: Any, place: Path | None = None) -> Path:
    """Stages one after the other, from an export on, in folders of ``place`` (that of ``folder``)."""
    here = folder
    for i, stage in enumerate(stages):
        here, _ = run_stage(stage, here, (place or folder.parent) / f"{folder.name}-{i}")
    return here


@first("trained", FAMILIES, through=True)
def test_exits_are_in_the_file_reload_and_are_outputs_of_the_export(trained: tuple[Path, Any], tmp_path: Path) -> None:
    out, changed = trained
    model, family = checkpoint.load(out, toy_task())
    stored = load_file(out / "model.safetensors")
    exported = chain(out, Export(), place=tmp_path)
    outputs = [name for name, (side, _) in graph.signature(exported / "model.onnx").items() if side == "output"]
    said = exits.predict(model, family, encode(out, toy_rows(20, seed=7), 32))

    assert structure.of(model, family).exits == exits.after(model) == (0, 2)
    assert changed.count == sum(tensor.numel() for key, tensor in stored.items() if key.startswith("exits.")) == 2 * (33 * 32 + 33 * 2)
    assert outputs == ["logits", "logits_after_0", "logits_after_2"]
    running = session(exported)
    got = [np.concatenate(head) for head in zip(*(ask(running, feed) for feed in rows(out, 20)), strict=True)]
    for own, its in zip(said, got, strict=True):
        np.testing.assert_allclose(own, its, atol=1e-4)


@first("trained", FAMILIES, through=True)
def test_every_row_gets_the_logits_of_the_first_exit_that_is_sure_alone_and_in_a_batch(trained: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = trained
    exported = chain(out, Export(), OptimizeGraph(), place=tmp_path)
    whole = session(exported)
    feed = batch(out, 12)
    outputs = ask(whole, feed)
    middle = float(np.median(largest(outputs[1])))
    branched, changed = run_stage(BranchExits(threshold=round(middle, 4)), exported, tmp_path / "branched")
    running = session(branched)

    assert [one.name for one in running.get_outputs()] == ["logits"]
    assert changed.count > 20
    assert graph.operators(branched / "model.onnx")["If"] == 2
    for threshold in (None, 0.0, 1.1, middle + 0.01, middle - 0.01):
        wanted = by_hand(outputs, changed.details["threshold"] if threshold is None else threshold)
        np.testing.assert_allclose(ask(running, feed, threshold)[0], wanted, atol=1e-4)
        for one in rows(out, 6):
            np.testing.assert_allclose(
                ask(running, one, threshold)[0],
                by_hand(ask(whole, one), changed.details["threshold"] if threshold is None else threshold),
                atol=1e-4,
            )


@first("trained", FAMILIES, through=True)
def test_an_int8_file_says_alone_what_its_parts_say(trained: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = trained
    quantized = chain(out, Export(), QuantizeDynamic(), OptimizeGraph(max_drop_pp=100), place=tmp_path)
    branched, changed = run_stage(BranchExits(threshold=0.6), quantized, tmp_path / "branched")
    whole, running = session(quantized), session(branched)

    for one in rows(out, 40):
        np.testing.assert_allclose(ask(running, one)[0], by_hand(ask(whole, one), 0.6), atol=1e-5)
    before = graph.operators(quantized / "model.onnx")
    assert graph.operators(branched / "model.onnx")["MatMulInteger"] == before["MatMulInteger"]
    assert changed.details["nodes"] > changed.details["nodes_before"]


def test_a_row_that_leaves_does_not_run_what_is_behind(tmp_path: Path) -> None:
    """By the runtime's own profile."""
    import json

    parent = random_checkpoint(tmp_path / "parent", "bert", layers=4)
    out, _ = run_stage(QUICK, parent, tmp_path, teacher=parent)
    branched = chain(out, Export(), OptimizeGraph(), BranchExits(threshold=0.6))
    ran = {}
    for threshold in (0.0, 1.1):
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / f"profile-{threshold}")
        running = ort.InferenceSession(str(branched / "model.onnx"), options, providers=["CPUExecutionProvider"])
        ask(running, rows(out, 1)[0], threshold)
        events = json.loads(Path(running.end_profiling()).read_text())
        ran[threshold] = sum(
            "MatMul" in event.get("args", {}).get("op_name", "") or "Gemm" in event.get("args", {}).get("op_name", "") for event in events
        )

    assert ran[0.0] < 0.5 * ran[1.1]


def test_the_threshold_is_the_lowest_that_keeps_the_score(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=4)
    context = toy_context(tmp_path)
    out, _ = run_stage(QUICK, parent, tmp_path, teacher=parent, context=context)
    exported = chain(out, Export())
    _, changed = run_stage(BranchExits(max_drop_pp=3.0), exported, tmp_path / "branched", context=context)
    heads = exits.predict(*checkpoint.load(out, toy_task()), encode(out, context.selection.rows, 32))
    found = changed.details

    assert found["selection_before"] == pytest.approx(context.select(heads[0]))
    assert found["selection_before"] - found["selection_after"] <= 0.03 + 1e-9
    assert sum(found["share_leaving"]) == pytest.approx(1)
    lower = [t for t in np.unique(np.concatenate([largest(head) for head in heads[1:]])) if t < found["threshold"] - 0.01]
    assert all(context.select(by_hand(heads, float(t))) < found["selection_before"] - 0.03 for t in lower[:: max(1, len(lower) // 10)])


def test_exits_alone_leave_the_model_as_it_was_and_learn(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3)
    stage = EarlyExit(after=(0,), train="exits", epochs=3, batch_size=16, learning_rate=3e-3, precision="fp32")
    out, changed = run_stage(stage, parent, tmp_path, teacher=parent)
    before, after = load_file(parent / "model.safetensors"), load_file(out / "model.safetensors")

    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    losses = [epoch["loss"] for epoch in changed.details["history"]]
    assert losses[-1] < losses[0]


def test_a_pruned_model_can_have_exits_and_one_with_exits_keeps_its_layers(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=4, heads=4)
    pruned, _ = run_stage(PruneStructure(epochs=1, batch_size=16, multiple_of=8, budget=Budget(share=0.6)), parent, tmp_path / "pruned")
    out, _ = run_stage(QUICK, pruned, tmp_path / "exits", teacher=parent)
    chain(out, Export(), QuantizeDynamic(), BranchExits(threshold=0.9))
    with pytest.raises(StageError, match="distill: the parent has exits"):
        run_stage(Distill(layers=2, epochs=1), out, tmp_path / "student", teacher=parent)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3)
    for after in ((2,), (1, 0), (-1,)):
        with pytest.raises(StageError, match="after: must be rising indices from 0 to 1"):
            run_stage(EarlyExit(after=after), parent, tmp_path / f"after-{after}")
    scored = random_checkpoint(tmp_path / "scored", "bert", outputs=1)
    with pytest.raises(StageError, match="asks for a score, which has no confidence"):
        run_stage(EarlyExit(after=(0,)), scored, tmp_path / "score", context=toy_context(tmp_path / "score", outputs=1))
    with pytest.raises(StageError, match="the parent has no exits"):
        run_stage(BranchExits(), chain(parent, Export()), tmp_path / "none")
    with pytest.raises(ValidationError):
        EarlyExit.model_validate({"kind": "early-exit", "after": []})
    with pytest.raises(ValidationError):
        BranchExits.model_validate({"kind": "branch-exits", "threshold": 1.5})


def test_where_no_row_can_leave_without_costing_too_much_it_says_so(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=4)
    out, _ = run_stage(QUICK, parent, tmp_path, teacher=parent)
    exported = chain(out, Export())
    heads = exits.predict(*checkpoint.load(out, toy_task()), encode(out, toy_context(tmp_path / "rows").selection.rows, 32))

    def select(logits: NDArray[np.float32]) -> float:
        """1 where every row has the last head's logits, else 0."""
        return float(np.allclose(logits, heads[0], atol=1e-4))

    context = replace(toy_context(tmp_path / "never"), select=select)
    with pytest.raises(
        StageError, match=r"max_drop_pp: wherever a selection row leaves, the score falls by more than 0\.5 points from 1\.0000"
    ):
        run_stage(BranchExits(), exported, tmp_path / "never", context=context)


def test_a_rest_that_reads_a_length_is_refused_with_what_to_do() -> None:
    """On both sides of the exit a Reshape reads the batch's length: behind it, with fewer rows, it would be wrong."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["states"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["ids"], ["length"]),
        helper.make_node("Reshape", ["states", "length"], ["leave"]),
        helper.make_node("Exp", ["states"], ["more"]),
        helper.make_node("Reshape", ["more", "length"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 2])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("logits", "leave")]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(
        StageError, match="branch-exits: what lies behind leave reads length, which may hold the length of the batch"
    ) as caught:
        branch(model, ["leave"], 0.5, "branch-exits")
    assert "constant-shapes" in str(caught.value.remedy)
