"""Rows without labels: where their words come from, and that the teacher alone teaches on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import tensor

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_rows
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import augment, checkpoint, losses
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.factorize import Factorize
from onnxsqueeze.tasks.rows import UNLABELLED, Row

QUICK = Distill(layers=1, epochs=1, batch_size=16)


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_replaced_by_near_ones_of_the_models_own_vocabulary(tmp_path: Path, name: FamilyName) -> None:
    folder = random_checkpoint(tmp_path, name)
    rows = toy_rows(30, seed=1, pairs=True)
    made = augment.with_other_words(rows, folder, copies=2, share=0.5, seed=0)
    words = {piece.lstrip("\u0120") for piece in checkpoint.vocabulary(folder)}

    assert 40 < len(made) <= 60
    assert all(row.label == UNLABELLED and row.text_pair for row in made)
    before = {word.lower() for row in rows for text in (row.text, row.text_pair or "") for word in text.split()}
    new = {word.lower() for row in made for text in (row.text, row.text_pair or "") for word in text.split()} - before
    assert new <= words
    assert made == augment.with_other_words(rows, folder, copies=2, share=0.5, seed=0)
    assert made != augment.with_other_words(rows, folder, copies=2, share=0.5, seed=1)


def test_words_of_a_copy_are_those_that_the_student_knows_and_whole(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    some = set(sorted(checkpoint.vocabulary(folder))[::2])
    new: set[str] = set()
    for row in toy_rows(30, seed=1):
        for made in augment.with_other_words([row], folder, copies=3, share=1.0, seed=0, known=some):
            new |= {now for now, was in zip(made.text.split(), row.text.split(), strict=True) if now != was}

    assert len(new) > 10
    assert new <= some
    assert augment.with_other_words([Row("the4th b2b x9", None, 0)], folder, copies=3, share=1.0, seed=0) == [], "parts of words stay"


def test_near_is_the_largest_cosine(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    vocabulary = checkpoint.vocabulary(folder)
    vectors = torch.nn.functional.normalize(checkpoint.vocabulary_matrix(folder), dim=1)
    whole = [piece for piece in vocabulary if piece.isalpha() and piece.islower() and len(piece) > 1]
    word = whole[3]
    near = augment._neighbours(folder, {word})[word]
    cosines = {other: float(vectors[vocabulary[word]] @ vectors[vocabulary[other]]) for other in whole if other != word}

    assert near == sorted(cosines, key=lambda other: -cosines[other])[:15]


def test_capitals_numbers_and_unknown_words_stay(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    known = next(piece for piece in checkpoint.vocabulary(folder) if piece.isalpha() and piece.islower() and len(piece) > 3)
    (made,) = augment.with_other_words([Row(f"{known.capitalize()} 42 xqzzy , {known}", None, 1)], folder, copies=1, share=1.0, seed=0)
    parts = made.text.split(" ")

    assert parts[0][0].isupper()
    assert parts[0].lower() != known
    assert parts[1:4] == ["42", "xqzzy", ","]


def test_lines_become_rows_and_pairs() -> None:
    texts = [f"line {i}" for i in range(50)]
    single = augment.from_texts(texts, 10, seed=0, pairs=False)
    pairs = augment.from_texts(texts, 100, seed=0, pairs=True)

    assert len(single) == 10
    assert [row.text for row in single] == sorted((row.text for row in single), key=lambda text: int(text.split()[1]))
    assert len(pairs) == 49
    assert (pairs[3].text, pairs[3].text_pair) == ("line 3", "line 4")


def test_rows_without_labels_have_no_part_in_the_tasks_loss() -> None:
    logits = tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 1.0]])
    some = losses.task(logits, tensor([1, UNLABELLED, 0]), regression=False)
    torch.testing.assert_close(some, losses.task(logits[[0, 2]], tensor([1, 0]), regression=False))
    assert losses.task(logits, torch.full((3,), UNLABELLED), regression=False).item() == 0
    scores = losses.task(logits[:, :1], tensor([0.5, float(UNLABELLED), 1.0]), regression=True)
    torch.testing.assert_close(scores, losses.task(logits[[0, 2], :1], tensor([0.5, 1.0]), regression=True))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_student_learns_on_more_rows_than_the_task_has(tmp_path: Path, pairs: bool) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row.text for row in toy_rows(40, seed=5)), encoding="utf-8")
    seen: list[int] = []
    context = toy_context(
        tmp_path, pairs=pairs, progress=lambda _done, total, note="": seen.append(total) if note.startswith("epoch") else None
    )
    stage = QUICK.model_copy(update={"texts": texts, "texts_count": 30, "other_words": 1})
    _, changed = run_stage(stage, teacher, tmp_path / "out", teacher=teacher, context=context)
    more = changed.details["rows_without_labels"]

    assert changed.details["trained_rows"] == 64 + more
    assert 30 + 50 < more <= 30 + 64
    assert set(seen) == {-(-(64 + more) // 16)}


def test_any_stage_that_is_taught_may_have_more_rows_and_none_without_a_teacher(tmp_path: Path) -> None:
    teacher = random_checkpoint(tmp_path / "teacher", "bert")
    stage = Factorize(vocabulary_rank=8, share=None, epochs=1, batch_size=16, other_words=1)
    _, changed = run_stage(stage, teacher, tmp_path / "out", teacher=teacher)
    assert changed.details["trained_rows"] == 64 + changed.details["rows_without_labels"] > 100
    with pytest.raises(StageError, match="factorize: texts and other_words ask for rows without labels, and there is no teacher"):
        run_stage(stage, teacher, tmp_path / "alone")


def test_more_rows_without_a_teachers_loss_are_refused() -> None:
    with pytest.raises(ValidationError, match="a loss against the teacher must be above 0"):
        Distill(other_words=1, alpha_logits=0, alpha_hidden=0)
