"""What the command line sets for a server, and the limits that it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_CONNECTIONS = 256  # a process; those beyond get 503, beyond twice as many nothing. Twice 256 fits 1024 open files, the usual limit
MAX_HEAD_BYTES = 65_536  # request line and headers
MAX_BODIES_BYTES = 64 * 2**20  # all bodies that are arriving, together
LINGER_S = 0.5  # at the end: how long open connections may still send a request
DRAIN_S = 25.0  # at the end: how long accepted requests may take; below the 30 s after which Kubernetes kills
WATCH_S = 1.0  # between looks at the folder


@dataclass(frozen=True)
class Settings:
    """One server. ``queue`` counts rows, ``threads`` are a process's, ``timeout_s`` bounds a request's arrival and, apart, its wait."""

    folder: Path
    name: str
    host: str
    port: int
    workers: int
    max_batch: int
    max_delay_ms: float
    threads: int
    queue: int
    timeout_s: float
