"""The store: finds an artifact or a measurement by what made it.

    <root>/artifacts/<key>/entry.json      what made it, how long it took, what changed, digest of files/
    <root>/artifacts/<key>/files/          the model folder, never written to again
    <root>/drafts/<key>/                   being written; only the holder of the key's lock touches it
    <root>/checkpoints/<key>/              a training stage's way back after a kill
    <root>/measurements/<kind>/<key>.bin   a measurement's bytes
    <root>/looks/<digest>                  one line per set of models whose dev figures were measured
    <root>/locks/<key>                     flock: freed by the kernel when its process dies

An artifact is whole or absent: it is made in drafts/, fsynced, and renamed. Two runs that want the same artifact
make it once: the second waits for the lock and then finds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsqueeze.artifact import Artifact, Format, folder_digest, make_durable
from onnxsqueeze.errors import SqueezeError, StoreError
from onnxsqueeze.stage import Changed

_NEARLY_FULL_BYTES = 1 << 20  # less than this free after a failed write: the disk is the cause, whatever the library said
# How libraries without OSError's errno say it: safetensors and torch pass on the system's text, numpy counts what it wrote.
_SAYS_FULL = re.compile(r"no space left|os error 28\b|quota exceeded|requested and \d+ written", re.IGNORECASE)
_ATTEMPT_FILE = ".attempt.json"  # in a checkpoint folder: when the process that works there began, and the seconds before it
_ABANDONED_S = 3600  # a temporary file this old belongs to no living process


def key_of(causes: Mapping[str, Any]) -> str:
    """The sha256 of everything that decides the bytes of a result, as canonical JSON."""
    return hashlib.sha256(json.dumps(causes, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A finished stage in the store."""

    artifact: Artifact
    changed: Changed
    seconds: float


class Store:
    """A folder of finished work, safe against kills and against other runs. Raises StoreError where it cannot be written."""

    def __init__(self, root: Path, *, tell: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self._tell = tell
        for name in ("artifacts", "drafts", "checkpoints", "measurements", "looks", "locks"):
            with writing(root, "create the store"):
                (root / name).mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root / "measurements")

    @staticmethod
    def default_root() -> Path:
        """``$ONNXSQUEEZE_STORE``, else ``onnxsqueeze`` in the user's cache folder."""
        named = os.environ.get("ONNXSQUEEZE_STORE")
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxsqueeze"

    def find(self, key: str) -> Entry | None:
        """The finished artifact of ``key``, its content checked against its digest, or None.

        A damaged one is set aside (and made anew by the caller), with a message.
        """
        if not self.has(key):
            return None
        entry = self.note(key)
        if entry is None or folder_digest(entry.artifact.path) != entry.artifact.digest:
            with self._lock(key):
                entry = self.note(key)
                if entry is None or folder_digest(entry.artifact.path) != entry.artifact.digest:  # still: no other run has made it anew
                    self._tell(f"store: {key[:12]} does not have the content it was stored with; it is made anew")
                    shutil.rmtree(self.root / "artifacts" / key, ignore_errors=True)
            return None
        if (self.root / "checkpoints" / key).exists():  # its process was killed between the rename and the end
            with self._lock(key):
                shutil.rmtree(self.root / "checkpoints" / key, ignore_errors=True)
        return entry

    def note(self, key: str) -> Entry | None:
        """What was noted of the artifact of ``key`` when it was finished; its files may be gone. None where the note is, or cannot be read."""
        folder = self.root / "artifacts" / key
        try:
            entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return Entry(
            Artifact(folder / "files", entry["format"], key, entry["digest"]),
            Changed(entry["changed"]["count"], entry["changed"]["what"], entry["changed"]["details"]),
            entry["seconds"],
        )

    def has(self, key: str) -> bool:
        """Whether ``key`` was finished; its content is not checked (see `find`)."""
        return (self.root / "artifacts" / key / "entry.json").is_file()

    def make(self, key: str, format_: Format, causes: Mapping[str, Any], build: Callable[[Path, Path], Changed]) -> tuple[Entry, bool]:
        """Return the artifact of ``key`` and whether it was found; otherwise ``build(draft, checkpoint)`` makes it.

        ``build`` fills the empty folder ``draft``; ``checkpoint`` keeps what it holds until the artifact is finished.
        """
        with self._lock(key):
            found = self.find(key)
            if found:
                return found, True
            draft = self.root / "drafts" / key
            checkpoint = self.root / "checkpoints" / key
            final = self.root / "artifacts" / key
            try:
                with writing(self.root, "write to the store"):
                    shutil.rmtree(draft, ignore_errors=True)
                    (draft / "files").mkdir(parents=True)
                    checkpoint.mkdir(parents=True, exist_ok=True)
                    before = _begin_attempt(checkpoint)
                    start = time.perf_counter()
                    changed = build(draft / "files", checkpoint)
                    seconds = round(before + time.perf_counter() - start, 3)
                    entry = {
                        "key": key,
                        "format": format_,
                        "digest": folder_digest(draft / "files"),
                        "seconds": seconds,
                        "changed": {"count": changed.count, "what": changed.what, "details": dict(changed.details)},
                        "causes": causes,
                    }
                    (draft / "entry.json").write_text(json.dumps(entry, indent=1), encoding="utf-8")
                    make_durable(draft)
                    if final.exists():  # a folder without entry.json: cannot come from here, but must not block
                        shutil.rmtree(final)
                    draft.rename(final)
                    _sync_folder(final.parent)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            return Entry(Artifact(final / "files", format_, key, str(entry["digest"])), changed, seconds), False

    def measurement(self, kind: str, causes: Mapping[str, Any]) -> bytes | None:
        """The bytes that were kept for these causes, or None."""
        try:
            return self._measurement_file(kind, causes).read_bytes()
        except FileNotFoundError:
            return None

    def keep_measurement(self, kind: str, causes: Mapping[str, Any], value: bytes) -> None:
        """Keep a measurement's bytes; a later one of the same causes replaces it."""
        write_atomically(self._measurement_file(kind, causes), value)

    def looks(self, dev_digest: str, models: str) -> int:
        """How many other sets of models had their figures on this dev split measured before; notes this set.

        ``models`` names the set (a digest): measuring the same set again is no new look.
        """
        file = self.root / "looks" / dev_digest
        with self._lock(f"looks-{dev_digest}"):
            seen = file.read_text(encoding="utf-8").split() if file.is_file() else []
            if models in seen:
                return seen.index(models)
            write_atomically(file, "".join(f"{line}\n" for line in [*seen, models]).encode())
            return len(seen)

    def _measurement_file(self, kind: str, causes: Mapping[str, Any]) -> Path:
        return self.root / "measurements" / kind / f"{key_of(causes)}.bin"

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        with exclusive(self.root / "locks" / key, waiting=lambda: self._tell(f"store: another run is making {key[:12]}; waiting for it")):
            yield


