"""More rows for a student, without labels: the teacher says what they are."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from onnxsqueeze.nn import checkpoint
from onnxsqueeze.tasks.rows import UNLABELLED, Row
from onnxsqueeze.tasks.tables import read_texts

if TYPE_CHECKING:
    from onnxsqueeze.artifact import Artifact
    from onnxsqueeze.nn.settings import TaughtSettings
    from onnxsqueeze.stage import Context

_NEIGHBOURS = 15
_CHUNK = 512
_WORD = re.compile(r"\b[^\W\d_]{2,}\b")
_BEGINS = ("\u0120", "\u2581")  # how byte-level BPE and its like mark a piece that begins a word


def more_rows(settings: TaughtSettings, teacher: Artifact, student: Path, context: Context) -> Context:
    """The context with the rows that the teacher alone labels behind the task's own.

    What words are near, the teacher's table says; of those the student's tokenizer knows, so that both read the same pieces.
    """
    rows, more = context.train.rows, []
    if settings.texts is not None:
        more += from_texts(read_texts(settings.texts), settings.texts_count, context.seed, pairs=rows[0].text_pair is not None)
    if settings.other_words:
        more += with_other_words(
            rows, teacher.path, settings.other_words, settings.other_words_share, context.seed, known=checkpoint.vocabulary(student)
        )
    return replace(context, train=replace(context.train, rows=[*rows, *more])) if more else context


def from_texts(texts: Sequence[str], count: int, seed: int, *, pairs: bool) -> list[Row]:
    """``count`` rows (or as many as there are) drawn from ``texts``, in their order; of a task with pairs each line with the one behind it."""
    usable = len(texts) - 1 if pairs else len(texts)
    drawn = np.sort(np.random.default_rng(seed).permutation(usable)[:count])
    return [Row(texts[i], texts[i + 1] if pairs else None, UNLABELLED) for i in drawn.tolist()]


def with_other_words(
    rows: Sequence[Row], folder: Path, copies: int, share: float, seed: int, *, known: Container[str] | None = None
) -> list[Row]:
    """``copies`` of each row in which a ``share`` of the words that the vocabulary knows is replaced by near ones.

    Near are the 15 words whose vectors in the table of the model in ``folder`` have the largest cosine, of those that are ``known`` (default: all). Copies that came out as the row itself are left out.
    Source: Jiao et al. 2020, "TinyBERT", algorithm 1 (there by a masked language model and by GloVe's neighbours).
    """
    near = _neighbours(folder, {word.lower() for row in rows for text in _texts(row) for word in _WORD.findall(text)}, known)
    random = np.random.default_rng(seed)

    def other(found: re.Match[str]) -> str:
        others = near.get(found.group().lower())
        if others is None or random.random() >= share:
            return found.group()
        word = others[int(random.integers(len(others)))]
        return word.capitalize() if found.group()[0].isupper() else word

    made = [
        replace(row, text=_WORD.sub(other, row.text), text_pair=row.text_pair and _WORD.sub(other, row.text_pair), label=UNLABELLED)
        for _ in range(copies)
        for row in rows
    ]
    return [new for new, row in zip(made, [*rows] * copies, strict=True) if _texts(new) != _texts(row)]


def _texts(row: Row) -> tuple[str, ...]:
    return (row.text,) if row.text_pair is None else (row.text, row.text_pair)


def _neighbours(folder: Path, words: set[str], known: Container[str] | None = None) -> dict[str, list[str]]:
    """Of those of ``words`` that are one piece of the vocabulary, the nearest other words, of those that are ``known``."""
    vocabulary = checkpoint.vocabulary(folder)
    vectors = torch.nn.functional.normalize(checkpoint.vocabulary_matrix(folder).float(), dim=1)
    marked = any(piece.startswith(_BEGINS) for piece in vocabulary)
    whole: dict[str, int] = {}
    for piece, i in sorted(vocabulary.items(), key=lambda item: item[1]):
        if known is not None and piece not in known:
            continue
        bare = piece[1:] if marked and piece.startswith(_BEGINS) else None if marked else piece
        if bare and _WORD.fullmatch(bare) and bare.islower():
            whole.setdefault(bare, i)
    names, places = list(whole), torch.tensor(list(whole.values()))
    asked = [word for word in sorted(words) if word in whole]
    found: dict[str, list[str]] = {}
    for start in range(0, len(asked), _CHUNK):
        some = asked[start : start + _CHUNK]
        near = (vectors[[whole[word] for word in some]] @ vectors[places].T).topk(min(_NEIGHBOURS + 1, len(names)), dim=1).indices.tolist()
        found |= {word: [names[i] for i in order if names[i] != word][:_NEIGHBOURS] for word, order in zip(some, near, strict=True)}
    return {word: others for word, others in found.items() if others}
