"""How much of the CPU others took while something was timed: other processes, and other machines on the same host."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

OTHERS_SHARE = 0.05  # of the cores that this process may use; above it, what was timed in between proves nothing
IDLE_SHARE = 0.05  # of one core, that models which wait for their turn may use together


@dataclass(frozen=True)
class Reading:
    """Seconds since some beginning: ``wall_s``, and of the cores that this process may use ``busy_s`` (all processes, and what a host took away), ``own_s``."""

    wall_s: float
    busy_s: float
    own_s: float


def read() -> Reading | None:
    """Now; None where the system does not tell (then nobody can say that others were quiet, or that they were not)."""
    try:
        cores = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError, NotImplementedError):  # a container without /proc/stat
        return None
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    busy = 0.0
    for number in mine:
        if number >= len(cores):
            return None
        times = cores[number]
        busy += sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return Reading(time.perf_counter(), busy, time.process_time())


def others_share(before: Reading | None, after: Reading | None, cores: int, timed_s: float = 0.0) -> float:
    """The part of ``cores`` that others used between two readings, from 0 to 1; 0 where there are no readings.

    ``timed_s`` are the CPU seconds of the process that was timed meanwhile: no others' either. The kernel counts busy time in ticks of
    10 ms, so one of them is left to rounding; in spans under ten, one for each core.
    """
    if before is None or after is None or after.wall_s <= before.wall_s:
        return 0.0
    wall, tick = after.wall_s - before.wall_s, _tick_s()
    rounding = tick if wall >= 10 * tick else tick * cores
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s) - timed_s - rounding
    return max(0.0, others / (cores * wall))


def idle_share(
    cpu_before: Sequence[float | None], cpu_after: Sequence[float | None], before: Reading | None, after: Reading | None
) -> float | None:
    """The part of one core that processes which should wait used between two readings; one tick is left to rounding.

    Lists hold the CPU seconds of each. None where the system does not tell, and where nobody waits.
    """
    if before is None or after is None or after.wall_s <= before.wall_s:
        return None
    used = [late - early for early, late in zip(cpu_before, cpu_after, strict=True) if early is not None and late is not None]
    return max(0.0, sum(used) - _tick_s()) / (after.wall_s - before.wall_s) if used else None


def _tick_s() -> float:
    return 1 / os.sysconf("SC_CLK_TCK")
