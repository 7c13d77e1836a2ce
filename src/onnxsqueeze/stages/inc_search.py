"""A search among neural-compressor's configurations, by one of its strategies: every trial is scored and noted here, and the best picked.

What `neural_compressor.quantization.fit` returns is not asked: with a time limit it need not be the best trial, and with SmoothQuant not one that
meets the goal.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze import graph, weights
from onnxsqueeze.artifact import MODEL_FILE, Artifact, copy_side_files, file_sha256
from onnxsqueeze.errors import MeasureError, StageError
from onnxsqueeze.stage import Context
from onnxsqueeze.stages.scoring import selection_score

if TYPE_CHECKING:
    import onnx

_WORST = -1.0  # no metric is lower; neural-compressor wants a number for what cannot be scored
_REMEDY = "raise max_drop_pp, max_trials or tune_seconds, or search otherwise: another tune, approach or smooth"
_ADVANTAGES = ("has fewer weights in float", "has more operators in integers", "scores higher", "is as good, and came first")


@dataclass(frozen=True)
class Trial:
    """One configuration as it was written and scored. ``score`` is None where it could not be, and ``fault`` says why."""

    number: int
    operators: Mapping[str, str]  # those in integers: name → type, as neural-compressor has them before it quantizes
    settings: Mapping[str, int]  # how many of them have which ranges and scales
    float_weights: int
    digest: str
    score: float | None
    fault: str
    seconds: float

    @property
    def rank(self) -> tuple[float, ...]:
        """The larger, the better: see `_ADVANTAGES`."""
        return (-self.float_weights, len(self.operators), _WORST if self.score is None else self.score, -self.number)


class Search:
    """The ``eval_func`` of one search: takes each model that is tried, finishes and scores it, and keeps the best that meets the goal in ``folder``.

    Best is what has fewest weights in float, then most operators in integers, then the highest score; of equals the first. The goal is met by
    a trial that scores at most ``max_drop_pp`` points less than ``before``, the float parent. After ``seconds`` no further trial begins.
    """

    def __init__(
        self,
        name: str,
        parent: Artifact,
        finish: Callable[[onnx.ModelProto], None],
        context: Context,
        *,
        folder: Path,
        max_drop_pp: float,
        seconds: float | None,
    ) -> None:
        self._name, self._parent, self._finish, self._context, self._folder = name, parent, finish, context, folder
        self.max_drop_pp, self._seconds = max_drop_pp, seconds
        self._terminal = sys.stderr
        self.before = selection_score(parent.path, context)
        self.best: Trial | None = None
        self.trials: list[Trial] = []
        self.tried: Mapping[Any, Any] = {}  # neural-compressor's configuration of the next trial
        self._asked_before = False
        self._start = self._last = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self._seconds is not None and time.monotonic() - self._start >= self._seconds

    def __call__(self, model: onnx.ModelProto) -> float:
        """The score of ``model``; asked first for that of the float parent."""
        if not self._asked_before:
            self._asked_before = True
            return self.before
        folder = self._folder / f"trial-{len(self.trials) + 1}"
        folder.mkdir()
        trial = self._tried_in(folder, model)
        self.trials.append(trial)
        if self._meets(trial) and (self.best is None or trial.rank > self.best.rank):
            if self.best is not None:
                shutil.rmtree(self._folder / f"trial-{self.best.number}")
            self.best = trial
        else:
            shutil.rmtree(folder)
        return _WORST if trial.score is None else trial.score

    def take(self, out: Path) -> dict[str, Any]:
        """Move the best trial's files to ``out``: the search for the record. Raises StageError, with the nearest trial, where none met the goal."""
        if self.best is None:
            raise StageError(f"{self._name}: {self._missed()}", remedy=_REMEDY)
        for path in (self._folder / f"trial-{self.best.number}").iterdir():
            path.rename(out / path.name)
        noted = [self._noted(trial, before) for trial, before in zip(self.trials, [None, *self.trials[:-1]], strict=True)]
        return {"selection_before": self.before, "selection_after": self.best.score, "trials": noted}

    def _tried_in(self, folder: Path, model: onnx.ModelProto) -> Trial:
        import onnx

        made = onnx.ModelProto()
        made.CopyFrom(model)  # neural-compressor goes on with its own
        self._finish(made)
        operators = dict(sorted(_in_integers(made)))
        written = graph.save(made, folder)
        copy_side_files(self._parent.path, folder)
        digest, number = file_sha256(written), len(self.trials) + 1
        score, fault = self._scored(folder, digest, number)
        now = time.monotonic()
        took, self._last = now - self._last, now
        return Trial(number, operators, _settings(self.tried, operators), _float_weights(written), digest, score, fault, took)

    def _scored(self, folder: Path, digest: str, number: int) -> tuple[float | None, str]:
        """(score, why there is none); the score of a file that was tried before is known."""
        if not weights.integers(folder / MODEL_FILE):
            return None, "no weight is in integers"
        for trial in self.trials:
            if trial.digest == digest:
                return trial.score, trial.fault
        progress = self._context.progress
        context = replace(self._context, progress=lambda done, total, note="": progress(done, total, note or f"trial {number}"))
        try:
            with redirect_stderr(self._terminal):  # progress is for the user, what neural-compressor says is not
                return selection_score(folder, context), ""
        except MeasureError as error:
            return None, error.message

    def _meets(self, trial: Trial) -> bool:
        return trial.score is not None and trial.score >= self.before - self.max_drop_pp / 100  # as neural-compressor computes it

    def _noted(self, trial: Trial, before: Trial | None) -> dict[str, Any]:
        last = trial.operators if before is None else before.operators
        return {
            "trial": trial.number,
            "quantized": dict(sorted(Counter(trial.operators.values()).items())),
            "to_float": [name for name in last if name not in trial.operators],
            "to_integers": [name for name in trial.operators if name not in last],
            "settings": dict(trial.settings),
            "float_weights": trial.float_weights,
            "score": trial.score,
            "seconds": round(trial.seconds, 3),
            "kept": trial is self.best,
            "why": self._why(trial),
        }

    def _why(self, trial: Trial) -> str:
        same = next(other for other in self.trials if other.digest == trial.digest)
        if same is not trial:
            return f"the same file as trial {same.number}"
        if trial.score is None:
            return trial.fault
        lost = f"loses {100 * (self.before - trial.score):.2f} points"
        if not self._meets(trial):
            return f"{lost}, more than {self.max_drop_pp:g}"
        if self.best is None or trial is self.best:
            return f"{lost} of at most {self.max_drop_pp:g}"
        place = next(i for i, (one, other) in enumerate(zip(self.best.rank, trial.rank, strict=True)) if one != other)
        return f"trial {self.best.number} {_ADVANTAGES[place]}"

    def _missed(self) -> str:
        trials = f"none of {len(self.trials)} trials" + (f" in {self._seconds:g} s" if self.over else "")
        scored = [(trial.score, -trial.number) for trial in self.trials if trial.score is not None]
        if not scored:
            return f"{trials} could be scored" + (f": {self.trials[-1].fault}" if self.trials else "")
        score, place = max(scored)
        return (
            f"{trials} scores within {self.max_drop_pp:g} points of the float model's {100 * self.before:.2f} on the selection split; "
            f"the nearest, trial {-place}, scores {100 * score:.2f}, {100 * (self.before - score):.2f} points less"
        )


