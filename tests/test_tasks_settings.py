from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from onnxsqueeze.tasks.settings import NAMES, TaskSettings

OWN = {"train": "a.csv", "dev": "b.jsonl"}


def test_a_plain_string_is_short_for_a_name() -> None:
    assert TaskSettings.model_validate("sst2") == TaskSettings(name="sst2")


def test_one_metric_may_be_given_without_a_list() -> None:
    assert TaskSettings.model_validate({**OWN, "metric": "f1"}).metric == ("f1",)


def test_class_names_that_yaml_reads_as_numbers_are_names() -> None:
    assert TaskSettings.model_validate({**OWN, "labels": [1, 0]}).labels == ("1", "0")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("stt2", "unknown task 'stt2'; did you mean 'sst2'?"),
        ({}, "needs `name`"),
        ({"train": "a.csv"}, "both `train` and `dev`"),
        ({"name": "rte", "metric": "f1"}, "`name` and `metric` exclude each other"),
        ({"train": "a.csv", "dev": "a.csv"}, "the same file"),
        ({**OWN, "metric": ["accuracy", "spearman"]}, "mixes correlations"),
        ({**OWN, "metric": ["f1", "f1"]}, "twice"),
        ({**OWN, "metric": "bleu"}, "Input should be 'accuracy'"),
        ({**OWN, "labels": ["a", "a"]}, "a class twice"),
        ({**OWN, "labels": ["a", "b"], "metric": "pearson"}, "is a score"),
        ({"name": "stsb", "labels": ["a", "b"]}, "is a score"),
        ({**OWN, "labels": ["a", "b", "c"], "metric": "f1"}, "`f1` needs two classes"),
        ({"name": "toy", "max_length": 7}, "greater than or equal to 8"),
        ({"name": "toy", "maxlength": 9}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_reason(given: Any, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TaskSettings.model_validate(given)
    assert said in str(caught.value)


def test_own_files_are_taken_from_beside_the_recipe_and_absolute_ones_stay() -> None:
    settings = TaskSettings.model_validate({"train": "rows/a.csv", "dev": "/data/b.csv"}).beside(Path("recipes"))
    assert (settings.train, settings.dev) == (Path("recipes/rows/a.csv"), Path("/data/b.csv"))
    assert TaskSettings(name=NAMES[0]).beside(Path("recipes")) == TaskSettings(name=NAMES[0])
