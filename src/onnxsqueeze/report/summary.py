"""Results → one table per backend, as text: what Markdown, HTML and terminal all show.

The forms differ in dress alone. Ratios are baseline ÷ target; differences are target − baseline, in points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from onnxsqueeze.report.grid import joined
from onnxsqueeze.report.numbers import (
    MISSING,
    hundredths,
    hundredths_interval,
    megabytes,
    metric_title,
    milliseconds,
    p_value,
    percent,
    plain,
    points,
    points_interval,
    ratio,
    ratio_interval,
)
from onnxsqueeze.results import Gate, MetricDelta, MetricValue, Results, Target, WeightClass

# From this share of zeros on a reader expects a smaller file. Rounding alone leaves fewer in int8 weights.
MANY_ZEROS = 0.2
_ITEM_BYTES = {
    "float64": 8.0, "int64": 8.0, "float32": 4.0, "float": 4.0, "int32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int16": 2.0,
    "int8": 1.0, "uint8": 1.0, "int4": 0.5, "uint4": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class GateLine:
    """One gate of one target, and how far it was passed or missed."""

    target: str
    name: str
    limit: str
    value: str
    passed: bool
    proven: bool
    margin: str

    @property
    def verdict(self) -> str:
        """``missed by 0.4``, ``passed by 1.2``, ``passed by 0.3, not proven``."""
        if not self.passed:
            return f"missed by {self.margin}"
        return f"passed by {self.margin}" + ("" if self.proven else ", not proven")


@dataclass(frozen=True)
class Row:
    """One target's line. Every text is ready to show; `MISSING` or empty where there is nothing."""

    target: Target
    status: str  # "baseline", "ok", "gate missed", "skipped", "failed"
    size: str = MISSING
    smaller: str = MISSING
    gzip: str = MISSING
    p50: str = MISSING
    faster: str = MISSING
    faster_ci: str = ""
    speed: str = ""
    metric: str = MISSING
    metric_ci: str = ""
    delta: str = MISSING
    delta_ci: str = ""
    p: str = ""
    quality: str = ""
    gates: tuple[GateLine, ...] = ()
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name

    @property
    def why(self) -> str:
        """Reason and remedy of a skipped or failed target, in one line; empty for the others."""
        if self.target.status == "ok":
            return ""
        reason = (self.target.reason or "no reason was recorded").rstrip(".")
        return f"{reason}. Remedy: {self.target.remedy}" if self.target.remedy else f"{reason}."


@dataclass(frozen=True)
class Finding:
    """The smallest or the fastest target that still does the job."""

    label: str
    row: Row


@dataclass(frozen=True)
class Table:
    """All targets of one backend, baseline first, then in the recipe's order."""

    backend: str
    provider: str
    metric: str  # "accuracy, %"
    split: str
    shape: str  # "batch 1, 128 tokens, 1 thread"; empty where no latency was measured
    rows: tuple[Row, ...]
    condition: str = field(default="")  # what a finding had to hold
    findings: tuple[Finding, ...] = ()

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows that have numbers."""
        return tuple(row for row in self.rows if row.target.status == "ok")

    @property
    def unmeasured(self) -> tuple[Row, ...]:
        """The skipped and the failed rows."""
        return tuple(row for row in self.rows if row.target.status != "ok")


def tables(results: Results) -> tuple[Table, ...]:
    """One table per backend, in the order in which the recipe names them."""
    backends = list(dict.fromkeys(target.backend for target in results.targets))
    return tuple(_table(results, backend) for backend in backends)


def first_split(results: Results) -> str:
    """The split whose primary metric decides."""
    return results.task.splits[0].name if results.task.splits else ""


def primary(results: Results, target: Target) -> MetricValue | None:
    """The target's primary metric on the deciding split, or None where it was not measured."""
    return target.metrics.get(first_split(results), {}).get(results.task.primary)


def primary_delta(results: Results, target: Target) -> MetricDelta | None:
    """The paired difference of that metric from the baseline's, or None."""
    return target.vs_baseline.metrics.get(first_split(results), {}).get(results.task.primary) if target.vs_baseline else None


def run_title(results: Results) -> str:
    """``qdp on mrpc, seed 0``: how a run is called in a report of several."""
    return f"{results.recipe} on {results.task.name}, seed {results.seed}"


def origin(results: Results) -> str:
    """What was squeezed by what, on which processors, when."""
    e = results.environment
    processors = f"{e.accelerator} and {e.cpu}" if e.accelerator else e.cpu
    return f"{results.model} squeezed by recipe {results.recipe} on {processors}, {results.date}."


def useless_zeros(weights: Sequence[WeightClass]) -> tuple[WeightClass, ...]:
    """The classes with many zeros that take the room of dense weights all the same. Scales and zero points ("other") are no weights."""
    return tuple(
        w
        for w in weights
        if w.class_ != "other"
        and w.n
        and w.zeros / w.n >= MANY_ZEROS
        and w.dtype.lower() in _ITEM_BYTES
        and w.bytes >= w.n * _ITEM_BYTES[w.dtype.lower()]
    )


