"""What a server gives end to end: two models beside each other under load, ten minutes of it, and what the way through the server costs one caller.

    python benchmarks/serving.py --data-dir glue --out reports/serving BASELINE_DIR SQUEEZED_DIR [--parts overhead curves soak] [--rounds 5] [--seconds 5] [--soak-seconds 600]
    python benchmarks/serving.py --out reports/serving --table-only

Both are folders of targets (or of `deploy`) of one SST-2 run. Each is served by `onnxsqueeze serve` with one thread, pinned to the last core of this process; the
generator is pinned to the first. Requests are sentences of the dev file, one each, in its order, to /classify (tokenized by the server).

overhead   one caller, call by call in random order, so that each meets a core that was idle or did something else, as requests do: the bare session (in a process of its own on the server's
           core, which times itself), an empty endpoint of Starlette on uvicorn, the same tokens through /infer, text through /classify
curves     closed loop: so many callers, each asks again when it is answered; the models in turns at each concurrency, in rounds; rates and 99 % points, CPU of both sides,
           and rows per second of computing time, as the server's own metrics have them
soak       open loop: requests at random times (Poisson) at 80 % of the squeezed model's highest rate in `curves`; errors, resident memory of the server

Each part is a JSON file; serving.md is drawn from those that are there.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import math
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from libraries import STARLETTE

from onnxsqueeze import environment
from onnxsqueeze.backends import HERE
from onnxsqueeze.errors import without_paths
from onnxsqueeze.measure.statistics import nearest_rank
from onnxsqueeze.results import read_results
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.settings import TaskSettings
from onnxsqueeze.tokens import Encoder, pad

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
BOUNDS_MS = (25, 50, 100, 200)
CALLS = 400  # of one kind in a round of `overhead`


class RefusedError(Exception):
    """An answer that is not 200."""


class Caller:
    """One kept connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"))

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes:
        """The answer's body. Raises RefusedError."""
        self._connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RefusedError(f"{path}: {answer.status}: {text[:200]!r}")
        return text


@dataclass(frozen=True)
class Server:
    """A server that answers at ``url``; ``process`` may be read."""

    url: str
    process: psutil.Process

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = Caller(self.url).ask("GET", "/metrics").decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))

    def cpu_s(self) -> float:
        """CPU seconds so far, of its children too."""
        return sum(_cpu_s(one) for one in [self.process, *self.process.children(recursive=True)])


