"""The folder that a run leaves: a folder per target, whole or absent, and nothing of runs before that is no longer true."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from onnxsqueeze.artifact import MODEL_SUFFIX, file_sha256, folder_files, make_durable
from onnxsqueeze.errors import UsageError
from onnxsqueeze.results import RESULTS_FILE
from onnxsqueeze.store import write_atomically, writing


def check_writable(out: Path) -> None:
    """Make ``out`` and write to it once. Raises UsageError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"output folder {out}: cannot be written to: {error.strerror}", remedy="name another with --out DIR") from error


def publish(source: Path, folder: Path, beside: Mapping[str, bytes], provenance: bytes = b"") -> None:
    """Put a copy of a model folder at ``folder`` with the files ``beside`` it, whole or not at all; ``provenance`` is appended to each .onnx.

    Raises StoreError where the disk is full or read-only.
    """
    if folder.is_dir() and _is_copy(folder, source, beside, provenance):
        return
    with whole(folder) as draft:
        for file in folder_files(source):
            copy = draft / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            if file.suffix == MODEL_SUFFIX:
                with copy.open("ab") as handle:
                    handle.write(provenance)
        for name, content in beside.items():
            (draft / name).write_bytes(content)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of ``folder`` at the end, or vanishes where something is raised. Raises StoreError where the disk is full."""
    with writing(folder.parent, f"write {folder.name}"):
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            draft.chmod(0o755)
            yield draft
            make_durable(draft)
            if folder.exists():
                shutil.rmtree(folder)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def put_samples(folder: Path, files: Mapping[str, bytes]) -> None:
    """Leave exactly ``files`` (by their path below ``folder``'s parent) in ``folder``. Raises StoreError where the disk is full."""
    with writing(folder.parent, f"write {folder.name}"):
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if f"{folder.name}/{old.name}" not in files:
                old.unlink()
        for name, content in files.items():
            write_atomically(folder.parent / name, content)


def _is_copy(folder: Path, source: Path, beside: Mapping[str, bytes], provenance: bytes) -> bool:
    there = {file.relative_to(folder).as_posix(): file_sha256(file) for file in folder_files(folder)}
    wanted = {
        file.relative_to(source).as_posix(): file_sha256(file, provenance if file.suffix == MODEL_SUFFIX else b"")
        for file in folder_files(source)
    }
    return there == wanted | {name: hashlib.sha256(content).hexdigest() for name, content in beside.items()}


def remove_stale(out: Path, keep: Iterable[str]) -> None:
    """Delete target folders of the record that lies here, except ``keep``, and what killed runs left half-written.

    Only under the lock of ``out``: no other run is writing here.
    """
    try:
        old = [str(target["name"]) for target in json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))["targets"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        old = []
    kept = set(keep)
    with writing(out, "remove what an earlier run left"):
        for name in set(old) - kept:
            if (out / name / "model.onnx").is_file():
                shutil.rmtree(out / name)
        for name in {*old, *kept, RESULTS_FILE, "report.md", "report.html"}:
            for left in out.glob(f".{name}-*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
