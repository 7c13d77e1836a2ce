from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import FAMILIES, FamilyName, random_checkpoint, toy_task
from onnxsqueeze.errors import ModelError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.tasks.rows import TaskInfo


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_head_is_seen_in_the_weights_names(tmp_path: Path, name: FamilyName) -> None:
    assert checkpoint.has_trained_head(random_checkpoint(tmp_path / "with", name))
    assert not checkpoint.has_trained_head(random_checkpoint(tmp_path / "without", name, head=False))


# architectures → whether a folder whose weights have the names of a sequence classification head has one
PURPOSES = {
    ("BertForSequenceClassification",): True,
    (): True,
    ("BertModel",): True,
    ("BertForTokenClassification",): False,
    ("BertForQuestionAnswering",): False,
    ("BertForMaskedLM",): False,
}


@pytest.mark.parametrize("architectures", PURPOSES)
def test_a_head_for_another_purpose_is_no_classification_head_whatever_its_weights_are_called(
    tmp_path: Path, architectures: tuple[str, ...]
) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    edit_config(folder, architectures=list(architectures))
    assert checkpoint.has_trained_head(folder) is PURPOSES[architectures]


def test_a_real_token_classification_model_is_no_teacher_as_it_is_and_takes_a_new_head(tmp_path: Path) -> None:
    import transformers

    folder = random_checkpoint(tmp_path / "model", "bert")
    hf: Any = transformers  # its constructors have no types
    hf.BertForTokenClassification(hf.BertConfig.from_pretrained(folder, num_labels=5)).save_pretrained(folder)
    assert "classifier.weight" in load_file(folder / "model.safetensors")
    assert not checkpoint.has_trained_head(folder)
    with pytest.raises(ModelError, match="no trained classification head"):
        checkpoint.load(folder, toy_task())
    model, _ = checkpoint.load(folder, toy_task(), new_head_seed=0)
    assert model.config.num_labels == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_class_names_that_config_leaves_out_are_filled_in_for_a_trained_head(tmp_path: Path, name: FamilyName) -> None:
    folder = random_checkpoint(tmp_path / "two", name)
    assert not {"id2label", "num_labels"} & json.loads((folder / "config.json").read_text()).keys(), "transformers leaves them out"
    assert checkpoint.id2label(folder) == {0: "LABEL_0", 1: "LABEL_1"}
    assert checkpoint.id2label(random_checkpoint(tmp_path / "none", name, head=False)) == {}


def test_without_names_the_number_of_classes_is_the_stated_one_or_the_heads_rows(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "roberta", outputs=3)
    edit_config(folder, id2label=None, label2id=None)
    assert checkpoint.id2label(folder) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    edit_config(folder, num_labels=4)
    assert len(checkpoint.id2label(folder)) == 4