@contextmanager
def started(words: Sequence[str], path: str, core: int) -> Iterator[Server]:
    """A server process on one core, ready; ended by SIGTERM. The port is put in the place of the word PORT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *(str(port) if word == "PORT" else word for word in words)]
    process = subprocess.Popen(["taskset", "-c", str(core), *command], env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(words)}: ended with {process.returncode}")
            with suppress(ConnectionError, RefusedError):
                Caller(url).ask("GET", path)
                break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{' '.join(words)}: not ready within a minute")
        yield Server(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def served(folder: Path, core: int) -> Any:
    """`onnxsqueeze serve` of a folder, with one thread."""
    words = ["-m", "onnxsqueeze", "serve", str(folder), "--port", "PORT", "--threads", "1"]
    return started(words, "/v2/health/ready", core)


async def closed_loop(url: str, bodies: Sequence[bytes], concurrency: int, seconds: float) -> tuple[list[float], int, float]:
    """Times in ms of every answered request, refused ones, and the seconds it all took: each caller asks again when it is answered."""
    times: list[float] = []
    refused, at = 0, 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as client:
        begin = time.perf_counter()

        async def caller() -> None:
            nonlocal refused, at
            while (start := time.perf_counter()) < begin + seconds:
                body = bodies[at % len(bodies)]
                at += 1
                async with client.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
                    await answer.read()
                if answer.status == 200:
                    times.append(1000 * (time.perf_counter() - start))
                else:
                    refused += 1

        await asyncio.gather(*(caller() for _ in range(concurrency)))
        return times, refused, time.perf_counter() - begin


async def open_loop(url: str, bodies: Sequence[bytes], rate: float, seconds: float, process: psutil.Process) -> dict[str, Any]:
    """Requests at random times, whatever became of the earlier ones."""
    times: list[float] = []
    statuses: dict[str, int] = {}
    memory: list[tuple[float, int]] = []
    waits = np.random.default_rng(0).exponential(1 / rate, math.ceil(rate * seconds * 1.2)).cumsum()
    waits = waits[waits < seconds]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=128)) as client:
        begin = time.perf_counter()

        async def ask(body: bytes, due: float) -> None:
            try:
                async with client.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
                    await answer.read()
                said = str(answer.status)
            except aiohttp.ClientError as error:
                said = type(error).__name__
            statuses[said] = statuses.get(said, 0) + 1
            times.append(1000 * (time.perf_counter() - begin - due))

        async def watch() -> None:
            while time.perf_counter() < begin + seconds:
                memory.append((round(time.perf_counter() - begin, 1), process.memory_info().rss))
                await asyncio.sleep(5)

        watching = asyncio.create_task(watch())
        asked = set()
        for i, due in enumerate(waits):
            await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
            task = asyncio.create_task(ask(bodies[i % len(bodies)], due))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)
        await watching
    return {
        "rate_per_s": rate,
        "seconds": seconds,
        "statuses": statuses,
        "p50_ms": nearest_rank(np.array(times), 50),
        "p99_ms": nearest_rank(np.array(times), 99),
        "rss_bytes": memory,
    }


def curves(folders: Sequence[Path], bodies: Sequence[bytes], cores: Sequence[int], rounds: int, seconds: float) -> dict[str, Any]:
    """Every concurrency, the models in turns, in rounds."""
    found = []
    me = psutil.Process()
    with served(folders[0], cores[-1]) as first, served(folders[1], cores[-1]) as second:
        servers = {folders[0].name: first, folders[1].name: second}
        for server in servers.values():
            asyncio.run(closed_loop(f"{server.url}/classify", bodies, 8, 2))
        for round_ in range(rounds):
            for concurrency in CONCURRENCY:
                for name, server in servers.items():
                    before = [server.metric(one) for one in COMPUTE]
                    cpu = server.cpu_s(), _cpu_s(me)
                    times, refused, took = asyncio.run(closed_loop(f"{server.url}/classify", bodies, concurrency, seconds))
                    used = server.cpu_s() - cpu[0], _cpu_s(me) - cpu[1]
                    rows, compute_s = (server.metric(one) - was for one, was in zip(COMPUTE, before, strict=True))
                    point = {
                        "model": name,
                        "round": round_,
                        "concurrency": concurrency,
                        "n": len(times),
                        "refused": refused,
                        "rate_per_s": len(times) / took,
                        "p50_ms": nearest_rank(np.array(times), 50),
                        "p99_ms": nearest_rank(np.array(times), 99),
                        "rows_per_compute_s": rows / compute_s,
                        "cpu_server": used[0] / took,
                        "cpu_generator": used[1] / took,
                    }
                    print({key: round(value, 3) if isinstance(value, float) else value for key, value in point.items()}, flush=True)
                    found.append(point)
    return {"points": found, "seconds": seconds}


def overhead(folder: Path, encoder: Encoder, texts: Sequence[str], cores: Sequence[int], rounds: int) -> dict[str, Any]:
    """p50 of each kind of call, per round, in ms; one caller, the same sentences."""
    rows = [pad([row], encoder.pad_id) for row in encoder.encode(texts[:CALLS], [None] * len(texts[:CALLS]))]
    found: dict[str, list[float]] = {"session": [], "empty": [], "binary": [], "json": [], "classify": []}
    os.sched_setaffinity(0, {cores[-1]})  # the session's process inherits it
    session = HERE.open("cpu", folder / "model.onnx", 1)
    session.hold(rows)
    os.sched_setaffinity(0, {cores[0]})
    with served(folder, cores[-1]) as server, started(["-c", STARLETTE, "PORT"], "/v2/models/m/infer", cores[-1]) as nothing:
        plain, asking, path = Caller(nothing.url), Caller(server.url), f"/v2/models/{folder.name}/infer"
        classified = [json.dumps({"texts": [text]}).encode() for text in texts[: len(rows)]]
        binary, plainly = ([tensors(row, session.inputs, binary=binary) for row in rows] for binary in (True, False))

        def once(name: str, i: int) -> float:
            if name == "session":
                return float(session.replay([i]).times_ms[0])
            if name == "empty":
                return _timed(plain.ask, "POST", "/v2/models/m/infer", *plainly[i])
            if name == "classify":
                return _timed(asking.ask, "POST", "/classify", classified[i])
            return _timed(asking.ask, "POST", path, *(binary if name == "binary" else plainly)[i])

        for round_ in range(rounds + 1):
            took: dict[str, list[float]] = {name: [] for name in found}
            for i in range(len(rows)):
                for name in random.sample(list(found), len(found)):
                    took[name].append(once(name, i))
            for name, times in took.items() if round_ else ():  # the first warms everything
                found[name].append(nearest_rank(np.array(times), 50))
    session.close()
    return {"p50_ms": found, "calls": len(rows)}


def tensors(row: Mapping[str, Any], names: Sequence[str], *, binary: bool) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference request, as Triton's client writes them."""
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    inputs = []
    for name in names:
        one = InferInput(name, list(row[name].shape), "INT64")
        one.set_data_from_numpy(row[name], binary_data=binary)
        inputs.append(one)
    body, size = InferenceServerClient.generate_request_body(inputs, outputs=[InferRequestedOutput("logits", binary_data=binary)])
    return body, {"Inference-Header-Content-Length": str(size)} if size else {}


