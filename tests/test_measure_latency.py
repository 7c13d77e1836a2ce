"""Interleaved timing: what is slower is found slower by the right ratio, equals tie, and conditions are recorded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from models import random_checkpoint, silent, toy_rows
from onnxsqueeze.backends import Block, Replay
from onnxsqueeze.environment import default_threads
from onnxsqueeze.errors import MeasureError, Unavailable
from onnxsqueeze.measure.contention import OTHERS_SHARE, Reading, others_share, read
from onnxsqueeze.measure.latency import P99_RUNS, REPEATS, Candidate, LatencyResult, Timeable, measure_latency, verdict
from onnxsqueeze.measure.settings import MeasureSettings, Shape
from onnxsqueeze.measure.work import ROUNDS, FixedWork, TaskWork, Work
from test_backends import classifier

SHAPE = Shape(batch=1, sequence=16, threads=1)
QUICK = MeasureSettings(min_runs=100, min_seconds=0)
PROCESSES = QUICK.processes


class Sleeper:
    """A session whose runs take a known time on the bench's clock, plus a seeded percent of unrest."""

    def __init__(self, name: str, bench: Bench) -> None:
        self.name, self.bench, self.closed, self.blocks = name, bench, False, 0
        self.load_s, self.luck = next(bench.loads_s, 0.25), bench.luck()

    def hold(self, feeds: Sequence[Mapping[str, NDArray[np.int64]]]) -> None:
        self.feeds = feeds
        self.bench.feeds += feeds

    def replay(self, order: Sequence[int], arrivals_s: Sequence[float] | None = None) -> Replay:  # noqa: ARG002, none has arrivals
        """A call of n tokens takes n times as long as `run_ms` says."""
        self.bench.replayed.setdefault(self.name, []).append(list(order))
        ends = np.cumsum([self.run_ms() * self.feeds[i]["input_ids"].shape[1] for i in order])
        return Replay(np.concatenate([[0.0], ends[:-1]]), ends, ends[-1] / 1e3)

    def time(self, least_runs: int, least_ms: float, *, uncounted: int = 0) -> Block:
        self.blocks += uncounted
        before = [self.run_ms() for _ in range(uncounted)]
        times: list[float] = []
        while len(times) < least_runs or sum(times) < least_ms:
            times.append(self.run_ms())
        return Block(np.array(times), (sum(before) + sum(times)) / 1e3)

    def run_ms(self) -> float:
        ms = self.bench.ms[self.name]
        self.bench.calls.append(self.name)
        taken = (ms if isinstance(ms, float) else ms()) * self.luck * (1 + 0.01 * self.bench.unrest.random())
        self.bench.now_s += taken / 1e3
        return taken

    def cpu_s(self) -> float:
        return self.bench.restless.get(self.name, 0.0) * self.bench.now_s

    def memory_bytes(self) -> int:
        return 1_000_000

    def close(self) -> None:
        self.closed = True


class Bench:
    """Times sleepers by a clock that only they move; ``ms`` is the time of a run per name."""

    def __init__(self, folder: Path, config: Mapping[str, object] | None = None, **ms: float | Callable[[], float]) -> None:
        self.calls: list[str] = []
        self.feeds: list[Mapping[str, NDArray[np.int64]]] = []
        self.replayed: dict[str, list[list[int]]] = {}
        self.sessions: list[Sleeper] = []
        self.told: list[tuple[int, int, str]] = []
        self.candidates, self.ms, self.now_s, self.unrest = [], ms, 0.0, np.random.default_rng(0)
        self.loads_s: Iterator[float] = iter(())
        self.luck: Callable[[], float] = lambda: 1.0  # a factor on all runs of a session
        self.restless: dict[str, float] = {}  # of one core, what a session uses all the time
        self.others: Callable[[], float] = lambda: 0.0
        self.others_s, self.read_at = 0.0, 0.0
        for name in ms:
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(json.dumps(config if config is not None else {"vocab_size": 30}), encoding="utf-8")
            self.candidates.append(Candidate(name, folder / name / "model.onnx", "cpu"))

    def opener(self, backend: str, onnx: Path, threads: int) -> Timeable:
        assert (backend, threads) == ("cpu", 1)
        self.sessions.append(Sleeper(onnx.parent.name, self))
        return self.sessions[-1]

    def hear(self, done: int, total: int, note: str = "") -> None:
        self.told.append((done, total, note))

    def measure(
        self, baseline: str | None, settings: MeasureSettings = QUICK, shape: Shape = SHAPE, work: Work | None = None
    ) -> dict[str, LatencyResult]:
        return measure_latency(
            self.candidates, baseline, work or FixedWork(shape), settings, self.hear, opener=self.opener, reader=self.read
        )

    def read(self) -> Reading:
        """Busy is what sleepers slept, and ``others`` of one second in every second besides."""
        self.others_s += self.others() * (self.now_s - self.read_at)
        self.read_at = self.now_s
        return Reading(self.now_s, self.now_s + self.others_s, 0.0)


