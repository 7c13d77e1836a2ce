"""`onnxsqueeze serve` with more to do than it can: the queue's limits, calls that are shared, and the end under load."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsqueeze.serving.settings import DRAIN_S, MAX_CONNECTIONS
from servers import SLOW_WORD, Server, asked, model_folder, row_of, serving, tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory, "slow")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def infer(server: Server, ids: list[int]) -> tuple[int, dict[str, str], Any]:
    feed = tensors([ids])
    del feed["token_type_ids"]
    status, headers, body = server.ask("POST", "/v2/models/slow/infer", asked(feed))
    return status, headers, json.loads(body)


def blocked(server: Server, folder: Path, pool: ThreadPoolExecutor) -> Future[tuple[int, dict[str, str], Any]]:
    """A call that takes a second or more, under way when this returns: the only request that the thread can have taken."""
    blocker = pool.submit(infer, server, row_of(folder, f"a {SLOW_WORD} film"))
    time.sleep(0.3)  # it is sent, and nothing else is
    server.until("queue_rows", 0)
    assert not blocker.done()
    return blocker


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[Server]:
    with serving(folder, "--max-batch", 1, "--queue", 1, "--timeout-s", 0.4, "--threads", 1) as running:
        yield running


def test_what_waits_too_long_gets_504_and_what_finds_no_place_429(narrow: Server, folder: Path, pool: ThreadPoolExecutor) -> None:
    quick = row_of(folder, "a film")
    blocker = blocked(narrow, folder, pool)
    waiting = pool.submit(infer, narrow, quick)
    narrow.until("queue_rows", 1)
    status, headers, said = infer(narrow, quick)
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert said["error"].startswith("queue: 1 rows wait and 1 more are over its limit of 1; try again in ")
    status, said = narrow.json("POST", "/classify", {"texts": ["a film"]})
    assert status == 429
    status, _, said = waiting.result()
    assert status == 504
    assert said["error"].startswith("queue: no call took the request within 0.4 s")
    assert not blocker.done()
    assert blocker.result()[0] == 200
    assert infer(narrow, quick)[0] == 200
    assert narrow.metric("requests_total", endpoint="infer", status="429") == 1
    assert narrow.metric("requests_total", endpoint="classify", status="429") == 1
    assert narrow.metric("requests_total", endpoint="infer", status="504") == 1
    assert narrow.metric("requests_total", endpoint="infer", status="200") == 2


@pytest.mark.full
def test_a_client_that_leaves_while_it_waits_costs_no_call(narrow: Server, folder: Path, pool: ThreadPoolExecutor) -> None:
    calls = narrow.metric("compute_seconds_count")
    blocker = blocked(narrow, folder, pool)
    feed = tensors([row_of(folder, "a film")])
    connection = http.client.HTTPConnection(narrow.host, narrow.port, timeout=0.1)
    with pytest.raises(TimeoutError):  # noqa: PT012  # either may be the first to wait
        connection.request(
            "POST", "/v2/models/slow/infer", json.dumps(asked({name: feed[name] for name in ("input_ids", "attention_mask")}))
        )
        connection.getresponse()
    connection.close()
    assert blocker.result()[0] == 200
    narrow.until("queue_rows", 0)
    assert narrow.metric("compute_seconds_count") == calls + 1, "it was dropped when its time in the queue was over"


def test_those_of_like_length_share_a_call_and_the_others_wait(folder: Path, pool: ThreadPoolExecutor) -> None:
    with serving(folder, "--max-batch", 8, "--threads", 1) as server:
        blocker = blocked(server, folder, pool)
        lengths = [5, 30, 6, 5, 28, 9, 100]
        others = []
        for waiting, length in enumerate(lengths, 1):
            others.append(pool.submit(infer, server, [5] * length))
            server.until("queue_rows", waiting)
        assert [one.result()[0] for one in (blocker, *others)] == [200] * 8
        calls, rows = server.metric("batch_rows_count"), server.metric("batch_rows_sum")
        assert (calls, rows) == (4, 8), "the blocker; 5, 6, 5, 9; 30, 28; 100"
        assert server.metric("batch_rows_bucket", le="4.0") - server.metric("batch_rows_bucket", le="2.0") == 1
        padding = (1 - 25 / 36) + (1 - 58 / 60)
        assert server.metric("padding_ratio_sum") == pytest.approx(padding)
        assert server.metric("queue_seconds_count") == 8
        assert server.metric("request_seconds_count", endpoint="infer") == 8
        assert server.metric("compute_seconds_sum") <= server.metric("request_seconds_sum", endpoint="infer")


@pytest.mark.full
def test_a_delay_fills_a_call_but_never_holds_up_an_idle_server(folder: Path, pool: ThreadPoolExecutor) -> None:
    with serving(folder, "--max-batch", 2, "--max-delay-ms", 1000, "--threads", 1) as server:
        began = time.perf_counter()
        assert infer(server, [5] * 5)[0] == 200
        assert time.perf_counter() - began < 0.9
        blocker = blocked(server, folder, pool)
        first = pool.submit(infer, server, [5] * 5)
        assert blocker.result()[0] == 200
        second = pool.submit(infer, server, [5] * 6)
        assert (first.result()[0], second.result()[0]) == (200, 200)
        assert server.metric("batch_rows_count") in (3, 4)  # 3, unless this machine stood still for the delay


def test_sigterm_under_load_answers_every_request_that_came_in(folder: Path) -> None:
    """Every client sends on one connection until it is told that it is the last answer; no request may stay without one."""
    lost: list[str] = []
    answered: Counter[int] = Counter()
    feed = tensors([[5] * 8])
    body = json.dumps(asked({name: feed[name] for name in ("input_ids", "attention_mask")})).encode()

    def load(server: Server) -> None:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
        connection.connect()
        while True:
            try:
                connection.request("POST", "/v2/models/slow/infer", body)
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException) as error:
                lost.append(repr(error))
                return
            answered[response.status] += 1
            if response.getheader("connection") == "close":
                return

    with serving(folder, "--max-batch", 4, "--threads", 1) as server:
        clients = [threading.Thread(target=load, args=(server,)) for _ in range(6)]
        blocker: list[int] = []
        slow = threading.Thread(target=lambda: blocker.append(infer(server, row_of(folder, f"a {SLOW_WORD} film"))[0]))
        for client in clients:
            client.start()
        time.sleep(0.5)
        slow.start()
        time.sleep(0.2)
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < DRAIN_S
        for client in (*clients, slow):
            client.join()
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/v2")
    assert lost == []
    assert answered.keys() == {200}
    assert blocker == [200]


@pytest.mark.full
def test_an_idle_server_ends_at_once_by_either_signal(folder: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(folder, "--threads", 1) as server, socket.create_connection((server.host, server.port)):
            began = time.monotonic()
            assert server.end(number) == 0
            assert time.monotonic() - began < 5


@pytest.mark.full
def test_connections_beyond_the_limit_get_503_and_the_others_go_on(folder: Path) -> None:
    with serving(folder, "--threads", 1, "--timeout-s", 20) as server:
        ready = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n"
        held = []
        try:
            for _ in range(MAX_CONNECTIONS):
                held.append(socket.create_connection((server.host, server.port), timeout=10))  # noqa: PERF401  # closed below, however far it came
            held[0].sendall(ready)
            assert held[0].recv(1000).startswith(b"HTTP/1.1 200")
            with socket.create_connection((server.host, server.port), timeout=10) as more:
                more.sendall(ready)
                said = more.recv(1000)
                while b"}" not in said:
                    said += more.recv(1000)
            assert said.startswith(b"HTTP/1.1 503")
            assert f"more than {MAX_CONNECTIONS} connections are open".encode() in said
            held[1].sendall(ready)
            assert held[1].recv(1000).startswith(b"HTTP/1.1 200")
        finally:
            for one in held:
                one.close()
        server.until("connections_refused_total", 1, status="503")


@pytest.mark.full
def test_the_slow_model_is_a_model(folder: Path) -> None:
    """What these tests stand on: the word makes a call long, and nothing else does."""
    from onnxsqueeze.serving.folder import require
    from onnxsqueeze.serving.model import open_model

    model = open_model(require(folder), 1, 4)
    times = []
    for text in ("a film", f"a {SLOW_WORD} film"):
        feed = tensors([row_of(folder, text)])
        began = time.perf_counter()
        model.run({name: feed[name] for name in model.inputs})
        times.append(time.perf_counter() - began)
    assert times[0] < 0.2
    assert times[1] > 0.6
    assert np.isfinite(times).all()
