"""How many rows a call may have, how many are worth waiting for and how long: read from the batches that a run has measured, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsqueeze.results import Target

# Where a record knows no batch but 1. Source: onnxruntime_backend, README, "Default Max Batch Size".
DEFAULT_MAX_BATCH_SIZE = 4
_WORTH = 1.05  # rows a second, against every smaller batch: processes of one file differ by a few per cent
_DELAY_SHARE = 0.1  # of one row's p50: a request that waits in vain is a tenth slower


@dataclass(frozen=True)
class Batching:
    """``preferred`` are batch sizes, ``delay_us`` microseconds that a request may wait for others; ``why`` says where each came from, by its name."""

    max_batch_size: int
    preferred: tuple[int, ...]
    delay_us: int
    why: dict[str, str]


def fixed(rows: int) -> Batching:
    """For a graph whose first dimension is not free: Triton then does not batch at all, and every call has ``rows`` rows."""
    return Batching(0, (), 0, {"max_batch_size": f"the graph's first dimension is fixed at {rows}: every request has that many rows"})


def of(target: Target) -> Batching:
    """What the record of ``target`` says about batches.

    The sweep are its latencies with one sequence length and the measured threads: the length of which most batches were measured, the one that decides
    where several have as many. A batch is preferred where it gives at least 5 % more rows a second than every smaller one; where one is, a request may wait
    a tenth of one row's p50 for it. The largest measured batch is the largest allowed.
    """
    sequence, p50_ms = _sweep(target)
    load = target.load
    measured = {*p50_ms, *([load.offline_batch] if load else [])} - {1}
    if not measured:
        reason = f"the record has no batch but 1: Triton's own default is {DEFAULT_MAX_BATCH_SIZE}; measure with `measure: {{sweep: {{batch: [1, 2, 4, 8, 16]}}}}`"
        return Batching(
            DEFAULT_MAX_BATCH_SIZE, (), 0, {"max_batch_size": reason, "preferred_batch_size": "none: the record has no batch sweep"}
        )
    why = {"max_batch_size": "the largest batch that was measured"}
    if len(p50_ms) < 2:
        return Batching(max(measured), (), 0, {**why, "preferred_batch_size": "none: the record has no batch sweep"})
    rates = {batch: 1000 * batch / p50 for batch, p50 in sorted(p50_ms.items())}
    preferred = [batch for batch, rate in rates.items() if rate >= _WORTH * max((r for b, r in rates.items() if b < batch), default=rate)]
    said = ", ".join(f"{batch}: {rate:.0f}" for batch, rate in rates.items())
    swept = f"rows a second at {sequence} tokens by batch: {said}"
    if not preferred:
        return Batching(max(measured), (), 0, {**why, "preferred_batch_size": f"none: no batch gives 5 % more than a smaller one; {swept}"})
    delay_us = round(1000 * _DELAY_SHARE * p50_ms[min(p50_ms)] / min(p50_ms))
    why["preferred_batch_size"] = f"each gives at least 5 % more than every smaller batch; {swept}"
    why["max_queue_delay_microseconds"] = "a tenth of the p50 of one row"
    return Batching(max(measured), tuple(preferred), delay_us, why)


def _sweep(target: Target) -> tuple[int, dict[int, float]]:
    """(tokens, batch → p50 in ms) of the shapes that differ in the batch alone; (0, {}) where nothing was timed."""
    decides = target.latency
    if decides is None:
        return 0, {}
    by_sequence: dict[int, dict[int, float]] = {}
    for one in (decides, *target.latencies):
        if one.lengths == "fixed" and one.threads == decides.threads:
            by_sequence.setdefault(one.sequence, {}).setdefault(one.batch, one.p50_ms)
    return max(by_sequence.items(), key=lambda item: (len(item[1]), item[0] == decides.sequence))
