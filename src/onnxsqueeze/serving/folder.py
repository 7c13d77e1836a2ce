"""Where the versions of a model lie: one deployed folder, a target's folder below a run, or a folder of numbered versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxsqueeze.artifact import EXTERNAL_DATA_FILE, MODEL_FILE
from onnxsqueeze.errors import UsageError

_LOADED = (MODEL_FILE, EXTERNAL_DATA_FILE, "golden.json", "tokenizer.json", "config.json")  # the files that a version is made of


@dataclass(frozen=True)
class Place:
    """One version: its .onnx, the folder of what lies beside it, and its number (1 where it has none).

    ``stamp`` tells a file that was replaced: inode, size and time of each file that is loaded.
    """

    onnx: Path
    folder: Path
    version: int
    stamp: tuple[tuple[str, int, int, int], ...]


def find(folder: Path) -> Place | None:
    """The version to serve: the folder's own model, else that of its highest numbered folder that holds one; None where there is none.

    A folder that is being written has no model.onnx or is refused when it is loaded; write it under another name and rename it.
    """
    own = _place(folder, 1)
    if own:
        return own
    try:
        numbers = sorted(
            (int(path.name) for path in folder.iterdir() if path.name.isdecimal() and not path.name.startswith("0")), reverse=True
        )
    except OSError:
        return None
    return next((place for number in numbers if (place := _place(folder / str(number), number))), None)


def require(folder: Path) -> Place:
    """As `find`. Raises UsageError where there is nothing to serve."""
    place = find(folder)
    if place is None:
        raise UsageError(
            f"{folder}: holds no {MODEL_FILE}, no onnx/{MODEL_FILE} and no numbered folder with one",
            remedy="name a folder of `onnxsqueeze deploy`, a target's folder below a run, or a folder of versions (1/, 2/, …)",
        )
    return place


def _place(folder: Path, version: int) -> Place | None:
    onnx = next((file for file in (folder / MODEL_FILE, folder / "onnx" / MODEL_FILE) if file.is_file()), None)
    return None if onnx is None else Place(onnx, folder, version, _stamp(onnx.parent, folder))


def _stamp(*folders: Path) -> tuple[tuple[str, int, int, int], ...]:
    found = {}
    for folder in folders:
        for name in _LOADED:
            try:
                facts = (folder / name).stat()
            except OSError:  # is not there, or is gone again
                continue
            found[str(folder / name)] = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return tuple((name, *facts) for name, facts in sorted(found.items()))
