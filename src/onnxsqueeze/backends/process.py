"""The near side of `worker.py`: starts it in some Python, asks, and tells why it ended where it ended."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from onnxsqueeze.backends import worker
from onnxsqueeze.errors import MeasureError, without_paths

if TYPE_CHECKING:
    from onnxsqueeze.backends.worker import Arrays, Header

_LAST_LINES = 4  # of what a worker that ended had written
_START_S = 120.0  # importing ONNX Runtime from a cold disk, and no more: what says nothing for so long is not a Python
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_END_S = 5.0  # a worker ends by itself when its input does; a run that hangs is killed after this


class Worker:
    """One process of ``python`` (a path, or a name on PATH); ``what`` names it in messages ("int8/model.onnx on CPUExecutionProvider").

    Raises MeasureError where it cannot be started.
    """

    def __init__(self, python: str, what: str) -> None:
        self.what = what
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process; a pipe nobody reads would stop it
        try:
            self._process = subprocess.Popen(  # noqa: S603  # the user's Python, and our own file
                [python, worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=_environment(python)
            )
        except OSError as error:
            self._said.close()
            raise MeasureError(f"{what}: {Path(python).name} cannot be started: {error.strerror}", remedy="name a Python") from error
        assert self._process.stdin is not None  # noqa: S101  # they are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def ask(self, do: str, arrays: Arrays | None = None, *, timeout_s: float | None = None, **header: Any) -> tuple[Header, Arrays]:
        """One request and its answer. Raises MeasureError with the last lines that the process wrote where it ended instead."""
        try:
            worker.send(self._requests, {"do": do, **header}, arrays or {})
            if timeout_s is not None and not select.select([self._answers], [], [], timeout_s)[0]:
                raise self._silent(timeout_s)
            answer = worker.receive(self._answers)
        except (BrokenPipeError, EOFError) as error:
            raise self._ended() from error
        except ValueError as error:  # not JSON: not our file that answers
            raise self._ended() from error
        if answer is None:
            raise self._ended()
        return answer

    def about(self) -> Header:
        """What the Python says of itself; the first thing to ask."""
        return self.ask("about", timeout_s=_START_S)[0]

    def cpu_s(self) -> float | None:
        """CPU seconds of the process so far, in the kernel's ticks of 10 ms; None where the system does not tell or it has ended."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return None
        return float(times.user + times.system)

    def said(self) -> str:
        """The last lines that it and its runtime have written so far, without paths and colours; may be empty."""
        self._said.seek(0)
        text = _COLOUR.sub("", self._said.read().decode(errors="replace"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return without_paths(" | ".join(lines[-_LAST_LINES:]))

    def close(self) -> None:
        """End the process and wait for it."""
        with suppress(BrokenPipeError):  # it has ended already
            self._requests.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._said.close()

    def _silent(self, seconds: float) -> MeasureError:
        self._process.kill()
        return MeasureError(f"{self.what}: its Python said nothing for {seconds:.0f} s", remedy="name a Python with numpy and onnxruntime")

    def _ended(self) -> MeasureError:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # it talks, but not our language
            self._process.kill()
            code = self._process.wait()
        last = self.said()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        remedy = (
            "often too little memory: look at `dmesg`, measure fewer targets at once or a smaller batch"
            if code == -signal.SIGKILL
            else "run it in a stock session on the same input; if that works, report this as a bug"
        )
        return MeasureError(f"{self.what}: its process {how}{f': {last}' if last else ', without a word'}", remedy=remedy)


def _environment(python: str) -> dict[str, str]:
    """Ours; for another Python without the variables that would make it look among our packages."""
    ours = python == sys.executable
    return {name: value for name, value in os.environ.items() if ours or name not in ("PYTHONPATH", "PYTHONHOME")}
