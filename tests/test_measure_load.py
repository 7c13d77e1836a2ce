"""Load on a session whose service times are known: what must come out can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from models import silent
from onnxsqueeze.backends import Replay
from onnxsqueeze.measure.load import arrivals_s, measure_load
from onnxsqueeze.measure.settings import LoadSettings

Feed = Mapping[str, NDArray[np.int64]]


@dataclass
class Clockwork:
    """Takes ``ms_a_row`` a row, and ``ms_a_call`` on top; time passes as if it were real."""

    ms_a_row: float
    ms_a_call: float = 0.0
    feeds: list[Feed] = field(default_factory=list)

    def hold(self, feeds: Sequence[Feed]) -> None:
        self.feeds = list(feeds)

    def replay(self, order: Sequence[int], arrivals_s: Sequence[float] | None = None) -> Replay:
        now = 0.0
        begins, ends = [], []
        for i, which in enumerate(order):
            begins.append(max(now, 1000 * arrivals_s[i]) if arrivals_s is not None else now)
            now = begins[-1] + self.ms_a_call + self.ms_a_row * len(self.feeds[which]["input_ids"])
            ends.append(now)
        return Replay(np.array(begins), np.array(ends), 0.0)


def calls(n: int, batch: int) -> list[Feed]:
    feed: Feed = {name: np.ones((batch, 4), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    return [feed for _ in range(n // batch)]


def test_one_caller_waits_for_one_row_and_a_backlog_saves_the_cost_of_calls() -> None:
    load = measure_load(Clockwork(2.0, 3.0), calls(64, 1), calls(64, 16), LoadSettings(seconds=1.0, batch=16), threads=1, progress=silent)
    assert load.single_stream_p90_ms == pytest.approx(5.0)
    assert load.single_stream_n == 200  # a second of 5 ms
    assert load.offline_rows_per_s == pytest.approx(16 / 0.035)
    assert load.mean_tokens == 4
    assert (load.server_rows_per_s, load.server_trials) == (None, ())


def test_the_highest_rate_is_the_last_one_whose_slowest_percent_held_the_bound() -> None:
    settings = LoadSettings(seconds=20.0, bound_ms=30.0)
    load = measure_load(Clockwork(10.0), calls(64, 1), calls(64, 32), settings, threads=1, progress=silent)
    assert load.server_rows_per_s is not None
    # a queue of Poisson arrivals with fixed service of 10 ms: at 40 of 100 a second 99 % are through within 30 ms, at 80 they are not
    assert 30 < load.server_rows_per_s < 70
    held = [trial.rate_per_s for trial in load.server_trials if trial.held]
    missed = [trial.rate_per_s for trial in load.server_trials if not trial.held]
    assert load.server_rows_per_s == max(held) < min(missed)
    assert min(missed) - max(held) <= 100 / 2**5


def test_a_bound_below_the_time_of_one_row_is_held_by_no_rate() -> None:
    load = measure_load(Clockwork(10.0), calls(64, 1), calls(64, 32), LoadSettings(seconds=1.0, bound_ms=9.0), threads=1, progress=silent)
    assert load.server_rows_per_s == 0.0
    assert not any(trial.held for trial in load.server_trials)


def test_a_bound_that_every_rate_holds_ends_near_what_one_caller_gets() -> None:
    load = measure_load(Clockwork(1.0), calls(64, 1), calls(64, 32), LoadSettings(seconds=1.0, bound_ms=1e6), threads=1, progress=silent)
    assert load.server_rows_per_s == pytest.approx(1000, rel=0.04)


def test_arrivals_are_a_poisson_process_of_the_rate_and_the_same_every_time() -> None:
    found = np.array(arrivals_s(50.0, 20_000))
    gaps = np.diff(found)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    assert arrivals_s(50.0, 10) == arrivals_s(50.0, 20_000)[:10]
    assert arrivals_s(100.0, 10)[-1] == pytest.approx(arrivals_s(50.0, 10)[-1] / 2)
