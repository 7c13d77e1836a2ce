"""Rows that share a call of the model, and who makes the calls: a thread, or the event loop where the call is over before that would matter.

A request that comes while nothing runs is called at once and alone, exactly as it was sent: by the loop itself where it was read alone and its call,
as the last ones tell, takes no more than `_HERE_S`, which saves two hand-overs between threads; else by the thread. Those that come meanwhile wait; the next call takes the one that has waited longest, and, in the order of their coming, those whose real length (without padding) keeps the longest and
the shortest of the call within `_NEAR_TOKENS` tokens or `_NEAR_SHARE` of the longest, up to ``max_batch`` rows. So at most a quarter of
a long call is padding, and of a short one eight tokens a row.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsqueeze.serving.answer import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxsqueeze.serving.model import Model

    Feed = dict[str, NDArray[Any]]
    Outputs = list[NDArray[Any]]

_NEAR_TOKENS, _NEAR_SHARE = 8, 0.25
_KEPT = 0.8  # of the estimated times, at each new call
_HERE_S = 0.005  # so long health checks, refusals and the next requests may wait for a call in the loop


class Job:
    """One request's rows on their way: made and ended by the event loop, read by the thread in between."""

    __slots__ = ("came", "dead", "feed", "future", "length", "model", "rows", "taken", "timer")

    def __init__(self, model: Model, feed: Feed, rows: int, length: int, future: asyncio.Future[Outputs]) -> None:
        self.model, self.feed, self.rows, self.length, self.future = model, feed, rows, length, future
        self.came = time.perf_counter()
        self.timer: asyncio.TimerHandle | None = None
        self.taken = False  # by a call: the thread writes it
        self.dead = False  # waited too long: the loop writes it


@dataclass(frozen=True, slots=True)
class Batch:
    """One call that was made, for the metrics."""

    rows: int
    tokens: int  # padding among them
    padding: float
    compute_s: float
    waited_s: tuple[float, ...]
    left_rows: int  # that still waited when it ended


def choose(waiting: list[Job], max_batch: int) -> list[Job]:
    """Take the jobs of the next call out of ``waiting``, by the rule above; jobs of another model or that cannot be merged wait."""
    first = waiting[0]
    if len(waiting) == 1 or not first.model.mergeable:
        return [waiting.pop(0)]
    taken, left = [first], []
    rows, shortest, longest = first.rows, first.length, first.length
    for job in waiting[1:]:
        low, high = min(shortest, job.length), max(longest, job.length)
        fits = rows + job.rows <= max_batch and high - low <= max(_NEAR_TOKENS, _NEAR_SHARE * high)
        if fits and job.model is first.model:
            taken.append(job)
            rows, shortest, longest = rows + job.rows, low, high
        else:
            left.append(job)
    waiting[:] = left
    return taken


def merge(jobs: Sequence[Job]) -> Feed:
    """One feed of all rows, as wide as the longest is really long; padded by the model's padding."""
    width, rows = max(job.length for job in jobs), sum(job.rows for job in jobs)
    merged: Feed = {}
    for name, first in jobs[0].feed.items():
        whole = np.full((rows, width), jobs[0].model.pad_id if name == "input_ids" else 0, first.dtype)
        at = 0
        for job in jobs:
            part = job.feed[name][:, :width]
            whole[at : at + job.rows, : part.shape[1]] = part
            at += job.rows
        merged[name] = whole
    return merged


def split(jobs: Sequence[Job], outputs: Outputs, per_token: Sequence[bool]) -> list[Outputs]:
    """Each job's own rows of the outputs; outputs of each token as wide as the job was sent, zero where it was padding."""
    parts: list[Outputs] = []
    at = 0
    for job in jobs:
        own = []
        for output, tokens in zip(outputs, per_token, strict=True):
            rows = output[at : at + job.rows]
            if tokens:
                width = next(iter(job.feed.values())).shape[1]
                kept = np.zeros((job.rows, width, *rows.shape[2:]), rows.dtype)
                kept[:, : min(width, rows.shape[1])] = rows[:, :width]
                rows = kept
            own.append(rows)
        at += job.rows
        parts.append(own)
    return parts


