"""`onnxsqueeze serve`, one real server: the Open Inference Protocol, /classify, and everything that is no right request."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from onnxsqueeze import __version__
from servers import Server, asked, bare, model_folder, row_of, serving, tensors

TEXTS = ["a great film , said the woman", "dull", "the plot was not good and the music was very old"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory, "bert")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, "--max-batch", 8, "--threads", 1, "--timeout-s", 1) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{server.host}:{server.port}") as one:
        yield one


@pytest.fixture
def feed(folder: Path) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    return tensors([row_of(folder, TEXTS[0])])


def given(feed: dict[str, Any], *, binary: bool) -> list[triton.InferInput]:
    listed = []
    for name, array in feed.items():
        one = triton.InferInput(name, array.shape, "INT64")
        one.set_data_from_numpy(array, binary_data=binary)
        listed.append(one)
    return listed


def test_the_server_says_what_it_is_and_with_how_many_threads(client: triton.InferenceServerClient, folder: Path) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    about = client.get_server_metadata()
    assert (about["name"], about["version"]) == ("onnxsqueeze", __version__)
    assert about["parameters"] | {"threads": 1, "workers": 1, "max_batch": 8, "queue": 64, "timeout_s": 1.0} == about["parameters"]
    assert client.is_model_ready("bert")
    assert client.is_model_ready("bert", "1")
    told = client.get_model_metadata("bert", "1")
    assert told["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert told["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}]
    assert told["parameters"]["max_tokens"] == 160
    assert told["parameters"]["sha256:model.onnx"] == json.loads((folder / "golden.json").read_text())["sha256"]["model.onnx"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_a_real_client_gets_the_bare_sessions_bits(
    client: triton.InferenceServerClient, folder: Path, feed: dict[str, Any], binary_in: bool, binary_out: bool
) -> None:
    wanted = [triton.InferRequestedOutput("logits", binary_data=binary_out)]
    answer = client.infer("bert", given(feed, binary=binary_in), outputs=wanted, request_id="seven", model_version="1")
    np.testing.assert_array_equal(answer.as_numpy("logits"), bare(folder, feed))
    said = answer.get_response()
    assert (said["id"], said["model_name"], said["model_version"]) == ("seven", "bert", "1")


def test_without_named_outputs_all_come_and_parameters_come_back(server: Server, folder: Path, feed: dict[str, Any]) -> None:
    status, said = server.json("POST", "/v2/models/bert/infer", asked(feed, parameters={"trace": "abc", "n": 1}, id=""))
    assert status == 200
    assert (said["parameters"], said["id"]) == ({"trace": "abc", "n": 1}, "")
    (output,) = said["outputs"]
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(output["shape"]), bare(folder, feed))


def test_binary_output_for_the_whole_request(server: Server, folder: Path, feed: dict[str, Any]) -> None:
    status, headers, body = server.ask("POST", "/v2/models/bert/infer", asked(feed, parameters={"binary_data_output": True}))
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    cut = int(headers["inference-header-content-length"])
    assert json.loads(body[:cut])["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    ]
    assert struct.unpack("<2f", body[cut:]) == tuple(bare(folder, feed)[0].tolist())


def test_flat_data_is_the_same_as_nested(server: Server, feed: dict[str, Any]) -> None:
    flat = asked(feed)
    for one in flat["inputs"]:
        one["data"] = one["data"][0]
    assert server.json("POST", "/v2/models/bert/infer", flat) == server.json("POST", "/v2/models/bert/infer", asked(feed))


def test_classify_names_the_labels_and_their_scores(server: Server, folder: Path) -> None:
    status, said = server.json("POST", "/classify", {"texts": TEXTS})
    assert (status, said["model"], said["version"]) == (200, "bert", "1")
    for text, result in zip(TEXTS, said["results"], strict=True):
        logits = bare(folder, tensors([row_of(folder, text)]))[0].astype(np.float64)
        chances = np.exp(logits) / np.exp(logits).sum()
        assert list(result["scores"].values()) == pytest.approx(chances, abs=1e-5)
        assert result["label"] == f"LABEL_{chances.argmax()}"
        assert result["score"] == max(result["scores"].values())


def test_a_text_is_cut_where_it_was_cut_when_the_model_was_measured(server: Server, folder: Path) -> None:
    long = "the movie was not dull " * 2000
    answers = [server.json("POST", "/classify", {"texts": [text]}) for text in (long, long[:300])]
    assert answers[0] == answers[1]
    assert answers[0][0] == 200
    late = "a" * 5000 + " great " + " " * 9000 + "film " * 40  # one unknown word, and the rest where few look
    status, said = server.json("POST", "/classify", {"texts": [late]})
    logits = bare(folder, tensors([row_of(folder, late)]))[0].astype(np.float64)
    assert status == 200
    assert said["results"][0]["scores"]["LABEL_0"] == pytest.approx(1 / (1 + np.exp(logits[1] - logits[0])), abs=1e-5)


def test_texts_in_any_script_are_read(server: Server) -> None:
    assert server.json("POST", "/classify", {"texts": ["très bon 🎬 \u0000", "", "映画"]})[0] == 200


def changed(feed: dict[str, Any], i: int = 0, **fields: Any) -> dict[str, Any]:
    request = asked(feed)
    request["inputs"][i] |= fields
    return request


IDS = [[2, 5, 6, 3]]
REFUSED: list[tuple[str, Any, str]] = [
    ("no inputs", {"inputs": []}, "inputs: must be a list of tensors, got an empty list; send input_ids, attention_mask, token_type_ids"),
    ("inputs of another kind", {"inputs": {"a": 1}}, "inputs: must be a list of tensors, got an object"),
    ("an input missing", {"inputs": asked(tensors(IDS))["inputs"][:1]}, "inputs: attention_mask, token_type_ids missing"),
    ("an input twice", {"inputs": asked(tensors(IDS))["inputs"][:1] * 2}, "inputs[1]: input_ids is there twice"),
    ("an unknown input", changed(tensors(IDS), name="inputids"), "inputs[0].name: the model has no 'inputids'; did you mean 'input_ids'?"),
    ("another type", changed(tensors(IDS), datatype="INT32"), 'inputs[0].datatype: input_ids must be INT64, got "INT32"'),
    ("text", changed(tensors(IDS), datatype="BYTES", data=["a"]), 'inputs[0].datatype: input_ids must be INT64, got "BYTES"'),
    ("a fraction", changed(tensors(IDS), data=[2, 5.5, 6, 3]), "inputs[0].data: must be a list of INT64, got a number"),
    ("words", changed(tensors(IDS), data=["2", "5", "6", "3"]), "inputs[0].data: must be a list of INT64, got a string"),
    ("true", changed(tensors(IDS), data=[True, 5, 6, 3]), "inputs[0].data: must be a list of INT64, got a boolean"),
    ("a number that does not fit", changed(tensors(IDS), data=[2, 2**63, 6, 3]), "inputs[0].data: values must fit INT64"),
    ("another rank", changed(tensors(IDS), shape=[4]), "inputs[0].shape: input_ids must be [-1, -1] (-1 is free), got [4]"),
    ("a negative size", changed(tensors(IDS), shape=[-1, -4]), "inputs[0].shape: must be a list of sizes that are not negative"),
    ("a size that is no number", changed(tensors(IDS), shape=[True, 4]), "inputs[0].shape: must be a list of sizes"),
    ("a huge shape", changed(tensors(IDS), shape=[2**30, 2**30]), "inputs[0].data: the shape [1073741824, 1073741824] has"),
    ("too few values", changed(tensors(IDS), data=[2, 5, 6]), "inputs[0].data: the shape [1, 4] has 4 values, got [3]"),
    ("ragged rows", changed(tensors(IDS * 2), data=[[2, 5, 6, 3], [2, 5, 3]]), "inputs[0].data: must be flat or nested as its shape [2, 4] is"),
    ("too deep", changed(tensors(IDS), data=[[[2, 5, 6, 3]]]), "inputs[0].data: must be flat or nested as its shape"),
    ("no values", asked(tensors([[]])), "input_ids: shape [1, 0] holds no values"),
    ("unlike shapes", changed(tensors(IDS), i=1, shape=[1, 2], data=[1, 1]), "attention_mask: must have the shape of input_ids, [1, 4], got [1, 2]"),
    ("too many rows", asked(tensors(IDS * 9)), "input_ids: at most 8 rows a request, got 9"),
    ("too many tokens", asked(tensors([[5] * 161])), "input_ids: the model reads at most 160 tokens a row, got 161"),
    ("an id beyond the vocabulary", asked(tensors([[2, 10_000, 3]])), "input_ids: the vocabulary has the ids 0 to "),
    ("a negative id", asked(tensors([[2, -1, 3]])), "got -1; tokenize with the tokenizer.json of this model"),
    ("a type beyond two", changed(tensors(IDS), i=2, data=[0, 0, 2, 0]), "token_type_ids: the model knows the ids 0 to 1, got 2"),
    ("a mask of twos", changed(tensors(IDS), i=1, data=[1, 2, 1, 1]), "attention_mask: must be 0 or 1, got 2"),
    ("a row without tokens", changed(tensors(IDS), i=1, data=[0, 0, 0, 0]), "attention_mask: row 0 masks every token"),
    ("an unknown output", asked(tensors(IDS), outputs=[{"name": "logit"}]), "outputs[0].name: the model has no 'logit'; did you mean 'logits'?"),
    ("an output twice", asked(tensors(IDS), outputs=[{"name": "logits"}] * 2), "outputs[1]: logits is there twice"),
    ("an unknown parameter", asked(tensors(IDS), outputs=[{"name": "logits", "parameters": {"classification": 1}}]), "'classification' is not understood here"),
    ("an id of another kind", asked(tensors(IDS), id=7), "id: must be a string, got a number"),
    ("a parameter of another kind", asked(tensors(IDS), parameters={"a": []}), "parameters.a: must be a string, a number or a boolean"),
    ("bytes that were not announced", changed(tensors(IDS), parameters={"binary_data_size": 32}), "needs the header Inference-Header-Content-Length"),
    ("no JSON", b"{", "body: is not JSON"),
    ("not UTF-8", b'{"inputs": "\xff"}', "body: is not UTF-8"),
    ("a list", [], "body: must be a JSON object, got an empty list"),
    ("a deep document", b"[" * 100_000, "body: "),
    ("a long number", b'{"inputs": ' + b"1" * 10_000 + b"}", "body: is not JSON"),
    ("nothing", b"", "body: is not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_what_the_model_cannot_take_is_refused_with_the_place_and_the_fault(server: Server, request_: Any, message: str) -> None:
    status, said = server.json("POST", "/v2/models/bert/infer", request_)
    assert status == 400
    assert message in said["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"texts": []}, "texts: must be a list of at least one text"),
        ({"texts": "a"}, "texts: must be a list of at least one text"),
        ({"texts": [["a", "b"]]}, "texts[0]: this model reads one text a row, got two"),
        ({"texts": ["a", 1]}, "texts[1]: must be a text or a list of two"),
        ({"texts": ["a"] * 9}, "texts: at most 8 a request, got 9"),
        ({"text": ["a"]}, "body: 'text' is not understood here"),
        (b'{"texts": ["\\ud800"]}', "texts[0]: holds half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_refused(server: Server, body: Any, message: str) -> None:
    status, said = server.json("POST", "/classify", body)
    assert status == 400
    assert message in said["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/brt", 404, "model 'brt': unknown; this server has 'bert'"),
        ("POST", "/v2/models/brt/infer", 404, "model 'brt': unknown"),
        ("GET", "/v2/models/bert/versions/2", 404, "version '2': is not served; version 1 is"),
        ("POST", "/v2/models/bert/versions/x/infer", 404, "version 'x': is not served"),
        ("GET", "/v3", 404, "/v3: unknown path"),
        ("GET", "/v2/models/bert/infer", 405, "does not take GET"),
        ("DELETE", "/v2", 405, "does not take DELETE"),
    ],
)
def test_what_is_not_there_is_told_in_json(server: Server, method: str, path: str, status: int, message: str) -> None:
    got, said = server.json(method, path)
    assert got == status
    assert message in said["error"]


@pytest.mark.parametrize(
    ("length", "size", "tail", "message"),
    [
        ("0", 32, b"", "Inference-Header-Content-Length: must be from 1 to the body's"),
        ("-5", 32, b"", "Inference-Header-Content-Length: must be from 1"),
        ("9" * 30, 32, b"", "Inference-Header-Content-Length: must be from 1"),
        (None, 31, bytes(31), "binary_data_size: [1, 4] of INT64 are 32 bytes, got 31"),
        (None, 32, bytes(31), "inputs[0]: the body ends 1 bytes too early"),
        (None, 32, bytes(40), "body: 8 bytes are left after the last tensor"),
    ],
)
def test_bytes_that_do_not_fit_their_announcement_are_refused(
    server: Server, length: str | None, size: int, tail: bytes, message: str
) -> None:
    request = asked(tensors(IDS))
    request["inputs"][0] = {"name": "input_ids", "datatype": "INT64", "shape": [1, 4], "parameters": {"binary_data_size": size}}
    text = json.dumps(request).encode()
    status, said = server.json("POST", "/v2/models/bert/infer", text + tail, {"Inference-Header-Content-Length": length or str(len(text))})
    assert status == 400
    assert message in said["error"]


def test_a_real_client_reads_the_refusal(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="at most 160 tokens"):
        client.infer("bert", given(tensors([[5] * 200]), binary=True))
    with pytest.raises(InferenceServerException, match="bodies are not unpacked"):
        client.infer("bert", given(tensors(IDS), binary=True), request_compression_algorithm="gzip")


def raw(server: Server, *parts: bytes, wait_s: float = 10) -> bytes:
    """What comes back for these bytes, until the server closes."""
    with socket.create_connection((server.host, server.port), timeout=wait_s) as connection:
        for part in parts:
            connection.sendall(part)
        got = b""
        while chunk := connection.recv(65_536):
            got += chunk
    return got


def test_a_body_of_100_mb_is_refused_by_its_announcement(server: Server) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100000000\r\n\r\n"
    said = raw(server, head)
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"body: must be at most 1048576 bytes, got 100000000" in said


def test_a_body_of_100_mb_that_comes_in_pieces_is_not_kept(server: Server) -> None:
    before = psutil.Process(server.process.pid).memory_info().rss
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + bytes(65_536) + b"\r\n"
        with pytest.raises(OSError, match=r"reset|Broken|timed out"):  # noqa: PT012  # the server reads on for a while, then closes
            for _ in range(1600):
                connection.sendall(piece)
            while connection.recv(65_536):
                pass
            raise OSError("reset, in order")
    assert psutil.Process(server.process.pid).memory_info().rss - before < 20e6
    assert server.metric("requests_total", endpoint="classify", status="413") >= 1


@pytest.mark.parametrize(
    ("parts", "status", "message"),
    [
        ((b"HELLO\r\n\r\n",), b"400", b"request: is not HTTP/1.1"),
        ((b"GET /v2 HTTP/1.1\r\nHost: x\r\nLong: ", b"a" * 70_000), b"431", b"headers: must be at most 65536 bytes"),
        ((b"GET /v2 HTTP/1.1\r\nHo",), b"408", b"request: did not arrive within 1 s"),
        ((b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",), b"408", b"request: did not arrive within 1 s"),
    ],
)
def test_what_is_no_request_and_what_is_late_is_answered_and_closed(
    server: Server, parts: tuple[bytes, ...], status: bytes, message: bytes
) -> None:
    before = server.metric("connections_refused_total", status=status.decode())
    said = raw(server, *parts)
    assert said.startswith(b"HTTP/1.1 " + status)
    assert message in said
    assert server.metric("connections_refused_total", status=status.decode()) == before + 1


def test_requests_that_follow_each_other_without_waiting_are_answered_in_their_order(server: Server) -> None:
    said = raw(
        server, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 20 + b"GET /v3 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    assert said.count(b"HTTP/1.1 200 OK") == 20
    assert said.index(b"HTTP/1.1 404") > said.rindex(b"HTTP/1.1 200 OK")


def test_a_server_that_was_asked_nonsense_by_many_keeps_its_memory_and_its_bits(server: Server, folder: Path, feed: dict[str, Any]) -> None:
    rubbish: list[tuple[str, Any]] = [("/v2/models/bert/infer", one[1]) for one in REFUSED]
    rubbish += [("/v2/models/bert/infer", b"\x00" * 900_000), ("/classify", {"texts": ["a b " * 50_000] * 4})]
    full = asked(tensors([[5] * 160] * 8))

    def one(i: int) -> int:
        path, body = rubbish[i % len(rubbish)] if i % 3 else ("/v2/models/bert/infer", full)
        return server.ask("POST", path, body)[0]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(150)))  # the arenas of the largest shapes are there
        before = psutil.Process(server.process.pid).memory_info().rss
        statuses = set(pool.map(one, range(450)))
    assert statuses <= {200, 400}
    assert psutil.Process(server.process.pid).memory_info().rss - before < 20e6
    status, said = server.json("POST", "/v2/models/bert/infer", asked(feed))
    assert status == 200
    np.testing.assert_array_equal(np.array(said["outputs"][0]["data"], np.float32).reshape(1, 2), bare(folder, feed))
