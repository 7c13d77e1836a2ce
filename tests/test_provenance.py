"""What a published .onnx says of itself: true, small, in nobody's way, and the recipe comes back out of it."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from models import random_checkpoint
from onnxsqueeze import graph
from onnxsqueeze.artifact import file_sha256
from onnxsqueeze.errors import ModelError
from onnxsqueeze.measure.size import measure_size
from onnxsqueeze.models import resolve
from onnxsqueeze.pipeline import Outcome
from onnxsqueeze.provenance import KEY, RECIPE_KEY, Provenance, decode, encode, recipe_of
from onnxsqueeze.recipe import load
from runs import RECIPES, SMALL, command, run

RECIPE = """\
# A comment that stays.
schema: 1
name: own
task: toy
stages: [{kind: finetune}]
targets:
  - {name: fp32, after: finetune, baseline: true, stages: [{kind: export}]}
  - {name: int8, stages: [{kind: export}, {kind: quantize-dynamic}]}
  - {name: packed, stages: [{kind: export}, {kind: quantize-dynamic}, {kind: pack, dense: true}]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card, a recipe, and a store."""
    folder = tmp_path_factory.mktemp("provenance")
    model = random_checkpoint(folder / "tiny-bert", "bert", layers=2, head=False)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (folder / "own.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def ran(place: Path) -> Outcome:
    return run(place / "own.yaml", place / "out", model=place / "tiny-bert", store=place / "store", overrides=SMALL, seed=3)[0]


def noted(file: Path) -> tuple[Provenance, str]:
    return decode(onnx.load(str(file), load_external_data=False), file.name)


def test_every_published_file_says_what_the_record_says(ran: Outcome) -> None:
    files = sorted(ran.out.rglob("*.onnx"))
    assert [file.relative_to(ran.out).as_posix() for file in files] == [
        "fp32/model.onnx",
        "int8/model.onnx",
        "packed/dense/model.onnx",
        "packed/model.onnx",
    ]
    record = ran.results
    for file in files:
        name = file.relative_to(ran.out).parts[0]
        target = next(t for t in record.targets if t.name == name)
        found, _ = noted(file)
        assert (found.target, found.backend, found.runtime) == (name, "cpu", target.runtime)
        assert (found.recipe_sha256, found.model, found.model_sha256) == (record.recipe_sha256, "tiny-bert", record.model_sha256)
        assert (found.license, found.seed, found.task) == ("mit", 3, "toy")
        assert found.stages == tuple(stage.id for stage in target.stages)
        assert found.metric is not None
        measured = target.metrics["validation"]["accuracy"]
        assert (found.metric.name, found.metric.split, found.metric.n) == ("accuracy", "validation", measured.n)
        assert found.metric.value == pytest.approx(measured.value, abs=1e-6)
        assert found.metric.ci95 == pytest.approx(measured.ci95, abs=1e-6)
        splits = (*record.task.training, *record.task.splits)
        assert [(r.split, r.role, r.n, r.sha256) for r in found.rows] == [(s.name, s.role, s.n, s.sha256) for s in splits]
        assert found.versions["onnxruntime"] == ort.__version__
        assert found.onnxsqueeze == record.environment.versions["onnxsqueeze"]


def test_only_the_metadata_differs_from_what_was_measured_and_outputs_are_equal_to_the_bit(ran: Outcome, place: Path) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(5, 60, (3, 17))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    for target in ran.results.targets:
        made = place / "store" / "artifacts" / str(target.stages[-1].key) / "files" / "model.onnx"
        file = ran.out / str(target.model)
        before, after = made.read_bytes(), file.read_bytes()
        assert after[: len(before)] == before
        assert len(after) - len(before) == target.size_provenance_bytes
        plain, published = onnx.load(str(made)), onnx.load(str(file))
        assert {entry.key for entry in published.metadata_props} - {entry.key for entry in plain.metadata_props} == {KEY, RECIPE_KEY}
        del published.metadata_props[-2:]
        assert published.SerializeToString(deterministic=True) == plain.SerializeToString(deterministic=True)
        graph.check(file, like=made)
        outputs = [ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0] for path in (made, file)]
        np.testing.assert_array_equal(outputs[0].view(np.int32), outputs[1].view(np.int32))


def test_sizes_and_digests_of_the_record_are_those_of_the_published_files(ran: Outcome) -> None:
    for target in ran.results.targets:
        size = measure_size(ran.out / target.name)
        assert target.size_bytes == size.size_bytes
        assert target.size_dense_bytes == size.size_dense_bytes
        assert target.size_parts_bytes is not None
        assert sum(target.size_parts_bytes.model_dump().values()) == size.size_bytes
        # compressed apart from the file, whose codes do not fit it
        assert target.size_gzip_bytes == pytest.approx(size.size_gzip_bytes, abs=400)
        assert target.size_dense_gzip_bytes == pytest.approx(size.size_dense_gzip_bytes, abs=400)
        assert target.size_dense_zstd_bytes == pytest.approx(size.size_dense_zstd_bytes, abs=400)
        here = {f.path.removeprefix(f"{target.name}/"): (f.sha256, f.bytes) for f in target.files}
        assert here == {f.path: (f.sha256, f.bytes) for f in size.files if f.path != "golden.json"}
        golden = json.loads((ran.out / target.name / "golden.json").read_text())
        assert golden["sha256"]["model.onnx"] == file_sha256(ran.out / target.name / "model.onnx")


def test_the_same_command_writes_the_same_bytes_and_another_seed_others(ran: Outcome, place: Path) -> None:
    digests = {f.path: f.sha256 for t in ran.results.targets for f in t.files}
    again, _ = run(place / "own.yaml", place / "again", model=place / "tiny-bert", store=place / "store", overrides=SMALL, seed=3)
    assert {f.path: f.sha256 for t in again.results.targets for f in t.files} == digests
    for path, digest in digests.items():
        assert file_sha256(place / "again" / path) == digest


def test_it_is_small_and_names_no_path_of_this_machine(ran: Outcome, place: Path) -> None:
    for target in ran.results.targets:
        assert target.size_provenance_bytes is not None
        assert target.size_provenance_bytes < 3000
        found = {e.key: e.value for e in onnx.load(str(ran.out / str(target.model))).metadata_props}
        text = found[KEY] + zlib.decompress(base64.b64decode(found[RECIPE_KEY]), -15).decode()
        assert str(place) not in text
        assert not re.search(r"(?<![\w/.:<])/(home|root|tmp|usr|work|mnt)/", text)


@pytest.mark.parametrize("recipe", ["quantization", "size"])
def test_the_longest_recipes_take_a_few_kilobytes(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert len(encode(made_up(), text)) < 4096


def made_up(**fields: object) -> Provenance:
    given = {
        "onnxsqueeze": "1", "target": "t", "backend": "cpu", "stages": ("export",), "recipe": "own", "recipe_sha256": "0" * 64,
        "model": "m", "model_sha256": "1" * 64, "task": "toy", "rows": (), "seed": 0, "versions": {}, **fields,
    }  # fmt: skip
    return Provenance.model_validate(given)


def test_a_recipe_comes_back_as_it_was_written_or_with_what_the_command_line_put_in(ran: Outcome, place: Path, tmp_path: Path) -> None:
    found, text = noted(ran.out / "int8" / "model.onnx")
    assert text == RECIPE
    assert recipe_of(made_up(), text, "x") == RECIPE
    (tmp_path / "back.yaml").write_text(recipe_of(found, text, "x"))
    back, given = load(tmp_path / "back.yaml").recipe, load(place / "own.yaml", [*SMALL, "seed=3", "model=tiny-bert"]).recipe
    assert back == given
    assert back.stages[0].model_dump()["epochs"] == 1
    assert command("check", "back.yaml", cwd=tmp_path).returncode == 0


def test_another_task_is_in_the_recipe_that_comes_back(tmp_path: Path) -> None:
    text = RECIPE.replace("task: toy", "task: {name: toy, max_length: 32}")
    options = ('task={"name": "sst2", "max_length": 32}', "seed=4")
    (tmp_path / "back.yaml").write_text(recipe_of(made_up(overrides=("task.train_rows=9",), options=options), text, "x"))
    recipe = load(tmp_path / "back.yaml").recipe
    assert (recipe.task.name, recipe.task.max_length, recipe.seed) == ("sst2", 32, 4)


def test_an_absolute_path_in_a_recipe_leaves_its_last_part(tmp_path: Path) -> None:
    text = RECIPE.replace("task: toy", "task: {train: /home/alice/data/a.csv, dev: /home/alice/data/b.csv, text: x, label: y, metric: f1}")
    note = onnx.ModelProto.FromString(encode(made_up(), text))
    _, kept = decode(note, "x")
    assert "alice" not in kept
    (tmp_path / "back.yaml").write_text(kept)
    assert [str(path) for path in (load(tmp_path / "back.yaml").recipe.task.train, load(tmp_path / "back.yaml").recipe.task.dev)] == [
        "a.csv",
        "b.csv",
    ]


def a_bomb() -> bytes:
    """256 MiB of spaces as raw deflate: a block that refers to nothing before it, many times."""
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return 256 * block + packer.flush()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "carries no provenance"),
        ({KEY: "{}", RECIPE_KEY: ""}, "its provenance cannot be read"),
        ({KEY: "not json", RECIPE_KEY: "AA=="}, "its provenance cannot be read"),
        ({KEY: made_up().model_dump_json()}, "its provenance cannot be read"),
        ({KEY: made_up().model_dump_json(), RECIPE_KEY: "!"}, "its provenance cannot be read"),
        ({KEY: made_up().model_dump_json(), RECIPE_KEY: base64.b64encode(a_bomb()).decode()}, "longer than"),
    ],
    ids=["none", "lacks", "no json", "no recipe", "no base64", "a bomb"],
)  # fmt: skip
def test_what_cannot_be_read_is_told(entries: dict[str, str], message: str) -> None:
    model = onnx.ModelProto()
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    with pytest.raises(ModelError, match=f"x.onnx: .*{message}") as raised:
        decode(model, "x.onnx")
    assert raised.value.remedy


def test_a_licence_is_what_the_models_card_says(place: Path, tmp_path: Path) -> None:
    assert resolve("minilm").license == "apache-2.0"
    bare = random_checkpoint(tmp_path / "bare", "bert", layers=1)
    assert resolve(str(bare)).license is None
    for card in ("---\nlicense: [\n---\n", "# no front matter\n", "---\nlicense: other\n---\n"):
        (bare / "README.md").write_text(card)
        assert resolve(str(bare)).license is None
    assert resolve(str(place / "tiny-bert")).license == "mit"


def test_the_digest_of_a_model_does_not_depend_on_its_card(tmp_path: Path) -> None:
    bare = random_checkpoint(tmp_path / "bare", "bert", layers=1)
    before = resolve(str(bare)).artifact.digest
    (bare / "README.md").write_text("---\nlicense: mit\n---\n")
    assert resolve(str(bare)).artifact.digest == before