@contextmanager
def watched(strategy: str) -> Iterator[None]:
    """Inside the block neural-compressor's ``strategy`` tells its eval_func, a `Search`, what it tries, and ends when that is over."""
    from neural_compressor.strategy import STRATEGIES

    plain = STRATEGIES[strategy]

    def next_tune_cfg(self: Any) -> Iterator[Any]:
        self.early_stop_sq_tuning_process = False  # with SmoothQuant it would end after one trial
        for configuration in plain.next_tune_cfg(self):
            self.eval_func.tried = configuration
            yield configuration
            if self.eval_func.over:
                self.best_tuning_cfg = None  # or it would be quantized again
                return

    STRATEGIES[strategy] = type(plain.__name__, (plain,), {"next_tune_cfg": next_tune_cfg, "_save": lambda self: None})  # noqa: ARG005, its history is for resuming
    try:
        yield
    finally:
        STRATEGIES[strategy] = plain


def _in_integers(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """(name, type) of each operator that works on integers. Source: neural-compressor's ONNXRUNTIMEAdaptor._dump_model_op_stats."""
    for node in model.graph.node:
        if node.name.endswith("_quant"):
            yield node.name.removesuffix("_quant"), node.op_type.removeprefix("QLinear").removesuffix("Integer")


def _settings(configuration: Mapping[Any, Any], operators: Mapping[str, str]) -> dict[str, int]:
    """How many of ``operators`` have which ranges and scales in neural-compressor's ``configuration``: ``{"kl per_channel": 14}``."""
    states = [setting.get_state() for key, setting in configuration.items() if key[0] in operators]  # keys: (name, type), and some words
    return dict(sorted(Counter(f"{state['activation']['algorithm']} {state['weight']['granularity']}" for state in states).items()))


def _float_weights(written: Path) -> int:
    return sum(part.n for part in weights.by_class(written) if part.class_ != "other" and part.dtype == "float32")