class Batcher:
    """The queue in front of the model. All but `_work` and what it calls runs in the event loop's thread."""

    def __init__(self, *, max_batch: int, max_delay_s: float, queue: int, timeout_s: float, observe: Callable[[Batch], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_batch, self._max_delay_s, self._queue, self._timeout_s = max_batch, max_delay_s, queue, timeout_s
        self._observe = observe
        self._given: SimpleQueue[Job | None] = SimpleQueue()
        self._came_rows = 0  # rows that were let in; the loop alone writes it
        self._taken_rows = 0  # rows that a call of the thread took; the thread alone writes it
        self._here_rows = 0  # rows that a call in the loop took; the loop alone writes it
        self._open = 0  # jobs without an answer
        self._fresh: list[Job] = []  # that this turn of the loop has read, while nothing runs
        self._row_s = self._token_s = 0.0
        self._thread = threading.Thread(target=self._work, name="calls", daemon=True)
        self._thread.start()

    @property
    def waiting_rows(self) -> int:
        """Rows that were let in and that no call has taken yet."""
        return self._came_rows - self._taken_rows - self._here_rows

    def require_room(self, rows: int = 1) -> None:
        """Raise Refused (429) where the queue has no place for so many rows."""
        waiting = self.waiting_rows
        if waiting and waiting + rows > self._queue:
            seconds = max(1, math.ceil(waiting * self._row_s))
            raise Refused(
                429,
                f"queue: {waiting} rows wait and {rows} more are over its limit of {self._queue}; try again in {seconds} s, or start with a larger --queue",
                ((b"retry-after", str(seconds).encode()),),
            )

    def reserve(self, rows: int) -> None:
        """Let rows in that are still being made. Raises Refused as `require_room`; give back with `unreserve`, or `submit` them."""
        self.require_room(rows)
        self._came_rows += rows

    def unreserve(self, rows: int) -> None:
        """What was reserved will not come."""
        self._came_rows -= rows

    def submit(self, model: Model, feed: Feed, rows: int, length: int) -> asyncio.Future[Outputs]:
        """Put reserved rows in the queue; the future gives the model's outputs for them, or Refused (504, or 500 where the call failed)."""
        job = Job(model, feed, rows, length, self._loop.create_future())
        self._open += 1
        if self._open == 1 + len(self._fresh):  # nothing runs
            self._fresh.append(job)
            if len(self._fresh) == 1:
                self._loop.call_soon(self._begin)
        else:
            job.timer = self._loop.call_later(self._timeout_s, self._expire, job)
            self._given.put(job)
        return job.future

    def _begin(self) -> None:
        """Call what the last turn of the loop has read: here, or by the thread."""
        jobs, self._fresh = self._fresh, []
        first = jobs[0]
        expected_s = self._token_s * first.rows * first.length
        if len(jobs) == 1 and first.model.steady and 0 < expected_s <= _HERE_S and not first.future.cancelled():
            self._here_rows += first.rows
            self._finish(jobs, *self._called(jobs))
            return
        for job in jobs:
            if len(jobs) > 1:
                job.timer = self._loop.call_later(self._timeout_s, self._expire, job)
            self._given.put(job)

    def stop(self, wait_s: float) -> bool:
        """End the thread after what it was given; whether it ended in time."""
        self._given.put(None)
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _expire(self, job: Job) -> None:
        """A job that a call has taken already is answered when that ends."""
        job.timer = None
        if not job.taken:
            job.dead = True
            self._end(
                job,
                Refused(
                    504,
                    f"queue: no call took the request within {self._timeout_s:g} s; send fewer at once, or start with a larger --timeout-s",
                ),
            )

    def _forget(self, jobs: Sequence[Job]) -> None:
        """The clients of these left while they waited."""
        for job in jobs:
            if not job.dead:
                job.dead = True
                self._open -= 1
                if job.timer:
                    job.timer.cancel()

    def _end(self, job: Job, result: Outputs | Refused) -> None:
        self._open -= 1
        if job.timer:
            job.timer.cancel()
        if job.future.done():  # the client left, and its task was cancelled
            return
        if isinstance(result, Refused):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)

    def _finish(self, jobs: Sequence[Job], results: Sequence[Outputs | Refused], batch: Batch) -> None:
        for job, result in zip(jobs, results, strict=True):
            self._end(job, result)
        self._row_s = _moved(self._row_s, batch.compute_s / batch.rows)
        self._token_s = _moved(self._token_s, batch.compute_s / batch.tokens)
        self._observe(batch)

    def _work(self) -> None:
        """The thread: take, choose, call, hand back; until it is given None."""
        waiting: list[Job] = []
        going = True
        while going or waiting:
            idle = not waiting
            if idle:
                going = self._take(waiting, None)
            while going and not self._given.empty():
                going = self._take(waiting, 0)
            if waiting and not idle and self._max_delay_s and going:
                going = self._fill(waiting)
            self._drop_dead(waiting)
            if waiting:
                self._call(choose(waiting, self._max_batch))

    def _take(self, waiting: list[Job], timeout_s: float | None) -> bool:
        try:
            job = self._given.get(timeout=timeout_s) if timeout_s != 0 else self._given.get_nowait()
        except Empty:
            return True
        if job is None:
            return False
        waiting.append(job)
        return True

    def _fill(self, waiting: list[Job]) -> bool:
        """Wait for a fuller call, at most until the oldest has waited ``max_delay_s``."""
        until = waiting[0].came + self._max_delay_s
        going = True
        while going and sum(job.rows for job in waiting) < self._max_batch and (left := until - time.perf_counter()) > 0:
            going = self._take(waiting, left)
        return going

    def _drop_dead(self, waiting: list[Job]) -> None:
        dead = [job for job in waiting if job.dead or job.future.cancelled()]
        for job in dead:
            waiting.remove(job)
            self._taken_rows += job.rows
        if dead:
            self._in_loop(self._forget, dead)

    def _call(self, jobs: list[Job]) -> None:
        self._taken_rows += sum(job.rows for job in jobs)
        results, batch = self._called(jobs)
        self._in_loop(self._finish, jobs, results, batch)

    def _called(self, jobs: list[Job]) -> tuple[list[Outputs | Refused], Batch]:
        """Call the model for these jobs together; each one's result."""
        rows = sum(job.rows for job in jobs)
        began = time.perf_counter()
        waited = tuple(began - job.came for job in jobs)
        for job in jobs:
            job.taken = True
        model = jobs[0].model
        feed = jobs[0].feed if len(jobs) == 1 else merge(jobs)
        results: list[Outputs | Refused]
        try:
            outputs = model.run(feed)
            results = [outputs] if len(jobs) == 1 else [*split(jobs, outputs, model.per_token)]
        except Exception as error:  # noqa: BLE001  # whatever one request does to the model, the thread goes on for the others
            results = [self._alone(job) for job in jobs] if len(jobs) > 1 else [_failed(error)]
        took = time.perf_counter() - began
        real = sum(job.rows * job.length for job in jobs)
        positions = feed[next(iter(feed))].size
        return results, Batch(rows, positions, max(0.0, 1 - real / positions), took, waited, self.waiting_rows)

    def _alone(self, job: Job) -> Outputs | Refused:
        """After a shared call has failed: only the request that is at fault shall be refused."""
        try:
            return job.model.run(job.feed)
        except Exception as error:  # noqa: BLE001  # as above
            return _failed(error)

    def _in_loop(self, call: Callable[..., None], *words: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *words)
        except RuntimeError:  # the loop was closed: the server gave up waiting
            return


def _moved(mean: float, seconds: float) -> float:
    return seconds if not mean else _KEPT * mean + (1 - _KEPT) * seconds


def _failed(error: Exception) -> Refused:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return Refused(500, f"model: the call failed: {first[0][:300]}; check the values of the tensors")
