"""Intervals and tests against other libraries, hand-made figures, and how often they are right."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from crossed import first
from onnxsqueeze.measure import statistics
from onnxsqueeze.measure.statistics import (
    Floats,
    Ints,
    mcnemar,
    nearest_rank,
    paired_share_interval,
    percentile_interval,
    ratio_of_means_interval,
    ratio_of_medians_interval,
    resampled_class_metric,
    resampled_correlation,
    sign_p_value,
    wilson,
)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_wilson_agrees_with_scipy(case: tuple[int, int]) -> None:
    right, n = case
    reference = binomtest(right, n).proportion_ci(0.95, method="wilson")

    assert wilson(right, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_binomial_test_on_the_discordant_rows(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0

    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_with_few_discordant_rows_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + comb(9, 1)) / 2**9)
    assert mcnemar(4, 4) == 1.0


def test_the_interval_of_a_difference_by_hand_and_with_a_width_where_no_row_differs() -> None:
    low, high = paired_share_interval(3, 10, 198)
    middle, half = (4 - 11) / 200, 1.959964 * ((15 / 200 - 49 / 200**2) / 200) ** 0.5

    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    low, high = paired_share_interval(0, 0, 400)
    assert low == -high
    assert 0.004 < high < 0.01


def test_the_interval_of_a_difference_holds_the_truth_in_about_95_percent_of_samples() -> None:
    random = np.random.default_rng(1)
    drawn = random.multinomial(300, (0.03, 0.06, 0.91), size=2000)
    hits = [low <= -0.03 <= high for low, high in (paired_share_interval(int(g), int(w), 300) for g, w, _ in drawn)]

    assert 0.93 <= np.mean(hits) <= 0.985


def plain_bootstrap(metric: Callable[..., float], labels: Ints, predicted: Ints, n: int = 400) -> Floats:
    random = np.random.default_rng(9)
    rows = random.integers(len(labels), size=(n, len(labels)))
    return np.array([metric(labels[r], predicted[r]) for r in rows])


@first("classes", [3, 2])
def test_class_metrics_of_resamples_are_those_of_a_plain_bootstrap(classes: int) -> None:
    random = np.random.default_rng(2)
    labels = random.integers(classes, size=150)
    predicted = np.where(random.random(150) < 0.7, labels, random.integers(classes, size=150))
    for metric, reference in (("matthews", matthews_corrcoef), ("f1", f1_score), ("accuracy", lambda a, b: float((a == b).mean()))):
        if metric == "f1" and classes > 2:
            continue
        (ours,) = resampled_class_metric(metric, labels, (predicted,), classes)
        theirs = plain_bootstrap(reference, labels, predicted)
        assert ours.mean() == pytest.approx(theirs.mean(), abs=0.01)
        assert ours.std() == pytest.approx(theirs.std(), rel=0.15)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_one_draw_of_every_row_gives_the_library_s_metric(rows: list[tuple[int, int]]) -> None:
    labels, predicted = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    once = np.ones((1, len(rows)), np.int64)

    (matthews,) = statistics._class_metric("matthews", labels, predicted, once, 3)
    assert matthews == pytest.approx(matthews_corrcoef(labels, predicted), abs=1e-9)
    for positive in range(3):
        (f1,) = statistics._class_metric("f1", labels, predicted, once, 3, positive)
        assert f1 == pytest.approx(f1_score(labels == positive, predicted == positive, zero_division=0.0), abs=1e-9)


def test_f1_of_relabelled_rows_has_the_same_resampled_spread() -> None:
    random = np.random.default_rng(6)
    labels = (random.random(400) < 0.7).astype(np.int64)
    predicted = np.where(random.random(400) < 0.8, labels, 1 - labels)

    (straight,) = resampled_class_metric("f1", labels, (predicted,), 2, positive=1)
    (turned,) = resampled_class_metric("f1", 1 - labels, (1 - predicted,), 2, positive=0)
    assert percentile_interval(turned) == pytest.approx(percentile_interval(straight), abs=0.01)
    assert turned.mean() == pytest.approx(f1_score(labels, predicted), abs=0.01)
    assert abs(resampled_class_metric("f1", 1 - labels, (1 - predicted,), 2)[0].mean() - turned.mean()) > 0.1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3), st.integers(0, 3)), min_size=4, max_size=30))
@settings(max_examples=60, deadline=None)
def test_rank_correlation_of_counted_rows_is_that_of_the_rows_written_out(rows: list[tuple[int, int, int]]) -> None:
    x, y, counts = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    written = [np.repeat(values, counts.astype(int)) for values in (x, y)]
    if min(len(np.unique(values)) for values in written) < 2:
        return
    once = counts[None]

    ranked = statistics._pearson(statistics._ranks(x, once), statistics._ranks(y, once), once)
    assert ranked[0] == pytest.approx(spearmanr(*written)[0], abs=1e-9)
    plain = statistics._pearson(x[None], y[None], once)
    assert plain[0] == pytest.approx(pearsonr(*written)[0], abs=1e-9)


def test_an_answer_that_never_varies_has_no_correlation() -> None:
    labels, constant = np.arange(20.0), np.full(20, 3.0)

    for metric in ("pearson", "spearman"):
        assert not resampled_correlation(metric, labels, (constant,))[0].any()
    assert not resampled_class_metric("matthews", np.arange(20) % 2, (np.ones(20, np.int64),), 2)[0].any()


def test_both_models_stand_on_the_same_resamples_and_the_same_call_gives_the_same_numbers() -> None:
    random = np.random.default_rng(3)
    labels = random.integers(2, size=100)
    predicted = np.where(random.random(100) < 0.8, labels, 1 - labels)
    scores = labels + random.standard_normal(100)

    one, two = resampled_class_metric("matthews", labels, (predicted, predicted), 2)
    three, four = resampled_correlation("spearman", labels.astype(float), (scores, scores))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(three, four)
    np.testing.assert_array_equal(one, resampled_class_metric("matthews", labels, (predicted, predicted), 2)[0])
    np.testing.assert_array_equal(three, resampled_correlation("spearman", labels.astype(float), (scores, scores))[0])


def test_the_bootstrap_interval_holds_the_true_correlation_in_most_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    random = np.random.default_rng(4)
    hits = []
    for _ in range(120):
        x = random.standard_normal(150)
        y = 0.6 * x + 0.8 * random.standard_normal(150)
        low, high = percentile_interval(resampled_correlation("pearson", x, (y,))[0])
        hits.append(low <= 0.6 <= high)

    assert 0.87 <= np.mean(hits) <= 0.99


def test_ten_thousand_rows_take_seconds_not_minutes() -> None:
    random = np.random.default_rng(5)
    labels = random.integers(2, size=10_000)
    scores = labels + random.standard_normal(10_000)
    began = time.process_time()
    resampled_class_metric("matthews", labels, ((scores > 0.5).astype(np.int64),), 2)
    class_s = time.process_time() - began
    resampled_correlation("spearman", labels.astype(float), (scores,))

    assert class_s < 1
    assert time.process_time() - began < 10


def test_a_p_value_is_no_smaller_than_so_few_differing_rows_can_show() -> None:
    below = np.full(2000, -0.01)

    assert sign_p_value(below, 3) == 0.25
    assert sign_p_value(below, 1000) == pytest.approx(2 / 2001)
    assert sign_p_value(np.zeros(2000), 0) == 1.0
    assert sign_p_value(np.r_[np.full(1000, -1.0), np.full(1000, 1.0)], 50) == 1.0


def test_nearest_rank_by_hand() -> None:
    values = np.array([15.0, 20.0, 35.0, 40.0, 50.0])

    assert [nearest_rank(values, p) for p in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert nearest_rank(np.arange(1.0, 101.0), 99) == 99
    assert nearest_rank(np.arange(1.0, 101.0), 90) == 90


def test_a_ratio_of_medians_resamples_processes_not_runs() -> None:
    random = np.random.default_rng(6)
    speeds = random.uniform(1, 2, size=20)  # the machine is up to twice as slow during some processes, for both
    over = tuple(6.0 * s + random.normal(0, 0.01, 10) for s in speeds)
    under = tuple(3.0 * s + random.normal(0, 0.01, 30) for s in speeds)
    low, high = ratio_of_medians_interval(over, under)

    assert low <= 2.0 <= high
    unpaired = ratio_of_medians_interval(over, under[::-1])
    assert high - low < 0.5 * (unpaired[1] - unpaired[0])
    assert (low, high) == ratio_of_medians_interval(over, under)


@first("processes", [5, 3, 10])
def test_the_interval_of_a_ratio_holds_the_truth_nineteen_times_in_twenty(processes: int) -> None:
    """Each process is faster or slower for life, by 2 % as a standard deviation, and its runs by another 1 %."""
    random = np.random.default_rng(7)

    def runs() -> tuple[Floats, ...]:
        return tuple(random.normal(random.normal(1.0, 0.02), 0.01, 7) for _ in range(processes))

    intervals = [ratio_of_medians_interval(tuple(1.1 * block for block in runs()), runs()) for _ in range(400)]
    held = sum(low <= 1.1 <= high for low, high in intervals)

    assert 0.91 <= held / 400 <= 0.99


def test_a_ratio_of_means_sees_the_rows_that_a_median_does_not() -> None:
    """Half of the rows leave early: the median stays where it is, the mean does not."""
    random = np.random.default_rng(3)
    over = tuple(random.normal(10.0, 0.1, 100) for _ in range(5))
    under = tuple(np.where(random.random(100) < 0.45, 4.0, 10.0) for _ in range(5))
    low, high = ratio_of_means_interval(over, under)

    assert low < 10 / (0.45 * 4 + 0.55 * 10) < high
    assert ratio_of_medians_interval(over, under)[0] < 1.01


def test_the_median_of_drawn_rounds_is_the_nearest_rank_of_their_runs() -> None:
    blocks = (np.array([1.0, 5.0]), np.array([2.0, 9.0, 4.0]), np.array([3.0]))
    drawn = np.array([[1, 1, 1], [0, 2, 1], [3, 0, 0]])

    expected = [nearest_rank(np.concatenate([np.repeat(b, k) for b, k in zip(blocks, row, strict=True)]), 50) for row in drawn]
    assert statistics._medians(blocks, drawn).tolist() == expected
