"""The ranges to which activations are quantized, out of what they hold on training rows.

Rows come in batches that are padded to one length; of a batch's activations no more than `BUDGET_BYTES` are held at a time, and of a tensor's values only its
extremes or a histogram. ONNX Runtime's own calibrators keep every activation of every row, its entropy calibrator has as many bins as steps and so changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxsqueeze import graph
from onnxsqueeze.stages import calibration

if TYPE_CHECKING:
    import onnx

Method = Literal["minmax", "moving-average", "entropy", "percentile"]
Range = tuple[float, float]
Activations = Mapping[str, NDArray[np.float32]]

BUDGET_BYTES = 512 << 20
BINS = 2048
_STEPS = 256  # of a quantized activation
_CANDIDATES = 128  # thresholds that entropy tries
FLOOR = 1e-6  # of a probability: where all of a bin is cut off, and the divergence would be infinite


class Watch:
    """A model in a session without optimization that gives out some of its tensors."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str], scratch: Path, threads: int) -> None:
        from onnx import TensorProto, helper

        opened = type(model).FromString(model.SerializeToString())
        there = {output.name for output in opened.graph.output}
        opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in there)
        self._session = calibration.session(graph.save(opened, scratch), threads, optimized=False)
        self._names = list(names)

    def __call__(self, feeds: Iterable[Mapping[str, NDArray[Any]]]) -> Iterator[Activations]:
        """What the tensors hold, for one part of a batch after the other."""
        row_bytes = 0
        for feed in feeds if self._names else ():
            rows = len(feed["input_ids"])
            at_once = min(rows, max(1, BUDGET_BYTES // row_bytes)) if row_bytes else 1
            for start in range(0, rows, at_once):
                part = {name: values[start : start + at_once] for name, values in feed.items()}
                values = dict(zip(self._names, self._session.run(self._names, part), strict=True))
                yield values
                row_bytes = sum(one.nbytes for one in values.values()) // len(part["input_ids"])


def ranges(run: Callable[[], Iterable[Activations]], method: Method, percentile: float) -> dict[str, Range]:
    """Tensor → (low, high) with low ≤ 0 ≤ high; ``run`` gives the activations, each time from the first row on.

    minmax: the smallest and the largest value. moving-average: the means over rows of the smallest and the largest value of each. percentile: the part of the values that is named, in per
    cent, with as much cut off at either end. entropy: ± a threshold, within minmax, such that the distribution in `_STEPS` steps diverges least from what was seen (`entropy`).
    """
    extremes: dict[str, list[Range]] = {}
    for values in run():
        for name, one in values.items():
            per_row = one.reshape(len(one), -1)
            extremes.setdefault(name, []).extend(zip(per_row.min(1).tolist(), per_row.max(1).tolist(), strict=True))
    whole = {name: (min(low for low, _ in found), max(high for _, high in found)) for name, found in extremes.items()}
    if method == "minmax":
        found = whole
    elif method == "moving-average":
        found = {
            name: (float(np.mean([low for low, _ in seen])), float(np.mean([high for _, high in seen]))) for name, seen in extremes.items()
        }
    else:
        counts = _histograms(run(), whole)
        found = {
            name: narrowed(counts[name], *whole[name], percentile) if method == "percentile" else entropy(counts[name], *whole[name])
            for name in whole
        }
    return {name: (min(low, 0.0), max(high, 0.0)) for name, (low, high) in found.items()}


def _histograms(activations: Iterable[Activations], whole: Mapping[str, Range]) -> dict[str, NDArray[np.int64]]:
    """`BINS` counts of each tensor between its extremes."""
    found = {name: np.zeros(BINS, np.int64) for name in whole}
    for values in activations:
        for name, one in values.items():
            found[name] += np.histogram(one, BINS, whole[name])[0]
    return found


def narrowed(counts: NDArray[np.int64], low: float, high: float, percentile: float) -> Range:
    """The ends between which ``percentile`` % of the values lie, as much outside at either end, to a bin; ``counts[bins]`` lie between ``low`` and ``high``."""
    below = np.cumsum(counts)
    cut = int(below[-1]) * (100 - percentile) / 200
    edges = np.linspace(low, high, len(counts) + 1)
    first, last = (
        int(np.searchsorted(below, values - 1e-6)) for values in (max(cut, 1), int(below[-1]) - cut)
    )  # a whole value, whatever floats make of it
    return float(edges[first]), float(edges[last + 1])


def entropy(counts: NDArray[np.int64], low: float, high: float) -> Range:
    """The range ± t, cut to ``low`` … ``high``, that loses least information when what lies within is told by `_STEPS` values and what lies beyond by the ends.

    Information is the Kullback-Leibler divergence of the two histograms. Source: Migacz 2017, "8-bit Inference with TensorRT", entropy calibration.
    """
    edges = np.linspace(low, high, len(counts) + 1)
    furthest = max(abs(low), abs(high))
    best, least = (low, high), np.inf
    for i in range(1, _CANDIDATES + 1):
        threshold = furthest * i / _CANDIDATES
        first = max(0, int(np.searchsorted(edges, -threshold, side="right")) - 1)
        last = min(len(counts), int(np.searchsorted(edges, threshold)))
        if last - first < _STEPS:
            continue
        lost = _divergence(counts, first, last)
        if lost < least:
            best, least = (float(edges[first]), float(edges[last])), lost
    return best


def _divergence(counts: NDArray[np.int64], first: int, last: int) -> float:
    """Kullback-Leibler: of ``counts`` with all beyond ``first`` … ``last`` at the ends, from the same bins told by `_STEPS` values."""
    inside = counts[first:last].astype(np.float64)
    seen = inside.copy()
    seen[0] += counts[:first].sum()
    seen[-1] += counts[last:].sum()
    step = np.arange(last - first) * _STEPS // (last - first)
    filled = inside > 0
    total = np.bincount(step, inside, _STEPS)
    bins = np.bincount(step, filled, _STEPS)
    told = np.where(filled, (total / np.maximum(bins, 1))[step], 0.0)
    if told.sum() == 0:
        return float("inf")
    p, q = seen / seen.sum(), told / told.sum()
    held = p > 0
    return float((p[held] * np.log(p[held] / np.maximum(q[held], FLOOR))).sum())
