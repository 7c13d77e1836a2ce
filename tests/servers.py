"""Small deployed folders, and the real `onnxsqueeze serve` on them in its own process."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from models import FamilyName, artifact, random_checkpoint, toy_context
from onnxsqueeze.backends import HERE
from onnxsqueeze.measure import golden
from onnxsqueeze.stages.export import Export
from onnxsqueeze.tasks.rows import TaskInfo
from onnxsqueeze.tokens import Encoder
from runs import ROOT, start_words

MAX_LENGTH = 32
SLOW_WORD, SLOW_TURNS = "brilliant", 30_000  # seconds, on any machine of these years


def deployed(
    folder: Path,
    family: FamilyName = "bert",
    *,
    outputs: int = 2,
    pairs: bool = False,
    embeds: bool = False,
    seed: int = 0,
    hidden: int = 32,
) -> Path:
    """A folder as `deploy --to folder` writes it, without its record: a random two-layer model that reads up to 160 tokens."""
    checkpoint = random_checkpoint(
        folder.parent / f"{folder.name}-checkpoint", family, outputs=outputs, seed=seed, hidden=hidden, head=not embeds
    )
    context = toy_context(folder.parent / f"{folder.name}-context", outputs=outputs)
    if embeds:
        context = replace(context, task=TaskInfo("pairs", (), ("spearman",), "spearman", MAX_LENGTH, compare="cosine"))
    folder.mkdir(parents=True)
    Export(kind="export").run(artifact(checkpoint), None, folder, context)
    write_golden(folder, pairs=pairs, vectors=embeds)
    return folder


def write_golden(folder: Path, *, pairs: bool = False, vectors: bool = False) -> None:
    """Ask the model the golden sentences and write golden.json."""
    known = golden.answers(folder, "cpu", 1, MAX_LENGTH, golden.sentences(pairs=pairs), HERE, vectors=vectors)
    (folder / golden.GOLDEN_FILE).write_text(known.to_json())


def slow(folder: Path, like: Path, word: str, times: int) -> Path:
    """The folder ``like`` with a graph that multiplies matrices ``times`` times in a loop when ``word`` is in a row, else once; it takes no notice of the rest."""
    from onnx import TensorProto, helper, save

    tokenizer = json.loads((like / "tokenizer.json").read_text())
    number = tokenizer["model"]["vocab"][word]
    shutil.copytree(like, folder)
    size = 128
    matrix = np.eye(size, dtype=np.float32)
    body = helper.make_graph(
        [helper.make_node("MatMul", ["carried", "matrix"], ["next"]), helper.make_node("Identity", ["on"], ["still"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [size, size]),
        ],
    )
    nodes = [
        helper.make_node("Equal", ["input_ids", "number"], ["is_word"]),
        helper.make_node("Cast", ["is_word"], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["as_float"], ["any_word"], keepdims=0),
        helper.make_node("Mul", ["any_word", "times"], ["more"]),
        helper.make_node("Add", ["more", "one"], ["turns_float"]),
        helper.make_node("Cast", ["turns_float"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "", "matrix"], ["last"], body=body),
        helper.make_node("ReduceMax", ["last"], ["scalar"], keepdims=0),
        helper.make_node("Cast", ["input_ids"], ["ids_float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["ids_float"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "weights"], ["products"]),
        helper.make_node("Mul", ["products", "scalar"], ["logits"]),
    ]

    def constant(name: str, values: Any, kind: int) -> Any:
        array = np.asarray(values)
        return helper.make_tensor(name, kind, list(array.shape), array.ravel().tolist())

    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            constant("number", number, TensorProto.INT64),
            constant("times", float(times), TensorProto.FLOAT),
            constant("one", 1.0, TensorProto.FLOAT),
            constant("matrix", matrix, TensorProto.FLOAT),
            constant("weights", [[0.01, -0.01]], TensorProto.FLOAT),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(folder / "model.onnx"))
    write_golden(folder)
    return folder


@dataclass
class Server:
    """A running server. ``said`` is what it printed when it was ready."""

    process: subprocess.Popen[str]
    said: str
    host: str
    port: int

    def ask(
        self, method: str, path: str, body: bytes | Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request on a connection of its own; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: bytes | Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """(status, JSON) of one request."""
        status, _, content = self.ask(method, path, body, headers)
        return status, json.loads(content)

    def metric(self, name: str, **labels: str) -> float:
        """One value of /metrics; 0 where there is none yet."""
        for line in self.ask("GET", "/metrics")[2].decode().splitlines():
            found = re.fullmatch(r"onnxsqueeze_(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and dict(re.findall(r'(\w+)="([^"]*)"', found[2] or "")) == labels:
                return float(found[3])
        return 0.0

    def until(self, name: str, value: float, **labels: str) -> None:
        """Wait until a metric has this value."""
        for _ in range(500):
            if self.metric(name, **labels) == value:
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} is {self.metric(name, **labels)}, never became {value}")

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 40) -> int:
        """Signal it and wait; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def serving(folder: Path, *words: object, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Start a server on a free port and end it; its standard error is in ``folder``'s parent, for those who look."""
    with (folder.parent / f"{folder.name}.stderr").open("w") as errors:
        process = subprocess.Popen(
            start_words("serve", folder, "--port", 0, *words),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
        )
        try:
            said = _first_line(process.stdout, 60)
            found = re.search(r"http://([\d.]+):(\d+)", said)
            assert found, (said, Path(errors.name).read_text())
            yield Server(process, said, found[1], int(found[2]))
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            assert process.stdout
            process.stdout.close()


def _first_line(pipe: IO[str] | None, timeout_s: float) -> str:
    assert pipe
    return pipe.readline() if select.select([pipe], [], [], timeout_s)[0] else ""


def tensors(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """The feed of rows of equal length, nothing masked."""
    ids = np.array(rows, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def asked(feed: dict[str, np.ndarray[Any, np.dtype[np.int64]]], **more: Any) -> dict[str, Any]:
    """An inference request in JSON."""
    listed = [{"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.tolist()} for name, array in feed.items()]
    return {"inputs": listed, **more}


def model_folder(factory: pytest.TempPathFactory, kind: str) -> Path:
    """One of a few folders, made once a test process: bert, other (bert of another seed), value, pairs, vectors, slow. Not to be changed."""
    folder = factory.getbasetemp() / "served" / kind
    if folder.is_dir():
        return folder
    if kind == "slow":
        return slow(folder, model_folder(factory, "bert"), SLOW_WORD, SLOW_TURNS)
    made: dict[str, dict[str, Any]] = {
        "bert": {},
        "other": {"seed": 1},
        "value": {"family": "roberta", "outputs": 1},
        "pairs": {"pairs": True},
        "vectors": {"embeds": True},
    }
    return deployed(folder, **made[kind])


def row_of(folder: Path, text: str) -> list[int]:
    """The ids of a text."""
    return list(Encoder(folder, MAX_LENGTH).encode([text], [None])[0].ids)


def bare(folder: Path, feed: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What a session of its own says."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, np.dtype[np.float32]] = session.run(None, {one.name: feed[one.name] for one in session.get_inputs()})[0]
    return found