COMPUTE = (
    "onnxsqueeze_batch_rows_sum",
    "onnxsqueeze_compute_seconds_sum",
)  # of the server's metrics: rows that were computed, and how long that took


def _timed(call: Any, *words: Any) -> float:
    begin = time.perf_counter()
    call(*words)
    return 1000 * (time.perf_counter() - begin)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval over rounds, by Student's t."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} ({mean - half:.2f}–{mean + half:.2f})"


def _best(points: Sequence[dict[str, Any]], bound: float, key: str) -> float:
    """The highest value at a concurrency whose 99 % point is within the bound; NaN where none is."""
    return max((point[key] for point in points if point["p99_ms"] <= bound), default=math.nan)


def table(out: Path) -> None:
    """serving.md from the parts that are there."""
    parts = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in ("about", "overhead", "curves", "soak")
        if (out / f"{name}.json").is_file()
    }
    about = parts["about"]
    lines = [
        "# Served on loopback",
        "",
        f"{about['cpu']} ({about['instruction_set']}), {about['date']}; the generator on one core, the server with one thread on another. Made by `{about['command']}` at commit {about['commit']}; the models by `{about['run']}`.",
        "",
    ]
    lines += [
        "| model | MB | accuracy, % |",
        "| --- | --- | --- |",
        *(f"| {m['name']} | {m['size_bytes'] / 1e6:.2f} | {m['metric']:.1f} |" for m in about["models"]),
        "",
    ]
    if "overhead" in parts:
        p50 = parts["overhead"]["p50_ms"]
        more = {name: [a - b for a, b in zip(p50[name], p50["session"], strict=True)] for name in ("binary", "json", "classify")}
        lines += [
            "## One caller",
            "",
            f"{about['models'][1]['name']}, batch 1, sentences of the dev file at their own lengths; p50 in ms, mean over {len(p50['session'])} rounds of {parts['overhead']['calls']} calls with its 95 % interval.",
            "",
        ]
        lines += ["| call | p50, ms | above the bare session | above session and empty endpoint |", "| --- | --- | --- | --- |"]
        lines += [
            f"| the bare session | {_interval(p50['session'])} | | |",
            f"| an empty endpoint (Starlette, uvicorn) | {_interval(p50['empty'])} | | |",
        ]
        for name, what in (
            ("binary", "tokens to /infer, binary tensors"),
            ("json", "tokens to /infer, JSON"),
            ("classify", "text to /classify, tokenized there"),
        ):
            above = [a - b for a, b in zip(more[name], p50["empty"], strict=True)]
            lines.append(f"| {what} | {_interval(p50[name])} | {_interval(more[name])} | {_interval(above)} |")
        lines.append("")
    if "curves" in parts:
        points = parts["curves"]["points"]
        names = [m["name"] for m in about["models"]]
        rounds = sorted({point["round"] for point in points})
        at = {(p["model"], p["round"], p["concurrency"]): p for p in points}
        lines += [
            "## Rate and 99 % point against concurrency",
            "",
            f"Means over {len(rounds)} rounds of {parts['curves']['seconds']:g} s, the models in turns. CPU: cores used by server and generator. In the server: rows per second of computing.",
            "",
        ]
        lines += [
            "| callers | " + " | ".join(f"{n}: rows/s | p99, ms | in the server, rows/s | CPU server, generator" for n in names) + " |",
            "| --- " * (1 + 4 * len(names)) + "|",
        ]
        for c in sorted({p["concurrency"] for p in points}):
            cells = [str(c)]
            for name in names:
                mean = {
                    key: statistics.mean(at[name, r, c][key] for r in rounds)
                    for key in ("rate_per_s", "p99_ms", "rows_per_compute_s", "cpu_server", "cpu_generator")
                }
                cells += [
                    f"{mean['rate_per_s']:.0f}",
                    f"{mean['p99_ms']:.1f}",
                    f"{mean['rows_per_compute_s']:.0f}",
                    f"{mean['cpu_server']:.2f}, {mean['cpu_generator']:.2f}",
                ]
            lines.append("| " + " | ".join(cells) + " |")
        refused = sum(p["refused"] for p in points)
        lines += [
            "",
            f"Refused requests: {refused} of {sum(p['n'] for p in points) + refused}.",
            "",
            "| 99 % point within | end to end, × | in the server, × |",
            "| --- | --- | --- |",
        ]
        for bound in (*BOUNDS_MS, math.inf):
            ratios = []
            for key in ("rate_per_s", "rows_per_compute_s"):
                each = [
                    [_best([p for p in points if p["model"] == name and p["round"] == r], bound, key) for r in rounds] for name in names
                ]
                ratios.append([b / a for a, b in zip(*each, strict=True)])
            cells = [_interval(one) if not any(map(math.isnan, one)) else "the baseline has none" for one in ratios]
            lines.append(f"| {'any' if bound == math.inf else f'{bound} ms'} | {cells[0]} | {cells[1]} |")
        lines.append("")
    if "soak" in parts:
        soak = parts["soak"]
        memory = [rss / 1e6 for _, rss in soak["rss_bytes"]]
        tenth = max(1, len(memory) // 10)
        lines += [
            "## Under load for long",
            "",
            (
                f"{about['models'][1]['name']}, {soak['seconds']:g} s at {soak['rate_per_s']:.0f} requests a second (80 % of the most), commit {soak['commit']}: answers by status {soak['statuses']}, p50 {soak['p50_ms']:.1f} ms, p99 {soak['p99_ms']:.1f} ms;"
                f" resident memory {statistics.mean(memory[tenth : 2 * tenth]):.1f} MB in the second tenth, {statistics.mean(memory[-tenth:]):.1f} MB in the last, {max(memory):.1f} MB at most."
            ),
            "",
        ]
    (out / "serving.md").write_text("\n".join(lines))


def main() -> None:
    """Measure the parts asked for and draw the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["overhead", "curves", "soak"], choices=["overhead", "curves", "soak"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--soak-seconds", type=float, default=600.0)
    parser.add_argument("--table-only", action="store_true")
    asked = parser.parse_args()
    if not asked.table_only:
        measure(asked)
    table(asked.out)


def measure(asked: argparse.Namespace) -> None:
    """Each part into its file."""
    first, second = asked.folders
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("needs two cores: one for the generator, one for the server")
    asked.out.mkdir(parents=True, exist_ok=True)
    record = read_results(first.parent)
    targets = {target.name: target for target in record.targets}
    task = open_task(TaskSettings(name="sst2", max_length=record.task.max_length), data_dir=asked.data_dir, seed=record.seed)
    texts = [row.text for row in task.dev()[0].rows]
    bodies = [json.dumps({"texts": [text]}).encode() for text in texts]
    processors = environment.processors()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    split = record.task.splits[0].name
    about = {
        "cpu": processors["cpu"],
        "instruction_set": processors["instruction_set"],
        "date": datetime.now(UTC).date().isoformat(),
        "command": without_paths(f"python benchmarks/serving.py {' '.join(sys.argv[1:])}"),
        "commit": commit,
        "run": record.command,
        "models": [
            {
                "name": one.name,
                "size_bytes": targets[one.name].size_bytes,
                "metric": 100 * targets[one.name].metrics[split]["accuracy"].value,
            }
            for one in (first, second)
        ],
    }
    _write(asked.out / "about.json", about)
    if "overhead" in asked.parts:
        _write(asked.out / "overhead.json", overhead(second, Encoder(second, record.task.max_length), texts, cores, asked.rounds))
    os.sched_setaffinity(0, {cores[0]})
    if "curves" in asked.parts:
        _write(asked.out / "curves.json", curves((first, second), bodies, cores, asked.rounds, asked.seconds))
    if "soak" in asked.parts:
        points = json.loads((asked.out / "curves.json").read_text())["points"]
        most = max(
            statistics.mean(p["rate_per_s"] for p in points if (p["model"], p["concurrency"]) == (second.name, c)) for c in CONCURRENCY
        )
        with served(second, cores[-1]) as server:
            asyncio.run(closed_loop(f"{server.url}/classify", bodies, 8, 5))
            _write(
                asked.out / "soak.json",
                {"commit": commit}
                | asyncio.run(open_loop(f"{server.url}/classify", bodies, 0.8 * most, asked.soak_seconds, server.process)),
            )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
