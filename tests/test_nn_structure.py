"""Layers of unequal shape: cut, saved, read again, exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from models import FAMILIES, FamilyName, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze import graph
from onnxsqueeze.errors import ModelError
from onnxsqueeze.nn import checkpoint, structure
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.structure import Structure
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.export import Export

HEADS, NEURONS = ((0, 2, 3), (1,), (0, 1, 2, 3)), (tuple(range(0, 128, 2)), tuple(range(5)), tuple(range(100)))


def model_of(folder: Path) -> tuple[Any, families.Family]:
    return checkpoint.load(folder, toy_task())


def logits(model: Any, family: families.Family) -> torch.Tensor:
    ids = torch.arange(7, 27).reshape(2, 10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.inference_mode():
        found: torch.Tensor = model(**{name: inputs[name] for name in family.inputs()}).logits
    return found


def cut(folder: Path, out: Path) -> Any:
    """A checkpoint of three layers, shrunk and saved."""
    model, family = model_of(folder)
    structure.shrink(model, family, HEADS, NEURONS)
    out.mkdir()
    checkpoint.save(model, folder, out, toy_task())
    return model


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> FamilyName:
    found: FamilyName = request.param
    return found


@pytest.fixture
def folder(tmp_path: Path, name: FamilyName) -> Path:
    return random_checkpoint(tmp_path / "whole", name, layers=3, heads=4)


def test_kept_layers_are_the_chosen_ones_in_order(folder: Path) -> None:
    model, family = model_of(folder)
    before = list(families.layers(model, family))
    structure.keep_layers(model, family, (0, 2))
    assert list(families.layers(model, family)) == [before[0], before[2]]
    assert model.config.num_hidden_layers == 2
    assert structure.stated(model.config) is None, "equal layers need no word of ours"


def test_what_is_taken_out_is_what_had_said_nothing(folder: Path) -> None:
    """With the columns that read them at zero, heads and neurons add nothing; without them the logits are the same."""
    model, family = model_of(folder)
    for i, layer in enumerate(families.layers(model, family)):
        gone = [h for h in range(4) if h not in HEADS[i]]
        out = layer.get_parameter(f"{family.attention[3]}.weight")
        down = layer.get_parameter(f"{family.feed_forward[1]}.weight")
        with torch.no_grad():
            for head in gone:
                out[:, 8 * head : 8 * head + 8] = 0
            down[:, [n for n in range(128) if n not in NEURONS[i]]] = 0
    before = logits(model, family)
    structure.shrink(model, family, HEADS, NEURONS)

    torch.testing.assert_close(logits(model, family), before, atol=1e-5, rtol=1e-4)
    assert structure.of(model, family) == structure.stated(model.config) == Structure(8, (3, 1, 4), (64, 5, 100))


def test_unequal_layers_are_saved_and_read_again_to_the_bit(folder: Path, tmp_path: Path) -> None:
    written = cut(folder, tmp_path / "cut")
    again, family = model_of(tmp_path / "cut")

    assert json.loads((tmp_path / "cut" / "config.json").read_text())["onnxsqueeze"] == {
        "head_size": 8,
        "heads": [3, 1, 4],
        "neurons": [64, 5, 100],
    }
    assert torch.equal(logits(again, family), logits(written, family))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in written.parameters())


def test_unequal_layers_are_exported_without_an_operator_that_equal_ones_lack(folder: Path, tmp_path: Path) -> None:
    cut(folder, tmp_path / "cut")
    files = []
    for place in (folder, tmp_path / "cut"):
        out, _ = run_stage(Export(), place, tmp_path / f"{place.name}-onnx", context=toy_context(tmp_path / place.name))
        files.append(out / "model.onnx")
    whole, smaller = (graph.operators(file) for file in files)

    assert smaller == whole
    assert files[1].stat().st_size < files[0].stat().st_size


def test_a_student_takes_the_shapes_of_the_layers_it_keeps(folder: Path, tmp_path: Path) -> None:
    cut(folder, tmp_path / "cut")
    stage = Distill(layers=(0, 2), epochs=1, batch_size=16, alpha_attention=1.0)
    out, _ = run_stage(stage, tmp_path / "cut", tmp_path / "student", teacher=tmp_path / "cut")
    model, family = model_of(out)

    assert structure.of(model, family) == Structure(8, (3, 4), (64, 100))


def test_attention_of_layers_with_other_heads_cannot_be_learned(folder: Path, tmp_path: Path) -> None:
    from onnxsqueeze.errors import StageError

    cut(folder, tmp_path / "cut")
    stage = Distill(layers=(0, 2), epochs=1, batch_size=16, alpha_attention=1.0)
    with pytest.raises(StageError, match="layer 0 of the student has 3 heads, the one that teaches it 4"):
        run_stage(stage, tmp_path / "cut", tmp_path / "student", teacher=folder)


def test_a_narrower_model_has_the_units_that_were_kept(folder: Path, tmp_path: Path) -> None:
    model, family = model_of(folder)
    had = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = [i for i in range(32) if i % 4]
    structure.narrow(model, family, kept)
    (tmp_path / "narrow").mkdir()
    checkpoint.save(model, folder, tmp_path / "narrow", toy_task())
    again, _ = model_of(tmp_path / "narrow")

    assert torch.equal(logits(again, family), logits(model, family))
    assert again.config.hidden_size == 24
    assert structure.of(again, family) == Structure(8, (4, 4, 4), (128, 128, 128))
    query, down = family.attention[0], family.feed_forward[1]
    stem = f"{family.encoder}.{family.layers}.1"
    assert torch.equal(model.get_parameter(f"{stem}.{query}.weight"), had[f"{stem}.{query}.weight"][:, kept])
    assert torch.equal(model.get_parameter(f"{stem}.{down}.weight"), had[f"{stem}.{down}.weight"][kept])
    last = f"{family.head[-1]}.weight"
    assert torch.equal(model.get_parameter(last), had[last][:, kept])
    run_stage(Export(), tmp_path / "narrow", tmp_path / "onnx", context=toy_context(tmp_path))  # compares it with PyTorch


def test_keeping_every_unit_changes_nothing(folder: Path) -> None:
    model, family = model_of(folder)
    before = logits(model, family)
    structure.narrow(model, family, range(32))
    structure.shrink(model, family, [range(4)] * 3, [range(128)] * 3)
    assert torch.equal(logits(model, family), before)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"heads": [1, 1], "neurons": [4, 4]}, "must be"),
        ("half", "must be"),
        ({"head_size": 8, "heads": [1], "neurons": [4, 4]}, "must hold one number ≥ 1 for each of 2 layers"),
        ({"head_size": 8, "heads": [1, 0], "neurons": [4, 4]}, "must hold one number ≥ 1"),
    ],
)
def test_a_structure_that_makes_no_sense_is_an_error_that_says_where(tmp_path: Path, stated: Mapping[str, Any] | str, words: str) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "onnxsqueeze": stated}))
    with pytest.raises(ModelError, match=f"config.json: onnxsqueeze: {words}"):
        model_of(folder)


def test_weights_of_another_shape_than_stated_are_named(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bert")
    config = json.loads((folder / "config.json").read_text())
    stated = {"head_size": 16, "heads": [2, 1], "neurons": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "onnxsqueeze": stated}))
    with pytest.raises(ModelError, match=r"of another shape than config.json says, first bert.encoder.layer.1.attention"):
        model_of(folder)
