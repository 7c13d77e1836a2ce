"""Latency of several models beside each other: every ratio is between runs that shared the same seconds.

Each model has a process of its own, in which its runs are timed; while one runs the others wait. For one work, with all open:

    load     each session is made twice; the second time counts, when the file is in memory
    first    the first run of each session; the memory that its process took at most until then
    warm-up  windows of runs until the medians of two successive windows differ by at most 3 %, for at most 2 s
    rounds   20 rounds; in each, every model runs one block. A block begins with one run that is not counted (the model before it left
             its weights in the caches) and lasts 1/20 of what settings ask for in runs *and* seconds; or it is 40 calls of the task's
             rows, the same for every model. The order is drawn anew for each cycle and turned by one place each round, so that every
             model stands equally often in every place.
    quiet    a block in which others took more than 5 % of the cores, or the waiting models more than 5 % of one, is run again, until
             the blocks are three times as many as planned; what is left disturbed then is counted, and makes the latency invalid
    ratio    median of the baseline ÷ median of the target, with an interval that resamples rounds
    valid    no block was disturbed, and the medians of the first and of the second ten rounds are within 25 % of each other
    verdict  faster or slower where the whole interval lies on one side of 1 and the ratio is beyond 6 %; else a tie
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from onnxsqueeze.backends import HERE, Block
from onnxsqueeze.environment import default_threads
from onnxsqueeze.measure.contention import IDLE_SHARE, OTHERS_SHARE, Reading, idle_share, others_share, read
from onnxsqueeze.measure.settings import MeasureSettings
from onnxsqueeze.measure.work import ROUNDS, Runs, Work
from onnxsqueeze.results import Latency
from onnxsqueeze.stage import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Blocks = tuple[NDArray[np.float64], ...]  # milliseconds of each run, one array per round

Verdict = Literal["faster", "slower", "tie", "unproven"]

P99_RUNS = 459  # 0.99^459 < 0.01: so many runs have one beyond the 99 % point with 99 % probability
TIE_RATIO = (
    1.06  # two processes of one file, each interval on one side of 1, differed by up to 5.7 %: benchmarks/equal_files.py, docs/log.md
)
DRIFT_RATIO = 1.25  # the medians of the first and the second half of the rounds may differ by this much
REPEATS = 3  # planned and repeated blocks together are at most this many times the planned ones
_WINDOW_RUNS, _WINDOW_MS = 5, 50.0
_STEADY_RATIO, _WARMUP_MS = 1.03, 2_000.0
_SEED = 0


class Timeable(Runs, Protocol):
    """What is timed: `onnxsqueeze.backends.Session`, or anything that runs and keeps the time."""

    load_s: float

    def cpu_s(self) -> float | None:
        """CPU seconds that it has used so far; None where nobody can tell."""

    def memory_bytes(self) -> int | None:
        """Memory that it has taken at most so far, what it held before the load apart; None where nobody can tell."""

    def close(self) -> None:
        """Free what the session holds."""


Opener = Callable[[str, Path, int], Timeable]  # backend, file, threads


@dataclass(frozen=True)
class Candidate:
    """One model to measure. ``onnx`` is its file, with config.json beside it; ``backend`` is a name that the opener knows."""

    name: str
    onnx: Path
    backend: str


@dataclass(frozen=True)
class LatencyResult:
    """``samples_ms`` holds the counted runs, one array per round. The baseline, and all where there is none, has no speed-up.

    ``verdict`` is "unproven" where this or the baseline's latency is not valid, or there is no baseline; the baseline's is "tie".
    """

    latency: Latency
    speedup: float | None
    speedup_ci95: tuple[float, float] | None
    verdict: Verdict
    samples_ms: Blocks


def measure_latency(
    candidates: Sequence[Candidate],
    baseline: str | None,
    work: Work,
    settings: MeasureSettings,
    progress: Progress,
    *,
    opener: Opener = HERE.open,
    reader: Callable[[], Reading | None] = read,
) -> dict[str, LatencyResult]:
    """Time all ``candidates`` at one ``work``, interleaved; per name its latency and its ratio to the one named ``baseline``.

    Of ``settings`` only ``min_runs`` and ``min_seconds`` are used, and for a fixed shape alone. Raises MeasureError where a model does
    not take the shape, Unavailable where a backend does not start.
    """
    threads = work.shape.threads
    sessions: dict[str, Timeable] = {}
    try:
        for c in candidates:
            opener(c.backend, c.onnx, threads).close()
            sessions[c.name] = opener(c.backend, c.onnx, threads)
            work.hold(c.onnx, sessions[c.name])
        first_ms = {name: float(session.time(1, 0.0).times_ms[0]) for name, session in sessions.items()}
        memory = {name: session.memory_bytes() for name, session in sessions.items()}
        total = len(sessions) * (ROUNDS + 1)
        warm: dict[str, tuple[int, bool]] = {}
        for done, (name, session) in enumerate(sessions.items()):
            progress(done, total, f"warming up {name}")
            warm[name] = _warm_up(session)
        samples: dict[str, list[_Measured]] = {name: [] for name in sessions}
        spare = (REPEATS - 1) * ROUNDS * len(sessions)
        for done, (round_, name) in enumerate(_order(list(sessions)), start=len(sessions)):
            progress(done, total, name)
            run = partial(work.block, sessions[name], round_, settings)
            block = _block(name, sessions, run, reader)
            while block.disturbed and spare:
                spare -= 1
                block = replace(_block(name, sessions, run, reader), repeats=block.repeats + 1)
            samples[name].append(block)
        progress(total, total)
    finally:
        for session in sessions.values():
            session.close()
    blocks = {name: tuple(block.times_ms for block in found) for name, found in samples.items()}
    latencies = {
        name: _latency(blocks[name], work, session.load_s, first_ms[name], *warm[name], _quiet(samples[name]), memory[name])
        for name, session in sessions.items()
    }
    return {name: _result(name, baseline, latencies, blocks) for name in sessions}


def verdict(speedup: float, ci95: tuple[float, float]) -> Verdict:
    """Faster or slower where the whole interval lies on one side of 1 and ``speedup`` is beyond `TIE_RATIO`; else a tie."""
    if ci95[0] > 1 and speedup > TIE_RATIO:
        return "faster"
    return "slower" if ci95[1] < 1 and speedup < 1 / TIE_RATIO else "tie"


def _result(name: str, baseline: str | None, latencies: Mapping[str, Latency], blocks: Mapping[str, Blocks]) -> LatencyResult:
    from onnxsqueeze.measure.statistics import ratio_of_medians_interval

    if baseline is None or name == baseline:
        return LatencyResult(latencies[name], None, None, "unproven" if baseline is None else "tie", blocks[name])
    speedup = latencies[baseline].p50_ms / latencies[name].p50_ms
    interval = ratio_of_medians_interval(blocks[baseline], blocks[name])
    proven = latencies[baseline].valid and latencies[name].valid
    return LatencyResult(latencies[name], speedup, interval, verdict(speedup, interval) if proven else "unproven", blocks[name])


@dataclass(frozen=True)
class _Measured:
    """One block's runs; meanwhile the part of the cores that others took, and of one core the waiting models; how often it was run again."""

    times_ms: NDArray[np.float64]
    others: float
    idle: float | None
    repeats: int = 0

    @property
    def disturbed(self) -> bool:
        """Whether it proves nothing."""
        return self.others > OTHERS_SHARE or (self.idle or 0.0) > IDLE_SHARE


