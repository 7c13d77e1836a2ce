"""What is kept of a measured latency: its figures for the record, and every run."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from onnxsqueeze.measure.latency import LatencyResult, Verdict, verdict
from onnxsqueeze.measure.work import ROUNDS
from onnxsqueeze.results import Latency

if TYPE_CHECKING:
    from onnxsqueeze.measure.latency import Blocks


@dataclass(frozen=True)
class Timed:
    """One target at one shape, with its ratio to the baseline that was measured beside it."""

    latency: Latency
    speedup: float | None
    speedup_ci95: tuple[float, float] | None
    verdict: str
    mean_speedup: float | None = None
    mean_speedup_ci95: tuple[float, float] | None = None
    turns: str | None = None

    def to_json(self) -> bytes:
        """What the store keeps."""
        return json.dumps(
            {
                "latency": self.latency.model_dump(mode="json"),
                "speedup": self.speedup,
                "speedup_ci95": self.speedup_ci95,
                "verdict": self.verdict,
                "mean_speedup": self.mean_speedup,
                "mean_speedup_ci95": self.mean_speedup_ci95,
                "turns": self.turns,
            }
        ).encode()

    @staticmethod
    def from_json(content: bytes) -> Timed:
        """The reverse of `to_json`."""
        value = json.loads(content)
        return Timed(
            Latency.model_validate(value["latency"]),
            value["speedup"],
            _pair(value["speedup_ci95"]),
            value["verdict"],
            value.get("mean_speedup"),
            _pair(value.get("mean_speedup_ci95")),
            value.get("turns"),
        )


def packed(result: LatencyResult) -> bytes:
    """Every run in microseconds, one array a round, as a compressed .npz: ``blocks["arr_0"][runs] uint32``."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, *[np.rint(1000 * block).astype(np.uint32) for block in result.samples_ms])
    return buffer.getvalue()


def timed(result: LatencyResult) -> Timed:
    """What a record says of a measured latency."""
    means = result.mean_speedup, result.mean_speedup_ci95
    return Timed(result.latency, result.speedup, result.speedup_ci95, result.verdict, *means, result.turns)


def by_process(content: bytes, processes: int) -> Blocks:
    """The runs of each process in microseconds, out of what `packed` made."""
    import numpy as np

    with np.load(io.BytesIO(content)) as kept:
        rounds = [kept[f"arr_{i}"].astype(np.float64) for i in range(len(kept.files))]
    bounds = [process * ROUNDS // processes for process in range(processes + 1)]
    return tuple(np.concatenate(rounds[low:high]) for low, high in pairwise(bounds))


def against(parent: Timed, parents_runs: bytes, target: Timed, runs: bytes) -> tuple[float, tuple[float, float] | None, Verdict]:
    """p50 of ``parent`` ÷ that of ``target``, its 95 % interval and the verdict; neither of the last two where they were not timed in turns."""
    from onnxsqueeze.measure.statistics import ratio_of_medians_interval

    one, other = parent.latency, target.latency
    speedup = one.p50_ms / other.p50_ms
    if parent.turns is None or parent.turns != target.turns:
        return speedup, None, "unproven"
    interval = ratio_of_medians_interval(by_process(parents_runs, one.processes), by_process(runs, other.processes))
    return speedup, interval, verdict(speedup, interval) if one.valid and other.valid else "unproven"


def speedup(timed: Timed) -> dict[str, Any]:
    """The ratio at a further shape, for a record's `extra`."""
    latency = timed.latency
    return {
        "batch": latency.batch,
        "sequence": latency.sequence,
        "threads": latency.threads,
        "lengths": latency.lengths,
        "speedup": timed.speedup,
        "speedup_ci95": list(timed.speedup_ci95) if timed.speedup_ci95 else None,
        "speed": timed.verdict,
        "mean_speedup": timed.mean_speedup,
        "mean_speedup_ci95": list(timed.mean_speedup_ci95) if timed.mean_speedup_ci95 else None,
    }


def _pair(value: Sequence[float] | None) -> tuple[float, float] | None:
    return None if value is None else (value[0], value[1])
