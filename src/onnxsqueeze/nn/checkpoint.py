"""Checkpoint folders: read without running anything from them, written so that equal weights are equal bytes."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze.artifact import copy_side_files
from onnxsqueeze.errors import ModelError
from onnxsqueeze.nn import structure
from onnxsqueeze.nn.family import Family, family_of
from onnxsqueeze.tasks.rows import TaskInfo

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
_PURPOSE = re.compile(r"For[A-Z]\w*$")  # in the name of one of transformers' classes: BertForTokenClassification
_UNSTATED_OUTPUTS = 2  # what transformers builds where config.json says nothing. Source: transformers.PretrainedConfig, num_labels


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises ModelError where it is missing, is not JSON, or names no model_type.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"{file}: cannot be read: {reason}", remedy="name a model folder as transformers' save_pretrained writes it"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file}: has no model_type", remedy='add it, e.g. "model_type": "bert"')
    return config


def has_trained_head(folder: Path) -> bool:
    """Whether the folder holds a trained classification head: a teacher as it is. Reads config.json and the weights' names, never torch.

    A head for another purpose (token classification, question answering, …; ``architectures`` names it) is none, whatever its weights
    are called. A pickled checkpoint's names cannot be read without running torch, so there ``architectures`` alone decides.
    """
    config = read_config(folder)
    family = family_of(config["model_type"])
    classes = [str(name) for name in config.get("architectures") or []]
    purposes = [purpose for name in classes if (purpose := _PURPOSE.search(name))]
    if purposes and not any(purpose[0] == "ForSequenceClassification" for purpose in purposes):
        _require_weights(folder)
        return False
    if (folder / WEIGHTS_FILE).is_file():
        names = _weight_names(folder)
        return all(f"{module}.weight" in names for module in family.head)
    _require_weights(folder)
    return f"{family.classes}ForSequenceClassification" in classes


def id2label(folder: Path) -> dict[int, str]:
    """Index → name of the folder's outputs, as its config.json gives them; empty where it gives none and there is no trained head.

    transformers leaves names out that are its own (LABEL_0, LABEL_1, …): a trained head's are filled in here. Never loads torch.
    """
    config = read_config(folder)
    names = config.get("id2label") or {}
    if names or not has_trained_head(folder):
        return {int(index): str(name) for index, name in names.items()}
    return {i: f"LABEL_{i}" for i in range(_outputs(folder, config))}


def load(
    folder: Path, task: TaskInfo, *, new_head_seed: int | None = None, eager_attention: bool = False
) -> tuple[PreTrainedModel, Family]:
    """The folder's sequence classification model in float32 on the CPU, in evaluation mode, with one output per class of ``task``.

    Of a task whose models embed, the encoder alone (`onnxsqueeze.nn.embedder`), whatever heads the folder has.
    ``new_head_seed`` allows a head that the checkpoint lacks (or has in another width) to be drawn from that seed; without it the
    checkpoint must bring its own, trained for the same classes. ``eager_attention`` is for those who read attention probabilities.

    Raises ModelError for a missing, damaged or unfit folder and for an unknown architecture.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from onnxsqueeze.nn import embedder

    family = family_of(read_config(folder)["model_type"])
    pickled = _require_weights(folder)
    if not pickled:
        _weight_names(folder)  # finds a truncated file before any work
    if new_head_seed is None and not task.embeds:
        _require_head(folder, task)
    config = getattr(transformers, f"{family.classes}Config").from_pretrained(folder, local_files_only=True)
    if task.max_length > family.max_tokens(config):
        raise ModelError(
            f"{folder.name}: reads at most {family.max_tokens(config)} tokens, and the task's rows may have {task.max_length}",
            remedy=f"set the task's max_length to {family.max_tokens(config)} or less",
        )
    _describe_outputs(config, task)
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(new_head_seed or 0)
        try:
            model, new = _read_model(folder, family, config, pickled=pickled, new_head=new_head_seed is not None, eager=eager_attention)
        except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ModelError(f"{folder.name}: the weights cannot be loaded: {error}", remedy="download or save the model again") from error
    may_be_new = () if new_head_seed is None and not task.embeds else tuple(f"{module}." for module in (*family.head, *family.fresh))
    lost = sorted(name for name in new if not name.startswith(may_be_new))
    if lost:
        raise ModelError(
            f"{folder.name}: {len(lost)} weights are missing or of another shape than config.json says, first {lost[0]}",
            remedy="check that config.json belongs to these weights",
        )
    if task.embeds:
        embedder.turn(model, family, task.pooling)
    return model.eval(), family


