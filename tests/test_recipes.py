"""The recipe that combines most methods, and one whose file has branches, on a random two-layer model. The others run on MiniLM in test_full_runs.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models import random_checkpoint
from runs import RECIPES, SMALL, run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store and one model for all runs of this module: the teacher is trained once."""
    folder = tmp_path_factory.mktemp("runs")
    random_checkpoint(folder / "model", "bert", layers=2, head=False)
    return folder


@pytest.mark.full
def test_methods_combine_into_one_file(place: Path) -> None:
    overrides = [
        *SMALL,
        "stages.distill.layers=1",
        "stages.prune-structure.multiple_of=8",
        "stages.factorize.vocabulary_rank=8",
        *(f"stages.{stage}.epochs=1" for stage in ("distill", "prune-structure", "factorize", "cluster-weights")),
    ]
    outcome, _ = run("smallest", place / "smallest", model=place / "model", store=place / "store", overrides=overrides)
    assert outcome.exit_code == 0, outcome.problems
    found = {target.name: target for target in outcome.results.targets}
    assert (found["smallest"].size_bytes or 0) < (found["int8"].size_bytes or 0)
    config = json.loads((place / "smallest" / "smallest" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert config["onnxsqueeze"]["neurons"][0] < config["intermediate_size"]
    assert config["onnxsqueeze"]["vocabulary_rank"] == 8


def test_a_recipe_of_one_method_ends_in_files_with_branches(place: Path) -> None:
    overrides = [
        *SMALL,
        "stages.early-exit.after=[0]",
        "stages.early-exit.epochs=1",
        *(f"targets.{name}.stages.branch-exits.max_drop_pp=100" for name in ("early-exit-fp32", "early-exit-int8")),
    ]
    recipe = RECIPES / "methods" / "early-exit.yaml"
    outcome, _ = run(recipe, place / "exits", model=place / "model", store=place / "store", overrides=overrides)
    assert outcome.exit_code == 0, outcome.problems
    found = {target.name: target.operators or {} for target in outcome.results.targets if target.status == "ok"}
    assert ["If" in found[name] for name in ("fp32", "int8", "early-exit-fp32", "early-exit-int8")] == [False, False, True, True]