def test_a_slower_and_a_faster_model_are_found_with_the_right_ratio(tmp_path: Path) -> None:
    found = Bench(tmp_path, base=1.0, slow=2.0, fast=0.5).measure("base")

    assert found["slow"].speedup == pytest.approx(0.5, rel=0.05)
    assert found["fast"].speedup == pytest.approx(2.0, rel=0.05)
    assert (found["slow"].verdict, found["fast"].verdict) == ("slower", "faster")
    assert found["fast"].speedup is not None
    assert found["fast"].speedup_ci95 is not None
    low, high = found["fast"].speedup_ci95
    assert 1.8 < low <= found["fast"].speedup <= high < 2.2
    assert found["base"].latency.p50_ms == pytest.approx(1.0, rel=0.05)


def test_two_equal_models_tie_and_a_baseline_has_no_ratio(tmp_path: Path) -> None:
    found = Bench(tmp_path, base=0.5, same=0.5).measure("base")

    assert found["same"].verdict == "tie"
    assert (found["base"].speedup, found["base"].speedup_ci95, found["base"].verdict) == (None, None, "tie")


def test_without_a_baseline_there_is_a_latency_and_no_verdict(tmp_path: Path) -> None:
    found = Bench(tmp_path, only=0.3).measure(None)

    assert (found["only"].speedup, found["only"].verdict) == (None, "unproven")
    assert found["only"].latency.n >= 100


def test_a_difference_that_nobody_would_choose_by_is_a_tie_however_well_it_is_known() -> None:
    assert verdict(1.015, (1.01, 1.02)) == "tie"
    assert verdict(1.03, (1.01, 1.05)) == "faster"
    assert verdict(1.5, (0.99, 2.0)) == "tie"
    assert verdict(1.5, (1.4, 1.6)) == "faster"
    assert verdict(0.7, (0.65, 0.75)) == "slower"
    assert verdict(0.99, (0.98, 0.999)) == "tie"


