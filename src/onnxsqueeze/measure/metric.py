"""A task's metrics through the .onnx itself, on its backend, with intervals and a paired comparison with the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxsqueeze.artifact import MODEL_FILE
from onnxsqueeze.backends import HERE, Answers
from onnxsqueeze.errors import MeasureError
from onnxsqueeze.results import MetricDelta, MetricValue
from onnxsqueeze.stage import Progress
from onnxsqueeze.tasks.rows import SplitRows, TaskInfo
from onnxsqueeze.tokens import Encoder, pad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TELL_EVERY = 50  # calls between two reports of progress


def predict(
    folder: Path,
    backend: str,
    split: SplitRows,
    max_length: int,
    batch: int,
    threads: int,
    progress: Progress,
    *,
    opener: Callable[[str, Path, int], Answers] = HERE.open,
    onnx: Path | None = None,
) -> NDArray[np.float32]:
    """``logits[rows, outputs]`` of every row in the file's order, ``batch`` rows a call, each padded to the longest of its call.

    Outputs of dynamically quantized models depend on what shares a call, so this is how the model is to be served: at batch 1 nothing
    is padded. ``onnx`` is the file where it does not lie in ``folder``. Raises MeasureError where the logits are not [batch, outputs] or not finite.
    """
    import numpy as np

    encoder = Encoder(folder, max_length)
    rows = encoder.encode([row.text for row in split.rows], [row.text_pair for row in split.rows])
    found: list[NDArray[np.float32]] = []
    with closing(opener(backend, onnx or folder / MODEL_FILE, threads)) as session:
        for call, at in enumerate(range(0, len(rows), batch)):
            part = rows[at : at + batch]
            logits = session.run(pad(part, encoder.pad_id))
            if logits.ndim != 2 or len(logits) != len(part) or (found and logits.shape[1] != found[0].shape[1]):
                raise MeasureError(
                    f"{folder.name}/{MODEL_FILE}: logits of {len(part)} rows have shape {list(logits.shape)}, expected [{len(part)}, outputs]",
                    remedy="export the model with a classification head",
                )
            if not np.isfinite(logits).all():
                first = at + int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
                raise MeasureError(
                    f"{folder.name}/{MODEL_FILE}: row {first + 1} of {split.name} gives logits that are not finite",
                    remedy="a number overflowed: leave out float16 or use another calibration",
                )
            found.append(logits)
            if call % _TELL_EVERY == 0:
                progress(at, len(rows))
    progress(len(rows), len(rows))
    return np.concatenate(found)


def evaluate(info: TaskInfo, logits: NDArray[np.float32], labels: Sequence[int | float]) -> dict[str, MetricValue]:
    """Each metric of the task with its 95 % interval: Wilson's for accuracy, the percentile bootstrap over rows for the others."""
    import numpy as np

    from onnxsqueeze.measure import statistics
    from onnxsqueeze.tasks.metrics import scores

    n, found = len(labels), {}
    for metric, value in scores(info, logits, labels).items():
        if metric == "accuracy":
            interval = statistics.wilson(int((logits.argmax(axis=1) == np.asarray(labels)).sum()), n)
        else:
            (resampled,) = _resampled(info, metric, labels, logits)
            interval = statistics.percentile_interval(resampled)
        found[metric] = MetricValue(value=value, ci95=interval, n=n)
    return found


def compare(
    info: TaskInfo, target: NDArray[np.float32], baseline: NDArray[np.float32], labels: Sequence[int | float]
) -> dict[str, MetricDelta]:
    """Each metric's target - baseline on the same rows, with its 95 % interval and p-value.

    Accuracy: Bonett and Price's interval and McNemar's exact test. The others: both models on the same bootstrap resamples.
    ``target`` and ``baseline`` are ``logits[rows, outputs]``.
    """
    import numpy as np

    from onnxsqueeze.measure import statistics
    from onnxsqueeze.tasks.metrics import scores

    ours, theirs = scores(info, target, labels), scores(info, baseline, labels)
    found = {}
    for metric, value in ours.items():
        if metric == "accuracy":
            right, was_right = (logits.argmax(axis=1) == np.asarray(labels) for logits in (target, baseline))
            gained, lost = int((right & ~was_right).sum()), int((was_right & ~right).sum())
            interval, p_value = statistics.paired_share_interval(gained, lost, len(labels)), statistics.mcnemar(gained, lost)
        else:
            after, before = _resampled(info, metric, labels, target, baseline)
            differing = int((_answers(info, target) != _answers(info, baseline)).sum())
            interval, p_value = statistics.percentile_interval(after - before), statistics.sign_p_value(after - before, differing)
        found[metric] = MetricDelta(delta=value - theirs[metric], ci95=interval, p_value=p_value)
    return found


def quality(delta: MetricDelta) -> Literal["better", "worse", "tie"]:
    """Better or worse where the whole interval lies on one side of 0 and p < 0.05; else a tie."""
    low, high = delta.ci95
    if delta.p_value >= 0.05 or low <= 0 <= high:
        return "tie"
    return "better" if low > 0 else "worse"


def _answers(info: TaskInfo, logits: NDArray[np.float32]) -> NDArray[Any]:
    return logits.argmax(axis=1) if info.labels else logits[:, 0]


def _resampled(info: TaskInfo, metric: str, labels: Sequence[int | float], *models: NDArray[np.float32]) -> tuple[NDArray[np.float64], ...]:
    """The metric of each model on the same resamples of the rows."""
    import numpy as np

    from onnxsqueeze.measure import statistics

    if info.labels:
        return statistics.resampled_class_metric(
            metric, np.asarray(labels, np.int64), tuple(m.argmax(axis=1) for m in models), info.outputs, info.positive_index
        )
    return statistics.resampled_correlation(metric, np.asarray(labels, np.float64), tuple(m[:, 0].astype(np.float64) for m in models))
