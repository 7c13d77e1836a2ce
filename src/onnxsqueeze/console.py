"""What a user sees while a run goes on: a live bar with time left on a terminal, plain lines without one. All on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_PLAIN_INTERVAL_S = 15.0  # without a terminal: a line at most this often while one piece of work goes on


class Watcher:
    """Tells how far a run is. A context manager: the live bar is gone when it ends."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._live = self.console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self.console,
            transient=True,
            expand=True,
        )
        self._start = time.monotonic()
        self._said = 0.0
        self._title = ""

    def __enter__(self) -> Watcher:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line that stays, with the seconds since the start."""
        self.console.print(Text(f"[{time.monotonic() - self._start:6.1f} s] {text}"))

    def begin(self, title: str) -> Watcher:
        """A piece of work starts."""
        self._title, self._said = title, time.monotonic()
        self._first: tuple[float, int] | None = (
            None  # when the first call came, and what was done by then: a resumed stage starts in the middle
        )
        if self._live:
            self._clear()
            self._task = self._bar.add_task(title, total=None, note="")
        else:
            self.say(f"{title} …")
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total``; cheap when called often."""
        now = time.monotonic()
        self._first = self._first or (now, done)
        if self._live:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif now - self._said >= _PLAIN_INTERVAL_S:
            self._said = now
            began, before = self._first
            left = f", about {(now - began) / (done - before) * (total - done):.0f} s left" if done > before else ""
            self.say(f"{self._title}: {done:,}/{total:,}{left}{f' ({note})' if note else ''}")

    def end(self, text: str) -> None:
        """The piece of work that began last is done."""
        if self._live:
            self._clear()
        self.say(text)

    def _clear(self) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.refresh()  # or the next line would be printed above the old bar
