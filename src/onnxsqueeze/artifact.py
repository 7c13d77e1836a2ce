"""A model on disk, named by its content.

A *checkpoint* is a Hugging Face folder: config.json, model.safetensors, tokenizer.json.
An *onnx* artifact is a deployable folder: model.onnx (with model.onnx_data beside it where the weights are
external), tokenizer.json, config.json.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["checkpoint", "onnx"]

MODEL_FILE = "model.onnx"
MODEL_SUFFIX = ".onnx"
EXTERNAL_DATA_FILE = "model.onnx_data"  # the name that transformers.js and optimum look for
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")

TRITON_CONFIG_FILE = "config.pbtxt"
# In a target's folder, in a Hugging Face one, in a model of a Triton repository; with external data its files lie in a folder of the model's name.
_PLACES = (MODEL_FILE, f"onnx/{MODEL_FILE}", f"1/{MODEL_FILE}", f"1/{MODEL_FILE}/{MODEL_FILE}")


@dataclass(frozen=True)
class Artifact:
    """A finished, read-only model folder.

    ``key`` names the causes (what made it), ``digest`` the content (sha256 over its files).
    """

    path: Path
    format: Format
    key: str
    digest: str

    @property
    def onnx(self) -> Path:
        """The .onnx file of an *onnx* artifact."""
        return self.path / MODEL_FILE


def models_in(folder: Path) -> list[Path]:
    """The .onnx in the folder of a model; in a Triton repository, those of its models, by name."""
    here = [folder / place for place in _PLACES if (folder / place).is_file()]
    if here:
        return here[:1]
    return [file for config in sorted(folder.glob(f"*/{TRITON_CONFIG_FILE}")) for file in models_in(config.parent)]


def file_sha256(path: Path, appended: bytes = b"") -> str:
    """The sha256 of one file, read in pieces, and of what is ``appended`` to it."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
    digest.update(appended)
    return digest.hexdigest()


def folder_files(folder: Path) -> list[Path]:
    """Every file below ``folder``, sorted by its relative name."""
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix())


def folder_digest(folder: Path) -> str:
    """One sha256 over names and contents of all files below ``folder``."""
    total = hashlib.sha256()
    for path in folder_files(folder):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def copy_side_files(parent: Path, out: Path) -> None:
    """Copy what belongs beside the weights (configuration, tokenizer) from one model folder to another.

    Files that ``out`` has already are left alone.
    """
    for name in SIDE_FILES:
        if (parent / name).is_file() and not (out / name).exists():
            shutil.copyfile(parent / name, out / name)


def make_durable(folder: Path) -> None:
    """Fsync every file and folder of ``folder``, so that a rename of it never exposes half-written content."""
    for path in [*folder_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