def test_every_model_runs_one_block_a_round_and_stands_equally_often_in_every_place(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a=0.05, b=0.05, c=0.05, d=0.05)
    found = bench.measure("a", MeasureSettings(min_runs=20, min_seconds=0))
    blocks = [name for _, _, name in bench.told if name in found]
    rounds = [blocks[i : i + 4] for i in range(0, len(blocks), 4)]

    assert all(sorted(one) == ["a", "b", "c", "d"] for one in rounds)
    for place in range(4):
        assert Counter(one[place] for one in rounds) == dict.fromkeys("abcd", ROUNDS // 4)
    assert {len(result.samples_ms) for result in found.values()} == {ROUNDS}
    assert len({tuple(one) for one in rounds}) > 4  # not one order turned round and round


def test_runs_and_seconds_both_reach_what_was_asked(tmp_path: Path) -> None:
    found = Bench(tmp_path, base=0.4, slow=4.0).measure("base", MeasureSettings(min_runs=60, min_seconds=0.2))

    assert found["slow"].latency.n == 60
    assert found["base"].latency.n > 300
    for result in found.values():
        times = np.concatenate(result.samples_ms)
        assert len(times) == result.latency.n
        assert times.sum() >= 200
        assert (times.min(), times.max()) == (result.latency.min_ms, result.latency.max_ms)


@pytest.mark.parametrize(("runs", "known"), [(P99_RUNS - 19, False), (P99_RUNS + 1, True)])
def test_p99_is_only_told_from_459_runs_on(tmp_path: Path, runs: int, known: bool) -> None:
    latency = Bench(tmp_path, base=0.02).measure("base", MeasureSettings(min_runs=runs, min_seconds=0))["base"].latency

    assert latency.n == runs
    assert (latency.p99_ms is not None) == known


def test_the_limit_of_p99_is_exact() -> None:
    from onnxsqueeze.measure.latency import _Kept, _latency, _Measured

    def p99(n: int) -> float | None:
        blocks = tuple(np.array_split(np.arange(1.0, n + 1), ROUNDS))
        kept = _Kept([0.1], [1.0], [], [(5, True)], [_Measured(block, 0.0, None) for block in blocks])
        return _latency(kept, FixedWork(SHAPE)).p99_ms

    assert p99(458) is None
    assert p99(459) == 455  # ceil(0.99 · 459)


def test_a_machine_that_slows_down_half_way_proves_nothing(tmp_path: Path) -> None:
    def load() -> float:
        done, total, _ = bench.told[-1] if bench.told else (0, 1, "")
        return 1.5 if done > total / 2 else 1.0

    bench = Bench(tmp_path, base=lambda: 0.3 * load(), other=lambda: 0.1 * load())
    found = bench.measure("base")

    assert not found["base"].latency.valid
    assert found["other"].verdict == "unproven"
    assert found["other"].speedup == pytest.approx(3.0, rel=0.05)


def test_a_block_that_others_disturbed_is_run_again_and_counts_no_more(tmp_path: Path) -> None:
    bench = Bench(tmp_path, base=10.0, other=5.0)
    noisy = iter([False] * 9 + [True] * 3)  # the reading at a block's end: two a block
    bench.others = lambda: 2.0 if next(noisy, False) else 0.0
    found = bench.measure("base")

    assert found["base"].latency.repeated_blocks + found["other"].latency.repeated_blocks in (1, 2)
    for result in found.values():
        assert result.latency.disturbed_blocks == 0
        assert result.latency.valid
        assert len(result.samples_ms) == ROUNDS


def test_others_that_never_rest_make_the_latency_invalid_and_end_the_repetitions(tmp_path: Path) -> None:
    bench = Bench(tmp_path, base=10.0, other=5.0)
    bench.others = lambda: 2.0
    found = bench.measure("base")

    assert sum(result.latency.repeated_blocks for result in found.values()) == (REPEATS - 1) * ROUNDS * 2
    assert found["other"].verdict == "unproven"
    assert found["other"].speedup == pytest.approx(2.0, rel=0.05)
    for result in found.values():
        assert not result.latency.valid
        assert result.latency.disturbed_blocks > 0


def test_models_that_use_the_cpu_while_they_wait_make_the_latency_of_the_others_invalid(tmp_path: Path) -> None:
    bench = Bench(tmp_path, base=10.0, other=5.0)
    bench.restless = {"other": 0.5}
    found = bench.measure("base")

    assert found["base"].latency.idle_cpu_share == pytest.approx(0.5, abs=0.25)  # one tick of 10 ms is left to rounding
    assert found["base"].latency.disturbed_blocks == ROUNDS
    assert not found["base"].latency.valid
    assert found["other"].latency.idle_cpu_share == 0.0
    assert found["other"].latency.valid
    assert found["other"].verdict == "unproven"


def test_a_real_neighbour_is_noticed_and_a_quiet_span_is_not_blamed() -> None:
    def span(seconds: float) -> float:
        before, began = read(), time.perf_counter()
        while time.perf_counter() - began < seconds:
            pass
        return others_share(before, read(), default_threads())

    busy = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(busy) for _ in range(default_threads())]
    try:
        time.sleep(0.2)
        shares = [span(0.4) for _ in range(3)]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert min(shares) > OTHERS_SHARE
    before = read()
    assert others_share(before, before, 2) == 0.0
    assert others_share(None, before, 2) == 0.0


def test_a_process_that_is_timed_is_no_neighbour() -> None:
    before, after = Reading(0.0, 0.0, 0.0), Reading(1.0, 1.2, 0.1)

    assert others_share(before, after, 1) == pytest.approx(1.09)
    assert others_share(before, after, 1, 1.0) == pytest.approx(0.09)


def test_warm_up_ends_when_two_windows_agree(tmp_path: Path) -> None:
    cold = iter([50.0, 40.0, *np.linspace(30, 10, 28)])
    latency = Bench(tmp_path, base=lambda: next(cold, 10.0)).measure("base")["base"].latency

    assert latency.steady
    assert 30 <= latency.warmup - 10 * (PROCESSES - 1) <= 50
    assert latency.first_run_ms == pytest.approx(10, rel=0.02), "the first process alone was cold"
    assert latency.max_ms < 10.2


