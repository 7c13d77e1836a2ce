from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from models import FAMILIES, FamilyName, artifact, random_checkpoint, run_stage, silent, toy_context, toy_rows, toy_task
from onnxsqueeze.errors import MeasureError, StageError
from onnxsqueeze.nn import checkpoint, teacher, training
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.precision import effective, machine_bound
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.stage import Context, Progress
from onnxsqueeze.stages.cluster_weights import ClusterWeights
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.drop_tokens import DropTokens
from onnxsqueeze.stages.early_exit import EarlyExit
from onnxsqueeze.stages.factorize import Factorize
from onnxsqueeze.stages.finetune import Finetune
from onnxsqueeze.stages.prune_structure import PruneStructure
from onnxsqueeze.stages.prune_weights import PruneWeights
from onnxsqueeze.stages.share_layers import ShareLayers
from onnxsqueeze.stages.train_low_bit import TrainLowBit
from onnxsqueeze.stages.train_quantized import TrainQuantized
from onnxsqueeze.tasks.metrics import primary


class KilledError(Exception):
    """What kills the training in a test."""


class Killer:
    """A progress that raises at a given step and remembers the steps it saw."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps: list[int] = []

    def __call__(self, done: int, total: int, note: str = "") -> None:  # noqa: ARG002, a progress has it
        if note.startswith("epoch"):
            self.steps.append(done)
            if done == self.at:
                raise KilledError


# 64 rows in batches of 16: 4 steps an epoch
STAGES: dict[str, TrainingSettings] = {
    "finetune": Finetune(epochs=3, batch_size=16, learning_rate=1e-3),
    "distill": Distill(layers=1, epochs=3, batch_size=16, learning_rate=1e-3, alpha_attention=1.0, freeze_embeddings=True),
    "prune-weights": PruneWeights(epochs=3, batch_size=16, learning_rate=1e-3, sparsity=0.7, recovery=0.1),
    "prune-weights by movement": PruneWeights(
        epochs=3, batch_size=16, learning_rate=1e-3, sparsity=0.7, recovery=0.1, criterion="movement"
    ),
    "prune-structure": PruneStructure(epochs=3, batch_size=16, learning_rate=1e-3, multiple_of=8, recovery=0.1),
    "prune-structure by gates": PruneStructure(
        epochs=3, batch_size=16, learning_rate=1e-3, multiple_of=8, recovery=0.1, importance="gates"
    ),
    "factorize": Factorize(epochs=3, batch_size=16, learning_rate=1e-3, multiple_of=2),
    "share-layers": ShareLayers(epochs=3, batch_size=16, learning_rate=1e-3, distinct=1),
    "train-quantized": TrainQuantized(epochs=3, batch_size=16, learning_rate=1e-3),
    "train-quantized in fixed ranges": TrainQuantized(epochs=3, batch_size=16, learning_rate=1e-3, activations="static", train_rows=60),
    "train-low-bit": TrainLowBit(epochs=3, batch_size=16, learning_rate=1e-3, renew=3),
    "cluster-weights": ClusterWeights(epochs=3, batch_size=16, learning_rate=1e-2, bits=2),
    "cluster-weights that move": ClusterWeights(epochs=3, batch_size=16, learning_rate=1e-2, bits=2, reassign=3),
    "early-exit": EarlyExit(epochs=3, batch_size=16, learning_rate=1e-3, after=(0,)),
    "drop-tokens": DropTokens(epochs=3, batch_size=16, learning_rate=1e-3, keep={0: 60}),
}


# the other way that some stages have is test-full's
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) if " " in kind else kind for kind in STAGES])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
def test_a_training_interrupted_in_its_second_epoch_resumes_there_and_ends_in_the_same_bytes(
    tmp_path: Path, kind: str, precision: str
) -> None:
    stage = STAGES[kind].model_copy(update={"precision": precision})
    parent = random_checkpoint(tmp_path / "parent", "bert", hidden=16)
    teacher = random_checkpoint(tmp_path / "teacher", "bert", hidden=32, seed=1)  # wider, so that distill learns projections

    calls = count()

    def context(folder: Path, progress: Progress = silent) -> Context:  # the last epoch always scores best, so that every epoch matters
        return replace(toy_context(folder, progress=progress), select=lambda _: float(next(calls)))

    whole, _ = run_stage(stage, parent, tmp_path / "whole", teacher=teacher, context=context(tmp_path / "whole"))
    with pytest.raises(KilledError):
        run_stage(stage, parent, tmp_path / "killed", teacher=teacher, context=context(tmp_path, Killer(at=6)))
    again = Killer()
    resumed, changed = run_stage(stage, parent, tmp_path / "again", teacher=teacher, context=context(tmp_path, again))

    assert again.steps == list(range(5, 13))
    assert changed.details["resumed_at_epoch"] == 2
    assert changed.details["best_epoch"] == 3
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_training_that_was_killed_before_its_files_were_written_trains_no_more(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    stage = STAGES["finetune"]
    first, _ = run_stage(stage, parent, tmp_path / "first", context=toy_context(tmp_path))
    progress = Killer()
    second, changed = run_stage(stage, parent, tmp_path / "second", context=toy_context(tmp_path, progress=progress))
    assert progress.steps == []
    assert len(changed.details["history"]) == 3
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut short": lambda whole: whole[: len(whole) // 2],
    "its end is zeros": lambda whole: whole[:-4096] + bytes(4096),
    "one byte of the weights": lambda whole: whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 64]) + whole[len(whole) // 2 + 1 :],
    "something else": lambda _: b"no saved state",
    "half a pickle": lambda _: b"\x80\x02X\x01",  # struct.error from torch alone
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A parent, the state of a training killed in its second epoch, and the weights that the whole training ends in."""
    folder = tmp_path_factory.mktemp("killed")
    parent = random_checkpoint(folder / "parent", "bert", hidden=16)
    whole, _ = run_stage(STAGES["finetune"], parent, folder / "whole")
    context = toy_context(folder, progress=Killer(at=6))
    with pytest.raises(KilledError):
        run_stage(STAGES["finetune"], parent, folder / "run", context=context)
    return parent, (context.checkpoint / "training.pt").read_bytes(), (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_starts_the_training_anew_and_the_record_says_so(
    tmp_path: Path, killed: tuple[Path, bytes, bytes], damage: str
) -> None:
    parent, state, weights = killed
    steps = Killer()
    context = toy_context(tmp_path, progress=steps)
    (context.checkpoint / "training.pt").write_bytes(DAMAGES[damage](state))
    out, changed = run_stage(STAGES["finetune"], parent, tmp_path / "run", context=context)
    assert changed.details["restarted"] == "the saved state could not be read"
    assert "resumed_at_epoch" not in changed.details
    assert steps.steps == list(range(1, 13))
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_whole_state_is_resumed_and_the_record_tells_of_no_restart(tmp_path: Path, killed: tuple[Path, bytes, bytes]) -> None:
    parent, state, weights = killed
    context = toy_context(tmp_path)
    (context.checkpoint / "training.pt").write_bytes(state)
    out, changed = run_stage(STAGES["finetune"], parent, tmp_path / "run", context=context)
    assert changed.details["resumed_at_epoch"] == 2
    assert "restarted" not in changed.details
    assert (out / "model.safetensors").read_bytes() == weights


def test_no_length_of_a_cut_state_is_more_than_a_restart(tmp_path: Path, killed: tuple[Path, bytes, bytes]) -> None:
    _, state, _ = killed
    file = tmp_path / "training.pt"
    for length in (*range(0, 400, 7), *range(400, len(state), len(state) // 60), *range(len(state) - 400, len(state), 7)):
        file.write_bytes(state[:length])
        with pytest.raises(training._UNREADABLE):
            training._State.read(file)


@pytest.mark.parametrize("damage", ["empty", "cut short", "something else"])
def test_damaged_logits_of_a_teacher_are_made_again_and_the_progress_says_so(tmp_path: Path, damage: str) -> None:
    folder = random_checkpoint(tmp_path / "teacher", "bert", hidden=16)
    notes: list[str] = []
    context = toy_context(tmp_path, progress=lambda _done, _total, note="": notes.append(note))
    master = teacher.load(artifact(folder), context)
    first = teacher.logits(master, "fp32", context)
    assert set(notes) == {"the teacher's logits"}
    notes.clear()
    assert torch.equal(teacher.logits(master, "fp32", context), first)
    assert not notes, "kept logits are read"
    file = next((tmp_path / "kept" / "measurements" / "teacher-logits").iterdir())
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert torch.equal(teacher.logits(master, "fp32", context), first)
    assert set(notes) == {"the teacher's logits, anew: the saved ones could not be read"}
    assert file.read_bytes() == whole


def selecting(context: Context, spoilt: Container[int]) -> Context:
    """``context`` with the task's own metric as `select`; it gets the logits of the calls in ``spoilt`` (from 1) as not finite."""
    labels = [row.label for row in context.selection.rows]
    calls = count(1)

    def select(logits: NDArray[np.float32]) -> float:
        if next(calls) in spoilt:
            logits[0, 0] = np.inf
        return primary(context.task, logits, labels)

    return replace(context, select=select)


def test_an_epoch_whose_logits_are_not_finite_has_no_score_and_is_not_kept(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    _, changed = run_stage(STAGES["finetune"], parent, tmp_path / "run", context=selecting(toy_context(tmp_path), {1, 3}))
    assert [entry["score"] is None for entry in changed.details["history"]] == [True, False, True]
    assert changed.details["best_epoch"] == 2


def test_a_training_without_any_score_is_an_error_with_a_remedy_and_is_not_remembered(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    context = toy_context(tmp_path)
    with pytest.raises(StageError, match="finetune: none of the epochs 1 to 3 has a score") as caught:
        run_stage(STAGES["finetune"], parent, tmp_path / "run", context=selecting(context, range(1, 4)))
    assert "learning_rate" in str(caught.value.remedy)
    assert not list(context.checkpoint.iterdir())


def test_a_score_in_an_epoch_that_may_not_be_kept_does_not_count(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    with pytest.raises(StageError, match="prune-weights: none of the epochs 3 to 3 has a score"):
        run_stage(STAGES["prune-weights"], parent, tmp_path / "run", context=selecting(toy_context(tmp_path), {3}))


def test_a_metric_that_fails_on_finite_logits_is_no_missing_score(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    context = toy_context(tmp_path)
    context = replace(context, select=lambda logits: primary(context.task, logits, [0]))
    with pytest.raises(MeasureError, match="must have the shape"):
        run_stage(STAGES["finetune"], parent, tmp_path / "run", context=context)


def test_the_seed_decides_the_bytes_and_the_callers_random_state_does_not(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    files = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(100 + i)
        before = torch.get_rng_state()
        out, _ = run_stage(STAGES["finetune"], parent, tmp_path / f"{i}", context=toy_context(tmp_path / f"{i}", seed=seed))
        assert torch.equal(before, torch.get_rng_state())
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(("scores", "best"), [([0.5, 0.5, 0.5], 1), ([0.5, 0.7, 0.7], 2), ([float("nan"), 0.1, float("nan")], 2)])
def test_the_best_epoch_by_the_selection_rows_is_kept_and_ties_go_to_the_earlier(tmp_path: Path, scores: list[float], best: int) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    seen: list[NDArray[np.float32]] = []

    def select(logits: NDArray[np.float32]) -> float:
        seen.append(logits)
        return scores[len(seen) - 1]

    context = replace(toy_context(tmp_path), select=select)
    out, changed = run_stage(STAGES["finetune"], parent, tmp_path / "run", context=context)
    assert changed.details["best_epoch"] == best
    assert [entry["score"] for entry in changed.details["history"]] == [None if score != score else score for score in scores]
    model, family = checkpoint.load(out, context.task)
    selection = encode(parent, context.selection.rows, context.task.max_length)
    np.testing.assert_array_equal(training.predict(model, family, selection), seen[best - 1])


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_those_of_each_row_alone_in_the_rows_order(tmp_path: Path, name: FamilyName) -> None:
    folder = random_checkpoint(tmp_path, name)
    model, family = checkpoint.load(folder, toy_task())
    rows = toy_rows(70, seed=3, pairs=True)
    together = training.predict(model, family, encode(folder, rows, 32))
    assert together.shape == (70, 2)
    for i in (0, 1, 33, 69):
        np.testing.assert_allclose(together[i : i + 1], training.predict(model, family, encode(folder, rows[i : i + 1], 32)), atol=1e-5)
    assert np.ptp(together[:, 0]) > 0.01


def test_a_loss_that_is_not_finite_stops_the_training_with_a_remedy(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    tensors = load_file(parent / "model.safetensors")
    tensors["classifier.weight"][0, 0] = torch.inf
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"finetune: the loss is (nan|inf) at step 1 of 12") as caught:
        run_stage(STAGES["finetune"], parent, tmp_path / "run")
    assert "learning_rate" in str(caught.value.remedy)


def test_training_learns_what_decides_the_label(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "distilbert", hidden=64)
    stage = Finetune(epochs=6, batch_size=16, learning_rate=2e-3, precision="fp32")
    _, changed = run_stage(stage, parent, tmp_path / "run", context=toy_context(tmp_path, rows=400))
    history = changed.details["history"]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert max(entry["score"] for entry in history) > 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_embeddings_keep_every_bit_while_the_rest_is_trained(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    out, _ = run_stage(Finetune(epochs=1, batch_size=16, learning_rate=1e-3, force=True, freeze_embeddings=True), parent, tmp_path)
    before, after = load_file(parent / "model.safetensors"), load_file(out / "model.safetensors")
    tables = {key for key in before if "embeddings." in key and before[key].dim() == 2}
    assert {key for key in before if torch.equal(before[key], after[key])} == tables
    assert tables


def test_the_rate_rises_to_its_peak_and_falls_towards_zero() -> None:
    rates = [training.rate(step, 100, 0.1) for step in range(100)]
    assert rates[10] == max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.1
    assert 0 < rates[-1] < 0.02
    assert training.rate(0, 1, 0.0) == 1.0


def test_auto_is_bf16_only_where_it_is_native() -> None:
    assert effective("auto", cuda=False, features=frozenset({"avx512_bf16"})) == "bf16"
    assert effective("auto", cuda=False, features=frozenset({"amx_bf16"})) == "bf16"
    assert effective("auto", cuda=False, features=frozenset({"avx512f", "avx512_vnni"})) == "fp32"
    assert effective("auto", cuda=True, features=frozenset()) == "bf16"
    assert effective("fp32", cuda=True, features=frozenset()) == "fp32"


def test_bf16_training_is_bound_to_the_machine() -> None:
    assert machine_bound("bf16")
    assert Finetune(precision="bf16").machine_bound()
    assert machine_bound("fp32") == Path("/dev/nvidiactl").exists()


def test_bf16_and_fp32_train_to_different_bytes(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    found = {}
    for precision in ("fp32", "bf16"):
        out, changed = run_stage(Finetune(epochs=1, precision=precision), parent, tmp_path / precision)
        assert changed.details["precision"] == precision
        found[precision] = (out / "model.safetensors").read_bytes()
    assert found["fp32"] != found["bf16"]