def _table(results: Results, backend: str) -> Table:
    targets = sorted((t for t in results.targets if t.backend == backend), key=lambda t: not t.baseline)
    rows = tuple(_row(results, target) for target in targets)
    gated = any(row.gates for row in rows)
    shapes = [t.latency for t in targets if t.latency]
    return Table(
        backend=backend,
        provider=targets[0].provider,
        metric=metric_title(results.task.primary),
        split=first_split(results),
        shape=f"batch {shapes[0].batch}, {shapes[0].sequence} tokens, {_threads(shapes[0].threads)}" if shapes else "",
        rows=rows,
        condition="passes every gate" if gated else "is not measurably worse than the baseline",
        findings=_findings(rows, gated=gated),
    )


def _row(results: Results, target: Target) -> Row:
    if target.status != "ok":
        return Row(target, status=target.status)
    latency, versus = target.latency, target.vs_baseline
    value, delta = primary(results, target), primary_delta(results, target)
    gates = tuple(_gate(results, target, gate) for gate in target.gates)
    return Row(
        target=target,
        status="baseline" if target.baseline else "ok" if all(g.passed for g in gates) else "gate missed",
        size=megabytes(target.size_bytes),
        smaller=ratio(versus.size_ratio) if versus else MISSING,
        gzip=megabytes(target.size_gzip_bytes),
        p50=milliseconds(latency.p50_ms) if latency else MISSING,
        faster=ratio(versus.speedup) if versus else MISSING,
        faster_ci=ratio_interval(versus.speedup_ci95) if versus else "",
        speed=versus.speed if versus else "",
        metric=hundredths(value.value) if value else MISSING,
        metric_ci=hundredths_interval(value.ci95) if value else "",
        delta=points(delta.delta) if delta else MISSING,
        delta_ci=points_interval(delta.ci95) if delta else "",
        p=p_value(delta.p_value) if delta else "",
        quality=versus.quality if versus else "",
        gates=gates,
        warnings=tuple(_warnings(target, gates)),
        remarks=tuple(_remarks(results, target, gates)),
    )


def _warnings(target: Target, gates: Sequence[GateLine]) -> list[str]:
    lines = [f"gate {g.name}: {g.value} against a limit of {g.limit}, {g.verdict}" for g in gates if not g.passed]
    if target.vs_baseline and target.vs_baseline.speed == "slower":
        lines.append(f"slower than its baseline {target.vs_baseline.baseline}")
    above = target.vs_parent
    if above and above.speed == "slower" and not (target.vs_baseline and target.vs_baseline.baseline == above.parent):
        times = joined(f"{ratio(above.speedup)} as fast", ratio_interval(above.speedup_ci95))
        lines.append(f"slower than {above.parent}, which it was made from: {times}")
    if target.latency and not target.latency.valid:
        disturbed = target.latency.disturbed_blocks
        why = f"others used the CPU in {disturbed} of its 20 blocks" if disturbed else "the times drifted"
        lines.append(f"its latency is not valid ({why}): no ratio is proven")
    return lines


def _remarks(results: Results, target: Target, gates: Sequence[GateLine]) -> list[str]:
    lines = [f"gate {g.name}: passed, not proven (the 95 % interval passes {g.limit})" for g in gates if g.passed and not g.proven]
    dense = useless_zeros(target.weights)
    if dense:
        where = ", ".join(dict.fromkeys(w.class_.replace("_", " ") for w in dense))
        lines.append(
            f"zeros save no bytes: {percent(sum(w.zeros for w in dense), sum(w.n for w in dense))} of the {where} weights are zero and are stored all the same"
        )
    if target.latency and not target.latency.steady:
        lines.append("its warm-up ended before the times were steady")
    if target.latency and target.latency.date != results.date:
        lines.append(f"its latency was measured on {target.latency.date} and is reused")
    return lines


def _gate(results: Results, target: Target, gate: Gate) -> GateLine:
    return GateLine(
        target.name,
        gate.name,
        plain(gate.limit),
        plain(gate.value),
        gate.passed,
        _proven(results, target, gate),
        plain(abs(gate.value - gate.limit)),
    )


def _proven(results: Results, target: Target, gate: Gate) -> bool:
    """Gates are decided by the point estimate; one is proven where the far end of the 95 % interval holds it too."""
    delta, versus = primary_delta(results, target), target.vs_baseline
    if gate.name == "metric_drop_pp" and delta:
        return -100 * delta.ci95[0] <= gate.limit
    if gate.name == "min_speedup" and versus:
        return versus.speed != "unproven" and versus.speedup_ci95 is not None and versus.speedup_ci95[0] >= gate.limit
    if gate.name == "min_speedup_vs_parent" and (above := target.vs_parent):
        return above.speed != "unproven" and above.speedup_ci95 is not None and above.speedup_ci95[0] >= gate.limit
    return True


def _findings(rows: Sequence[Row], *, gated: bool) -> tuple[Finding, ...]:
    good = [
        (row, v) for row in rows if (v := row.target.vs_baseline) and (all(g.passed for g in row.gates) if gated else v.quality != "worse")
    ]
    small = max((pair for pair in good if pair[1].size_ratio > 1), key=lambda pair: pair[1].size_ratio, default=None)
    fast = max((pair for pair in good if pair[1].speed == "faster"), key=lambda pair: pair[1].speedup or 0.0, default=None)
    if small and fast and small[0] is fast[0]:
        return (Finding("Smallest and fastest", small[0]),)
    return tuple(Finding(label, pair[0]) for label, pair in (("Smallest", small), ("Fastest", fast)) if pair)


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"
