from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models import FAMILIES, FamilyName, random_checkpoint, toy_task
from onnxsqueeze.errors import ModelError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.batches import encode
from onnxsqueeze.tasks.rows import Row


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_every_linear_weight_of_the_layers_and_no_other(tmp_path: Path, name: FamilyName) -> None:
    model, family = checkpoint.load(random_checkpoint(tmp_path, name, layers=3), toy_task())
    named = families.linear_weights(model, family)
    inside = {id(m.weight) for m in families.layers(model, family).modules() if isinstance(m, torch.nn.Linear)}
    assert {id(model.get_parameter(n)) for n in named} == inside
    assert list(named.values()).count("attention") == 3 * 4
    assert list(named.values()).count("feed_forward") == 3 * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_every_embedding(tmp_path: Path, name: FamilyName) -> None:
    model, family = checkpoint.load(random_checkpoint(tmp_path, name), toy_task())
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    assert {id(model.get_parameter(n)) for n in families.embedding_weights(model, family)} == tables


@pytest.mark.parametrize("name", FAMILIES)
def test_the_longest_input_runs_and_one_token_more_does_not(tmp_path: Path, name: FamilyName) -> None:
    model, family = checkpoint.load(random_checkpoint(tmp_path, name), toy_task())
    longest = family.max_tokens(model.config)

    def run(tokens: int) -> None:
        ids = torch.full((1, tokens), 7)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    run(longest)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(longest + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_returned_undropped_when_a_loss_reads_it(tmp_path: Path, name: FamilyName) -> None:
    folder = random_checkpoint(tmp_path, name)
    model, family = checkpoint.load(folder, toy_task(), eager_attention=True)
    families.without_attention_dropout(model, family)
    model.train()
    ids = torch.tensor([encode(folder, [Row("the movie was good .", None, 1)], 32).encoded[0].ids])
    for layer in model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions:
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]))


def test_transformers_has_every_family() -> None:
    """`deploy --to hf` relies on it without asking."""
    import transformers

    hf: Any = transformers  # this mapping has no types
    assert set(families.FAMILIES) <= set(hf.CONFIG_MAPPING.keys())


def test_an_unknown_architecture_is_refused_by_name_with_what_would_have_to_be_written() -> None:
    with pytest.raises(ModelError, match=r"'bort'.*did you mean 'bert'") as caught:
        families.family_of("bort")
    assert "nn/family.py" in str(caught.value.remedy)
