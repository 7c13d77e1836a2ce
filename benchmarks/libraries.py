"""What serving libraries take for an empty model: p50 of one caller on loopback, each library in an environment of its own, in turns.

    python benchmarks/libraries.py --work runs/libraries [--rounds 5] [--calls 500]

Installs Starlette with uvicorn, KServe's model server and Ray Serve with pip below --work (about 1 GB). Each answers the Open Inference Protocol's request for one row of 24 token ids with two
numbers that it does not compute; Starlette's bare endpoint reads the body and answers with fixed bytes. Prints a table: p50 per round, its mean and 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import statistics
import subprocess
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
from scipy.stats import t

from onnxsqueeze.measure.statistics import nearest_rank

STARLETTE = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

async def infer(request):
    await request.body()
    return Response(b'{"outputs": [{"name": "logits", "shape": [1, 2], "datatype": "FP32", "data": [0.0, 1.0]}]}', media_type="application/json")

app = Starlette(routes=[Route("/v2/models/m/infer", infer, methods=["GET", "POST"])])
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", access_log=False, http="httptools", loop="uvloop")
"""

KSERVE = """
import sys
from kserve import InferOutput, InferResponse, Model, ModelServer

class Empty(Model):
    def __init__(self):
        super().__init__("m")
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        return InferResponse(payload.id or "1", "m", [InferOutput("logits", [1, 2], "FP32", [0.0, 1.0])])

ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1, access_log_format=None).start([Empty()])
"""

RAY = """
import sys, time
from ray import serve
from starlette.requests import Request

@serve.deployment
class Empty:
    async def __call__(self, request: Request):
        await request.json()
        return {"outputs": [{"name": "logits", "shape": [1, 2], "datatype": "FP32", "data": [0.0, 1.0]}]}

serve.start(http_options={"port": int(sys.argv[1])})
serve.run(Empty.bind(), route_prefix="/v2/models/m/infer")
while True:
    time.sleep(60)
"""

LIBRARIES = {
    "Starlette on uvicorn": (["starlette", "uvicorn", "httptools", "uvloop"], STARLETTE),
    "KServe's model server": (["kserve"], KSERVE),
    "Ray Serve": (["ray[serve]"], RAY),
}
ROW = {"shape": [1, 24], "datatype": "INT64", "data": list(range(24))}
BODY = json.dumps({"inputs": [{"name": name, **ROW} for name in ("input_ids", "attention_mask", "token_type_ids")]}).encode()


def ask(connection: HTTPConnection) -> float:
    """One request's time in ms."""
    begin = time.perf_counter()
    connection.request("POST", "/v2/models/m/infer", BODY, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise ConnectionError(f"{answer.status}: {text[:200]!r}")
    return 1000 * (time.perf_counter() - begin)


@contextmanager
def started(name: str, work: Path) -> Iterator[HTTPConnection]:
    """A connection to a server of one library, which is installed where it is not yet, and ended in the end."""
    packages, code = LIBRARIES[name]
    place = work / name.split()[0].partition("'")[0].lower()
    python = place / "bin" / "python"
    if not python.is_file():
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (work / f"{place.name}.log").open("w") as log:
        process = subprocess.Popen([python, "-c", code, str(port)], stdout=log, stderr=log)
        try:
            connection = HTTPConnection("127.0.0.1", port)
            for _ in range(900):
                if process.poll() is not None:
                    raise SystemExit(f"{name}: ended with {process.returncode}, see {log.name}")
                with suppress(OSError):
                    ask(connection)
                    break
                connection.close()
                time.sleep(0.2)
            yield connection
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=500)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    p50: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    with ExitStack() as servers:
        connections = {name: servers.enter_context(started(name, asked.work)) for name in LIBRARIES}
        for round_ in range(asked.rounds + 1):
            for name, connection in connections.items():
                connection.close()  # it was idle, and may be closed there; the next request opens it
                times = [ask(connection) for _ in range(asked.calls)]
                if round_:  # the first warms it
                    p50[name].append(nearest_rank(np.array(times), 50))
    print("| library | p50, ms (95 %) | rounds |\n| --- | --- | --- |")
    for name, values in p50.items():
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        mean = statistics.mean(values)
        print(f"| {name} | {mean:.2f} ({mean - half:.2f}–{mean + half:.2f}) | {', '.join(f'{value:.2f}' for value in values)} |")


if __name__ == "__main__":
    main()
