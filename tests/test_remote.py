"""`onnxsqueeze verify URL`: a real server of the right model passes, another model fails, and what is no such server is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from onnxsqueeze.errors import MeasureError, SqueezeError, Unavailable, UsageError
from onnxsqueeze.remote import Remote


@contextmanager
def answering(status: int, body: bytes, *, keeps: bool = True) -> Iterator[str]:
    """A web server that is no inference server: it gives the same to everything, and ends each connection without a word where it ``keeps`` none."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = not keeps

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (200, b"<html>", MeasureError, "does not speak the Open Inference Protocol v2: GET /v2/models/m gives b'<html>'"),
        (200, b"{}", MeasureError, "its description of m lacks 'inputs'"),
        (404, b'{"error": "no model m"}', MeasureError, "GET /v2/models/m: 404 Not Found: no model m"),
        (500, b"oh", MeasureError, "500 Internal Server Error: b'oh'"),
    ],
)
def test_what_is_no_inference_server_is_told_with_what_it_said(status: int, body: bytes, kind: type[SqueezeError], said: str) -> None:
    with answering(status, body) as url, pytest.raises(kind) as caught:
        Remote(f"{url}/v2/models/m")
    assert said in str(caught.value)


def test_several_models_are_listed_and_one_has_to_be_named() -> None:
    index = json.dumps([{"name": "b", "version": "1"}, {"name": "a"}]).encode()
    with answering(200, index) as url, pytest.raises(UsageError) as caught:
        Remote(url)
    assert "serves a, b" in str(caught.value)
    assert f"{url}/v2/models/NAME" in str(caught.value)


def test_a_server_without_an_index_needs_the_name_in_the_url() -> None:
    with answering(404, b"") as url, pytest.raises(UsageError, match="does not say what it serves"):
        Remote(url)


def test_nothing_at_that_port() -> None:
    with answering(200, b"") as url:
        pass
    with pytest.raises(Unavailable, match="does not answer"):
        Remote(f"{url}/v2/models/m")


@pytest.mark.parametrize("url", ["ftp://a", "http://", "a:8000", "http://a:port", "http://a:99999"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"http://HOST:PORT"):
        Remote(url)


def test_a_model_that_takes_no_token_ids_is_told_with_what_it_takes() -> None:
    about = json.dumps({"inputs": [{"name": "text", "datatype": "BYTES"}], "outputs": [{"name": "logits"}]}).encode()
    with answering(200, about) as url, pytest.raises(MeasureError, match="reads text BYTES, not token ids"):
        Remote(f"{url}/v2/models/m").run({})


def test_an_answer_without_the_tensor_is_no_answer() -> None:
    about = json.dumps({"inputs": [{"name": "input_ids", "datatype": "INT64"}], "outputs": [{"name": "logits"}]}).encode()
    with answering(200, about) as url, pytest.raises(MeasureError, match="its answer holds no tensor logits"):
        Remote(f"{url}/v2/models/m").run({"input_ids": np.ones((1, 2), np.int64)})


def test_a_connection_that_the_server_closed_between_two_calls_is_opened_again() -> None:
    about = json.dumps(
        {"inputs": [{"name": "input_ids", "datatype": "INT64"}], "outputs": [{"name": "y", "shape": [1, 1], "data": [2.5]}]}
    ).encode()
    with answering(200, about, keeps=False) as url:
        remote = Remote(f"{url}/v2/models/m")
        for _ in range(2):
            assert remote.run({"input_ids": np.ones((1, 2), np.int64)}).tolist() == [[2.5]]