def _read_model(
    folder: Path, family: Family, config: PretrainedConfig, *, pickled: bool, new_head: bool, eager: bool
) -> tuple[Any, list[str]]:
    """The model with the folder's weights, and the names of those that the folder does not have in this shape."""
    import torch
    import transformers
    from safetensors.torch import load_file

    classes = getattr(transformers, f"{family.classes}ForSequenceClassification")
    options = {"attn_implementation": "eager"} if eager else {}
    unequal = structure.stated(config)
    if unequal is None:
        model, info = classes.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=not pickled,
            weights_only=True,
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
            **options,
        )
        return model, [*info["missing_keys"], *info["mismatched_keys"]]
    model = classes._from_config(config, dtype=torch.float32, **options)  # transformers' own reader knows equal layers alone
    structure.build(model, family, unequal)
    weights = load_file(folder / WEIGHTS_FILE)
    wanted = structure.own_state(model)
    fitting = {name: tensor for name, tensor in weights.items() if name in wanted and tensor.shape == wanted[name].shape}
    model.load_state_dict(fitting, strict=False)
    return model, [name for name in wanted if name not in fitting]


def save(model: PreTrainedModel, parent: Path, out: Path, task: TaskInfo) -> None:
    """Write config.json, model.safetensors and the parent's tokenizer files into ``out``. Equal weights give equal bytes."""
    from safetensors.torch import save_file

    _describe_outputs(model.config, task)
    config = {key: value for key, value in model.config.to_diff_dict().items() if not key.startswith("_")}
    config["architectures"] = [f"{family_of(model.config.model_type).classes}Model" if task.embeds else type(model).__name__]
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in structure.own_state(model).items()}
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    copy_side_files(parent, out)


def token_ids(folder: Path) -> dict[str, int]:
    """The ids that the model's configuration names, those of transformers' defaults too: ``pad_token_id`` and its like."""
    import transformers

    family = family_of(read_config(folder)["model_type"])
    config = getattr(transformers, f"{family.classes}Config").from_pretrained(folder, local_files_only=True).to_dict()
    return {name: value for name, value in config.items() if name.endswith("_token_id") and type(value) is int}


def vocabulary_rows(folder: Path) -> int:
    """How many rows the vocabulary matrix in the folder's weights has."""
    from safetensors import safe_open

    if _require_weights(folder):
        weights = _weights(folder)
        return len(weights[_vocabulary_name(folder, weights)])
    with safe_open(folder / WEIGHTS_FILE, framework="np") as file:
        return int(file.get_slice(_vocabulary_name(folder, _weight_names(folder))).get_shape()[0])


