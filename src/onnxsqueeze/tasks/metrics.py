"""The figures of a task: its metrics over logits and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onnxsqueeze.errors import MeasureError
from onnxsqueeze.tasks.rows import TaskInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def said(info: TaskInfo, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a model says of each row, ``[n, outputs]``: its logits; of one that embeds, the cosine of each pair's vectors.

    ``outputs`` are those of `onnxsqueeze.tasks.rows.as_read`'s rows.
    """
    if not info.embeds:
        return outputs
    import numpy as np

    first, second = (outputs[start::2].astype(np.float64) for start in (0, 1))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # a vector of zeros: not finite, and an error where it is scored
        cosines: NDArray[np.float32] = ((first * second).sum(1) / lengths)[:, None].astype(np.float32)
    return cosines


def scores(info: TaskInfo, logits: NDArray[np.float32], labels: Sequence[int | float] | NDArray[Any]) -> dict[str, float]:
    """Every metric of the task, in its order, as fractions (correlations as they are).

    ``logits[n, outputs]`` in the rows' order; the class is the largest logit (the first of equals). f1 is that of
    ``info.positive``. Matthews of one predicted class, a correlation of constant values and f1 of a class that is nowhere are 0.0.
    Raises MeasureError where the shape does not fit or a logit is not finite.
    Source: sklearn.metrics.f1_score and matthews_corrcoef; scipy.stats.pearsonr and spearmanr.
    """
    return {metric: _score(info, metric, *_checked(info, logits, labels)) for metric in info.metrics}


def primary(info: TaskInfo, logits: NDArray[np.float32], labels: Sequence[int | float] | NDArray[Any]) -> float:
    """The one metric that decides; see `scores`."""
    return _score(info, info.primary, *_checked(info, logits, labels))


def _checked(
    info: TaskInfo, logits: NDArray[np.float32], labels: Sequence[int | float] | NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(truth, prediction), one value a row."""
    import numpy as np

    truth = np.asarray(labels)
    if logits.shape != (len(truth), info.outputs) or not len(truth):
        raise MeasureError(
            f"task {info.name}: logits must have the shape ({len(truth)}, {info.outputs}) and a row at least, got {logits.shape}"
        )
    if not np.isfinite(logits).all():
        rows = int((~np.isfinite(logits).all(axis=1)).sum())
        raise MeasureError(
            f"task {info.name}: {rows} of {len(truth)} rows have logits that are not finite",
            remedy="lower the learning rate, or leave the layer that overflows in float32",
        )
    return truth, logits[:, 0].astype(np.float64) if info.kind == "regression" else logits.argmax(axis=1)


def _score(info: TaskInfo, metric: str, truth: NDArray[Any], prediction: NDArray[Any]) -> float:
    if metric == "accuracy":
        return float((truth == prediction).mean())
    if metric in ("f1", "matthews"):
        from sklearn.metrics import f1_score, matthews_corrcoef

        if metric == "matthews" and (truth.min() == truth.max() or prediction.min() == prediction.max()):
            return 0.0
        if metric == "matthews":
            return float(matthews_corrcoef(truth, prediction))
        return float(f1_score(truth, prediction, pos_label=info.positive_index, zero_division=0.0))
    if metric in ("pearson", "spearman"):
        from scipy.stats import pearsonr, spearmanr

        if truth.min() == truth.max() or prediction.min() == prediction.max():
            return 0.0
        return float((pearsonr if metric == "pearson" else spearmanr)(truth, prediction)[0])
    raise MeasureError(f"unknown metric {metric!r}")
