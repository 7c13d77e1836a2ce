"""The recipes that combine methods, and one per method, on a random two-layer model."""

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


@pytest.mark.parametrize("recipe", ["smallest", "fastest"])
def test_methods_combine_into_one_file(recipe: str, place: Path) -> None:
    overrides = [
        *SMALL,
        "stages.distill.layers=1",
        "stages.distill.epochs=1",
        "stages.prune-structure.multiple_of=8",
        "stages.prune-structure.epochs=1",
    ]
    if recipe == "smallest":
        overrides += ["stages.factorize.vocabulary_rank=8", "stages.factorize.epochs=1", "stages.cluster-weights.epochs=1"]
    else:  # tuning is minutes of measuring: test_stage_optimize_graph.py tunes
        overrides += [f"targets.{name}.stages.optimize-graph.tune=false" for name in ("int8", "fastest")]
    outcome, _ = run(recipe, place / recipe, model=place / "model", store=place / "store", overrides=overrides)
    assert outcome.exit_code == 0, outcome.problems
    found = {target.name: target for target in outcome.results.targets}
    assert (found[recipe].size_bytes or 0) < (found["int8"].size_bytes or 0)
    config = json.loads((place / recipe / recipe / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert config["onnxsqueeze"]["neurons"][0] < config["intermediate_size"]
    assert config["onnxsqueeze"].get("vocabulary_rank") == (8 if recipe == "smallest" else None)


# What makes a recipe of recipes/methods/ fit a model of two layers. The others run on MiniLM in test_full_runs.py.
METHODS = {
    "cluster-weights": ["stages.cluster-weights.epochs=1", "measure.latency=false"],
    "distill-small": [f"targets.{name}.stages.distill-small.epochs=1" for name in ("cnn-fp32", "cnn-int8", "bilstm-fp32")],
    "early-exit": [
        "stages.early-exit.after=[0]",
        "stages.early-exit.epochs=1",
        *(f"targets.{name}.stages.branch-exits.max_drop_pp=100" for name in ("early-exit-fp32", "early-exit-int8")),
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_of_a_method_ends_in_files_that_are_measured(method: str, place: Path) -> None:
    outcome, _ = run(
        RECIPES / "methods" / f"{method}.yaml",
        place / method,
        model=place / "model",
        store=place / "store",
        overrides=[*SMALL, *METHODS[method]],
    )
    assert outcome.exit_code == 0, outcome.problems
    assert {target.status for target in outcome.results.targets} == {"ok"}
