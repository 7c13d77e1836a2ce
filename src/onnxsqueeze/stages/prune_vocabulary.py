"""prune-vocabulary: take rows out of the vocabulary matrix that the task never reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze import vocabulary
from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn.family import family_of
from onnxsqueeze.stage import Changed, Context, Stage, State
from onnxsqueeze.tasks.rows import Row
from onnxsqueeze.tasks.tables import read_texts


class PruneVocabulary(Stage):
    """Keeps the pieces of words that the training rows, and a corpus, are cut into; the others fall back to smaller ones, so that every text stays readable.

    Special tokens and all pieces of one character stay. tokenizer.json is written anew and travels with the model. A text whose pieces
    all stay gets the same logits, bit for bit. Source: the idea, Abdaoui et al. 2020, "Load What You Need: Smaller Versions of
    Multilingual BERT".
    """

    takes: ClassVar[tuple[State, ...]] = ("checkpoint",)
    gives: ClassVar[State] = "checkpoint"
    tools: ClassVar[tuple[str, ...]] = ("safetensors", "tokenizers", "torch", "transformers")
    uses_data: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False
    text_files: ClassVar[tuple[str, ...]] = ("corpus", "out_of_domain")

    kind: Literal["prune-vocabulary"] = "prune-vocabulary"
    min_count: int = Field(1, ge=1, description="Pieces that occur less often go, the rarest first; counted anew after each")
    size: int | None = Field(
        None, ge=1, description="Most rows that stay, with those that always do: beyond it the rarest pieces go, counted anew after each"
    )
    corpus: Path | None = Field(
        None, description="Text file, one text a line, relative to the recipe: its pieces count beside those of the training rows"
    )
    out_of_domain: Path | None = Field(
        None,
        description="Text file, one text a line, relative to the recipe: the record says what happens to these; no choice is made on them",
    )

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """``size``, where the model has no more rows than that."""
        rows = config.get("vocab_size")
        if self.size is None or not isinstance(rows, int) or self.size < rows:
            return None
        return f"size: must be below {rows}, the model's rows, got {self.size}"

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, needs no teacher
        """Write the smaller model and its tokenizer; counts the rows that the written vocabulary matrix has fewer.

        Raises StageError where ``size`` is too small, and ModelError for a tokenizer whose pieces cannot be taken out.
        """
        pieces = vocabulary.Vocabulary(parent.path, _named_ids(parent.path))
        before = checkpoint.vocabulary_rows(parent.path)
        if self.size is not None and self.size < len(pieces.always):
            raise StageError(
                f"{self.name}: size: must be at least {len(pieces.always)}, the special tokens and pieces of one character, got {self.size}",
                remedy="ask for more rows",
            )
        corpus, strange = (read_texts(path) if path else [] for path in (self.corpus, self.out_of_domain))
        context.progress(0, 3, "the words of the training rows")
        words = pieces.words(text for row in context.train.rows for text in (row.text, row.text_pair) if text is not None)
        words.update(pieces.words(corpus))
        kept = pieces.choose(words, min_count=self.min_count, size=self.size)
        rows = pieces.kept_ids(kept)
        if rows[-1] >= before:
            raise StageError(
                f"{self.name}: the tokenizer gives ids up to {rows[-1]}, and the vocabulary matrix has {before} rows",
                remedy="check that tokenizer.json belongs to these weights",
            )
        pieces.write(kept, out)
        checkpoint.save_rows(parent.path, out, rows)
        copy_side_files(parent.path, out)

        context.progress(1, 3, "what it makes of the rows")
        length = context.task.max_length
        left = checkpoint.vocabulary_rows(out)
        found: dict[str, Any] = {"rows": left, "rows_before": before, "always_kept": len(pieces.always)}
        for split in (context.train, context.selection):
            found[split.role] = self._reading(parent.path, out, ((row.text, row.text_pair) for row in split.rows), length).details()
        if strange:
            reading = self._reading(parent.path, out, ((text, None) for text in strange), length)
            found["out_of_domain"] = reading.details()
            if checkpoint.has_trained_head(parent.path):
                context.progress(2, 3, "what the model says to texts out of its domain")
                found["out_of_domain"] |= _answers(parent.path, out, strange, reading.changed, context)
        return Changed(before - left, "rows", found)

    def _reading(self, parent: Path, out: Path, rows: Iterable[tuple[str, str | None]], length: int) -> vocabulary.Reading:
        """What both tokenizers make of ``rows``. Raises StageError where the new one reads less."""
        reading = vocabulary.Reading(parent, out, length)
        reading.add(rows)
        if reading.unknown[1] > reading.unknown[0]:
            raise StageError(
                f"{self.name}: {reading.unknown[1]} tokens of {reading.texts} texts are unknown, {reading.unknown[0]} before",
                remedy="report this as a bug",
            )
        return reading


def _named_ids(folder: Path) -> set[int]:
    """Ids that must stay for the model's sake: those in its configuration, and where positions count from the padding id on, all up to that."""
    ids = checkpoint.token_ids(folder)
    counted = family_of(checkpoint.read_config(folder)["model_type"]).position_offset > 0
    return {*ids.values(), *(range(ids.get("pad_token_id", 0) + 1) if counted else ())}


def _answers(parent: Path, out: Path, texts: Sequence[str], changed: Sequence[int], context: Context) -> dict[str, float]:
    """How the model's answers moved: the share of all ``texts`` with the same class, or for a score its mean change.

    Texts whose tokens are the same have the same answer, so only those at ``changed`` are asked.
    """
    import numpy as np
    import torch

    from onnxsqueeze.nn import batches, training

    torch.set_num_threads(context.threads)
    names = tuple(name for _, name in sorted(checkpoint.id2label(parent).items()))
    task = replace(context.task, labels=names if len(names) > 1 else ())  # the model's own classes: a finetune below may give it others
    rows = [Row(texts[i], None, 0) for i in changed]
    if not rows:
        return {"same_class_pct": 100.0} if task.labels else {"mean_change": 0.0}
    logits = []
    for folder in (parent, out):
        model, family = checkpoint.load(folder, task)
        training.place(model)
        logits.append(training.predict(model, family, batches.encode(folder, rows, task.max_length)))
    if not task.labels:
        return {"mean_change": float(np.abs(logits[1] - logits[0]).sum() / len(texts))}
    other = int((logits[0].argmax(1) != logits[1].argmax(1)).sum())
    return {"same_class_pct": 100 * (1 - other / len(texts))}
