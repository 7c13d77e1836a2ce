"""Running recipes on small real models, in this process and as the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest

from onnxsqueeze import cli, pipeline, prepare
from onnxsqueeze.stage import Progress
from onnxsqueeze.store import Store

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"

# What makes a run small: few rows, one epoch, one layer, and nothing timed; timing takes as long as all the rest.
SMALL = (
    "task.train_rows=256",
    "task.max_length=32",
    "stages.finetune.epochs=1",
    "measure={sequence: 32, shapes: [], processes: 2, min_runs: 20, min_seconds: 0, task_lengths: false, profile: false, latency: false}",
)
TIMED = ("measure.latency=true",)  # behind `SMALL`: one shape, for a short time
STEADY = (*TIMED, "measure.processes=3", "measure.min_runs=100")  # long enough to be compared with another measurement


class Silent:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def begin(self, title: str) -> Progress:
        self.lines.append(f"{title} …")
        return self

    def __call__(self, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total, note

    def end(self, text: str) -> None:
        self.lines.append(text)


def small(recipe: str) -> tuple[str, ...]:
    """Overrides that make one of the shipped recipes small."""
    extra = []
    if "d" in recipe:
        extra += ["stages.distill.epochs=1", "stages.distill.layers=1"]
    if "p" in recipe:
        extra += ["stages.prune-structure.epochs=1", "stages.prune-structure.multiple_of=8"]
    return (*SMALL, *extra)


def run(
    recipe: str | Path,
    out: Path,
    *,
    model: Path,
    store: Path,
    overrides: Sequence[str] = (),
    watcher: Silent | None = None,
    **asked: object,
) -> tuple[pipeline.Outcome, list[str]]:
    """Run a recipe (a shipped one by its name) in this process; the outcome and what the watcher was told."""
    file = RECIPES / f"{recipe}.yaml" if isinstance(recipe, str) else recipe
    request = prepare.Request(file, model=str(model), out=out, overrides=tuple(overrides), **asked)  # type: ignore[arg-type]  # tests name fields of Request
    watcher = watcher or Silent()
    outcome = pipeline.run(prepare.prepare(request), Store(store), watcher)
    return outcome, watcher.lines


def command(*words: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The real command, in its own process."""
    return subprocess.run(
        start_words(*words), cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False
    )


class Command(Protocol):
    """The command with these words in a folder."""

    def __call__(self, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]: ...


def here(*words: object, cwd: Path, patch: pytest.MonkeyPatch, said: pytest.CaptureFixture[str]) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has everything imported: a second less."""
    argv = [str(word) for word in words]
    patch.chdir(cwd)
    patch.setattr(sys, "argv", ["onnxsqueeze", *argv])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    shown = said.readouterr()
    return subprocess.CompletedProcess(argv, code, shown.out, shown.err)


def start_words(*words: object) -> list[str]:
    """argv of the real command."""
    return [sys.executable, "-m", "onnxsqueeze", *(str(word) for word in words)]
