"""Latency of several models beside each other: every ratio is between runs that shared the same seconds.

For one shape, with all sessions open:

    load     each session is made twice; the second time counts, when the file is in memory
    first    the first run of each session
    warm-up  windows of runs until the medians of two successive windows differ by at most 3 %, for at most 2 s
    rounds   20 rounds; in each, every model runs one block. A block begins with one run that is not counted (the model before it left
             its weights in the caches) and lasts 1/20 of what settings ask for in runs *and* seconds. The order is drawn anew for
             each cycle and turned by one place each round, so that every model stands equally often in every place.
    quiet    a block in which others took more than 5 % of the cores is run again, until the blocks are three times as many as planned;
             what is left disturbed then is counted, and makes the latency invalid
    ratio    median of the baseline ÷ median of the target, with an interval that resamples rounds
    valid    no block was disturbed, and the medians of the first and of the second ten rounds are within 25 % of each other
    verdict  faster or slower where the whole interval lies on one side of 1 and the ratio is beyond 2 %; else a tie
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from onnxsqueeze import backends
from onnxsqueeze.environment import default_threads
from onnxsqueeze.errors import MeasureError
from onnxsqueeze.measure.contention import OTHERS_SHARE, Reading, others_share, read
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.results import Latency
from onnxsqueeze.stage import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[np.int64]]
    Blocks = tuple[NDArray[np.float64], ...]  # milliseconds of each run, one array per round

Verdict = Literal["faster", "slower", "tie", "unproven"]

ROUNDS = 20
P99_RUNS = 459  # 0.99^459 < 0.01: so many runs have one beyond the 99 % point with 99 % probability
TIE_RATIO = 1.02  # two sessions of one file differ by 1 or 2 %: where their memory lies, how it is aligned
DRIFT_RATIO = 1.25  # the medians of the first and the second half of the rounds may differ by this much
REPEATS = 3  # planned and repeated blocks together are at most this many times the planned ones
_WINDOW_RUNS, _WINDOW_MS = 5, 50.0
_STEADY_RATIO, _WARMUP_MS = 1.03, 2_000.0
_SEED = 0


class Runs(Protocol):
    """What is timed: `onnxsqueeze.backends.Session`, or anything that runs."""

    load_s: float

    def run(self, feed: Feed) -> object:
        """One call; its result is not looked at."""

    def close(self) -> None:
        """Free what the session holds."""


Opener = Callable[[str, Path, int], Runs]  # backend, file, threads


@dataclass(frozen=True)
class Candidate:
    """One model to measure. ``onnx`` is its file, with config.json beside it; ``backend`` is a name that `backends.get` knows."""

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


def _open(backend: str, onnx: Path, threads: int) -> Runs:
    return backends.get(backend).open(onnx, threads)


def measure_latency(
    candidates: Sequence[Candidate],
    baseline: str | None,
    shape: Shape,
    settings: MeasureSettings,
    progress: Progress,
    *,
    opener: Opener = _open,
    clock: Callable[[], int] = time.perf_counter_ns,
    reader: Callable[[], Reading | None] = read,
) -> dict[str, LatencyResult]:
    """Time all ``candidates`` at one shape, interleaved; per name its latency and its ratio to the one named ``baseline``.

    Inputs are random ids of the vocabulary with a full attention mask, the same in every run. Of ``settings`` only ``min_runs`` and
    ``min_seconds`` are used. Raises MeasureError where a model does not take the shape, Unavailable where a backend does not start.
    """
    feeds = {c.name: _feed(c, shape) for c in candidates}
    watches: dict[str, _Stopwatch] = {}
    try:
        for c in candidates:
            opener(c.backend, c.onnx, shape.threads).close()
            watches[c.name] = _Stopwatch(opener(c.backend, c.onnx, shape.threads), feeds[c.name], clock)
        first_ms = {name: watch.run_ms() for name, watch in watches.items()}
        total = len(watches) * (ROUNDS + 1)
        warm: dict[str, tuple[int, bool]] = {}
        for done, (name, watch) in enumerate(watches.items()):
            progress(done, total, f"warming up {name}")
            warm[name] = watch.warm_up()
        samples: dict[str, list[_Block]] = {name: [] for name in watches}
        cores, spare = default_threads(), (REPEATS - 1) * ROUNDS * len(watches)
        for done, name in enumerate(_order(list(watches)), start=len(watches)):
            progress(done, total, name)
            block = watches[name].block(settings, reader, cores)
            while block.others > OTHERS_SHARE and spare:
                spare -= 1
                block = replace(watches[name].block(settings, reader, cores), repeats=block.repeats + 1)
            samples[name].append(block)
        progress(total, total)
    finally:
        for watch in watches.values():
            watch.session.close()
    blocks = {name: tuple(block.times_ms for block in found) for name, found in samples.items()}
    latencies = {
        name: _latency(blocks[name], shape, watch.session.load_s, first_ms[name], *warm[name], _unrest(samples[name]))
        for name, watch in watches.items()
    }
    return {name: _result(name, baseline, latencies, blocks) for name in watches}


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
class _Block:
    """One block's runs, the part of the cores that others took meanwhile, and how often it was run again for that."""

    times_ms: NDArray[np.float64]
    others: float
    repeats: int = 0


