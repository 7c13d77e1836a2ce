"""Kill a run with SIGKILL at many moments, start it again, and show that nothing was lost and nothing differs.

    python benchmarks/kill.py --out reports/kill

Every trial starts from an empty store. Three kinds of moment, drawn by the seed: at any time, inside a training stage,
and while a file below the store or the output folder is open for writing. After the kill the same command runs to its
end, and is compared with a run that was never killed: bytes of every .onnx, task metrics, stages executed again, the
epoch in which a training stage starts. Writes kill.json and kill.md. Exit code 1 where any trial differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnxsqueeze.environment import cpu_model
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.recipe import load

ROOT = Path(__file__).parent.parent
TRAINING = ("finetune", "distill", "prune-weights")
Moment = Literal["any time", "training", "writing"]
_OPEN_FOR_WRITING = os.O_WRONLY | os.O_RDWR


@dataclass
class Trial:
    """One kill and what the next run did."""

    number: int
    moment: Moment
    killed_after_s: float = 0.0
    during: str = ""
    open_file: str = ""
    finished_before: list[str] = field(default_factory=list)
    epochs_before: int | None = None
    resumed_in_epoch: int | None = None
    executed_again: list[str] = field(default_factory=list)
    equal_files: bool = False
    equal_metrics: bool = False
    problems: list[str] = field(default_factory=list)


def command(out: Path, recipe: Path) -> list[str]:
    """The command that is killed and given again."""
    return [sys.executable, "-m", "onnxsqueeze", "run", str(recipe), "--out", str(out)]


class Run:
    """The real command in its own process; its lines with the seconds at which they came."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.lines = folder, list[str]()
        env = {**os.environ, "ONNXSQUEEZE_STORE": str(folder / "store"), "HF_HUB_OFFLINE": "1"}
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            command(folder / "out", recipe), env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr  # noqa: S101  # it was opened with a pipe
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def finish(self) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait()
        self._reader.join()
        return code

    def kill(self) -> float:
        """SIGKILL this one process, by its id; seconds since its start."""
        os.kill(self.process.pid, signal.SIGKILL)
        seconds = time.monotonic() - self.start
        self.finish()
        return seconds

    def during(self) -> str:
        """The piece of work that began last and has not ended, by the lines so far."""
        begun = ""
        for line in self.lines:
            text = line.partition("] ")[2]
            if text.endswith(" …"):
                begun = text.removesuffix(" …")
            elif begun and not re.match(rf"{re.escape(begun)}: [\d,]+/", text):
                begun = ""
        return begun

    def file_being_written(self) -> str:
        """A file below the folder that the process has open for writing, relative to it; "" where there is none."""
        folder = Path(f"/proc/{self.process.pid}")
        try:
            for fd in (folder / "fd").iterdir():
                target = fd.readlink()
                if not target.is_relative_to(self.folder) or "locks" in target.parts or target.name == ".lock":
                    continue
                flags = re.search(r"flags:\s+(\d+)", (folder / "fdinfo" / fd.name).read_text())
                if flags and int(flags[1], 8) & _OPEN_FOR_WRITING:
                    return target.relative_to(self.folder).as_posix()
        except (FileNotFoundError, ProcessLookupError):
            pass  # the process or the descriptor went away between two looks
        return ""


def stages_in(store: Path) -> dict[str, tuple[str, int]]:
    """Key → (kind, time of writing) of every finished stage."""
    found = {}
    for entry in (store / "artifacts").glob("*/entry.json"):
        found[entry.parent.name] = (json.loads(entry.read_text())["causes"]["kind"], entry.stat().st_mtime_ns)
    return found


def epochs_saved(store: Path) -> int | None:
    """Finished epochs of the training stage that was under way, by its saved state; None where none was."""
    import torch

    under_way = [folder for folder in (store / "checkpoints").iterdir() if not (store / "artifacts" / folder.name / "entry.json").exists()]
    for folder in under_way:
        if (folder / "training.pt").exists():
            return int(torch.load(folder / "training.pt", map_location="cpu", weights_only=True, mmap=True)["epoch"])
    return 0 if under_way else None


def digests(out: Path) -> dict[str, str]:
    """Target → sha256 of its .onnx."""
    return {f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.glob("*/model.onnx"))}


def metrics(out: Path) -> dict[str, Any]:
    """Target → its metrics."""
    return {t["name"]: t["metrics"] for t in json.loads((out / "results.json").read_text())["targets"]}


def durations(lines: list[str]) -> Mapping[str, tuple[float, float]]:
    """Training stage → (start, end) in seconds, from the lines of a whole run."""
    found: dict[str, tuple[float, float]] = {}
    started: dict[str, float] = {}
    for line in lines:
        match = re.match(r"\[ *([\d.]+) s\] (.*)", line)
        if match:
            at, text = float(match[1]), match[2]
            kind = text.split(":")[0].removesuffix(" …")
            if text.endswith(" …"):
                started[kind] = at
            elif kind in TRAINING and kind in started:
                found[kind] = (started[kind], at)
    return found


