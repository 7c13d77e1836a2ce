from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import batches, checkpoint, structure, training
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.nn.distillation import teaching_layers
from onnxsqueeze.nn.training import predict
from onnxsqueeze.stages.distill import Distill, chosen_layers
from onnxsqueeze.stages.prune_vocabulary import PruneVocabulary
from onnxsqueeze.stages.prune_weights import PruneWeights

QUICK = Distill(layers=1, epochs=1, batch_size=16, alpha_attention=0.5)
BARELY = {"epochs": 1, "batch_size": 64, "learning_rate": 1e-7, "precision": "fp32"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_student_has_fewer_layers_and_reloads(tmp_path: Path, name: FamilyName) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", name)
    out, changed = run_stage(QUICK, teacher, tmp_path, teacher=teacher)
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    assert model.config.num_hidden_layers == 1
    assert (changed.details["layers"], changed.details["layers_before"], changed.details["kept"]) == (1, 2, [1])
    assert changed.count == len(load_file(teacher / "model.safetensors"))  # all were trained, and those of one layer are gone


@pytest.mark.parametrize("name", FAMILIES)
def test_the_student_starts_as_the_chosen_layers_of_its_parent(tmp_path: Path, name: FamilyName) -> None:
    from onnxsqueeze.nn.family import FAMILIES as DESCRIBED

    teacher = random_checkpoint(tmp_path / "teacher", name, layers=4)
    out, _ = run_stage(Distill(layers=(0, 3), alpha_hidden=0, **BARELY), teacher, tmp_path, teacher=teacher)
    stem = f"{DESCRIBED[name].encoder}.{DESCRIBED[name].layers}"
    before, after = load_file(teacher / "model.safetensors"), load_file(out / "model.safetensors")
    for key, value in after.items():
        torch.testing.assert_close(value, before[key.replace(f"{stem}.1.", f"{stem}.3.")], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wanted", "available", "kept"),
    [
        (3, 6, (1, 3, 5)),
        (4, 6, (1, 2, 4, 5)),
        (2, 6, (2, 5)),
        (6, 6, (0, 1, 2, 3, 4, 5)),
        (1, 12, (11,)),
        (6, 12, (1, 3, 5, 7, 9, 11)),
        ((0, 4), 6, (0, 4)),
    ],
)
def test_layers_are_chosen_evenly_up_to_the_last_or_as_named(wanted: int | tuple[int, ...], available: int, kept: tuple[int, ...]) -> None:
    assert chosen_layers(wanted, available, "distill") == kept


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_the_model_has_not_are_known_from_its_config(tmp_path: Path, name: FamilyName) -> None:
    config = json.loads((random_checkpoint(tmp_path, name, layers=6) / "config.json").read_text())
    assert Distill(layers=12).misfit(config) == "layers: must be from 1 to 6, the model's layers, got 12"
    assert Distill(layers=(0, 6)).misfit(config) == "layers: must be rising indices from 0 to 5, the model's last layer, got [0, 6]"
    assert Distill(layers=6).misfit(config) is None
    assert Distill(layers=(0, 5)).misfit(config) is None


def test_a_config_that_leaves_the_number_of_layers_to_the_library_is_not_judged() -> None:
    assert Distill(layers=99).misfit({"model_type": "bert"}) is None


def test_useful_layers_are_those_whose_absence_the_loss_notices(tmp_path: Path) -> None:
    """Against models without each layer, read anew and cut one by one."""
    folder = random_checkpoint(tmp_path / "parent", "bert", layers=4)
    context = toy_context(tmp_path)
    examples = encode(folder, context.train.rows, 32)

    def loss(kept: tuple[int, ...]) -> float:
        model, family = checkpoint.load(folder, toy_task())
        structure.keep_layers(model, family, kept)
        logits = torch.tensor(predict(model, family, examples))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(examples.labels)))

    three = min(itertools.combinations(range(4), 3), key=loss)
    two = min(itertools.combinations(three, 2), key=loss)
    stage = Distill(layers=2, choose="useful", epochs=1, batch_size=16)
    _, changed = run_stage(stage, folder, tmp_path, teacher=folder, context=context)
    assert changed.details["kept"] == list(two)


@pytest.mark.parametrize("wanted", [7, (), (6,), (-1,), (1, 0), (2, 2)])
def test_layers_that_the_model_has_not_are_an_error(wanted: int | tuple[int, ...]) -> None:
    with pytest.raises(StageError, match=r"^distill: layers: must be"):
        chosen_layers(wanted, 6, "distill")


def test_a_layer_learns_from_the_one_it_was_or_from_the_same_height_of_a_teacher_of_another_depth() -> None:
    assert teaching_layers((0, 4), 6, 6) == (0, 4)
    assert teaching_layers((0, 4), 6, 12) == (5, 11)
    assert teaching_layers((1, 2, 3), 4, 6) == (1, 3, 5)
    assert teaching_layers((0, 1, 2, 3), 4, 2) == (0, 0, 1, 1)