_held: dict[Path, int] = {}  # locks of this process: flock is per open file, so a nested request must not ask again


@contextlib.contextmanager
def exclusive(file: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an flock on ``file``; ``waiting`` is called once if another process has it. Reentrant within a process."""
    if file in _held:
        yield
        return
    with writing(file.parent, "lock"):
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        _held[file] = handle
        yield
    finally:
        _held.pop(file, None)
        os.close(handle)


def write_atomically(file: Path, content: bytes) -> None:
    """Write a whole file or nothing: a temporary neighbour, fsync, rename. Raises StoreError."""
    with writing(file.parent, "write"):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            Path(draft).chmod(0o644)
            Path(draft).replace(file)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


def _begin_attempt(checkpoint: Path) -> float:
    """Note that an attempt begins; the seconds that earlier, killed ones spent on what they saved."""
    note = checkpoint / _ATTEMPT_FILE
    before = 0.0
    if note.is_file():
        last = json.loads(note.read_text(encoding="utf-8"))
        saved = [file.stat().st_mtime for file in checkpoint.iterdir() if file != note]
        before = last["before_s"] + max(0.0, max(saved, default=0.0) - last["began"])
    write_atomically(note, json.dumps({"before_s": before, "began": time.time()}).encode())
    return float(before)


def _remove_abandoned(folder: Path) -> None:
    """Delete temporary files that killed processes left."""
    for file in folder.glob("*/.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > _ABANDONED_S:
                file.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Turn a full or read-only disk below ``folder`` into a StoreError, whatever way the library that wrote has of saying so."""
    try:
        yield
    except SqueezeError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if (
            code in (errno.ENOSPC, errno.EDQUOT)
            or _SAYS_FULL.search(str(error))
            or (code is None and _free_bytes(folder) < _NEARLY_FULL_BYTES)
        ):
            raise _full(folder, what) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StoreError(
                f"{folder}: cannot {what}: {os.strerror(code)}",
                remedy="name a folder that you may write to: ONNXSQUEEZE_STORE for the store, --out for the results",
            ) from error
        raise


def _full(folder: Path, what: str) -> StoreError:
    return StoreError(
        f"{folder}: cannot {what}: the disk is full",
        remedy="free some space, or name a folder on another disk: ONNXSQUEEZE_STORE for the store, --out for the results; finished stages are kept",
    )


def _free_bytes(folder: Path) -> int:
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    return shutil.disk_usage(existing).free