def _unrest(blocks: Sequence[_Block]) -> dict[str, int]:
    """The two counts of a record: blocks that were run again, and blocks that others disturbed all the same."""
    return {
        "repeated_blocks": sum(block.repeats for block in blocks),
        "disturbed_blocks": sum(block.others > OTHERS_SHARE for block in blocks),
    }


def _latency(
    blocks: Blocks,
    shape: Shape,
    load_s: float,
    first_run_ms: float,
    warmup: int,
    steady: bool,  # noqa: FBT001  # a fact, not a switch
    unrest: Mapping[str, int],
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
        batch=shape.batch,
        sequence=shape.sequence,
        threads=shape.threads,
        load_s=load_s,
        first_run_ms=first_run_ms,
        min_ms=float(runs.min()),
        max_ms=float(runs.max()),
        warmup=warmup,
        steady=steady,
        valid=max(halves) <= DRIFT_RATIO * min(halves) and not unrest["disturbed_blocks"],
        date=datetime.now(UTC).date().isoformat(),
        **unrest,
    )


def _order(names: list[str]) -> Iterator[str]:
    """The name of each block, `ROUNDS` rounds of all names: a new order every ``len(names)`` rounds, turned by one place in between."""
    import numpy as np

    random = np.random.default_rng(_SEED)
    order: list[str] = []
    for i in range(ROUNDS):
        turn = i % len(names)
        if turn == 0:
            order = [names[j] for j in random.permutation(len(names))]
        yield from (*order[turn:], *order[:turn])


@dataclass(frozen=True)
class _Stopwatch:
    """Times runs of one session on one input by a clock in nanoseconds."""

    session: Runs
    feed: Feed
    clock: Callable[[], int]

    def run_ms(self) -> float:
        """The time of one run."""
        began = self.clock()
        self.session.run(self.feed)
        return (self.clock() - began) / 1e6

    def runs_ms(self, least_runs: int, least_ms: float) -> list[float]:
        """The time of each run, until there are enough runs and they took long enough."""
        times: list[float] = []
        spent = 0.0
        while len(times) < least_runs or spent < least_ms:
            times.append(self.run_ms())
            spent += times[-1]
        return times

    def warm_up(self) -> tuple[int, bool]:
        """Run until two successive windows agree: (runs, whether they did before the time was up)."""
        from statistics import median

        runs, spent, before = 0, 0.0, None
        while True:
            window = self.runs_ms(_WINDOW_RUNS, _WINDOW_MS)
            runs, spent, now = runs + len(window), spent + sum(window), median(window)
            if before is not None:
                if max(now, before) <= _STEADY_RATIO * min(now, before):
                    return runs, True
                if spent > _WARMUP_MS:
                    return runs, False
            before = now

    def block(self, settings: MeasureSettings, reader: Callable[[], Reading | None], cores: int) -> _Block:
        """The runs of one block, without its first one and without garbage collection, and what others took of ``cores`` meanwhile."""
        import numpy as np

        collecting = gc.isenabled()
        gc.disable()
        try:
            self.session.run(self.feed)
            before = reader()
            times = np.array(self.runs_ms(-(-settings.min_runs // ROUNDS), 1000 * settings.min_seconds / ROUNDS))
            return _Block(times, others_share(before, reader(), cores))
        finally:
            if collecting:
                gc.enable()


def _feed(candidate: Candidate, shape: Shape) -> Feed:
    import numpy as np

    place = f"{candidate.name}: config.json"
    file = candidate.onnx.parent / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = int(config["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise MeasureError(
            f"{place}: no vocab_size can be read beside the model", remedy="copy the model's config.json to its .onnx"
        ) from error
    pad_id, longest = config.get("pad_token_id") or 0, config.get("max_position_embeddings")
    if longest is not None and "roberta" in config.get("model_type", ""):
        longest -= pad_id + 1  # its first position is pad_id + 1
    if longest is not None and shape.sequence > longest:
        raise MeasureError(
            f"{place}: the model takes at most {longest} tokens, measure asks for {shape.sequence}",
            remedy=f"set measure.sequence (and each of measure.shapes) to {longest} or less",
        )
    ids = np.random.default_rng(_SEED).integers(vocabulary, size=(shape.batch, shape.sequence))
    ids[ids == pad_id] = (pad_id + 1) % vocabulary
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
