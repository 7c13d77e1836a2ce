"""What stays the same between commands on one machine: which Python runs which backend. From the command line, else from a small file.

# $ONNXSQUEEZE_CONFIG, else $XDG_CONFIG_HOME/onnxsqueeze/config.yaml (~/.config where that is not set)
pythons:
  openvino: ~/venvs/openvino/bin/python
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from onnxsqueeze import backends
from onnxsqueeze.backends import Backends
from onnxsqueeze.document import Document
from onnxsqueeze.errors import Fault, RecipeError, UsageError, nearest

_KEY = "pythons"


def load(options: Sequence[str] = ()) -> Backends:
    """The registry that the user's file and ``options`` (``BACKEND=PATH``, as --python has them) ask for; options win.

    Raises UsageError for an option, and RecipeError with all faults of the file, that names no backend or no program.
    """
    return Backends({**_from_file(), **dict(map(_option, options))})


def file() -> Path:
    """Where the user's file would be."""
    named = os.environ.get("ONNXSQUEEZE_CONFIG")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "onnxsqueeze" / "config.yaml"


def _option(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise UsageError(f"--python {text}: must be BACKEND=PATH", remedy="for example --python openvino=VENV/bin/python")
    try:
        backend = backends.get(name).name
    except UsageError as error:
        raise UsageError(f"--python {text}: {error.message}", remedy=error.remedy) from error
    python = str(Path(path).expanduser())
    wrong = _wrong(python)
    if wrong:
        raise UsageError(f"--python {text}: {wrong}", remedy="name the python program of an environment: VENV/bin/python")
    return backend, python


def _from_file() -> Mapping[str, str]:
    source = file()
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        if "ONNXSQUEEZE_CONFIG" in os.environ:
            raise UsageError(f"{source}: no such file", remedy="unset $ONNXSQUEEZE_CONFIG, or let it name a file") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: cannot be read: {error}", remedy="let $ONNXSQUEEZE_CONFIG name a YAML file") from error
    document = Document.read(text, str(source))
    pythons: dict[str, str] = {}
    faults = [*document.faults, *_faults(document, source.parent, pythons)]
    if faults:
        raise RecipeError(faults)
    return pythons


def _faults(document: Document, folder: Path, pythons: dict[str, str]) -> Iterator[Fault]:
    """The faults of the file; what is right goes into ``pythons``. Relative paths begin in ``folder``, where the file lies."""
    data = document.data if document.data is not None else {}
    if not isinstance(data, dict):
        yield document.fault((), f"must be a mapping with the key {_KEY!r}, got {data!r}")
        return
    for key in data.keys() - {_KEY}:
        yield document.fault((key,), f"unknown key{nearest(key, [_KEY])}")
    given = data.get(_KEY) or {}
    if not isinstance(given, dict):
        yield document.fault((_KEY,), f"must map backends to Python programs, got {given!r}")
        return
    for name, path in given.items():
        place = (_KEY, name)
        try:
            backend = backends.get(name).name
        except UsageError as error:
            yield document.fault(place, error.message)
            continue
        if not isinstance(path, str):
            yield document.fault(place, f"must be the path of a Python program, got {path!r}")
            continue
        python = str(folder / Path(path).expanduser()) if "/" in path else path
        wrong = _wrong(python)
        if wrong:
            yield document.fault(place, f"{path}: {wrong}; name the python program of an environment: VENV/bin/python")
        pythons[backend] = python


def _wrong(python: str) -> str | None:
    """Why this cannot be started, or None."""
    path = Path(python)
    if shutil.which(python):
        return None
    if path.is_dir():
        inside = path / "bin" / "python"
        return f"is a folder{f'; did you mean {inside}?' if inside.exists() else ''}"
    return "is not a program" if path.exists() else "no such file"
