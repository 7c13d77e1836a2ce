"""Where a published .onnx comes from, written into the file itself: two entries of its ``metadata_props``.

``onnxsqueeze`` is JSON that a person can read in any viewer; ``onnxsqueeze.recipe`` is the recipe's text, deflated, in base64. Both are
appended to the bytes of the measured file, which a protobuf parser takes for one message: the graph and the weights stay as they were, byte
for byte. No absolute path, host or user name stands there.

Source: the Protocol Buffers encoding guide, "Last One Wins" and "Packed Repeated Fields" (concatenated messages are merged, repeated fields appended).
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxsqueeze.document import Document
from onnxsqueeze.errors import ModelError, SqueezeError, without_paths

if TYPE_CHECKING:
    import onnx

KEY = "onnxsqueeze"
RECIPE_KEY = "onnxsqueeze.recipe"
_MOST_RECIPE_BYTES = 1 << 20  # nobody writes a longer recipe: a deflated text that goes on is not one


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)  # ignore: a later version may say more


class Rows(_Part):
    """One split of the task, by digest."""

    split: str
    role: str = Field(description="train, selection or dev")
    n: int
    sha256: str


class Score(_Part):
    """The primary metric on the first dev split, measured through the file; ``ci95`` is its 95 % interval."""

    name: str
    split: str
    value: float
    ci95: tuple[float, float]
    n: int


class Provenance(_Part):
    """What one file was made of, with what, and what it scored. ``overrides`` are as `--set` had them, ``options`` what other options put into the recipe."""

    schema_: Literal[1] = Field(1, alias="schema")
    onnxsqueeze: str
    target: str
    backend: str
    stages: tuple[str, ...] = Field(description="Ids of the chain from the start to this file, skipped ones left out")
    recipe: str
    recipe_sha256: str
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    model: str
    model_sha256: str
    license: str | None = None
    task: str
    rows: tuple[Rows, ...]
    seed: int
    metric: Score | None = Field(None, description="null where the file was not measured")
    runtime: str | None = None
    versions: dict[str, str]


def encode(provenance: Provenance, recipe_text: str) -> bytes:
    """The bytes to append to an .onnx file: the same for the same arguments."""
    import onnx

    text = without_paths(recipe_text).encode()
    note = onnx.ModelProto()
    for key, value in (
        (KEY, json.dumps(provenance.model_dump(mode="json", by_alias=True, exclude_none=True), ensure_ascii=False, separators=(",", ":"))),
        (RECIPE_KEY, base64.b64encode(_deflated(text)).decode()),
    ):
        note.metadata_props.add(key=key, value=value)
    return bytes(note.SerializeToString())


def decode(model: onnx.ModelProto, name: str) -> tuple[Provenance, str]:
    """(what an .onnx file says of itself, the text of its recipe). ``name`` is the file's in messages.

    Raises ModelError where it says nothing, or what cannot be read.
    """
    found = {entry.key: entry.value for entry in model.metadata_props}
    if KEY not in found:
        raise ModelError(
            f"{name}: carries no provenance of onnxsqueeze",
            remedy="name a target's .onnx as `onnxsqueeze run` writes it; in an old output folder the same run again puts it in",
        )
    try:
        text = _inflated(base64.b64decode(found[RECIPE_KEY], validate=True)).decode()
        return Provenance.model_validate_json(found[KEY]), text
    except (KeyError, ValidationError, UnicodeDecodeError, binascii.Error, zlib.error) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise ModelError(
            f"{name}: its provenance cannot be read: {reason}",
            remedy="write the file again with `onnxsqueeze run`, or read it as plain ONNX",
        ) from error


def recipe_of(provenance: Provenance, text: str, name: str) -> str:
    """The recipe of a file as YAML: its own text, or, where something was put into it from the command line, written anew with that in it.

    Raises ModelError where they do not fit each other. ``name`` is the file's in messages.
    """
    changes = (*provenance.overrides, *provenance.options)
    if not changes:
        return text
    import yaml

    try:
        document = Document.read(text, f"{name}: recipe")
        document.override_all(changes)
    except SqueezeError as error:
        raise ModelError(
            f"{name}: its recipe cannot be put together: {error.message}", remedy="write the file again with `onnxsqueeze run`"
        ) from error
    return yaml.safe_dump(document.data, sort_keys=False, allow_unicode=True, width=120)


def as_options(values: dict[str, Any]) -> tuple[str, ...]:
    """``{"seed": 3}`` → ``("seed=3",)``: values in the spelling of `--set`; those of None are left out."""
    return tuple(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None)


def added_bytes(content: bytes) -> dict[Literal["plain", "gzip", "zstd"], int]:
    """What appending ``content`` adds to a file, and to the same file after gzip -9 and zstd: the last two to some hundred bytes, as it is compressed alone."""
    import pyarrow

    return {
        "plain": len(content),
        "gzip": len(_deflated(content)),
        "zstd": pyarrow.Codec("zstd", compression_level=12).compress(content).size,
    }


def _deflated(content: bytes) -> bytes:
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    return squeezed.compress(content) + squeezed.flush()


def _inflated(content: bytes) -> bytes:
    opened = zlib.decompressobj(-zlib.MAX_WBITS)
    text = opened.decompress(content, _MOST_RECIPE_BYTES)
    if not opened.eof:
        raise zlib.error(f"the recipe is cut off, or longer than {_MOST_RECIPE_BYTES:,} bytes")
    return text
