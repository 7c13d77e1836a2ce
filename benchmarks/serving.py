"""What `onnxsqueeze serve` costs beside the bare session: p50 of one row, in turns, on one keep-alive connection.

    python benchmarks/serving.py my-model [--rounds 2000] [--tokens 16]

Prints the p50 of a bare session in this process, of an endpoint of the server that runs nothing (/v2/health/live), and of an inference
(binary tensors both ways) on the same feed; 95 % of the rounds lie below the second number.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxsqueeze.serving.folder import require
from onnxsqueeze.serving.model import open_model


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("folder", type=Path)
    words.add_argument("--rounds", type=int, default=2000)
    words.add_argument("--tokens", type=int, default=16)
    words.add_argument("--threads", type=int, default=1)
    said = words.parse_args()
    model = open_model(require(said.folder), said.threads, 1)
    ids = np.full((1, said.tokens), 5, np.int64)
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feed = {name: every[name] for name in model.inputs}
    server = subprocess.Popen(
        [sys.executable, "-m", "onnxsqueeze", "serve", str(said.folder), "--name", "m", "--port", "0", "--threads", str(said.threads)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout  # noqa: S101  # a pipe was asked for
        found = re.search(r"http://([\d.]+):(\d+)", server.stdout.readline())
        assert found  # noqa: S101  # else it said why, above
        with socket.create_connection((found[1], int(found[2]))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
            request = _request(feed)
            sides: dict[str, Callable[[], object]] = {
                "bare session": lambda: model.run(feed),
                "empty endpoint": lambda: _ask(connection, head),
                "inference": lambda: _ask(connection, request),
            }
            times: dict[str, list[float]] = {name: [] for name in sides}
            for i in range(said.rounds):
                for name, side in sides.items():
                    began = time.perf_counter()
                    side()
                    if i >= said.rounds // 10:
                        times[name].append(1e3 * (time.perf_counter() - began))
    finally:
        server.terminate()
        server.wait()
    for name, one in times.items():
        print(
            f"{name:<15} p50_ms={np.median(one):.3f} p95_ms={np.percentile(one, 95):.3f} n={len(one)} batch=1 sequence={said.tokens} threads={said.threads}"
        )
    bare, empty, whole = (float(np.median(one)) for one in times.values())
    print(f"inference - bare session = {whole - bare:.3f} ms; - empty endpoint, too = {whole - bare - empty:.3f} ms")


def _request(feed: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> bytes:
    listed = [
        {"name": name, "datatype": "INT64", "shape": list(array.shape), "parameters": {"binary_data_size": array.nbytes}}
        for name, array in feed.items()
    ]
    text = json.dumps({"inputs": listed, "parameters": {"binary_data_output": True}}).encode()
    body = text + b"".join(array.tobytes() for array in feed.values())
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(text)}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _ask(connection: socket.socket, request: bytes) -> bytes:
    connection.sendall(request)
    got = b""
    while b"\r\n\r\n" not in got:
        got += connection.recv(65_536)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), got  # noqa: S101  # a measurement of refusals says nothing
    length = re.search(rb"content-length: (\d+)", head)
    assert length  # noqa: S101  # the server always states it
    while len(body) < int(length[1]):
        body += connection.recv(65_536)
    return body


if __name__ == "__main__":
    main()
