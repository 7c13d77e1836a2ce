"""What a server counts, as Prometheus reads it; of several processes together, by way of files in a folder that they share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from onnxsqueeze.serving.batching import Batch

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # set before prometheus_client is imported: it then keeps its values in files there

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)

Gathered = Literal["livesum", "livemin"]  # how the values of several processes become one


class Metrics:
    """The counters of one process. Only the event loop's thread writes to them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by endpoint and HTTP status", "endpoint", "status")
        self._turned_away = self._counter("connections_refused", "Answered before they were a request: 400, 408, 431, 503", "status")
        self._reloads = self._counter("reloads", "Versions that were loaded after the start, or refused", "outcome")
        self._total = self._histogram("request_seconds", "From a request's headers to its answer", _SECONDS, "endpoint")
        self._queue = self._histogram("queue_seconds", "Of a request, from the queue's door to its call", _SECONDS)
        self._compute = self._histogram("compute_seconds", "Of a call of the model", _SECONDS)
        self._rows = self._histogram("batch_rows", "Rows that shared a call", _ROWS)
        self._padding = self._histogram("padding_ratio", "Share of a call's positions that are padding", _SHARES)
        self.waiting = self._gauge("queue_rows", "Rows that wait for a call", "livesum")
        self.models = self._gauge("models_held", "Versions in memory: 1 a process, 2 while one takes the other's place", "livesum")
        self._version = self._gauge("model_version", "The version that is served (the lowest, of several processes)", "livemin")
        self._loaded = self._gauge("model_loaded_timestamp_seconds", "When it was loaded (the first, of several processes)", "livemin")
        self._children: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"onnxsqueeze_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, gathered: Gathered) -> Gauge:
        return Gauge(f"onnxsqueeze_{name}", text, registry=self._registry, multiprocess_mode=gathered)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"onnxsqueeze_{name}", text, labels, buckets=buckets, registry=self._registry)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """One request was answered."""
        try:
            count, total = self._children[endpoint, status]
        except KeyError:
            count, total = self._requests.labels(endpoint, str(status)), self._total.labels(endpoint)
            self._children[endpoint, status] = count, total
        count.inc()
        total.observe(seconds)

    def turned_away(self, status: int) -> None:
        """A connection was answered that never was a request."""
        self._turned_away.labels(str(status)).inc()

    def batch(self, batch: Batch) -> None:
        """One call was made."""
        for waited in batch.waited_s:
            self._queue.observe(waited)
        self._compute.observe(batch.compute_s)
        self._rows.observe(batch.rows)
        self._padding.observe(batch.padding)
        self.waiting.set(batch.left_rows)

    def served(self, version: int, loaded: float) -> None:
        """This version takes the requests from now on."""
        self._version.set(version)
        self._loaded.set(loaded)

    def reload(self, outcome: Literal["loaded", "refused"]) -> None:
        """A version came after the start."""
        self._reloads.labels(outcome).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        if SHARED not in os.environ:
            return generate_latest(self._registry)
        gathered = CollectorRegistry()
        MultiProcessCollector(gathered)  # type: ignore[no-untyped-call]
        return generate_latest(gathered)
