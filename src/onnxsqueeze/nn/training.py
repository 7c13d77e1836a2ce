"""The training loop: one, for every stage that trains. What differs is the loss, and what happens after a step.

An epoch is a function of the state before it and of (seed, epoch): the random generator is set anew from these two, so that a
training resumed from the last finished epoch ends in the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from onnxsqueeze.environment import processors
from onnxsqueeze.errors import MeasureError, StageError
from onnxsqueeze.nn.batches import Examples, by_length, epoch_order
from onnxsqueeze.nn.family import Family, embedding_weights
from onnxsqueeze.nn.precision import Precision, effective
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.stage import Context
from onnxsqueeze.tokens import pad

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CLIP = 1.0  # largest norm of all gradients together; Devlin et al. 2019's code
_EVALUATION_BATCH = 64
_STATE_FILE = "training.pt"
# What zipfile and torch.load raise for files cut short, zeroed, overwritten or of something else; found by
# damaging real ones thousands of times. The check sums come first, so torch never sees what it would read as wrong numbers.
_UNREADABLE = (OSError, EOFError, LookupError, ValueError, RuntimeError, zlib.error, pickle.UnpicklingError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Batch:
    """One step's rows: their positions among the training rows, the model's inputs, their labels; all on the training device."""

    index: Tensor
    inputs: dict[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Outcome:
    """What training did: one entry an epoch, the epoch that was kept, where it took up again, and why it started anew instead."""

    history: tuple[dict[str, Any], ...]
    best_epoch: int
    precision: Literal["fp32", "bf16"]
    device: str
    resumed_at_epoch: int | None
    restarted: str | None = None
    rows: int = 0  # that an epoch trained on
    unlabelled: int = 0  # of these, those without a label

    @property
    def best_score(self) -> float:
        """On the selection rows, of the epoch that was kept."""
        return float(self.history[self.best_epoch - 1]["score"])

    def details(self) -> dict[str, Any]:
        """For the record."""
        speed = self.rows * len(self.history) / sum(epoch["seconds"] for epoch in self.history)
        found = {"history": list(self.history), "best_epoch": self.best_epoch, "precision": self.precision, "device": self.device}
        made_on = {**processors(), "torch": str(torch.__version__)}
        unlabelled = {"rows_without_labels": self.unlabelled} if self.unlabelled else {}
        return found | {"trained_rows": self.rows, **unlabelled, "rows_per_second": round(speed, 1), "made_on": made_on} | self.again()

    def again(self) -> dict[str, Any]:
        """Where it took up, or why it began anew; empty where nothing had interrupted it."""
        found = {"resumed_at_epoch": self.resumed_at_epoch, "restarted": self.restarted}
        return {name: value for name, value in found.items() if value is not None}


def device() -> torch.device:
    """The GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(model: nn.Module) -> None:
    """Move a model to `device`."""
    model.to(device())


def effective_precision(wanted: Precision) -> Literal["fp32", "bf16"]:
    """The precision that training has here."""
    return effective(wanted, cuda=torch.cuda.is_available())


def autocast(format_: Literal["fp32", "bf16"]) -> torch.autocast:
    """A context in which matrix products run in ``format_``."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=format_ == "bf16")


def predict(
    model: nn.Module,
    family: Family,
    examples: Examples,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Logits ``[rows, outputs]`` in the rows' order, in evaluation mode. The model must be on `device` and stays in its mode."""
    was_training = model.training
    model.eval()
    parts = []
    batches = by_length([len(row) for row in examples.encoded], _EVALUATION_BATCH)
    with torch.inference_mode(), autocast(precision):
        for i, rows in enumerate(batches):
            parts.append(model(**inputs(family, examples, rows)).logits.float().cpu().numpy())
            if progress:
                progress(i + 1, len(batches))
    model.train(was_training)
    ordered: NDArray[np.float32] = np.empty((len(examples), parts[0].shape[1]), np.float32)
    ordered[np.concatenate([np.array(rows) for rows in batches])] = np.concatenate(parts)
    return ordered


