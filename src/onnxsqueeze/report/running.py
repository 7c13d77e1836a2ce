"""What ran while a target was measured, and how it stood a load, as grids."""

from __future__ import annotations

from collections.abc import Sequence

from onnxsqueeze.report.grid import Grid, grid
from onnxsqueeze.report.numbers import MISSING, megabytes, milliseconds, whole
from onnxsqueeze.results import Latency, Load, Proof, Target

_OPERATORS = 6  # that take the most time; results.json has all


def execution(targets: Sequence[Target]) -> Grid:
    """Per target: nodes per provider, what the session fused, and where the time goes."""
    rows = [
        (t.name, t.runtime or MISSING, _providers(t.proof), _fusions(t.proof), milliseconds(t.proof.total_ms), _times(t.proof))
        for t in targets
        if t.proof
    ]
    return grid(
        "What ran", "Target|Runtime|Nodes per provider|Made by the session|#All nodes, ms|Time per operator, the longest first", rows,
        note="From the runtime's own profile, which slows a run; at the shape that decides. Times are means a run.",
    )  # fmt: skip


def shape(latency: Latency) -> str:
    """``1 × 128``, or ``1 × the task's (median 25)``."""
    return (
        f"{latency.batch} × {latency.sequence}"
        if latency.lengths == "fixed"
        else f"{latency.batch} × the task's (median {latency.sequence})"
    )


def resources(targets: Sequence[Target]) -> Grid:
    """Per target and shape: rows a second, memory, loading, the first run, and how idle the other models were meanwhile."""
    rows = [
        (t.name, shape(x), str(x.threads), f"{_rate(x):,.0f}", f"{_rate(x) / x.threads:,.0f}", megabytes(x.peak_memory_bytes), f"{x.load_s:.2f}",
         milliseconds(x.first_run_ms), MISSING if x.idle_cpu_share is None else f"{100 * x.idle_cpu_share:.0f} %")
        for t in targets for x in dict.fromkeys((t.latency, *t.latencies)) if x
    ]  # fmt: skip
    return grid(
        "Throughput, memory, start", "Target|Batch × tokens|#Threads|#Rows a second|#… a core|#Peak memory, MB|#Load, s|#First run, ms|#Waiting models' CPU", rows,
        note="Rows a second at the median time. Memory: the most that loading and the first run took. The last column: the largest share of one core that the waiting models used in a block.",
        secondary=True,
    )  # fmt: skip


def from_text(targets: Sequence[Target]) -> Grid:
    """Per target: the tokenizer's time beside the model's, on the task's rows."""
    rows = [
        (t.name, str(x.batch), str(x.sequence), *(milliseconds(ms) for ms in (x.text_p50_ms, x.p50_ms, x.whole_p50_ms)))
        for t in targets
        for x in t.latencies
        if x.whole_p50_ms is not None
    ]
    return grid(
        "From text to logits", "Target|#Batch|#Median tokens|#Text to ids, p50, ms|#Model, p50, ms|#Text to logits, p50, ms", rows,
        note="On the task's rows; the tokenizer runs in one thread of this process.",
    )  # fmt: skip


def _rate(latency: Latency) -> float:
    return 1000 * latency.batch / latency.p50_ms


def load(targets: Sequence[Target]) -> Grid:
    """Per target: one caller, a backlog in full batches, and random requests, on rows of the task."""
    rows = [
        (t.name, str(x.threads), milliseconds(x.single_stream_p90_ms), f"{x.offline_rows_per_s:.0f}", str(x.offline_batch), *_server(x))
        for t in targets
        if (x := t.load)
    ]
    return grid(
        "Under load", "Target|#Threads|#One caller, p90, ms|#Backlog, rows a second|#in batches of|#Random requests, rows a second|Bound on p99", rows,
        note="The scenarios of MLPerf's LoadGen on rows of this task, each at its own length: single stream, offline, server. One session, no other batching; not an official run.",
    )  # fmt: skip


def _server(found: Load) -> tuple[str, str]:
    if found.server_bound_ms is None or found.server_rows_per_s is None:
        return MISSING, MISSING
    return f"{found.server_rows_per_s:.0f}", f"{milliseconds(found.server_bound_ms)} ms"


def _providers(proof: Proof) -> str:
    nodes = ", ".join(f"{name} {n}" for name, n in proof.nodes_per_provider.items())
    return f"{nodes}; {proof.memcpy_nodes} copies between devices" if proof.memcpy_nodes else nodes


def _fusions(proof: Proof) -> str:
    return ", ".join(f"{name} {n}" for name, n in proof.fusions.items()) or "nothing"


def _times(proof: Proof) -> str:
    total = sum(one.ms for one in proof.operators)
    parts = [f"{one.operator} {whole(one.nodes)}: {100 * one.ms / total:.0f} %" for one in proof.operators[:_OPERATORS]]
    rest = sum(one.ms for one in proof.operators[_OPERATORS:])
    return ", ".join([*parts, *([f"the rest: {100 * rest / total:.0f} %"] if rest else [])])
