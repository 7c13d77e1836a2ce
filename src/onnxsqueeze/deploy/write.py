"""The kinds of deployed folders, and how one is written: whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onnxsqueeze.artifact import MODEL_FILE
from onnxsqueeze.backends import HERE, Backends
from onnxsqueeze.deploy import text_model, triton
from onnxsqueeze.deploy.card import folder_readme, model_card
from onnxsqueeze.deploy.source import Source
from onnxsqueeze.errors import ModelError, UsageError, nearest, without_paths
from onnxsqueeze.nn.checkpoint import read_config
from onnxsqueeze.nn.family import FAMILIES
from onnxsqueeze.output import whole
from onnxsqueeze.results import RESULTS_FILE

Files = Mapping[str, Path | bytes]  # name in the deployed folder → content, or the file that it is a copy of

_CONFIG, _TOKENIZER_CONFIG, _README = "config.json", "tokenizer_config.json", "README.md"
_TOKENIZER_NOTES = (_TOKENIZER_CONFIG, "special_tokens_map.json")
_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")  # keys in which transformers noted a folder


def deploy(source: Source, kind: str, out: Path, backends: Backends = HERE, *, text: bool = False) -> tuple[str, ...]:
    """Write a deployed folder of ``kind`` at ``out``, with ``text`` a model that takes text, too; the names of its files.

    Raises UsageError where the kind is unknown, takes no text, or ``out`` holds anything, ModelError where the kind cannot hold this model,
    StoreError where the disk is full; with ``text`` also what `text_model.make` raises, for Triton what `triton.files` does.
    """
    make = KINDS.get(kind)
    if make is None:
        raise UsageError(f"--to {kind}: unknown kind of folder{nearest(kind, list(KINDS))}", remedy=f"name one of {', '.join(KINDS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: is there already, and not empty", remedy="name a new folder, or remove this one first")
    if text and kind == "triton":
        raise UsageError(
            "--text: Triton's ONNX Runtime has no operators of onnxruntime-extensions",
            remedy="leave --text out: clients tokenize with the tokenizer.json that lies beside the model",
        )
    files = make(replace(source, text=text_model.make(source)) if text else source, backends)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written to: {error.strerror}", remedy="name another folder") from error
    with whole(out) as draft:
        for name, content in files.items():
            place = draft / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_bytes(content)
    return tuple(files)


def _folder(source: Source, _: Backends) -> Files:
    """The model, its tokenizer and configuration, golden answers and record, all at the top."""
    files: dict[str, Path | bytes] = source.files() | _without_paths(source)
    files[RESULTS_FILE] = source.results(files, MODEL_FILE).to_json().encode()
    files[_README] = folder_readme(source, MODEL_FILE).encode()
    return files


def _hugging_face(source: Source, _: Backends) -> Files:
    """As the Hub's users expect it: onnx/model.onnx, which optimum and transformers.js find, and what AutoConfig and AutoTokenizer read at the top."""
    _require_known_type(source)
    model = f"onnx/{MODEL_FILE}"
    files: dict[str, Path | bytes] = source.files("onnx") | _without_paths(source) | _tokenizer_notes(source)
    files[_CONFIG] = _config(source)
    files[RESULTS_FILE] = source.results(files, model).to_json().encode()
    files[_README] = model_card(source, model).encode()
    return files


def _triton(source: Source, backends: Backends) -> Files:
    """A model repository of Triton's; see `onnxsqueeze.deploy.triton`."""
    return triton.files(source, _without_paths(source), backends)


KINDS: Mapping[str, Callable[[Source, Backends], Files]] = {"folder": _folder, "hf": _hugging_face, "triton": _triton}


def _without_paths(source: Source) -> dict[str, Path | bytes]:
    """The JSON files in which older versions of transformers left where a model lay on somebody's machine, without that."""
    changed: dict[str, Path | bytes] = {}
    for name in (_CONFIG, _TOKENIZER_CONFIG):
        if name not in source.beside:
            continue
        held = json.loads((source.folder / name).read_text(encoding="utf-8"))
        kept = {
            key: value for key, value in held.items() if not (key in _PLACES and isinstance(value, str) and without_paths(value) != value)
        }
        if kept != held:
            changed[name] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def _config(source: Source) -> bytes:
    """config.json with the labels both ways and the class that loads it, which transformers leaves out where they are its own defaults."""
    config = read_config(source.folder)
    config.pop("_name_or_path", None)
    if not source.embeds:
        labels = source.labels or tuple(f"LABEL_{i}" for i in range(len(source.golden.logits[0])))
        config |= {"id2label": {str(i): name for i, name in enumerate(labels)}, "label2id": {name: i for i, name in enumerate(labels)}}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _require_known_type(source: Source) -> None:
    kind = read_config(source.folder)["model_type"]
    if kind not in FAMILIES:  # each of these is one of transformers' own; to ask it would take five seconds
        raise ModelError(
            f"{source.target.name}: `--to hf`: transformers has no model of type {kind!r}, so nothing of Hugging Face's could load it",
            remedy="use `--to folder`: it loads in a plain ONNX Runtime session",
        )


def _tokenizer_notes(source: Source) -> dict[str, Path | bytes]:
    """What AutoTokenizer reads beside tokenizer.json: the model's own files, or, where it came without, as transformers writes them."""
    missing = [name for name in _TOKENIZER_NOTES if name not in source.beside]
    if not missing:
        return {}
    import transformers

    hf: Any = transformers  # this function has no types
    tokenizer = hf.AutoTokenizer.from_pretrained(str(source.folder))
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        return {name: (Path(place) / name).read_bytes() for name in missing if (Path(place) / name).is_file()}