def _block(name: str, sessions: Mapping[str, Timeable], run: Callable[[], Block], reader: Callable[[], Reading | None]) -> _Measured:
    """The counted runs of one block, and what others and the waiting models took of the CPU meanwhile."""
    waiting = [session for other, session in sessions.items() if other != name]
    idle_before, before = [session.cpu_s() for session in waiting], reader()
    block = run()
    after, idle_after = reader(), [session.cpu_s() for session in waiting]
    return _Measured(
        block.times_ms,
        others_share(before, after, default_threads(), block.cpu_s),
        idle_share(idle_before, idle_after, before, after),
    )


def _quiet(blocks: Sequence[_Measured]) -> dict[str, Any]:
    """What a record says of the quiet: blocks that were run again, blocks that were disturbed all the same, the waiting models' CPU."""
    known = [block.idle for block in blocks if block.idle is not None]
    return {
        "repeated_blocks": sum(block.repeats for block in blocks),
        "disturbed_blocks": sum(block.disturbed for block in blocks),
        "idle_cpu_share": round(max(known), 4) if known else None,
    }


def _latency(
    blocks: Blocks,
    work: Work,
    load_s: float,
    first_run_ms: float,
    warmup: int,
    steady: bool,  # noqa: FBT001  # a fact, not a switch
    quiet: Mapping[str, Any],
    memory_bytes: int | None,
) -> Latency:
    import numpy as np

    from onnxsqueeze.measure.statistics import nearest_rank

    runs = np.concatenate(blocks)
    halves = [nearest_rank(np.concatenate(half), 50) for half in (blocks[: ROUNDS // 2], blocks[ROUNDS // 2 :])]
    return Latency(
        p50_ms=nearest_rank(runs, 50),
        p90_ms=nearest_rank(runs, 90),
        p99_ms=nearest_rank(runs, 99) if len(runs) >= P99_RUNS else None,
        n=len(runs),
        batch=work.shape.batch,
        sequence=work.shape.sequence,
        threads=work.shape.threads,
        lengths=work.lengths,
        load_s=load_s,
        first_run_ms=first_run_ms,
        min_ms=float(runs.min()),
        max_ms=float(runs.max()),
        warmup=warmup,
        steady=steady,
        valid=max(halves) <= DRIFT_RATIO * min(halves) and not quiet["disturbed_blocks"],
        peak_memory_bytes=memory_bytes,
        date=datetime.now(UTC).date().isoformat(),
        **quiet,
    )


def _order(names: list[str]) -> Iterator[tuple[int, str]]:
    """The round and the name of each block, `ROUNDS` rounds of all names: a new order every ``len(names)`` rounds, turned by one place in between."""
    import numpy as np

    random = np.random.default_rng(_SEED)
    order: list[str] = []
    for i in range(ROUNDS):
        turn = i % len(names)
        if turn == 0:
            order = [names[j] for j in random.permutation(len(names))]
        yield from ((i, name) for name in (*order[turn:], *order[:turn]))


def _warm_up(session: Timeable) -> tuple[int, bool]:
    """Run until two successive windows agree: (runs, whether they did before the time was up)."""
    from statistics import median

    runs, spent, before = 0, 0.0, None
    while True:
        window = session.time(_WINDOW_RUNS, _WINDOW_MS).times_ms.tolist()
        runs, spent, now = runs + len(window), spent + sum(window), median(window)
        if before is not None:
            if max(now, before) <= _STEADY_RATIO * min(now, before):
                return runs, True
            if spent > _WARMUP_MS:
                return runs, False
        before = now
