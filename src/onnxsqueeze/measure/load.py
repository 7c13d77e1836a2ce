"""Three loads on one session, on the task's own rows: one caller, a backlog, and requests that come when they like.

    single stream   the next row is asked when the last one is answered: its 90 % point is what one caller waits
    offline         all rows are there at once and go in full batches, sorted by length: rows a second
    server          rows come by a Poisson process and wait in line; the highest rate at which 99 % are answered within the bound

Source: the scenarios of Reddi et al. 2020, "MLPerf Inference Benchmark", section 4.2, and MLPerf LoadGen. Not its official run: spans are
seconds, not ten minutes, unless `seconds` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from onnxsqueeze.backends import Replay
from onnxsqueeze.measure.settings import LoadSettings
from onnxsqueeze.results import Load, ServerTrial
from onnxsqueeze.stage import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[np.int64]]

_SEED = 0
_SEARCH_STEPS = 5  # halvings of the interval between a rate that held and one that did not: 3 % of it are left
_LEAST_CALLS = 100  # a 99 % point of fewer is the slowest call


class Replays(Protocol):
    """A session that runs what it holds at given times: `onnxsqueeze.backends.Session`."""

    def hold(self, feeds: Sequence[Feed]) -> None:
        """Keep the calls."""

    def replay(self, order: Sequence[int], arrivals_s: Sequence[float] | None = None) -> Replay:
        """Run them in this order, none before its arrival (None: each as soon as the last has ended)."""


def measure_load(
    session: Replays, rows: Sequence[Feed], full: Sequence[Feed], settings: LoadSettings, threads: int, progress: Progress
) -> Load:
    """All scenarios. ``rows`` are calls of one row each, ``full`` the same rows in full batches; ``threads`` are the session's."""
    import numpy as np

    from onnxsqueeze.measure.statistics import nearest_rank

    steps = 2 + (_SEARCH_STEPS if settings.bound_ms is not None else 0)
    progress(0, steps, "one caller")
    session.hold([*rows, *full])
    singles, batches = range(len(rows)), range(len(rows), len(rows) + len(full))
    once_ms = float(np.median(session.replay(_repeated(singles, _LEAST_CALLS)).times_ms))  # warms it, too
    alone = session.replay(_repeated(singles, max(_LEAST_CALLS, math.ceil(1000 * settings.seconds / once_ms)))).times_ms
    progress(1, steps, "backlog")
    backlog = [*batches] * math.ceil(1000 * settings.seconds / float(session.replay(batches).ends_ms[-1]))
    took_ms = float(session.replay(backlog).ends_ms[-1])
    trials = _search(session, singles, settings, 1000 / float(alone.mean()), lambda done: progress(2 + done, steps, "random requests"))
    held = [trial.rate_per_s for trial in trials if trial.held]
    return Load(
        single_stream_p90_ms=nearest_rank(alone, 90),
        single_stream_n=len(alone),
        offline_rows_per_s=sum(len(full[i - len(rows)]["input_ids"]) for i in backlog) / (took_ms / 1000),
        offline_batch=settings.batch,
        server_rows_per_s=max(held, default=0.0) if trials else None,
        server_bound_ms=settings.bound_ms,
        server_trials=trials,
        threads=threads,
        mean_tokens=float(np.mean([feed["attention_mask"].sum() for feed in rows])),
    )


def arrivals_s(rate_per_s: float, calls: int) -> list[float]:
    """Arrival times of a Poisson process, seconds from the start; the same ones for every model, scaled by the rate."""
    import numpy as np

    return (np.cumsum(np.random.default_rng(_SEED).exponential(1.0, calls)) / rate_per_s).tolist()  # type: ignore[no-any-return]


def _search(
    session: Replays, singles: Sequence[int], settings: LoadSettings, capacity: float, tell: Callable[[int], None]
) -> tuple[ServerTrial, ...]:
    """Trials from half of ``capacity`` on, each half way between the highest rate that held and the lowest that did not."""
    if settings.bound_ms is None:
        return ()
    trials: list[ServerTrial] = []
    low, high = 0.0, capacity
    for step in range(_SEARCH_STEPS):
        tell(step)
        rate = (low + high) / 2
        trials.append(_trial(session, singles, settings, rate, settings.bound_ms))
        low, high = (rate, high) if trials[-1].held else (low, rate)
    return tuple(trials)


def _trial(session: Replays, singles: Sequence[int], settings: LoadSettings, rate: float, bound_ms: float) -> ServerTrial:
    import numpy as np

    from onnxsqueeze.measure.statistics import nearest_rank

    order = _repeated(singles, max(_LEAST_CALLS, math.ceil(settings.seconds * rate)))
    arrived = arrivals_s(rate, len(order))
    waited = session.replay(order, arrived).ends_ms - 1000 * np.array(arrived)
    p99 = nearest_rank(waited, 99)
    return ServerTrial(rate_per_s=rate, n=len(order), p99_ms=p99, held=p99 <= bound_ms)


def _repeated(calls: Sequence[int], n: int) -> list[int]:
    return [calls[i % len(calls)] for i in range(n)]
