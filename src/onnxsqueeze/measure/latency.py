"""Latency of several models beside each other: every ratio is between runs that shared the same seconds.

Each model has a process of its own, in which its runs are timed; while one runs the others wait. Where a process gets its memory makes
it a few per cent faster or slower for as long as it lives, so for one work every model gets a new process several times (5 unless the
settings say otherwise), and each time, with all open:

    load     the session is made; the record has the median without the first time, when the file may not be in memory
    first    the first run of each session (median, likewise); the memory that its process took at most until then
    warm-up  windows of runs until the medians of two successive windows differ by at most 3 %, for at most 2 s
    rounds   20 in all, shared out among the processes; in each, every model runs one block. A block begins with one run that is not
             counted (the model before it left its weights in the caches) and lasts 1/20 of what settings ask for in runs *and* seconds;
             or it is 40 calls of the task's rows, the same for every model. The order is drawn anew for each cycle and turned by one
             place each round, so that every model stands equally often in every place.
    quiet    a block in which others took more than 5 % of the cores, or the waiting models more than 5 % of one, is run again, until
             the blocks are three times as many as planned; what is left disturbed then is counted, and makes the latency invalid

    ratio    median of the baseline ÷ median of the target, with an interval that knows how far processes differ
    valid    no block was disturbed, and the medians of the first and of the second ten rounds are within 25 % of each other
    verdict  faster or slower where the whole interval lies on one side of 1 and the ratio is beyond 2 %; else a tie
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

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
TIE_RATIO = 1.02  # nobody chooses a model for less, proven or not
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

    Speed-ups are of medians, and beside them of means. ``turns`` is the same for those that were timed in turns, and for no others. ``verdict`` is "unproven" where this or the baseline's latency is not valid, or there is no baseline; the baseline's is "tie".
    """

    latency: Latency
    speedup: float | None
    speedup_ci95: tuple[float, float] | None
    verdict: Verdict
    samples_ms: Blocks
    mean_speedup: float | None = None
    mean_speedup_ci95: tuple[float, float] | None = None
    turns: str | None = None


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

    Of ``settings`` only ``processes``, ``min_runs`` and ``min_seconds`` are used, the last two for a fixed shape alone. Raises MeasureError where a model does
    not take the shape, Unavailable where a backend does not start.
    """
    names = [candidate.name for candidate in candidates]
    kept = {name: _Kept() for name in names}
    order = list(_order(names))
    total = settings.processes * len(names) + len(order)
    spare, done = (REPEATS - 1) * len(order), 0
    for process in range(settings.processes):
        share = order[_first(process, settings) * len(names) : _first(process + 1, settings) * len(names)]
        with _opened(candidates, work, opener) as sessions:
            for name, session in sessions.items():
                kept[name].start(session)
            for name, session in sessions.items():
                progress(done, total, f"warming up {name}")
                kept[name].warm_up(session)
                done += 1
            for round_, name in share:
                progress(done, total, name)
                run = partial(work.block, sessions[name], round_, settings)
                block = _block(name, sessions, run, reader)
                while block.disturbed and spare:
                    spare -= 1
                    block = replace(_block(name, sessions, run, reader), repeats=block.repeats + 1)
                kept[name].blocks.append(block)
                done += 1
    progress(total, total)
    turns = secrets.token_hex(8)
    return {name: replace(_result(name, baseline, kept, work), turns=turns) for name in names}


def verdict(speedup: float, ci95: tuple[float, float]) -> Verdict:
    """Faster or slower where the whole interval lies on one side of 1 and ``speedup`` is beyond `TIE_RATIO`; else a tie."""
    if ci95[0] > 1 and speedup > TIE_RATIO:
        return "faster"
    return "slower" if ci95[1] < 1 and speedup < 1 / TIE_RATIO else "tie"


def _first(process: int, settings: MeasureSettings) -> int:
    """The first round of a process: rounds are shared out as evenly as they can be."""
    return process * ROUNDS // settings.processes


@contextmanager
def _opened(candidates: Sequence[Candidate], work: Work, opener: Opener) -> Iterator[dict[str, Timeable]]:
    """A new session of each model, by name, that holds the work."""
    with ExitStack() as stack:
        sessions: dict[str, Timeable] = {}
        for one in candidates:
            sessions[one.name] = stack.enter_context(closing(opener(one.backend, one.onnx, work.shape.threads)))
            work.hold(one.onnx, sessions[one.name])
        yield sessions


def _result(name: str, baseline: str | None, kept: Mapping[str, _Kept], work: Work) -> LatencyResult:
    from onnxsqueeze.measure.statistics import ratio_of_means_interval, ratio_of_medians_interval

    latency, blocks = _latency(kept[name], work), kept[name].times_ms
    if baseline is None or name == baseline:
        return LatencyResult(latency, None, None, "unproven" if baseline is None else "tie", blocks)
    base = _latency(kept[baseline], work)
    speedup = base.p50_ms / latency.p50_ms
    over, under = kept[baseline].by_process, kept[name].by_process
    interval = ratio_of_medians_interval(over, under)
    judged = verdict(speedup, interval) if base.valid and latency.valid else "unproven"
    mean = None if base.mean_ms is None or latency.mean_ms is None else base.mean_ms / latency.mean_ms
    return LatencyResult(latency, speedup, interval, judged, blocks, mean, ratio_of_means_interval(over, under))


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


@dataclass
class _Kept:
    """What is known of one model: an element per process, and the blocks, one per round."""

    load_s: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    warm_ups: list[tuple[int, bool]] = field(default_factory=list)  # runs, whether they became steady
    blocks: list[_Measured] = field(default_factory=list)

    def start(self, session: Timeable) -> None:
        """The first run of a process."""
        self.load_s.append(session.load_s)
        self.first_ms.append(float(session.time(1, 0.0).times_ms[0]))
        memory = session.memory_bytes()
        self.memory_bytes += [] if memory is None else [memory]

    def warm_up(self, session: Timeable) -> None:
        """The runs before those that count."""
        self.warm_ups.append(_warm_up(session))

    @property
    def times_ms(self) -> Blocks:
        """The counted runs of each round."""
        return tuple(block.times_ms for block in self.blocks)

    @property
    def by_process(self) -> Blocks:
        """The counted runs of each process."""
        import numpy as np

        processes = len(self.warm_ups)
        bounds = [process * ROUNDS // processes for process in range(processes + 1)]
        return tuple(np.concatenate(self.times_ms[i:j]) for i, j in pairwise(bounds))


def _latency(kept: _Kept, work: Work) -> Latency:
    import numpy as np

    from onnxsqueeze.measure.statistics import nearest_rank

    runs = np.concatenate(kept.times_ms)
    halves = [nearest_rank(np.concatenate(half), 50) for half in (kept.times_ms[: ROUNDS // 2], kept.times_ms[ROUNDS // 2 :])]
    disturbed = sum(block.disturbed for block in kept.blocks)
    idle = [block.idle for block in kept.blocks if block.idle is not None]
    return Latency(
        p50_ms=nearest_rank(runs, 50),
        p90_ms=nearest_rank(runs, 90),
        p99_ms=nearest_rank(runs, 99) if len(runs) >= P99_RUNS else None,
        n=len(runs),
        batch=work.shape.batch,
        sequence=work.shape.sequence,
        threads=work.shape.threads,
        lengths=work.lengths,
        processes=len(kept.warm_ups),
        load_s=nearest_rank(np.array(kept.load_s[1:] or kept.load_s), 50),
        first_run_ms=nearest_rank(np.array(kept.first_ms[1:] or kept.first_ms), 50),
        mean_ms=float(runs.mean()),
        min_ms=float(runs.min()),
        max_ms=float(runs.max()),
        warmup=sum(runs for runs, _ in kept.warm_ups),
        steady=all(steady for _, steady in kept.warm_ups),
        valid=max(halves) <= DRIFT_RATIO * min(halves) and not disturbed,
        peak_memory_bytes=max(kept.memory_bytes, default=None),
        date=datetime.now(UTC).date().isoformat(),
        repeated_blocks=sum(block.repeats for block in kept.blocks),
        disturbed_blocks=disturbed,
        idle_cpu_share=round(max(idle), 4) if idle else None,
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
