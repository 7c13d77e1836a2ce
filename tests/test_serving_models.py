"""`onnxsqueeze serve` on every kind of model and folder, new versions under way, several processes, and what it refuses to serve."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import artifact
from onnxsqueeze import graph
from onnxsqueeze.measure.golden import GOLDEN_FILE
from onnxsqueeze.tokens import Encoder
from runs import ROOT, command
from servers import MAX_LENGTH, Server, asked, bare, model_folder, row_of, serving, tensors, write_golden

ROWS = [[2, 60, 70, 3]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory, "bert")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory, "other")


def put(source: Path, folder: Path) -> None:
    """A version that is there at once, as it should be written."""
    draft = folder.with_name(f".{folder.name}")
    shutil.copytree(source, draft)
    draft.rename(folder)


def logits(server: Server, path: str = "/v2/models/many/infer") -> list[float]:
    status, said = server.json("POST", path, asked(tensors(ROWS)))
    assert status == 200, said
    found: list[float] = said["outputs"][0]["data"]
    return found


def test_regression_gives_a_value(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = model_folder(tmp_path_factory, "value")
    with serving(folder, "--name", "score", "--threads", 1) as server:
        status, said = server.json("POST", "/classify", {"texts": ["a great film"]})
        assert status == 200
        assert said["results"] == [{"value": pytest.approx(float(bare(folder, tensors([row_of(folder, "a great film")]))[0, 0]), abs=1e-5)}]
        assert server.json("GET", "/v2/models/score")[1]["parameters"]["max_tokens"] == 160, (
            "RoBERTa's table has two positions that no token uses"
        )
        feed = tensors([[0, 5, 2]])
        status, said = server.json("POST", "/v2/models/score/infer", asked(feed))
        assert (status, said["error"].split(";")[0]) == (400, "inputs[2].name: the model has no 'token_type_ids'")


@pytest.mark.full
def test_a_pair_is_read_as_a_pair(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = model_folder(tmp_path_factory, "pairs")
    with serving(folder, "--threads", 1) as server:
        status, said = server.json("POST", "/classify", {"texts": [["a film", "the movie was dull"]]})
        (row,) = Encoder(folder, MAX_LENGTH).encode(["a film"], ["the movie was dull"])
        feed = tensors([row.ids]) | {"token_type_ids": np.array([row.types])}
        powers = np.exp(bare(folder, feed)[0].astype(np.float64))
        assert status == 200
        assert list(said["results"][0]["scores"].values()) == pytest.approx(powers / powers.sum(), abs=1e-5)
        assert server.json("POST", "/classify", {"texts": ["a film"]}) == (
            400,
            {"error": 'texts[0]: this model reads two texts a row, got one; send {"texts": ["one", "two"]}, or [["one", "its second"], …] where the model reads pairs'},
        )  # fmt: skip


def test_a_model_that_embeds_gives_vectors(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = model_folder(tmp_path_factory, "vectors")
    with serving(folder, "--threads", 1) as server:
        status, said = server.json("POST", "/classify", {"texts": ["a film", "dull"]})
        assert status == 200
        for text, result in zip(["a film", "dull"], said["results"], strict=True):
            np.testing.assert_allclose(result["vector"], bare(folder, tensors([row_of(folder, text)]))[0], atol=1e-5)


def test_a_new_version_takes_over_without_a_lost_request_and_a_bad_one_does_not(bert: Path, other: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    put(bert, many / "1")
    right = {"1": bare(bert, tensors(ROWS))[0].tolist(), "2": bare(other, tensors(ROWS))[0].tolist()}
    wrong: list[Any] = []
    seen: set[str] = set()
    done = threading.Event()
    with serving(many, "--threads", 1) as server:

        def load() -> None:
            while not done.is_set():
                status, said = server.json("POST", "/v2/models/many/infer", asked(tensors(ROWS)))
                if status != 200 or said["outputs"][0]["data"] != right[said["model_version"]]:
                    wrong.append((status, said))
                seen.add(said.get("model_version", ""))

        with ThreadPoolExecutor(3) as pool:
            clients = [pool.submit(load) for _ in range(3)]
            try:
                put(other, many / "2")
                server.until("model_version", 2)
                server.until("models_held", 1)  # the first was released
            finally:
                done.set()
            for client in clients:
                client.result()
        assert (wrong, seen) == ([], {"1", "2"})
        assert server.json("GET", "/v2/models/many")[1]["versions"] == ["2"]
        assert server.json("GET", "/v2/models/many/versions/1")[0] == 404

        put(bert, tmp_path / "bad")
        known = json.loads((tmp_path / "bad" / GOLDEN_FILE).read_text())
        known["logits"][3][0] += 1
        (tmp_path / "bad" / GOLDEN_FILE).write_text(json.dumps(known))
        (tmp_path / "bad").rename(many / "3")
        server.until("reloads_total", 1, outcome="refused")
        status, said = server.json("POST", "/v2/repository/models/many/load", {})
        assert status == 409
        assert said["error"].startswith(
            "version 3 is refused, version 2 goes on: 3/model.onnx: does not answer as golden.json has it: off by 1 ("
        )
        assert logits(server) == right["2"]
        assert server.metric("model_version") == 2

        put(bert, many / "4")
        status, said = server.json("POST", "/v2/repository/models/many/load", {})
        assert (status, said) == (200, {"name": "many", "version": "4"})
        assert logits(server, "/v2/models/many/versions/4/infer") == right["1"]
        assert server.metric("reloads_total", outcome="loaded") == 2
        assert abs(server.metric("model_loaded_timestamp_seconds") - time.time()) < 60
    assert "version 3 is refused" in (tmp_path / "many.stderr").read_text()


@pytest.mark.full
def test_a_single_folder_is_loaded_again_when_it_is_replaced(bert: Path, other: Path, tmp_path: Path) -> None:
    put(bert, tmp_path / "many")
    with serving(tmp_path / "many", "--threads", 1) as server:
        assert logits(server) == bare(bert, tensors(ROWS))[0].tolist()
        assert server.json("POST", "/v2/repository/models/many/load")[0] == 200
        assert server.metric("reloads_total", outcome="loaded") == 0, "nothing was new"
        put(other, tmp_path / "new")
        (tmp_path / "many").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "many")
        server.until("reloads_total", 1, outcome="loaded")
        assert logits(server) == bare(other, tensors(ROWS))[0].tolist()


def test_two_processes_share_a_port_and_are_counted_together(bert: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    put(bert, many / "1")
    with serving(many, "--workers", 2, "--threads", 1) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: logits(server), range(60)))
        assert all(answer == answers[0] for answer in answers)
        server.until("requests_total", 60, endpoint="infer", status="200")  # counted when the answer is on its way
        assert server.metric("batch_rows_sum") == 60
        assert server.metric("models_held") == 2
        put(bert, many / "2")
        server.until("model_version", 2)  # the lowest of both
        assert server.metric("reloads_total", outcome="loaded") == 2
        children = subprocess.run(["pgrep", "-P", str(server.process.pid), "-f", "spawn_main"], capture_output=True, text=True, check=True)
        pids = [int(pid) for pid in children.stdout.split()]
        assert len(pids) == 2
        os.kill(pids[0], 9)
        server.until("models_held", 1)
        server.until("models_held", 2)
        assert logits(server) == answers[0]
        assert server.end() == 0
    assert "another is started" in (tmp_path / "many.stderr").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), 2, "holds no model.onnx, no onnx/model.onnx and no numbered folder with one"),
        (lambda folder: (folder / GOLDEN_FILE).unlink(), 2, "golden.json: cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), 2, "tokenizer.json cannot be read"),
        (lambda folder: (folder / "model.onnx").open("ab").write(b"\x00"), 2, "not the file that golden.json is of"),
    ],
)
def test_a_folder_that_is_not_whole_is_not_served(bert: Path, tmp_path: Path, change: Any, code: int, message: str) -> None:
    shutil.copytree(bert, tmp_path / "m")
    change(tmp_path / "m")
    done = command("serve", "m", "--port", 0, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_external_data_is_served_from_the_folder_and_from_nowhere_else(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "many")
    graph.save(graph.load(tmp_path / "many" / "model.onnx"), tmp_path / "many", external_above_bytes=1000)
    write_golden(tmp_path / "many")
    with serving(tmp_path / "many", "--threads", 1) as server:
        assert logits(server) == bare(bert, tensors(ROWS))[0].tolist()
    (tmp_path / "many" / "model.onnx_data").rename(tmp_path / "model.onnx_data")
    (tmp_path / "many" / "model.onnx_data").symlink_to(tmp_path / "model.onnx_data")
    done = command("serve", "many", "--port", 0, cwd=tmp_path)
    assert done.returncode == 2
    assert "outside its folder" in done.stderr


@pytest.mark.full
def test_what_the_command_line_cannot_have(bert: Path, tmp_path: Path) -> None:
    with serving(bert, "--threads", 1) as server:
        for words, message in (
            (("--port", server.port), "cannot be listened on"),
            (("--host", "nowhere.invalid"), "--host nowhere.invalid --port 8080: cannot be listened on"),
            (("--name", "a/b"), "--name a/b: must be letters, digits"),
        ):
            done = command("serve", bert, *words, cwd=tmp_path)
            assert done.returncode == 2
            assert message in re.sub(r"\s+", " ", done.stderr)


def test_without_the_extra_the_command_says_what_to_install(bert: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('starlette', 'uvloop') else find(name, *rest)\n"
        f"sys.argv = ['onnxsqueeze', 'serve', {str(bert)!r}]\n"
        "from onnxsqueeze.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "serve: starlette, uvloop not installed" in done.stderr
    assert "pip install 'onnxsqueeze[serve]'" in done.stderr


@pytest.mark.full
def test_a_host_beyond_this_machine_is_noted(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "m")
    with serving(tmp_path / "m", "--host", "0.0.0.0", "--threads", 1):  # noqa: S104  # what is tested
        pass
    assert "note: 0.0.0.0 is not loopback: whoever reaches it may use it" in (tmp_path / "m.stderr").read_text()


@pytest.mark.full
def test_a_hugging_face_folder_is_served(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "many")
    (tmp_path / "many" / "onnx").mkdir()
    (tmp_path / "many" / "model.onnx").rename(tmp_path / "many" / "onnx" / "model.onnx")
    assert artifact(tmp_path / "many").digest
    with serving(tmp_path / "many", "--threads", 1) as server:
        assert logits(server) == bare(bert, tensors(ROWS))[0].tolist()
