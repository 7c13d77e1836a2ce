"""What a teacher says about rows: logits once and for all, hidden states and attention beside the student."""

from __future__ import annotations

import os
import tokenize
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import batches, checkpoint, training

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.family import Family
    from onnxsqueeze.nn.precision import Precision
    from onnxsqueeze.stage import Context

_LOGITS_FILE = "teacher_logits.npy"


def load(teacher: Path, parent: Path, context: Context, *, eager_attention: bool = False) -> tuple[PreTrainedModel, Family]:
    """The teacher on the training device, in evaluation mode, without gradients.

    Raises StageError where its tokenizer is not the student's: the two would not see the same tokens.
    """
    if (teacher / "tokenizer.json").read_bytes() != (parent / "tokenizer.json").read_bytes():
        raise StageError(
            f"{teacher.name}: its tokenizer.json is not that of {parent.name}", remedy="name a teacher that shares the student's tokenizer"
        )
    model, family = checkpoint.load(teacher, context.task, eager_attention=eager_attention)
    training.place(model.requires_grad_(requires_grad=False))
    return model, family


def logits(model: PreTrainedModel, family: Family, examples: batches.Examples, precision: Precision, context: Context) -> torch.Tensor:
    """The teacher's logits ``[rows, outputs]`` on all training rows, computed once and kept in ``context.checkpoint``.

    A kept file that cannot be read is made again, and the progress says so.
    """
    file = context.checkpoint / _LOGITS_FILE
    known = file.is_file()
    kept = _read(file) if known else None
    if kept is None:
        note = "the teacher's logits, anew: the saved ones could not be read" if known else "the teacher's logits"
        torch.set_num_threads(context.threads)
        found = training.predict(
            model,
            family,
            examples,
            precision=training.effective_precision(precision),
            progress=lambda done, total: context.progress(done, total, note),
        )
        draft = file.with_suffix(".draft")
        with draft.open("wb") as handle:
            np.save(handle, found, allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)
        kept = found
    return torch.from_numpy(kept).to(training.device())


def _read(file: Path) -> NDArray[np.float32] | None:
    """The kept logits; None where the file is cut short or is something else."""
    try:
        found: NDArray[np.float32] = np.load(file, allow_pickle=False)
    except (EOFError, ValueError, tokenize.TokenError, zipfile.BadZipFile):  # what np.load raises for these
        return None
    return found