def test_warm_up_that_never_becomes_steady_ends_and_says_so(tmp_path: Path) -> None:
    runs = iter(range(1, 100_000))
    latency = Bench(tmp_path, grows=lambda: 2.0 * next(runs)).measure(None)["grows"].latency

    assert not latency.steady
    assert 10 <= latency.warmup < 500


def test_progress_tells_which_model_and_ends_at_the_total(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a=0.1, b=0.1)
    bench.measure("a")
    total = 2 * (ROUNDS + PROCESSES)

    assert bench.told[0] == (0, total, "warming up a")
    assert [done for done, _, _ in bench.told] == list(range(total + 1))


@pytest.mark.parametrize("processes", [2, 3, 5, 20])
def test_rounds_are_shared_out_among_new_processes_whose_sessions_are_closed(tmp_path: Path, processes: int) -> None:
    bench = Bench(tmp_path, a=0.05, b=0.05)
    found = bench.measure("a", MeasureSettings(min_runs=20, min_seconds=0, processes=processes))

    assert [session.name for session in bench.sessions] == ["a", "b"] * processes
    assert all(session.closed for session in bench.sessions)
    assert found["b"].latency.processes == processes
    assert {len(result.samples_ms) for result in found.values()} == {ROUNDS}
    shares = Counter(session.blocks for session in bench.sessions)
    assert max(shares) - min(shares) <= 1
    assert sum(blocks * sessions for blocks, sessions in shares.items()) == 2 * ROUNDS


def test_load_and_first_run_are_medians_without_the_first_process(tmp_path: Path) -> None:
    bench = Bench(tmp_path, base=0.05)
    bench.loads_s = iter([9.0, 0.3, 0.1, 0.2, 0.4])
    latency = bench.measure("base")["base"].latency

    assert latency.load_s == 0.2


def test_processes_that_differ_widen_the_interval_of_equal_files(tmp_path: Path) -> None:
    """Every process is up to 5 % slower than another for as long as it lives; equal files must stay a tie."""
    luck = np.random.default_rng(1)
    verdicts: Counter[str] = Counter()
    for attempt in range(20):
        bench = Bench(tmp_path / str(attempt), base=10.0, same=10.0)
        bench.luck = lambda: 1 + 0.05 * float(luck.random())
        result = bench.measure("base", MeasureSettings(min_runs=20, min_seconds=0))["same"]
        assert result.speedup_ci95 is not None
        low, high = result.speedup_ci95
        assert high / low > 1.01
        verdicts[result.verdict] += 1

    assert verdicts["tie"] >= 18


def test_inputs_are_ids_of_the_vocabulary_without_padding_the_same_in_every_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"vocab_size": 7, "pad_token_id": 1}, base=0.02)
    bench.measure("base", shape=Shape(batch=3, sequence=40, threads=1))

    first, *others = bench.feeds
    assert all(np.array_equal(other[name], first[name]) for other in others for name in first), "every process runs the same"
    assert {name: value.shape for name, value in first.items()} == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (3, 40))
    assert set(first["input_ids"].ravel()) == {0, 2, 3, 4, 5, 6}
    assert first["attention_mask"].all()
    assert not first["token_type_ids"].any()


def test_a_sequence_beyond_the_model_s_positions_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    bert = Bench(tmp_path, {"vocab_size": 9, "max_position_embeddings": 16}, base=0.02)
    bert.measure("base", MeasureSettings(min_runs=20, min_seconds=0))
    (tmp_path / "roberta").mkdir()
    roberta = Bench(
        tmp_path / "roberta", {"vocab_size": 9, "max_position_embeddings": 17, "pad_token_id": 1, "model_type": "roberta"}, r=0.02
    )

    with pytest.raises(MeasureError, match="takes at most 16 tokens, measure asks for 17") as caught:
        bert.measure("base", shape=Shape(batch=1, sequence=17, threads=1))
    assert "measure.sequence" in (caught.value.remedy or "")
    with pytest.raises(MeasureError, match="takes at most 15 tokens"):
        roberta.measure("r")


def test_a_model_without_its_configuration_is_an_error(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {}, base=0.02)

    with pytest.raises(MeasureError, match=r"base: config\.json: no vocab_size"):
        bench.measure("base")