def vocabulary(folder: Path) -> dict[str, int]:
    """Piece → id of the folder's tokenizer."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=False)
    return found


def vocabulary_matrix(folder: Path) -> Tensor:
    """The vectors of all pieces ``[rows, width]``; of a table in factors the first of them."""
    weights = _weights(folder)
    return weights[_vocabulary_name(folder, weights)]


def save_rows(parent: Path, out: Path, rows: Sequence[int]) -> None:
    """Write ``parent``'s config.json and weights into ``out`` with these rows of its vocabulary matrix alone, in this order.

    The ids that config.json names become the rows' new places. All other weights of the encoder and of a classification head are left
    as they are.
    """
    config, weights = read_config(parent), _own_weights(parent)
    name = _vocabulary_name(parent, weights)
    weights[name] = weights[name][list(rows)]
    place = {row: i for i, row in enumerate(rows)}
    for key, old in token_ids(parent).items():
        if key in config or place[old] != old:
            config[key] = place[old]
    config["vocab_size"] = len(rows)
    _write(config, weights, out)


def save_positions(parent: Path, out: Path, length: int) -> int:
    """Write ``parent``'s config.json and weights into ``out`` with positions for inputs of ``length`` tokens; returns how many the parent has them for.

    Raises ModelError where the weights hold no table of positions, or one that is not longer than that.
    """
    config, weights = read_config(parent), _own_weights(parent)
    family = family_of(config["model_type"])
    name = next((name for stem in (f"{family.encoder}.", "") if (name := f"{stem}{family.positions}.weight") in weights), None)
    before = len(weights[name]) - family.position_offset if name else 0
    if name is None or before <= length:
        raise ModelError(
            f"{parent.name}: has positions for {before} tokens, and {length} are to stay",
            remedy="take the stage out: there is nothing to cut",
        )
    config["max_position_embeddings"] = length + family.position_offset
    weights[name] = weights[name][: config["max_position_embeddings"]]
    _write(
        config, {key: tensor for key, tensor in weights.items() if not key.endswith(".position_ids")}, out
    )  # 0, 1, …: older files hold them
    return before


def changed_tensors(parent: Path, out: Path) -> int:
    """How many tensors of the two written files differ, are new or are gone. A pickled parent counts as wholly changed."""
    import numpy as np
    from safetensors import safe_open

    prefix = f"{family_of(read_config(out)['model_type']).encoder}."  # a plain encoder's file leaves it out
    if not (parent / WEIGHTS_FILE).is_file():
        return len(_weight_names(out))
    with safe_open(parent / WEIGHTS_FILE, framework="np") as before, safe_open(out / WEIGHTS_FILE, framework="np") as after:
        old, new = ({name.removeprefix(prefix): name for name in file.keys()} for file in (before, after))  # noqa: SIM118, no mapping
        both = old.keys() & new.keys()
        return len(old.keys() ^ new.keys()) + sum(
            not np.array_equal(before.get_tensor(old[name]), after.get_tensor(new[name])) for name in both
        )


def count_zeros(folder: Path, names: Sequence[str]) -> int:
    """How many weights of the named tensors are zero in the folder's written file."""
    import numpy as np
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="np") as file:
        return sum(int(np.count_nonzero(file.get_tensor(name) == 0)) for name in names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of what `load` itself judges: new heads, left-over pooling weights."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _describe_outputs(config: Any, task: TaskInfo) -> None:
    if task.embeds:
        return
    config.num_labels = task.outputs
    names = task.labels or ("score",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification" if task.labels else "regression"


def _require_weights(folder: Path) -> bool:
    """True where the weights are pickled (read by torch's restricted loader), False for safetensors."""
    if (folder / WEIGHTS_FILE).is_file():
        return False
    if (folder / PICKLE_FILE).is_file():
        return True
    raise ModelError(f"{folder}: holds no {WEIGHTS_FILE}", remedy=f"name a folder with config.json and {WEIGHTS_FILE} (or {PICKLE_FILE})")


def _weight_names(folder: Path) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, framework="np") as weights:
            return frozenset(weights.keys())
    except SafetensorError as error:
        raise ModelError(f"{file}: is damaged or cut short: {error}", remedy="download or save the model again") from error


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weights as it lies there. Raises ModelError where they are missing or damaged."""
    import torch
    from safetensors.torch import load_file

    if not _require_weights(folder):
        _weight_names(folder)
        return load_file(folder / WEIGHTS_FILE)
    try:
        pickled = torch.load(folder / PICKLE_FILE, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{folder.name}: {PICKLE_FILE} cannot be loaded: {error}", remedy="download or save the model again as safetensors"
        ) from error
    return {name: tensor.clone() for name, tensor in pickled.items()}  # tied ones share memory, and safetensors refuses that


def _own_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the encoder and of a classification head; a head of another purpose (a language model's has one output a row) is left out."""
    weights, family = _weights(folder), family_of(read_config(folder)["model_type"])
    mine = tuple(f"{module}." for module in (family.encoder, *family.head))
    return (
        {key: tensor for key, tensor in weights.items() if key.startswith(mine)}
        if any(key.startswith(mine[0]) for key in weights)
        else weights
    )


def _write(config: Mapping[str, Any], weights: Mapping[str, Tensor], out: Path) -> None:
    from safetensors.torch import save_file

    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, out / WEIGHTS_FILE, metadata={"format": "pt"})


def _vocabulary_name(folder: Path, names: Collection[str]) -> str:
    """The vocabulary matrix among ``names``; a plain encoder's file leaves the encoder's name out."""
    family = family_of(read_config(folder)["model_type"])
    places = [
        f"{stem}.{rest}" for stem in (family.table_of_words, family.words) for rest in ("weight", "table.weight")
    ]  # the last: of factors
    found = [name for name in places if name in names]
    if not found:
        raise ModelError(
            f"{folder.name}: its weights hold no {family.table_of_words}.weight", remedy="check that config.json belongs to these weights"
        )
    return found[0]


def _outputs(folder: Path, config: Mapping[str, Any]) -> int:
    """How many outputs a trained head has whose classes config.json does not name."""
    from safetensors import safe_open

    stated = config.get("num_labels")
    if isinstance(stated, int):
        return stated
    if not (folder / WEIGHTS_FILE).is_file():
        return _UNSTATED_OUTPUTS  # a pickled file's shapes cannot be read without running torch
    with safe_open(folder / WEIGHTS_FILE, framework="np") as file:
        return int(file.get_slice(f"{family_of(config['model_type']).head[-1]}.weight").get_shape()[0])


def _require_head(folder: Path, task: TaskInfo) -> None:
    if not has_trained_head(folder):
        raise ModelError(f"{folder.name}: has no trained classification head", remedy="put a finetune stage before this one")
    found = tuple(name for _, name in sorted(id2label(folder).items()))
    if task.labels and set(found) == set(task.labels) and found != task.labels:
        raise ModelError(
            f"{folder.name}: its classes are in the order {', '.join(found)}, the task's in the order {', '.join(task.labels)}",
            remedy="fine-tune it on this task (a finetune stage with force: true)",
        )
