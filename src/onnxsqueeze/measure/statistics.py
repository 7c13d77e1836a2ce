"""Intervals and tests on dev-set figures: 95 %, seeded, vectorised over resamples.

A resample draws as many rows as there are, with replacement; it is never built row by row. Class metrics depend only on how often
each combination of label and prediction occurs, so a resample is one multinomial draw of those counts. Correlations need the
rows: there a resample is how often each row was drawn, and ranks with ties follow from cumulated counts. Both have exactly the
distribution of the plain bootstrap. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13 (percentiles).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 2_000
SEED = 0
Z95 = 1.959963984540054  # the standard normal's 97.5 % point
_CHUNK = 500_000  # counts held at a time: 4 MB, which caches hold


def wilson(right: int, n: int) -> tuple[float, float]:
    """The score interval of a proportion. Source: Wilson 1927; Brown, Cai and DasGupta, Statistical Science 16(2), 2001."""
    share, spread = right / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return 0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of ``gained`` rows turned right and ``lost`` rows turned wrong; 1 where there are none.

    Source: McNemar 1947 in its exact, binomial form, which never rejects too often, also with few discordant rows.
    """
    n, few = gained + lost, min(gained, lost)
    if few * 2 == n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def paired_share_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The interval of (gained - lost) ÷ n, with a width above 0 also where no row differs.

    Source: Bonett and Price, J. Educational and Behavioral Statistics 37(4), 2012 (Wald with one row added to each side);
    recommended by Fagerland, Lydersen and Laake, Statistics in Medicine 33(16), 2014.
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def percentile_interval(values: Floats) -> tuple[float, float]:
    """From the 2.5 % to the 97.5 % point of resampled ``values``."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def sign_p_value(deltas: Floats, differing: int) -> float:
    """The two-sided bootstrap p-value that a delta is 0, from its resampled values: twice the smaller tail.

    It is never below 2 · 0.5^``differing``, the least that a test of paired rows can reach when only so many rows differ: the
    bootstrap alone would call three changed rows of thousands significant.
    """
    n = len(deltas)
    tail = (1 + min(int((deltas <= 0).sum()), int((deltas >= 0).sum()))) / (n + 1)
    return float(min(1.0, max(2 * tail, 2 * 0.5**differing)))


def resampled_class_metric(metric: str, labels: Ints, predictions: tuple[Ints, ...], classes: int, positive: int = 1) -> tuple[Floats, ...]:
    """``metric`` ("accuracy", "f1" of class ``positive``, "matthews") of each model on the same `RESAMPLES` resamples: one [resamples] per model."""
    rows = np.stack([labels, *predictions])
    cells, counts = np.unique(rows, axis=1, return_counts=True)
    random = np.random.default_rng(SEED)
    drawn = random.multinomial(len(labels), counts / counts.sum(), size=RESAMPLES)
    return tuple(_class_metric(metric, cells[0], cells[1 + i], drawn, classes, positive) for i in range(len(predictions)))


def resampled_correlation(metric: str, labels: Floats, scores: tuple[Floats, ...]) -> tuple[Floats, ...]:
    """``metric`` ("pearson", "spearman") of each model's scores on the same `RESAMPLES` resamples: one [resamples] per model."""
    n = len(labels)
    parts: list[list[Floats]] = [[] for _ in scores]
    for counts in _row_counts(n):
        left = _ranks(labels, counts) if metric == "spearman" else np.broadcast_to(labels, counts.shape)
        for part, values in zip(parts, scores, strict=True):
            right = _ranks(values, counts) if metric == "spearman" else np.broadcast_to(values, counts.shape)
            part.append(_pearson(left, right, counts))
    return tuple(np.concatenate(part) for part in parts)


def ratio_of_medians_interval(over: tuple[Floats, ...], under: tuple[Floats, ...]) -> tuple[float, float]:
    """The interval of median(``over``) ÷ median(``under``), where element i of both holds the runs of the i-th processes, which shared their seconds.

    Processes are resampled, not single runs: runs of one process are alike, and so is what disturbs a machine meanwhile. The standard error
    of the ratio's logarithm comes from the bootstrap, its reach from Student's t, since processes are few. Source: Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, ch. 12.2 and 6 (the factor √(n / (n - 1))).
    """
    return _ratio_interval(over, under, _medians)


def ratio_of_means_interval(over: tuple[Floats, ...], under: tuple[Floats, ...]) -> tuple[float, float]:
    """The same of mean(``over``) ÷ mean(``under``): of times whose rows differ much, such as those of a model that some rows leave early."""
    return _ratio_interval(over, under, _means)


