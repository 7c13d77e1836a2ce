"""What ran while a target was measured, and how it stood a load, as grids."""

from __future__ import annotations

from collections.abc import Sequence

from onnxsqueeze.report.grid import Grid, grid
from onnxsqueeze.report.numbers import MISSING, milliseconds, whole
from onnxsqueeze.results import Load, Proof, Target

_OPERATORS = 6  # that take the most time; results.json has all


def execution(targets: Sequence[Target]) -> Grid:
    """Per target: nodes per provider, what the session fused, and where the time goes."""
    rows = [(t.name, _providers(t.proof), _fusions(t.proof), milliseconds(t.proof.total_ms), _times(t.proof)) for t in targets if t.proof]
    return grid(
        "What ran", "Target|Nodes per provider|Made by the session|#All nodes, ms|Time per operator, the longest first", rows,
        note="From the runtime's own profile, which slows a run; at the shape that decides. Times are means a run.",
    )  # fmt: skip


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