def test_a_pickled_head_without_names_has_the_two_outputs_that_transformers_builds(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert checkpoint.id2label(folder) == {0: "LABEL_0", 1: "LABEL_1"}
    model, _ = checkpoint.load(folder, toy_task())
    assert model.config.num_labels == 2


def test_asking_for_the_head_and_importing_the_training_stages_loads_no_torch(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    code = (
        "import sys; from pathlib import Path; from onnxsqueeze.nn.checkpoint import has_trained_head, id2label;"
        "import onnxsqueeze.stages.distill, onnxsqueeze.stages.finetune, onnxsqueeze.stages.prune_weights;"
        f"f = Path({str(folder)!r}); assert has_trained_head(f); id2label(f);"
        "sys.exit(sum(m in sys.modules for m in ('torch', 'transformers', 'onnx', 'onnxruntime')))"
    )
    path = str(Path(checkpoint.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False).returncode == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_head_depends_on_its_seed_alone_and_the_encoder_is_the_checkpoints(tmp_path: Path, name: FamilyName) -> None:
    folder = random_checkpoint(tmp_path, name, head=False)
    torch.manual_seed(5)
    first, family = checkpoint.load(folder, toy_task(3), new_head_seed=1)
    generator = torch.get_rng_state()
    again, _ = checkpoint.load(folder, toy_task(3), new_head_seed=1)
    other, _ = checkpoint.load(folder, toy_task(3), new_head_seed=2)
    assert torch.equal(generator, torch.get_rng_state()), "the caller's random state is not touched"
    stored = load_file(folder / "model.safetensors")
    head = f"{family.head[-1]}.weight"
    assert first.get_parameter(head).shape[0] == 3
    assert torch.equal(first.get_parameter(head), again.get_parameter(head))
    assert not torch.equal(first.get_parameter(head), other.get_parameter(head))
    for key, value in first.state_dict().items():
        short = key.removeprefix(f"{family.encoder}.")
        assert short not in stored or torch.equal(value, stored[short])


def test_a_saved_model_reloads_with_the_tasks_class_names_and_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", outputs=3)
    model, _ = checkpoint.load(parent, toy_task(3))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        checkpoint.save(model, parent, tmp_path / name, toy_task(3))
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == ["config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert checkpoint.id2label(tmp_path / "one") == {0: "negative", 1: "neutral", 2: "positive"}
    assert checkpoint.changed_tensors(parent, tmp_path / "one") == 0
    assert str(tmp_path) not in (tmp_path / "one" / "config.json").read_text()


def test_changed_tensors_are_counted_in_the_files(tmp_path: Path) -> None:
    first = random_checkpoint(tmp_path / "first", "bert")
    second = random_checkpoint(tmp_path / "second", "bert")
    tensors = load_file(second / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, second / "model.safetensors")
    assert checkpoint.changed_tensors(first, second) == 2


def test_pickled_weights_load_without_running_anything(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model, _ = checkpoint.load(folder, toy_task())
    assert torch.equal(model.get_parameter("classifier.weight"), tensors["classifier.weight"])


class Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", "bert")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"classifier.weight": Touch(tmp_path / "ran")}, protocol=2))
    with pytest.raises(ModelError, match="cannot be loaded"):
        checkpoint.load(folder, toy_task())
    assert not (tmp_path / "ran").exists()


def test_code_that_lies_in_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", "bert")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"})
    checkpoint.load(folder, toy_task())
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: cannot be read: No such file"):
        checkpoint.load(tmp_path, toy_task())


def test_a_config_that_is_no_json_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        checkpoint.has_trained_head(tmp_path)


def test_a_config_without_model_type_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no model_type"):
        checkpoint.has_trained_head(tmp_path)


def test_an_unknown_architecture_is_refused_when_loading(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    edit_config(folder, model_type="gpt2")
    with pytest.raises(ModelError, match="'gpt2': unknown architecture"):
        checkpoint.load(folder, toy_task())


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        checkpoint.load(folder, toy_task())


def test_weights_that_were_cut_short_say_so(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or cut short"):
        checkpoint.load(folder, toy_task())


def test_a_config_of_another_model_is_found_out(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert", layers=2)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"16 weights are missing.*bert\.encoder\.layer\.2"):
        checkpoint.load(folder, toy_task(), new_head_seed=0)


def test_a_missing_head_is_an_error_unless_a_new_one_is_asked_for(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "roberta", head=False)
    with pytest.raises(ModelError, match="no trained classification head"):
        checkpoint.load(folder, toy_task())


def test_a_head_of_another_width_is_an_error_unless_a_new_one_is_asked_for(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "electra", outputs=2)
    with pytest.raises(ModelError):
        checkpoint.load(folder, toy_task(3))
    model, _ = checkpoint.load(folder, toy_task(3), new_head_seed=0)
    assert model.config.num_labels == 3


def test_classes_in_another_order_are_an_error_that_shows_both(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    edit_config(folder, id2label={"0": "positive", "1": "negative"}, label2id={"positive": 0, "negative": 1})
    with pytest.raises(ModelError, match=r"positive, negative.*negative, positive"):
        checkpoint.load(folder, toy_task())


def test_rows_longer_than_the_models_positions_are_refused_before_work(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "roberta")
    task = TaskInfo("long", ("a", "b"), ("accuracy",), "accuracy", max_length=161)
    with pytest.raises(ModelError, match="at most 160 tokens"):
        checkpoint.load(folder, task)
