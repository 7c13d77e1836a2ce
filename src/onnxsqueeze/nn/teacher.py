"""What a teacher says about rows: logits once and for all, hidden states and attention beside the student."""

from __future__ import annotations

import io
import tokenize
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from onnxsqueeze import environment
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import batches, checkpoint, training
from onnxsqueeze.tasks.rows import rows_sha256

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from onnxsqueeze.artifact import Artifact
    from onnxsqueeze.nn.family import Family
    from onnxsqueeze.nn.precision import Precision
    from onnxsqueeze.stage import Context

_LOGITS = "teacher-logits"


@dataclass(frozen=True)
class Teacher:
    """A model that teaches, the digest of its files, and the training rows as its own tokenizer reads them."""

    model: PreTrainedModel
    family: Family
    digest: str
    examples: batches.Examples

    def inputs(self, batch: training.Batch) -> dict[str, torch.Tensor]:
        """What the teacher reads for the rows of a student's batch."""
        return training.inputs(self.family, self.examples, batch.index.tolist())


def load(artifact: Artifact, context: Context, *, eager_attention: bool = False) -> Teacher:
    """The teacher on the training device, in evaluation mode, without gradients."""
    model, family = checkpoint.load(artifact.path, context.task, eager_attention=eager_attention)
    training.place(model.requires_grad_(requires_grad=False))
    return Teacher(model, family, artifact.digest, batches.encode(artifact.path, context.train.rows, context.task.max_length))


def require_same_tokens(name: str, settings: Sequence[str], folder: Path, parent: Path, context: Context) -> None:
    """Raise StageError where the teacher's tokens are not the student's, which losses token by token (``settings`` weigh them) need."""
    rows = context.train.rows
    differ = batches.cut_otherwise(folder, parent, rows, context.task.max_length)
    if differ:
        raise StageError(
            f"{name}: {', '.join(settings)}: the teacher's tokenizer cuts {differ} of {len(rows)} training rows into other tokens than the student's",
            remedy=f"set {' and '.join(f'{setting}: 0' for setting in settings)} (logits alone need no equal tokens), or keep the pieces of the "
            "training rows where the vocabulary is pruned (min_count: 1 and no size)",
        )


def logits(teacher: Teacher, precision: Precision, context: Context) -> torch.Tensor:
    """The teacher's logits ``[rows, outputs]`` on all training rows, computed once for all stages that it teaches on the same rows.

    Kept ones that cannot be read are made again, and the progress says so.
    """
    format_ = training.effective_precision(precision)
    causes = {
        "teacher": teacher.digest,
        "rows": rows_sha256(context.train.rows),
        "max_length": context.task.max_length,
        "precision": format_,
        "attention": teacher.model.config._attn_implementation,  # its kernels round otherwise, too
        "machine": {**environment.processors(), "threads": context.threads},  # another one rounds otherwise
        "torch": torch.__version__,
    }
    kept = context.kept.measurement(_LOGITS, causes)
    found = None if kept is None else _read(kept)
    if found is None:
        note = "the teacher's logits" if kept is None else "the teacher's logits, anew: the saved ones could not be read"
        torch.set_num_threads(context.threads)
        found = training.predict(
            teacher.model,
            teacher.family,
            teacher.examples,
            precision=format_,
            progress=lambda done, total: context.progress(done, total, note),
        )
        written = io.BytesIO()
        np.save(written, found, allow_pickle=False)
        context.kept.keep_measurement(_LOGITS, causes, written.getvalue())
    return torch.from_numpy(found).to(training.device())


def _read(kept: bytes) -> NDArray[np.float32] | None:
    """The kept logits; None where they are cut short or are something else."""
    try:
        found: NDArray[np.float32] = np.load(io.BytesIO(kept), allow_pickle=False)
    except (EOFError, ValueError, tokenize.TokenError, zipfile.BadZipFile):  # what np.load raises for these
        return None
    return found