def train(
    model: nn.Module,
    family: Family,
    settings: TrainingSettings,
    context: Context,
    *,
    examples: Examples,
    selection: Examples,
    loss: Callable[[Batch], Tensor],
    companion: nn.Module | None = None,
    after_step: Callable[[int], None] | None = None,
    first_epoch_to_keep: int = 1,
    scored: Callable[[], float | None] | None = None,
) -> Outcome:
    """Minimise ``loss``, which runs the model itself; leave in ``model`` the weights of the epoch that scored best on the selection rows.

    ``companion`` is trained and checkpointed beside the model and not part of the result (projections, masks). ``after_step`` gets the
    number of finished steps, and finds the step's gradients. Epochs count from 1; those before ``first_epoch_to_keep`` are never kept. Ties go to the earlier epoch.
    ``scored`` scores an epoch where the model's own logits on the selection rows do not say all.
    Resumes at the last finished epoch found in ``context.checkpoint``; a saved state that cannot be read is deleted and training starts anew.

    Raises StageError when the loss is no longer finite, when no epoch that may be kept has a score, or when there is no compiler for ``compiled``.
    """
    torch.set_num_threads(context.threads)
    format_ = effective_precision(settings.precision)
    companion = companion or nn.Module()
    place(model)
    place(companion)
    if settings.freeze_embeddings:
        for name in embedding_weights(model, family):
            model.get_parameter(name).requires_grad = False
    if settings.compiled:
        _compile(model, settings)
    optimizer = torch.optim.AdamW(_parameter_groups(model, companion, settings.weight_decay), lr=settings.learning_rate, fused=True)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    total = per_epoch * settings.epochs
    lengths = [len(row) for row in examples.encoded]
    labels = torch.tensor(examples.labels, device=device())

    state_file = context.checkpoint / _STATE_FILE
    state, restarted = _State(), None
    if state_file.is_file():
        try:
            state = _State.read(state_file)
        except _UNREADABLE:
            state_file.unlink()
            restarted = "the saved state could not be read"
    state.restore(model, companion, optimizer)
    resumed_at = state.epoch + 1 if 0 < state.epoch < settings.epochs else None

    with torch.random.fork_rng():
        for epoch in range(state.epoch + 1, settings.epochs + 1):
            started = time.perf_counter()
            torch.manual_seed(context.seed * 1_000_003 + epoch)
            model.train()
            companion.train()
            summed, seen = 0.0, 0
            for i, rows in enumerate(epoch_order(lengths, settings.batch_size, context.seed, epoch)):
                step = (epoch - 1) * per_epoch + i
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * rate(step, total, settings.warmup)
                with autocast(format_):
                    value = loss(Batch(torch.tensor(rows), inputs(family, examples, rows), labels[rows]))
                number = value.item()
                if not math.isfinite(number):
                    raise StageError(
                        f"{settings.name}: the loss is {number} at step {step + 1} of {total} (epoch {epoch})",
                        remedy="lower learning_rate, raise warmup, or set precision: fp32",
                    )
                value.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_([*model.parameters(), *companion.parameters()], _CLIP)
                optimizer.step()
                if after_step:
                    after_step(step + 1)
                optimizer.zero_grad()
                summed += number * len(rows)
                seen += len(rows)
                context.progress(step + 1, total, f"epoch {epoch}/{settings.epochs}, loss {summed / seen:.3g}")
            reached = scored() if scored else score(model, family, selection, context)
            state.add(
                {
                    "epoch": epoch,
                    "loss": summed / len(examples),
                    "score": reached,
                    "seconds": time.perf_counter() - started,
                },
                model,
                keep=epoch >= first_epoch_to_keep,
            )
            state.write(state_file, model, companion, optimizer)

    if state.history[state.best_epoch - 1]["score"] is None:
        state_file.unlink()  # or it would be found, and fail, again
        raise StageError(
            f"{settings.name}: none of the epochs {first_epoch_to_keep} to {settings.epochs} has a score on the selection rows:"
            " the logits, or the metric, are not finite",
            remedy="lower learning_rate, raise warmup, or set precision: fp32",
        )
    model._compiled_call_impl = None  # torch has no public way back
    model.load_state_dict(state.best)
    model.to("cpu").eval()
    return Outcome(tuple(state.history), state.best_epoch, format_, device().type, resumed_at, restarted, len(examples))