def test_the_teachers_logits_are_computed_once_and_kept(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    calls: list[str] = []

    def progress(done: int, total: int, note: str = "") -> None:
        if done == total:
            calls.append(note.split(",")[0])

    context = toy_context(tmp_path, progress=progress)
    first, _ = run_stage(QUICK, teacher, tmp_path / "first", teacher=teacher, context=context)
    (context.checkpoint / "training.pt").unlink()
    second, _ = run_stage(QUICK, teacher, tmp_path / "second", teacher=teacher, context=context)
    assert calls == ["the teacher's logits", "epoch 1/1", "epoch 1/1"]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_stages_with_the_same_teacher_on_the_same_rows_share_its_logits(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    notes: list[str] = []
    first = toy_context(tmp_path, progress=lambda _done, _total, note="": notes.append(note.split(",")[0]))
    student, _ = run_stage(Distill(layers=1, epochs=1), teacher, tmp_path / "first", teacher=teacher, context=first)
    assert "the teacher's logits" in notes
    notes.clear()
    (tmp_path / "next").mkdir()
    run_stage(PruneWeights(epochs=1), student, tmp_path / "second", teacher=teacher, context=replace(first, checkpoint=tmp_path / "next"))
    assert set(notes) == {"epoch 1/1"}


@pytest.mark.parametrize("weight", ["alpha_task", "alpha_logits", "alpha_hidden", "alpha_attention", "alpha_relations"])
def test_each_loss_moves_the_student(tmp_path: Path, weight: str) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "roberta")
    off = {"alpha_task": 0.0, "alpha_logits": 0.0, "alpha_hidden": 0.0, "alpha_attention": 0.0}
    stage = Distill(layers=1, epochs=2, batch_size=8, learning_rate=2e-3, precision="fp32", relation_heads=4, **{**off, weight: 1.0})
    _, changed = run_stage(stage, teacher, tmp_path, teacher=teacher)
    first, second = (entry["loss"] for entry in changed.details["history"])
    assert 0 < second < first


def test_a_wider_deeper_teacher_of_another_family_can_teach_where_the_tokens_agree(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "electra", layers=4, hidden=64)
    parent = random_checkpoint(tmp_path / "parent", "bert", layers=3)
    out, _ = run_stage(Distill(layers=2, epochs=1, alpha_attention=1.0), parent, tmp_path, teacher=teacher)
    assert not any("maps" in key for key in load_file(out / "model.safetensors")), "projections are dropped"


def test_relations_of_a_wider_teacher_are_learned_without_projections_and_heads_must_divide_both(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert", hidden=64)
    parent = random_checkpoint(tmp_path / "parent", "bert", hidden=32)
    stage = Distill(layers=1, epochs=1, alpha_hidden=0.0, alpha_relations=1.0, relation_heads=8)
    _, changed = run_stage(stage, parent, tmp_path, teacher=teacher)
    assert changed.details["history"][0]["loss"] > 0
    with pytest.raises(StageError, match="queries, keys and values of layer 0 are 32 wide, which 12 heads cannot share"):
        run_stage(stage.model_copy(update={"relation_heads": 12}), parent, tmp_path / "odd", teacher=teacher)


LOGITS_ALONE = Distill(layers=1, epochs=2, batch_size=8, learning_rate=2e-3, precision="fp32", alpha_task=0, alpha_hidden=0)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra"])
def test_the_logits_of_a_teacher_with_another_tokenizer_teach(tmp_path: Path, name: FamilyName) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", name)
    parent = random_checkpoint(tmp_path / "parent", "bert")
    _, changed = run_stage(LOGITS_ALONE, parent, tmp_path, teacher=teacher)
    first, second = (entry["loss"] for entry in changed.details["history"])
    assert 0 < second < first


def test_a_teacher_reads_the_rows_with_its_own_tokenizer(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "roberta")
    parent = random_checkpoint(tmp_path / "parent", "bert")
    context = toy_context(tmp_path)
    run_stage(LOGITS_ALONE, parent, tmp_path, teacher=teacher, context=context)
    model, family = checkpoint.load(teacher, context.task)
    own = training.predict(model, family, batches.encode(teacher, context.train.rows, context.task.max_length))
    kept = next((tmp_path / "kept" / "measurements" / "teacher-logits").iterdir())
    np.testing.assert_allclose(np.load(kept), own, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "alpha_hidden"),
        ({"alpha_attention": 1.0}, "alpha_hidden, alpha_attention"),
        ({"alpha_hidden": 0.0, "alpha_attention": 1.0}, "alpha_attention"),
    ],
)
def test_losses_token_by_token_are_refused_where_the_teachers_tokens_are_others(
    tmp_path: Path, given: dict[str, float], named: str
) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "roberta")
    parent = random_checkpoint(tmp_path / "parent", "bert")
    message = f"^distill: {named}: the teacher's tokenizer cuts 64 of 64 training rows into other tokens than the student's"
    with pytest.raises(StageError, match=message) as caught:
        run_stage(Distill(layers=1, **given), parent, tmp_path, teacher=teacher)
    assert f"set {named.replace(', ', ': 0 and ')}: 0" in str(caught.value.remedy)


