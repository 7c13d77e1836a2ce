"""Files of rows: CSV, TSV, JSONL and Parquet become (line, fields), or one error that names every faulty line (up to five).

TSV is GLUE's: one row a line, fields between tabs, quotes literal. CSV has quotes. Both are UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxsqueeze.errors import DataError, nearest

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_MOST_FAULTS = 5
_MEND = "mend these lines, or fetch the file again"

# Where a row stands ("12" = line 12) and its fields in the order in which the columns were asked for.
Record = tuple[int, tuple[Any, ...]]


class Faults:
    """Collects what is wrong with one file; the fifth fault, or `raise_any`, raises them all as one DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []

    def add(self, line: int | None, message: str) -> None:
        """Note a fault. Raises DataError when there are five."""
        self.found.append(f"{self.path}:{line}: {message}" if line else f"{self.path}: {message}")
        if len(self.found) == _MOST_FAULTS:
            self.found.append("… and perhaps more below; reading stopped here")
            self.raise_any()

    def raise_any(self, remedy: str = _MEND) -> None:
        """Raise DataError where a fault was noted."""
        if self.found:
            raise DataError("\n".join(self.found), remedy=remedy)


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises DataError where it is missing, unreadable or empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", remedy="check the path and its permissions") from error
    if not data.strip():
        raise DataError(f"{path}: the file is empty", remedy="fetch or write it again")
    return data


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out. Raises DataError where it is missing, empty or not UTF-8."""
    faults = Faults(path)
    texts = [_text(line, number, faults) for number, line in enumerate(_lines(read_bytes(path)), 1)]
    faults.raise_any()
    return [text for text in texts if text and text.strip()]


def read_table(path: Path, data: bytes, columns: Sequence[str], faults: Faults) -> Iterator[Record]:
    """The rows of a file by its ending. Raises DataError for an unknown ending, a missing column, a damaged file."""
    if path.suffix == ".tsv":
        return read_tsv(data, columns, faults)
    if path.suffix == ".csv":
        return _read_csv(data, columns, faults)
    if path.suffix == ".jsonl":
        return _read_jsonl(data, columns, faults)
    if path.suffix == ".parquet":
        return _read_parquet(data, columns, faults)
    raise DataError(f"{path}: unknown ending {path.suffix!r}{nearest(path.suffix, SUFFIXES)}", remedy=f"use one of {', '.join(SUFFIXES)}")


def read_tsv(data: bytes, columns: Sequence[str | int], faults: Faults, width: int | None = None) -> Iterator[Record]:
    """Rows of a TSV. ``width`` is given where the file has no header: the number of fields; ``columns`` are then positions."""
    lines = _lines(data)
    first = 1
    if width is None:
        header = _text(lines[0], 1, faults)
        faults.raise_any()
        names = (header or "").split("\t")
        places = _places([str(c) for c in columns], names, faults)
        width, first, lines = len(names), 2, lines[1:]
    else:
        places = [int(c) for c in columns]
    for number, line in enumerate(lines, first):
        text = _text(line, number, faults)
        if text is None:
            continue
        fields = text.split("\t")
        if len(fields) != width:
            cut = "; the file looks cut off here" if number == len(lines) + first - 1 and len(fields) < width else ""
            faults.add(number, f"must have {width} fields between tabs, got {len(fields)}{cut}")
            continue
        yield number, tuple(fields[place] for place in places)


def _read_csv(data: bytes, columns: Sequence[str], faults: Faults) -> Iterator[Record]:
    texts = [_text(line, number, faults) for number, line in enumerate(_lines(data), 1)]
    faults.raise_any()
    reader = csv.reader(io.StringIO("\n".join(text for text in texts if text is not None), newline=""), strict=True)
    try:
        names = next(reader)
        places = _places(columns, names, faults)
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) != len(names):
                cut = "; the file looks cut off here" if reader.line_num == len(texts) and len(fields) < len(names) else ""
                faults.add(start, f"must have {len(names)} fields, got {len(fields)}{cut}")
            else:
                yield start, tuple(fields[place] for place in places)
            start = reader.line_num + 1
    except csv.Error as error:
        faults.add(reader.line_num, f"is no CSV: {error} (a quote that is never closed?)")
        faults.raise_any()


def _read_jsonl(data: bytes, columns: Sequence[str], faults: Faults) -> Iterator[Record]:
    for number, line in enumerate(_lines(data), 1):
        text = _text(line, number, faults)
        if text is None:
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            faults.add(number, f"is no JSON: {error}")
            continue
        if not isinstance(row, dict):
            faults.add(number, f"must be a JSON object, got {text[:40]!r}")
            continue
        missing = [column for column in columns if column not in row]
        if missing:
            faults.add(number, f"has no key {missing[0]!r}{nearest(missing[0], list(row))}")
            continue
        yield number, tuple(row[column] for column in columns)


def _read_parquet(data: bytes, columns: Sequence[str], faults: Faults) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        _places(columns, file.schema_arrow.names, faults)
        table = file.read(columns=list(dict.fromkeys(columns)))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{faults.path}: is no readable Parquet file: {error}", remedy="write or fetch it again") from error
    values = [table.column(column).to_pylist() for column in columns]
    yield from enumerate(zip(*values, strict=True), 1)


def _lines(data: bytes) -> list[bytes]:
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def _text(line: bytes, number: int, faults: Faults) -> str | None:
    if b"\0" in line:
        faults.add(number, "holds a NUL byte: the file is damaged, or is UTF-16")
        return None
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        faults.add(number, f"is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
        return None


def _places(columns: Sequence[str], names: Sequence[str], faults: Faults) -> list[int]:
    for column in columns:
        if column not in names:
            faults.add(1, f"has no column {column!r}{nearest(column, list(names))}")
    faults.raise_any(f"its columns are: {', '.join(names)}")
    return [list(names).index(column) for column in columns]