def run_trial(
    trial: Trial, folder: Path, recipe: Path, reference: Path, whole_s: float, times: Mapping[str, tuple[float, float]], rng: random.Random
) -> None:
    """Kill one run as ``trial.moment`` says, run again, fill in ``trial``."""
    run = Run(folder, recipe)
    if trial.moment == "writing":
        skip = rng.randrange(0, 12)  # which of the writes
        last = ""
        while run.process.poll() is None:
            file = run.file_being_written()
            if file and file != last:
                skip -= 1
                if skip < 0:
                    break
            last = file
            time.sleep(0.0005)
    else:
        start, end = rng.choice(sorted(times.values())) if trial.moment == "training" else (0.0, whole_s)
        time.sleep(start + rng.random() * (end - start))
    trial.open_file = run.file_being_written()
    trial.killed_after_s = round(run.kill(), 2)
    trial.during = run.during() or "between two pieces of work"
    store = folder / "store"
    before = stages_in(store) if store.exists() else {}
    trial.finished_before = sorted(kind for kind, _ in before.values())
    trial.epochs_before = epochs_saved(store) if (store / "checkpoints").exists() else None

    again = Run(folder, recipe)
    code = again.finish()
    if code != 0:
        trial.problems.append(f"the next run ended with {code}: {again.lines[-1:]}")
        return
    after = stages_in(store)
    trial.executed_again = [kind for key, (kind, at) in before.items() if after.get(key, ("", 0))[1] != at]
    resumed = re.search(r"\(resumed in epoch (\d+)\)", "\n".join(again.lines))
    trial.resumed_in_epoch = int(resumed[1]) if resumed else None
    trial.equal_files = digests(folder / "out") == digests(reference)
    trial.equal_metrics = metrics(folder / "out") == metrics(reference)
    if trial.executed_again:
        trial.problems.append(f"executed again: {trial.executed_again}")
    epochs = next(
        (stage.epochs for stage in load(recipe).recipe.stages if isinstance(stage, TrainingSettings) and stage.name == trial.during), 0
    )
    due = trial.epochs_before + 1 if trial.epochs_before and trial.epochs_before < epochs else None  # None: none was finished, or all were
    if trial.resumed_in_epoch != due:
        trial.problems.append(f"{trial.epochs_before} of {epochs} epochs were finished, resumed in {trial.resumed_in_epoch}")
    if not trial.equal_files:
        trial.problems.append("the files differ")
    if not trial.equal_metrics:
        trial.problems.append("the metrics differ")
    if any((store / "drafts").iterdir()):
        trial.problems.append("a draft is left in the store")


def table(trials: list[Trial], whole_s: float, words: str) -> str:
    """The Markdown page."""
    in_training = sum(t.during in TRAINING for t in trials)
    writing = sum(bool(t.open_file) for t in trials)
    good = sum(not t.problems for t in trials)
    lines = [
        "# Killed and run again",
        "",
        f"`{words}`: {len(trials)} runs of {whole_s:.0f} s, each from an empty store, each killed once with SIGKILL and then given again.",
        f"{in_training} kills fell inside a training stage, {writing} while a file was open for writing. {good} of {len(trials)} next runs gave byte-equal",
        f".onnx files and equal metrics, executed no finished stage again, and started a training stage after its last finished epoch. {cpu_model()}.",
        "",
        "| # | killed after | during | file open for writing | finished stages | epochs finished | resumed in epoch | executed again | equal .onnx | equal metrics |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for t in trials:
        file = re.sub(r"[0-9a-f]{64}", lambda m: m[0][:8] + "…", t.open_file) or "–"
        cells = [
            t.number,
            f"{t.killed_after_s:.1f} s",
            t.during,
            file,
            len(t.finished_before),
            "–" if t.epochs_before is None else t.epochs_before,
            t.resumed_in_epoch or "–",
            ", ".join(t.executed_again) or "none",
            "yes" if t.equal_files else "NO",
            "yes" if t.equal_metrics else "NO",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    problems = [f"- trial {t.number}: {p}" for t in trials for p in t.problems]
    return "\n".join([*lines, *(["", "Problems:", *problems] if problems else []), ""])


def write(out: Path, trials: list[Trial], whole_s: float) -> None:
    """Write the page and the data of the trials so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "kill.md").write_text(table(trials, whole_s, _words()), encoding="utf-8")
    data = {"command": _words(), "seconds": round(whole_s, 1), "trials": [asdict(t) for t in trials]}
    (out / "kill.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _words() -> str:
    return shlex.join(["python", "benchmarks/kill.py", *sys.argv[1:]])


def main() -> int:
    """Run the trials and write the table."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    cli.add_argument("--out", type=Path, required=True, help="folder for kill.json and kill.md")
    cli.add_argument("--recipe", type=Path, default=ROOT / "benchmarks" / "kill.yaml")
    cli.add_argument("--training", type=int, default=9)
    cli.add_argument("--writing", type=int, default=6)
    cli.add_argument("--any", type=int, default=5)
    cli.add_argument("--seed", type=int, default=0)
    asked = cli.parse_args()
    rng = random.Random(asked.seed)  # noqa: S311  # moments of kills, nothing secret
    moments: list[Moment] = [*["training"] * asked.training, *["writing"] * asked.writing, *["any time"] * asked.any]  # type: ignore[list-item]  # literals
    rng.shuffle(moments)
    trials = [Trial(i + 1, moment) for i, moment in enumerate(moments)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = Run(folder / "reference", asked.recipe)
        if whole.finish():
            sys.stderr.write("\n".join(whole.lines) + "\n")
            return 1
        whole_s = time.monotonic() - whole.start
        times = durations(whole.lines)
        for trial in trials:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                run_trial(trial, Path(place), asked.recipe, folder / "reference" / "out", whole_s, times, rng)
            write(asked.out, trials[: trial.number], whole_s)
            sys.stderr.write(
                f"trial {trial.number}: killed after {trial.killed_after_s} s during {trial.during}: {trial.problems or 'equal'}\n"
            )
    sys.stdout.write(table(trials, whole_s, _words()))
    return int(any(t.problems for t in trials))


if __name__ == "__main__":
    sys.exit(main())
