"""The store: whole or absent, found by causes, safe beside other processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from onnxsqueeze.errors import StageError, StoreError
from onnxsqueeze.stage import Changed
from onnxsqueeze.store import Store, exclusive, key_of, write_atomically


def fill(text: str = "weights"):  # type: ignore[no-untyped-def]  # a closure with the store's build signature
    def build(draft: Path, checkpoint: Path) -> Changed:
        assert list(draft.iterdir()) == []
        (draft / "model.onnx").write_text(text)
        (checkpoint / "epoch").write_text("1")
        return Changed(3, "weights", {"epochs": [1]})

    return build


def test_a_finished_artifact_is_found_with_what_it_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made, was_there = store.make("k", "onnx", {"kind": "x"}, fill())
    again, was_there_again = store.make("k", "onnx", {"kind": "x"}, fill("other"))
    assert (was_there, was_there_again) == (False, True)
    assert again.artifact == made.artifact
    assert again.changed == Changed(3, "weights", {"epochs": [1]})
    assert again.artifact.onnx.read_text() == "weights"


def test_a_failed_stage_leaves_nothing_but_its_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def build(draft: Path, checkpoint: Path) -> Changed:
        (draft / "half").write_text("half")
        (checkpoint / "epoch").write_text("1")
        raise StageError("no")

    with pytest.raises(StageError):
        store.make("k", "onnx", {}, build)
    assert store.find("k") is None
    assert not list((tmp_path / "drafts").iterdir())
    assert (tmp_path / "checkpoints" / "k" / "epoch").read_text() == "1"


def test_a_damaged_artifact_is_named_and_made_anew(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path, tell=said.append)
    made, _ = store.make("k", "onnx", {}, fill())
    made.artifact.onnx.write_text("weightz")
    again, was_there = store.make("k", "onnx", {}, fill())
    assert not was_there
    assert again.artifact.onnx.read_text() == "weights"
    assert "content" in said[0]


def _make_slowly(root: str) -> None:
    def build(draft: Path, checkpoint: Path) -> Changed:
        (draft / "model.onnx").write_text(str(os.getpid()))
        (checkpoint / "started").write_text(str(os.getpid()))
        time.sleep(60 if not (checkpoint / "second").exists() else 0)
        return Changed(1, "x")

    Store(Path(root)).make("k", "onnx", {}, build)


def _wait_for(file: Path) -> None:
    until = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < until, f"{file.name} did not appear"
        time.sleep(0.02)


def test_a_killed_process_leaves_its_lock_free_and_nothing_half_written(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_make_slowly, args=(str(tmp_path),))
    process.start()
    _wait_for(tmp_path / "checkpoints" / "k" / "started")
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store = Store(tmp_path)
    assert store.find("k") is None
    entry, was_there = store.make("k", "onnx", {}, fill())
    assert not was_there
    assert [p.name for p in entry.artifact.path.iterdir()] == ["model.onnx"]


def test_two_runs_make_an_artifact_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    (tmp_path / "checkpoints" / "k").mkdir(parents=True)
    (tmp_path / "checkpoints" / "k" / "second").touch()
    runs = [context.Process(target=_make_slowly, args=(str(tmp_path),)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    entry = Store(tmp_path).find("k")
    assert entry
    assert int(entry.artifact.onnx.read_text()) in {run.pid for run in runs}


def test_a_lock_within_a_lock_of_the_same_process_does_not_wait(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "l", waiting=lambda: pytest.fail("waits for itself")),
        exclusive(tmp_path / "l", waiting=lambda: pytest.fail("waits for itself")),
    ):
        pass


def test_a_key_changes_with_every_cause() -> None:
    causes = {"kind": "export", "settings": {"opset": 18}, "parent": "p"}
    assert key_of(causes) == key_of(json.loads(json.dumps(causes)))
    assert key_of(causes) != key_of({**causes, "settings": {"opset": 17}})
    assert key_of(causes) != key_of({**causes, "parent": "q"})


def test_a_measurement_is_found_by_its_causes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.keep_measurement("latency", {"a": 1}, b"12")
    assert store.measurement("latency", {"a": 1}) == b"12"
    assert store.measurement("latency", {"a": 2}) is None


def test_looks_count_other_sets_of_models_and_not_the_same_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert [store.looks("dev", name) for name in ("a", "b", "a", "c", "b")] == [0, 1, 0, 2, 1]


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]  # yields a Path
    """A real file system with 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this machine does not let us mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_clear_message_and_loses_nothing(small_disk: Path) -> None:
    store = Store(small_disk)
    store.make("kept", "onnx", {}, fill())

    def build(draft: Path, checkpoint: Path) -> Changed:
        (draft / "model.onnx").write_bytes(bytes(4_000_000))
        return Changed(1, "x")

    with pytest.raises(StoreError, match="the disk is full") as caught:
        store.make("big", "onnx", {}, build)
    assert "free some space" in str(caught.value)
    assert store.find("kept")
    assert store.find("big") is None
    store.make("small", "onnx", {}, fill())


def test_a_library_that_hides_a_full_disk_still_gives_the_root_cause(small_disk: Path) -> None:
    def build(draft: Path, checkpoint: Path) -> Changed:
        try:
            (draft / "model.onnx").write_bytes(bytes(4_000_000))
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None
        return Changed(1, "x")

    with pytest.raises(StoreError, match="the disk is full"):
        Store(small_disk).make("big", "onnx", {}, build)


def test_the_real_library_that_saves_weights_gives_the_root_cause(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def build(draft: Path, checkpoint: Path) -> Changed:
        save_file({"w": torch.zeros(1_000_000)}, draft / "model.safetensors")
        return Changed(1, "x")

    with pytest.raises(StoreError, match="the disk is full"):
        Store(small_disk).make("big", "checkpoint", {}, build)


def test_a_full_disk_below_an_array_gives_the_root_cause(small_disk: Path) -> None:
    import numpy as np

    def build(draft: Path, checkpoint: Path) -> Changed:
        np.save(checkpoint / "logits.npy", np.zeros(1_000_000))
        return Changed(1, "x")

    with pytest.raises(StoreError, match="the disk is full"):
        Store(small_disk).make("big", "checkpoint", {}, build)


def test_the_seconds_of_a_resumed_stage_count_what_was_saved_before(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def interrupted(draft: Path, checkpoint: Path) -> Changed:
        (checkpoint / "epoch").write_text("1")
        os.utime(checkpoint / "epoch", (time.time() + 100, time.time() + 100))
        raise StageError("killed")

    with pytest.raises(StageError):
        store.make("k", "onnx", {}, interrupted)
    entry, _ = store.make("k", "onnx", {}, fill())
    assert 100 <= entry.seconds < 110


def test_a_checkpoint_that_a_kill_left_behind_a_finished_artifact_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make("k", "onnx", {}, fill())
    (tmp_path / "checkpoints" / "k").mkdir()
    assert store.find("k")
    assert not (tmp_path / "checkpoints" / "k").exists()


def test_a_store_below_a_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="ONNXSQUEEZE_STORE"):
        Store(tmp_path / "file" / "store")


def test_an_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "x.json", b"1")
    write_atomically(tmp_path / "deep" / "x.json", b"2")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "deep").iterdir()] == [("x.json", b"2")]