def _ratio_interval(
    over: tuple[Floats, ...], under: tuple[Floats, ...], summary: Callable[[tuple[Floats, ...], Ints], Floats]
) -> tuple[float, float]:
    from scipy.stats import t

    n = len(over)
    drawn = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    spread = float(np.log(summary(over, drawn) / summary(under, drawn)).std()) * math.sqrt(n / (n - 1))
    everything = np.ones((1, n), np.int64)
    ratio, reach = float((summary(over, everything) / summary(under, everything))[0]), math.exp(float(t.ppf(0.975, n - 1)) * spread)
    return ratio / reach, ratio * reach


def _means(blocks: tuple[Floats, ...], drawn: Ints) -> Floats:
    """The mean of all runs per resample of blocks, ``drawn[resamples, blocks]``; [resamples]."""
    found: Floats = drawn @ np.array([block.sum() for block in blocks]) / (drawn @ np.array([len(block) for block in blocks]))
    return found


def nearest_rank(values: Floats, percent: int) -> float:
    """The smallest value that at least ``percent`` % of ``values`` do not exceed: always one of them."""
    return float(np.sort(values)[max(0, math.ceil(percent * len(values) / 100) - 1)])


def _class_metric(metric: str, labels: Ints, predicted: Ints, drawn: Ints, classes: int, positive: int = 1) -> Floats:
    """The metric per resample from cell counts: ``drawn[resamples, cells]``, cell j has ``labels[j]`` and ``predicted[j]``."""
    n: Floats = drawn.sum(axis=1).astype(np.float64)
    hits: Floats = drawn[:, labels == predicted].sum(axis=1).astype(np.float64)
    if metric == "accuracy":
        return hits / n
    true = np.stack([drawn[:, labels == c].sum(axis=1) for c in range(classes)], axis=1).astype(np.float64)
    said = np.stack([drawn[:, predicted == c].sum(axis=1) for c in range(classes)], axis=1).astype(np.float64)
    if metric == "f1":
        both = drawn[:, (labels == positive) & (predicted == positive)].sum(axis=1).astype(np.float64)
        return _safe_ratio(2 * both, true[:, positive] + said[:, positive])
    if metric == "matthews":  # Source: Gorodkin 2004, the form for any number of classes
        bottom = np.sqrt((n**2 - (said**2).sum(axis=1)) * (n**2 - (true**2).sum(axis=1)))
        return _safe_ratio(hits * n - (true * said).sum(axis=1), bottom)
    raise ValueError(f"no such class metric: {metric}")


def _row_counts(n: int) -> Iterator[Floats]:
    """`RESAMPLES` resamples of n rows as counts [some resamples, n], in chunks."""
    random = np.random.default_rng(SEED)
    left = RESAMPLES
    while left:
        size = min(left, max(1, _CHUNK // n))
        picked = random.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(picked.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
        left -= size


def _ranks(values: Floats, counts: Floats) -> Floats:
    """Average ranks, ties shared, of each row's value in the resamples ``counts[resamples, n]``; [resamples, n]."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    below = np.cumsum(sizes, axis=1) - sizes
    ranks: Floats = below + (sizes + 1) / 2
    return ranks[:, group]


def _pearson(x: Floats, y: Floats, counts: Floats) -> Floats:
    n = counts.sum(axis=1, keepdims=True)
    x = x - np.einsum("ij,ij->i", counts, x)[:, None] / n
    y = y - np.einsum("ij,ij->i", counts, y)[:, None] / n
    together = np.einsum("ij,ij,ij->i", counts, x, y)
    spread = np.sqrt(np.einsum("ij,ij,ij->i", counts, x, x) * np.einsum("ij,ij,ij->i", counts, y, y))
    return _safe_ratio(together, spread)


def _medians(blocks: tuple[Floats, ...], drawn: Ints) -> Floats:
    """The nearest-rank median of all runs per resample of blocks, ``drawn[resamples, blocks]``; [resamples]."""
    values = np.concatenate(blocks)
    order = np.argsort(values, kind="stable")
    values, origin = values[order], np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])[order]
    step = max(1, _CHUNK // len(values))
    found = []
    for at in range(0, len(drawn), step):
        reached = np.cumsum(drawn[at : at + step, origin], axis=1)
        found.append(values[(reached * 2 >= reached[:, -1:]).argmax(axis=1)])
    return np.concatenate(found)


def _safe_ratio(top: Floats, bottom: Floats) -> Floats:
    """``top`` ÷ ``bottom``; 0 where ``bottom`` is 0: a model with one answer for all rows has no correlation."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
