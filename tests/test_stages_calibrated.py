from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exports import export
from onnxsqueeze import graph
from onnxsqueeze.stages import calibrated, calibration
from onnxsqueeze.stages.calibrated import Activations, Method, Watch, ranges

NAME = "/bert/encoder/layer.0/intermediate/intermediate_act_fn/Mul_1_output_0"


def of(*batches: list[list[float]]) -> Iterator[Activations]:
    return ({"x": np.array(batch, np.float32)} for batch in batches)


def one(method: Method, *batches: list[list[float]], percentile: float = 99.99) -> tuple[float, float]:
    return ranges(lambda: of(*batches), method, percentile)["x"]


def test_minmax_and_moving_average_by_hand() -> None:
    rows = [[-1.0, 4.0], [-3.0, 2.0]], [[-2.0, 6.0]]
    assert one("minmax", *rows) == (-3.0, 6.0)
    assert one("moving-average", *rows) == (-2.0, 4.0), "means of the rows' extremes, however the rows are batched"
    assert one("minmax", [[2.0, 5.0]]) == (0.0, 5.0), "0 is in every range: padding and bias need it"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(90, 100), st.sampled_from(["normal", "one-sided", "few"]))
def test_percentile_is_numpys_to_a_bin(seed: int, percentile: float, kind: str) -> None:
    random = np.random.default_rng(seed)
    drawn = random.integers(-3, 9, size=(4, 3)).astype(float) if kind == "few" else random.normal(size=(40, 50))
    values: NDArray[np.float32] = np.maximum(drawn, -0.17 if kind == "one-sided" else -np.inf).astype(np.float32)
    low, high = ranges(
        lambda: iter([{"x": values[:20]}, {"x": values[20:]}] if len(values) > 20 else [{"x": values}]), "percentile", percentile
    )["x"]
    cut = (100 - percentile) / 2
    bin_width = float(values.max() - values.min()) / calibrated.BINS
    expected = np.percentile(values, [cut, 100 - cut], method="inverted_cdf")
    assert low == pytest.approx(min(expected[0], 0), abs=1.01 * bin_width + 1e-6)
    assert high == pytest.approx(max(expected[1], 0), abs=1.01 * bin_width + 1e-6)


def test_entropy_cuts_lone_outliers_and_leaves_even_values_alone() -> None:
    random = np.random.default_rng(0)
    bulk = random.normal(size=(64, 512)).astype(np.float32)
    bulk[0, 0] = 60.0
    low, high = ranges(lambda: iter([{"x": bulk}]), "entropy", 0)["x"]
    assert 3.0 < high < 30.0
    assert -10.0 < low < -3.0
    even = random.uniform(-1, 1, size=(64, 512)).astype(np.float32)
    low, high = ranges(lambda: iter([{"x": even}]), "entropy", 0)["x"]
    assert (low, high) == pytest.approx((-1, 1), abs=0.02)


def test_entropy_takes_the_threshold_of_the_least_divergence() -> None:
    """Against the definition in plain loops, over every candidate."""
    random = np.random.default_rng(1)
    values = np.concatenate([random.normal(size=20_000), random.normal(0, 6, size=60)])
    low, high = float(values.min()), float(values.max())
    counts, edges = np.histogram(values, calibrated.BINS, (low, high))
    found = calibrated.entropy(counts.astype(np.int64), low, high)
    losses = {}
    for i in range(1, 129):
        threshold = max(-low, high) * i / 128
        inside = [k for k in range(calibrated.BINS) if edges[k + 1] > -threshold and edges[k] < threshold]
        if len(inside) < 256:
            continue
        p = counts[inside].astype(float)
        q = np.zeros(len(inside))
        groups: dict[int, list[int]] = {}
        for j in range(len(inside)):
            if counts[inside[j]]:
                groups.setdefault(j * 256 // len(inside), []).append(j)
        for filled in groups.values():
            q[filled] = sum(counts[inside[k]] for k in filled) / len(filled)
        p[0] += counts[: inside[0]].sum()
        p[-1] += counts[inside[-1] + 1 :].sum()
        p, q = p / p.sum(), q / q.sum()
        losses[edges[inside[0]], edges[inside[-1] + 1]] = sum(
            a * np.log(a / max(b, calibrated.FLOOR)) for a, b in zip(p, q, strict=True) if a
        )
    best = min(losses, key=lambda ends: losses[ends])
    assert found == pytest.approx(best)


@pytest.mark.parametrize("method", ["minmax", "moving-average", "entropy", "percentile"])
def test_a_constant_and_a_zero_tensor_have_finite_ranges(method: Method) -> None:
    assert one(method, [[0.0, 0.0]]) == (0.0, 0.0)
    low, high = one(method, [[2.5, 2.5], [2.5, 2.5]])
    assert low == 0.0
    assert high == pytest.approx(2.5, abs=0.5)


def test_a_small_budget_cuts_batches_and_gives_the_same_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, context = export(tmp_path, "bert")
    model = graph.load(parent.onnx)
    rows = list(calibration.feeds(parent.onnx, context, 24))
    (tmp_path / "scratch").mkdir()
    watch = Watch(model, [NAME], tmp_path / "scratch", 1)
    whole = ranges(lambda: watch(rows), "moving-average", 99.99)
    assert max(len(values[NAME]) for values in watch(rows)) == 8
    monkeypatch.setattr(calibrated, "BUDGET_BYTES", 2 * 15 * 128 * 4)
    assert max(len(values[NAME]) for values in watch(rows)) == 2, "two rows of 15 tokens and 128 neurons"
    cut = ranges(lambda: watch(rows), "moving-average", 99.99)
    assert cut[NAME] == pytest.approx(whole[NAME], rel=1e-5)
