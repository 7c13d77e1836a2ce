"""Recipes: every fault at once, each with file, line, place, what was found and the nearest right word."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from onnxsqueeze.errors import RecipeError, UsageError
from onnxsqueeze.recipe import LoadedRecipe, chain, json_schema, load

RECIPES = Path(__file__).parent.parent / "recipes"

GOOD = """\
schema: 1
name: x
task: toy
stages:
  - kind: finetune
  - kind: distill
targets:
  - name: fp32
    after: finetune
    baseline: true
    stages: [{kind: export}]
  - name: small
    stages: [{kind: export}, {kind: quantize-dynamic}]
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]  # a function str → Path
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> Path:
        Path("a.yaml").write_text(text)
        return Path("a.yaml")

    return _write


def faults(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    return str(caught.value).splitlines()


def test_a_good_recipe_loads_and_knows_its_chains(write) -> None:  # type: ignore[no-untyped-def]
    recipe = load(write(GOOD)).recipe
    above, own = chain(recipe, recipe.targets[0])
    assert [s.name for s in above] == ["finetune"]
    above, own = chain(recipe, recipe.targets[1])
    assert [s.name for s in (*above, *own)] == ["finetune", "distill", "export", "quantize-dynamic"]


def test_every_fault_is_told_at_once_in_the_order_of_the_lines(write) -> None:  # type: ignore[no-untyped-def]
    text = (
        GOOD.replace("task: toy", "task: sst3")
        .replace("kind: finetune", "kind: finetune\n    epocs: 3")
        .replace("kind: quantize-dynamic", "kind: quantise-dynamic")
    )
    found = faults(write(text))
    assert found[0].startswith("a.yaml:3: task")
    assert "sst2" in found[0]
    assert found[1] == "a.yaml:6: stages[0].finetune.epocs: unknown key 'epocs'; did you mean 'epochs'?"
    assert found[2] == "a.yaml:14: targets[1].stages[1].kind: unknown kind 'quantise-dynamic'; did you mean 'quantize-dynamic'?"
    assert len(found) == 3


def test_a_wrong_type_and_a_value_out_of_bounds_say_what_was_found(write) -> None:  # type: ignore[no-untyped-def]
    text = GOOD.replace("kind: distill", "kind: distill\n    epochs: many").replace(
        "{kind: export}, {kind: quantize-dynamic}", "{kind: export, opset: 3}, {kind: quantize-static, samples: 0}"
    )
    found = faults(write(text))
    assert found[0].startswith("a.yaml:7: stages[1].distill.epochs: ")
    assert found[0].endswith("got 'many'")
    assert any(
        f.startswith("a.yaml:14: targets[1].stages[0].export.opset: must be greater than or equal to ") and f.endswith("got 3")
        for f in found
    )
    assert "a.yaml:14: targets[1].stages[1].quantize-static.samples: must be greater than or equal to 1, got 0" in found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("after: finetune", "after: finetun", "a.yaml:9: targets[0].after: no shared stage has the id 'finetun'; did you mean 'finetune'?"),
        ("name: small", "name: small\n    backend: cuda0", "a.yaml:13: targets[1].backend: "),
        ("name: small", "name: fp32", "a.yaml:12: targets[1].name: 'fp32' is the name of targets[0] too"),
        (
            "stages: [{kind: export}, {kind: quantize-dynamic}]",
            "stages: [{kind: quantize-dynamic}]",
            "but 'distill' before it gives a PyTorch checkpoint; add {kind: export} before it",
        ),
        (
            "stages: [{kind: export}, {kind: quantize-dynamic}]",
            "stages: [{kind: export}, {kind: prune-weights}]",
            "prune-weights takes a PyTorch checkpoint, but 'export' before it gives a float32 .onnx; move it above the export",
        ),
        (
            "stages: [{kind: export}, {kind: quantize-dynamic}]",
            "stages: [{kind: prune-weights}]",
            "ends in PyTorch (prune-weights); a target is an .onnx file: add {kind: export}",
        ),
        ("stages: [{kind: export}, {kind: quantize-dynamic}]", "stages: [{kind: export}, {kind: float16}]", "float16 for backend cpu: "),
        ("name: small", "name: small\n    backend: cuda", "quantize-dynamic for backend cuda: "),
        ("- kind: distill", "- kind: finetune", "two stages in this chain have the id 'finetune'; give one of them an `id:` of its own"),
        ("- kind: distill", "- kind: export", "export gives an .onnx file; shared stages are in PyTorch: move it into `targets`"),
        (
            "- kind: distill",
            "- {kind: distill, teacher: finetunes}",
            "stages[1].teacher: no stage above has the id 'finetunes'; did you mean 'finetune'?",
        ),
        (
            "- kind: finetune\n  - kind: distill",
            "- kind: distill\n  - kind: finetune",
            "distill learns from a teacher, but finetune stands below it; move finetune above it",
        ),
        (
            "stages: [{kind: export}, {kind: quantize-dynamic}]",
            "stages: [{kind: train-quantized, activations: static}, {kind: export}, {kind: quantize-dynamic}]",
            "targets[1].stages[0]: train-quantized: activations: static trains for quantize-static, but behind it stands quantize-dynamic",
        ),
        (
            "stages: [{kind: export}, {kind: quantize-dynamic}]",
            "stages: [{kind: train-quantized}, {kind: export}, {kind: quantize-dynamic, per_channel: false}]",
            "train-quantized: per_channel is True here and False in 'quantize-dynamic' behind it; training must see the grid of the file",
        ),
        (
            "stages: [{kind: export}, {kind: quantize-dynamic}]",
            "stages: [{kind: train-quantized, activations: static}, {kind: export}, {kind: quantize-static, calibration: entropy}]",
            "'quantize-static' behind it has calibration: entropy, which training does not know",
        ),
        ("name: small", "name: small\n    baseline: true", "backend cpu has the baseline 'fp32' already"),
        ("    after: finetune\n", "", "a baseline is the teacher exported, untouched: `after: finetune`"),
        ("name: x", "name: x\nname: y", "a.yaml:3: name: the key 'name' stands twice; the first is in line 2"),
        ("schema: 1", "schema: 2", "a.yaml:1: schema: "),
        ("name: x\n", "", "'name' is missing; add it"),
        ("- kind: distill", "- distill", "a stage is a mapping with a `kind:`, got 'distill'"),
    ],
)
def test_one_fault_one_message(write, old: str, new: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    assert old in GOOD
    found = faults(write(GOOD.replace(old, new)))
    assert any(expected in fault for fault in found), found


def test_two_alike_are_fine_with_an_id(write) -> None:  # type: ignore[no-untyped-def]
    text = GOOD.replace("- kind: distill", "- kind: distill\n  - {kind: distill, id: again, teacher: distill}")
    assert [stage.name for stage in load(write(text)).recipe.stages] == ["finetune", "distill", "again"]


def test_text_that_is_not_yaml_names_the_line(write) -> None:  # type: ignore[no-untyped-def]
    found = faults(write("schema: 1\nname: [x\ntask: toy\n"))
    assert found[0].startswith("a.yaml:3: is not YAML: ")


def test_an_empty_file_and_a_list_are_no_recipes(write) -> None:  # type: ignore[no-untyped-def]
    assert "a recipe is a mapping" in faults(write(""))[0]
    assert "got list" in faults(write("- 1\n"))[0]


def test_a_missing_file_names_the_nearest(write) -> None:  # type: ignore[no-untyped-def]
    write(GOOD)
    with pytest.raises(UsageError, match=r"recipe b.yaml: there is no such file; did you mean 'a.yaml'\?"):
        load(Path("b.yaml"))


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("stages.finetune.epochs=7", lambda r: r.stages[0].epochs == 7),
        ("stages.0.epochs=7", lambda r: r.stages[0].epochs == 7),
        ("stages[0].epochs=7", lambda r: r.stages[0].epochs == 7),
        ("targets.small.stages.export.opset=17", lambda r: r.targets[1].stages[0].opset == 17),
        ("task.train_rows=2000", lambda r: r.task.train_rows == 2000 and r.task.name == "toy"),
        ("measure.batch=8", lambda r: r.measure.batch == 8),
        ("gates={metric_drop_pp: 1.5}", lambda r: r.gates.metric_drop_pp == 1.5),
        ("seed=3", lambda r: r.seed == 3),
    ],
)
def test_set_reaches_every_part(write, override: str, read) -> None:  # type: ignore[no-untyped-def]
    assert read(load(write(GOOD), [override]).recipe)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "must be PATH=VALUE"),
        ("stages.finetun.epochs=1", "nothing here is called 'finetun'; did you mean 'finetune'?"),
        ("name.x.y=1", "'name' is a value, it has no 'x'"),
        ("seed=[1", "the value is not YAML"),
    ],
)
def test_a_wrong_set_says_what_is_wrong(write, override: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        load(write(GOOD), [override])
    assert expected in str(caught.value)


def test_an_unknown_key_by_set_is_an_error(write) -> None:  # type: ignore[no-untyped-def]
    assert any("unknown key 'epocs'; did you mean 'epochs'?" in fault for fault in faults(write(GOOD), "stages.finetune.epocs=1"))


def test_the_digest_follows_text_and_overrides(write) -> None:  # type: ignore[no-untyped-def]
    digests = {load(write(GOOD)).sha256, load(write(GOOD), ["seed=0"]).sha256, load(write(GOOD + "\n")).sha256}
    assert len(digests) == 3


@cache
def validator() -> Any:
    """Of the published schema, which takes longer to check than a recipe."""
    schema = json_schema()
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@pytest.mark.parametrize("file", [*sorted(RECIPES.rglob("*.yaml")), RECIPES.parent / "benchmarks" / "kill.yaml"], ids=lambda f: f.stem)
def test_every_recipe_loads_and_fits_the_published_schema(file: Path) -> None:
    loaded: LoadedRecipe = load(file)
    assert loaded.recipe.name == file.stem
    validator().validate(yaml.safe_load(file.read_text()))


def test_there_is_a_recipe_for_each_subset_of_the_three_methods() -> None:
    assert {file.stem for file in RECIPES.glob("*.yaml")} >= {"none", "q", "d", "p", "qd", "qp", "dp", "qdp"}


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("abc:-[]{}", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "name", "stages", "id", "after", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(stages=yaml_values, targets=yaml_values, task=yaml_values)
def test_no_recipe_gives_anything_but_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, stages: object, targets: object, task: object
) -> None:
    file = tmp_path_factory.mktemp("r") / "a.yaml"
    file.write_text(yaml.safe_dump({"schema": 1, "name": "x", "task": task, "stages": stages, "targets": targets}))
    with pytest.raises(RecipeError):
        load(file)