def test_a_teacher_whose_ids_are_others_but_whose_tokens_are_the_same_teaches_as_if_they_were_the_same(tmp_path: Path) -> None:
    """Every loss, with the student's vocabulary pruned of what no row has: the ids differ, nothing else does."""
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    parent, _ = run_stage(PruneVocabulary(), teacher, tmp_path / "pruned")
    stage = Distill(layers=1, epochs=1, batch_size=16, alpha_attention=0.5, precision="fp32")
    one, first = run_stage(stage, teacher, tmp_path / "one", teacher=teacher)
    two, second = run_stage(stage, parent, tmp_path / "two", teacher=teacher)
    assert first.details["history"][0]["loss"] == pytest.approx(second.details["history"][0]["loss"], rel=1e-5)
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    del a["bert.embeddings.word_embeddings.weight"], b["bert.embeddings.word_embeddings.weight"]
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=1e-5, rtol=0)


def test_attention_of_unequal_heads_is_refused(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert", heads=4)
    parent = random_checkpoint(tmp_path / "parent", "bert", heads=2)
    with pytest.raises(StageError, match="layer 0 of the student has 2 heads, the one that teaches it 4"):
        run_stage(QUICK, parent, tmp_path, teacher=teacher)


def test_a_stage_without_a_teacher_says_so(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has no teacher"):
        run_stage(QUICK, random_checkpoint(tmp_path / "parent", "bert"), tmp_path)


def test_settings_without_any_loss_are_refused() -> None:
    with pytest.raises(ValidationError, match="must be above 0"):
        Distill(alpha_task=0, alpha_logits=0, alpha_hidden=0, alpha_attention=0)


def test_a_regression_student_learns_the_teachers_scores(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert", outputs=1)
    stage = Distill(layers=1, epochs=3, batch_size=8, learning_rate=2e-3, alpha_task=0, alpha_hidden=0)
    _, changed = run_stage(stage, teacher, tmp_path, teacher=teacher, context=toy_context(tmp_path, outputs=1))
    assert changed.details["history"][-1]["loss"] < changed.details["history"][0]["loss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_another_kind_is_taught_in_place_of_the_parents_layers_and_brings_its_tokenizer(
    tmp_path: Path, name: FamilyName
) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert", layers=3)
    student = random_checkpoint(tmp_path / "student", name, layers=2, hidden=16, head=False, seed=1)
    stage = Distill(student=str(student), epochs=1, batch_size=8, learning_rate=2e-3, alpha_hidden=0)
    out, changed = run_stage(stage, teacher, tmp_path, teacher=teacher)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == name
    assert (out / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
    assert (changed.details["student"], changed.details["kept"]) == ("student", [0, 1])
    model, family = checkpoint.load(out, toy_task())
    assert np.isfinite(training.predict(model, family, batches.encode(out, toy_context(tmp_path).selection.rows, 32))).all()


@pytest.mark.parametrize("also", [{"layers": 2}, {"choose": "useful"}])
def test_a_student_of_its_own_keeps_its_layers(also: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=f"`student` and `{next(iter(also))}` exclude each other"):
        Distill(student="minilm", **also)


@pytest.mark.full
def test_compiled_steps_learn_the_same_and_leave_nothing_of_themselves_behind(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    settings = {"layers": 1, "epochs": 2, "batch_size": 16, "precision": "fp32"}
    plain, expected = run_stage(Distill(**settings), teacher, tmp_path / "plain", teacher=teacher)
    compiled, found = run_stage(Distill(**settings, compiled=True), teacher, tmp_path / "compiled", teacher=teacher)
    assert list(load_file(compiled / "model.safetensors")) == list(load_file(plain / "model.safetensors"))
    # compiled dropout draws other numbers
    assert [e["loss"] for e in found.details["history"]] == pytest.approx([e["loss"] for e in expected.details["history"]], rel=0.1)


def test_steps_that_cannot_be_compiled_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(StageError, match=r"distill: compiled: torch.compile found no C\+\+ compiler") as failure:
        run_stage(Distill(layers=1, epochs=1, compiled=True), teacher, tmp_path, teacher=teacher)
    assert failure.value.remedy == "install g++, or leave `compiled` out"
