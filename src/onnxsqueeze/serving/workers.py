"""Several serving processes on one port, and the one that starts, watches and ends them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

from onnxsqueeze.errors import MeasureError, SqueezeError
from onnxsqueeze.serving.server import serve
from onnxsqueeze.serving.settings import DRAIN_S, LINGER_S, Settings

_RESTARTS = 5  # in all: a model that ends its process again and again is not started for ever
_SHARED = "PROMETHEUS_MULTIPROC_DIR"


def serve_all(settings: Settings, bound: socket.socket, told: str) -> int:
    """Serve in ``settings.workers`` processes until SIGTERM or SIGINT; prints ``told`` when all are ready. The exit code, as `server.serve`.

    All accept from the same socket, so that none is lost when one ends; one that dies is started again. Raises MeasureError where one does
    not become ready.
    """
    bound.listen(1024)
    with tempfile.TemporaryDirectory(prefix="onnxsqueeze-metrics-") as shared:
        os.environ[_SHARED] = shared
        return _Workers(settings, bound, told).run()


class _Workers:
    def __init__(self, settings: Settings, bound: socket.socket, told: str) -> None:
        self._settings, self._bound, self._told = settings, bound, told
        self._processes: dict[BaseProcess, Connection] = {}
        self._context = multiprocessing.get_context("spawn")
        self._ending, self._woken = False, socket.socketpair()

    def run(self) -> int:
        self._woken[1].settimeout(0)  # a signal never waits
        signal.set_wakeup_fd(self._woken[1].fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        for _ in range(self._settings.workers):
            self._start()
        try:
            if self._all_ready():
                print(self._told, flush=True)  # noqa: T201  # the result
            self._watch()
        finally:
            code = self._stop()
        return code

    def _end(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # a signal handler's signature
        self._ending = True

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._settings, self._bound, theirs))
        process.start()
        theirs.close()
        self._processes[process] = ours

    def _all_ready(self) -> bool:
        left = dict(self._processes)
        while left and not self._ending:
            wait([*left.values(), self._woken[0]])
            for process, pipe in list(left.items()):
                if pipe.poll():
                    try:
                        said = pipe.recv()
                    except EOFError:
                        said = "it ended while it loaded the model"
                    if said is not None:
                        raise MeasureError(f"a serving process did not start: {said}")
                    del left[process]
        return not self._ending

    def _watch(self) -> None:
        restarts = 0
        while not self._ending:
            wait([*(process.sentinel for process in self._processes), self._woken[0]])
            for process in [process for process in self._processes if not process.is_alive()]:
                self._processes.pop(process).close()
                _forget(process)
                if self._ending:
                    continue
                restarts += 1
                if restarts > _RESTARTS:
                    raise MeasureError(f"serving processes ended {restarts} times, last with exit code {process.exitcode}")
                text = f"onnxsqueeze serve: a process ended with exit code {process.exitcode}; another is started"
                print(text, file=sys.stderr, flush=True)  # noqa: T201  # progress goes to stderr
                self._start()

    def _stop(self) -> int:
        self._bound.close()  # else the kernel would go on taking connections that nobody serves
        for process in self._processes:
            process.terminate()
        until = time.monotonic() + DRAIN_S + LINGER_S + 3
        codes = []
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            codes.append(process.exitcode)
        return 0 if all(code in (0, -signal.SIGTERM) for code in codes) else 1  # by the signal itself: before it had begun to serve


def _forget(process: BaseProcess) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(process.pid, os.environ[_SHARED])  # type: ignore[no-untyped-call]


def _work(settings: Settings, bound: socket.socket, pipe: Connection) -> None:
    """What a process does: serve, and end with the one that started it."""
    try:
        code = serve(settings, bound, lambda: pipe.send(None), parent=pipe.fileno())
    except SqueezeError as error:
        pipe.send(str(error))
        sys.exit(error.exit_code)
    sys.exit(code)