def _compile(model: nn.Module, settings: TrainingSettings) -> None:
    """Let calls of ``model`` run as compiled code, for batches of any shape. Raises StageError where there is no compiler for it."""
    if device().type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        raise StageError(f"{settings.name}: compiled: torch.compile found no C++ compiler", remedy="install g++, or leave `compiled` out")
    model.compile(dynamic=True)


def rate(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor at ``step`` (from 0): rises linearly to 1 in the first ``warmup`` of ``total`` steps, then falls to 0."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (total - step) / (total - rising)


class _State:
    """What is known after a finished epoch, and all that the next one needs."""

    def __init__(self) -> None:
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self._saved: dict[str, Any] | None = None

    @classmethod
    def read(cls, file: Path) -> _State:
        """The state in ``file``. Raises one of `_UNREADABLE` where it is damaged, also where torch alone would read wrong numbers from it."""
        with zipfile.ZipFile(file) as entries:
            if entries.testzip() is not None:
                raise zipfile.BadZipFile
        saved = torch.load(file, map_location="cpu", weights_only=True)
        state = cls()
        state._saved = saved
        state.epoch, state.history, state.best_epoch = saved["epoch"], saved["history"], saved["best_epoch"]
        state.best = saved["model"] if saved["best"] is None else saved["best"]  # stored once where the last epoch is the best
        return state

    def restore(self, model: nn.Module, companion: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self._saved is not None:
            model.load_state_dict(self._saved["model"])
            companion.load_state_dict(self._saved["companion"])
            optimizer.load_state_dict(self._saved["optimizer"])
            self._saved = None

    def add(self, entry: dict[str, Any], model: nn.Module, *, keep: bool) -> None:
        """Count an epoch, and keep its weights where it may be kept and is better than those kept so far."""
        best_score = self.history[self.best_epoch - 1]["score"] if self.best_epoch else None
        better = not self.best_epoch or (entry["score"] is not None and (best_score is None or entry["score"] > best_score))
        self.epoch = entry["epoch"]
        self.history.append(entry)
        if keep and better:
            self.best_epoch = self.epoch
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def write(self, file: Path, model: nn.Module, companion: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Replace ``file`` in one step: a killed process leaves the old one or the new one."""
        draft = file.with_suffix(".draft")
        with draft.open("wb") as handle:
            torch.save(
                {
                    "epoch": self.epoch,
                    "history": self.history,
                    "best_epoch": self.best_epoch,
                    "best": None if self.best_epoch == self.epoch else self.best,
                    "model": model.state_dict(),
                    "companion": companion.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                handle,
            )
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)


def score(model: nn.Module, family: Family, selection: Examples, context: Context) -> float | None:
    """The model's score on the selection rows; None where its logits, or the metric, are not finite. Moves the model to `device`."""
    place(model)
    logits = predict(model, family, selection)
    try:
        found = context.select(logits)
    except MeasureError:
        if np.isfinite(logits).all():
            raise
        return None
    return found if math.isfinite(found) else None


def inputs(family: Family, examples: Examples, rows: Sequence[int]) -> dict[str, Tensor]:
    """What a model of ``family`` reads for these rows, on the training device: ``{name: [batch, tokens] int64}``, padded to the longest."""
    arrays = pad([examples.encoded[i] for i in rows], examples.pad_id)
    return {name: torch.from_numpy(arrays[name]).to(device()) for name in family.inputs()}


def _parameter_groups(model: nn.Module, companion: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in (*model.parameters(), *companion.parameters()) if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
