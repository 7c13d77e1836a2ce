"""`onnxsqueeze inspect`: what an .onnx file is, and what it says of where it comes from. Nothing of it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxsqueeze import graph
from onnxsqueeze.artifact import MODEL_FILE, file_sha256, models_in
from onnxsqueeze.errors import ModelError
from onnxsqueeze.provenance import KEY, RECIPE_KEY, Provenance, decode, recipe_of
from onnxsqueeze.text import note
from onnxsqueeze.text.note import TextNote


@dataclass(frozen=True)
class Inspected:
    """One file. ``values`` are ("input" | "output", name, type, dims), a dim by its name where it is free; ``files`` (name, bytes, sha256), the .onnx first.

    ``provenance`` is None where the file carries none; ``recipe`` is then empty. ``text`` is what a file with a tokenizer in its graph says of that.
    """

    files: tuple[tuple[str, int, str], ...]
    values: tuple[tuple[str, str, str, tuple[str, ...]], ...]
    ir_version: int
    opsets: dict[str, int]
    operators: dict[str, int]
    provenance_bytes: int
    provenance: Provenance | None
    recipe: str
    text: TextNote | None = None


def file_in(path: Path) -> Path:
    """The .onnx that ``path`` names: itself, or the one in that folder. Raises ModelError."""
    if not path.is_dir():
        return path
    found = models_in(path)
    if not found:
        raise ModelError(f"{path}: there is no {MODEL_FILE} in this folder", remedy="name an .onnx file, or the folder of one target")
    if len(found) > 1:
        raise ModelError(f"{path}: holds {len(found)} models", remedy=f"name one of them, e.g. {found[0]}")
    return found[0]


def inspect(path: Path) -> Inspected:
    """What the file at ``path`` is. Raises ModelError where it is no ONNX, where its external data is missing or outside its folder, or its provenance is damaged."""
    file = file_in(path)
    model = graph.read(file)
    parts = graph.files_of(file)
    for part in parts[1:]:
        if not part.is_file():
            raise ModelError(
                f"{file}: its weights are in {part.name}, which is not there", remedy="copy the .onnx with all files that lie beside it"
            )
    notes = [entry for entry in model.metadata_props if entry.key in (KEY, RECIPE_KEY)]
    provenance, text = decode(model, file.name) if any(entry.key == KEY for entry in notes) else (None, "")
    return Inspected(
        files=tuple((part.name, part.stat().st_size, file_sha256(part)) for part in parts),
        values=tuple((side, name, kind, tuple(str(dim) for dim in dims)) for side, name, kind, dims in graph.values(model)),
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        operators=graph.operators(file),
        provenance_bytes=sum(_field_bytes(entry.ByteSize()) for entry in notes),
        provenance=provenance,
        recipe=recipe_of(provenance, text, file.name) if provenance else "",
        text=note.read(model, file.name),
    )


def recipe(path: Path) -> str:
    """The recipe that the file was made by, as YAML. Raises ModelError as `inspect` does, and where the file carries no provenance."""
    file = file_in(path)
    provenance, text = decode(graph.read(file), file.name)
    return recipe_of(provenance, text, file.name)


def lines(found: Inspected) -> list[str]:
    """What `onnxsqueeze inspect` prints."""
    rows = [("file", f"{name}, {size:,} bytes, sha256 {digest}") for name, size, digest in found.files]
    rows += [(side, f"{name} {kind} [{', '.join(dims)}]") for side, name, kind, dims in found.values]
    rows += [
        ("version", f"IR {found.ir_version}; opset " + ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())),
        ("operators", ", ".join(f"{n} {name}" for name, n in sorted(found.operators.items(), key=lambda item: (-item[1], item[0])))),
    ]
    if found.text:
        tells = f"at most {found.text.max_length} tokens; {found.text.said()} (sha256 {found.text.tokenizer_sha256})"
        rows += [("tokenizer", f"in the graph, for sessions with onnxruntime-extensions {found.text.onnxruntime_extensions}; {tells}")]
    return [*_columns(rows), "", *_said(found)]


def _said(found: Inspected) -> list[str]:
    made = found.provenance
    if made is None:
        return ["provenance: none; the file was not written by `onnxsqueeze run`, or by a version before it wrote any"]
    metric = made.metric
    rows = [
        (
            "made by",
            f"onnxsqueeze {made.onnxsqueeze}, recipe {made.recipe} (sha256 {made.recipe_sha256}), target {made.target}, seed {made.seed}",
        ),
        *(("set", change) for change in (*made.overrides, *made.options)),
        ("stages", " → ".join(made.stages)),
        ("model", f"{made.model} (sha256 {made.model_sha256}), licence {made.license or 'not known'}"),
        ("task", made.task),
        *((row.role, f"{row.split}, {row.n:,} rows (sha256 {row.sha256})") for row in made.rows),
        (
            "metric",
            f"{metric.name} {metric.value:.4f} (95 %: {metric.ci95[0]:.4f}–{metric.ci95[1]:.4f}) on {metric.split}, {metric.n:,} rows"
            if metric
            else "was not measured",
        ),
        ("backend", f"{made.backend}{f', measured with {made.runtime}' if made.runtime else ''}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
    ]
    return [f"provenance ({found.provenance_bytes:,} bytes of the .onnx):", *_columns(rows)]


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {name:<10} {text}" for name, text in rows]


def _field_bytes(size: int) -> int:
    """Bytes that an entry of ``size`` bytes takes in its message: one for the tag (field 14), and its length in groups of 7 bits."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size