def test_real_sessions_are_timed_and_more_work_takes_longer(tmp_path: Path) -> None:
    candidates = []
    for name, width in (("small", 256), ("large", 4096)):
        (tmp_path / name).mkdir()
        classifier(tmp_path / name / "model.onnx", width=width)
        (tmp_path / name / "config.json").write_text('{"vocab_size": 50}', encoding="utf-8")
        candidates.append(Candidate(name, tmp_path / name / "model.onnx", "cpu"))
    found = measure_latency(
        candidates, "large", FixedWork(Shape(batch=2, sequence=64, threads=1)), MeasureSettings(min_runs=200, min_seconds=0.1), silent
    )

    assert (found["small"].speedup or 0) > 1.5  # also where others use the machine, and the verdict is "unproven"
    latency = found["small"].latency
    assert (latency.batch, latency.sequence, latency.threads) == (2, 64, 1)
    assert 0 < latency.min_ms <= latency.p50_ms <= latency.p90_ms <= latency.max_ms
    assert latency.load_s > 0
    for result in found.values():
        assert result.latency.idle_cpu_share is not None, "the system tells the CPU time of a process"
        assert result.latency.idle_cpu_share <= 0.05
        assert 0 < (result.latency.peak_memory_bytes or 0) < 2e9


def test_the_tasks_rows_are_the_same_calls_for_every_model_in_every_round(tmp_path: Path) -> None:
    bench = Bench(tmp_path, base=0.2, fast=0.1)
    for one in bench.candidates:
        random_checkpoint(one.onnx.parent, "bert")
    texts = [(row.text, None) for row in toy_rows(50, seed=0)]
    work = TaskWork.of(texts, bench.candidates[0].onnx.parent, max_length=32, batch=2, threads=1)
    found = bench.measure("base", work=work)

    assert (found["fast"].latency.lengths, found["fast"].latency.batch) == ("task", 2)
    assert found["fast"].latency.sequence == work.shape.sequence
    assert found["fast"].latency.n == 800
    assert found["fast"].speedup == pytest.approx(2.0, rel=0.05)
    rounds = bench.replayed["base"]
    assert rounds == bench.replayed["fast"]
    assert [i for round_ in rounds for i in round_[1:]] == list(range(800)), "the first of a round is not counted"
    lengths = {feed["input_ids"].shape[1] for feed in bench.feeds}
    assert len(lengths) > 3, "each call has its own length"
    assert min(lengths) <= work.shape.sequence <= max(lengths)


def test_the_way_from_text_to_logits_is_the_models_time_and_the_tokenizers(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", "roberta")
    pairs = [(row.text, row.text) for row in toy_rows(20, seed=0)]
    work = TaskWork.of(pairs, folder, max_length=64, batch=1, threads=1)
    model_ms = np.arange(800.0)
    text = work.text(folder / "model.onnx", model_ms)

    assert len(text.tokenize_ms) == len(text.whole_ms) == 200
    assert text.tokenize_ms.min() > 0
    np.testing.assert_allclose(text.whole_ms - text.tokenize_ms, model_ms[:200])


@pytest.mark.full
def test_memory_is_told_apart_by_model(tmp_path: Path) -> None:
    candidates = []
    for name, width in (("small", 8), ("large", 100_000)):
        (tmp_path / name).mkdir()
        classifier(tmp_path / name / "model.onnx", width=width)
        (tmp_path / name / "config.json").write_text('{"vocab_size": 50}', encoding="utf-8")
        candidates.append(Candidate(name, tmp_path / name / "model.onnx", "cpu"))
    found = measure_latency(candidates, None, FixedWork(SHAPE), MeasureSettings(min_runs=20, min_seconds=0), silent)

    small, large = (found[name].latency.peak_memory_bytes or 0 for name in ("small", "large"))
    assert large - small > 50 * 100_000 * 4  # the table of the large one


def test_a_backend_that_does_not_start_is_unavailable(tmp_path: Path) -> None:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    bench = Bench(tmp_path, base=0.1)

    with pytest.raises(Unavailable, match="no CUDAExecutionProvider"):
        measure_latency([Candidate("base", bench.candidates[0].onnx, "cuda")], "base", FixedWork(SHAPE), QUICK, silent)


def test_settings_refuse_what_cannot_be_measured() -> None:
    for wrong in (
        {"batch": 0},
        {"sequence": 0},
        {"threads": 0},
        {"min_runs": 19},
        {"min_seconds": -1},
        {"sequnce": 5},
        {"shapes": [{"sequence": 0}]},
    ):
        with pytest.raises(ValidationError):
            MeasureSettings.model_validate(wrong)
    assert MeasureSettings().shape == Shape(batch=1, sequence=128, threads=1)
    assert (MeasureSettings().min_runs, MeasureSettings().min_seconds) == (100, 3.0)
