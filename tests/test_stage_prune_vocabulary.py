from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertTokenizer, RobertaTokenizer

from crossed import first
from exports import build
from models import FAMILIES, GOOD, FamilyName, artifact, random_checkpoint, run_stage, toy_context, toy_task
from onnxsqueeze import models
from onnxsqueeze.errors import ModelError, StageError
from onnxsqueeze.nn import batches, checkpoint, training
from onnxsqueeze.nn.family import FAMILIES as DESCRIBED
from onnxsqueeze.stage import Context
from onnxsqueeze.stages import calibration
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.prune_vocabulary import PruneVocabulary
from onnxsqueeze.tasks.rows import Row, SplitRows
from onnxsqueeze.tokens import Encoder, pad


def training_rows(folder: Path, texts: list[str], selection: list[str] | None = None, **changes: Any) -> Context:
    """A context whose training rows are these texts."""
    context = toy_context(folder, **changes)
    train, chosen = ([Row(text, None, 0) for text in some] for some in (texts, selection or texts))
    return replace(
        context,
        train=SplitRows("train", train, "generated", "0" * 64, "train"),
        selection=SplitRows("selection", chosen, "generated", "1" * 64, "selection"),
    )


def tokenizer_of(folder: Path) -> Any:
    import transformers

    hf: Any = transformers  # most of its functions have no types
    return hf.AutoTokenizer.from_pretrained(folder)


def words_of(folder: Path) -> torch.Tensor:
    family = DESCRIBED[json.loads((folder / "config.json").read_text())["model_type"]]
    weights = load_file(folder / "model.safetensors")
    return next(weights[f"{name}.weight"] for name in (family.table_of_words, family.words) if f"{name}.weight" in weights)


def logits(folder: Path, context: Context, texts: list[str]) -> Any:
    model, family = checkpoint.load(folder, context.task)
    return training.predict(model, family, batches.encode(folder, [Row(text, None, 0) for text in texts], 32))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_reloads_and_its_files_agree(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    before = len(words_of(parent))
    out, changed = run_stage(PruneVocabulary(), parent, tmp_path, context=training_rows(tmp_path, ["a good film .", "the dull plot"]))
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []
    rows = len(words_of(out))
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == rows
    assert changed.count == before - rows == changed.details["rows_before"] - changed.details["rows"] > 0
    tokenizer = tokenizer_of(out)
    assert len(tokenizer) == rows
    assert sorted(tokenizer.get_vocab().values()) == list(range(rows))
    old = tokenizer_of(parent)
    for role in ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"):
        assert getattr(tokenizer, role) == getattr(old, role)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer("a good film .").input_ids == list(Encoder(out, 32).encode(["a good film ."], [None])[0].ids)
    table, source, ids = words_of(out), words_of(parent), old.get_vocab()
    for token, id_ in tokenizer.get_vocab().items():
        assert torch.equal(table[id_], source[ids[token]])


@first("name", FAMILIES)
def test_texts_whose_pieces_all_stayed_get_the_same_logits_bit_for_bit_and_through_the_onnx_too(tmp_path: Path, name: FamilyName) -> None:
    parent = random_checkpoint(tmp_path / "parent", name)
    context = toy_context(tmp_path, pairs=True)
    out, changed = run_stage(PruneVocabulary(), parent, tmp_path, context=context)
    assert changed.details["train"]["changed_pct"] == 0
    both = []
    for folder in (parent, out):
        model, family = checkpoint.load(folder, context.task)
        in_torch = training.predict(model, family, batches.encode(folder, context.train.rows, 32))
        exported, _ = build(Export(kind="export"), artifact(folder), tmp_path / f"{folder.name}-onnx", context)
        in_onnx = np.concatenate(calibration.logits(exported.onnx, list(calibration.feeds(exported.onnx, context, 64)), 1))
        both.append((in_torch, in_onnx, exported.onnx.stat().st_size))
    np.testing.assert_array_equal(both[0][0], both[1][0])
    np.testing.assert_array_equal(both[0][1], both[1][1])
    assert both[1][2] < both[0][2]


def swap(folder: Path, one: str, other: str) -> None:
    """Give two tokens each other's id, in tokenizer.json and config.json."""
    tokenizer, config = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("tokenizer", "config"))
    vocab = tokenizer["model"]["vocab"]
    turned = {vocab[one]: vocab[other], vocab[other]: vocab[one]}
    vocab[one], vocab[other] = vocab[other], vocab[one]
    for token in tokenizer["added_tokens"]:
        token["id"] = turned.get(token["id"], token["id"])
    for part in ("cls", "sep"):
        if part in tokenizer["post_processor"]:
            word, id_ = tokenizer["post_processor"][part]
            tokenizer["post_processor"][part] = [word, turned.get(id_, id_)]
    for name, id_ in config.items():
        config[name] = turned.get(id_, id_) if name.endswith("_token_id") else id_
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_padding_id_that_moves_is_renamed_in_the_configuration(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    swap(parent, "[PAD]", "dog")
    texts = ["a good film", "the dull plot of a movie ."]
    context = training_rows(tmp_path, texts)
    out, _ = run_stage(PruneVocabulary(), parent, tmp_path, context=context)
    before, after = (json.loads((folder / "config.json").read_text())["pad_token_id"] for folder in (parent, out))
    assert after == tokenizer_of(out).convert_tokens_to_ids("[PAD]") < before
    np.testing.assert_array_equal(logits(parent, context, texts), logits(out, context, texts))


def test_where_positions_count_from_the_padding_id_it_does_not_move(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "roberta")
    swap(parent, "<s>", "Ġdog")  # below the padding's id there is now a piece that no row has
    texts = ["a good film", "the dull plot of a movie ."]
    context = training_rows(tmp_path, texts)
    out, changed = run_stage(PruneVocabulary(), parent, tmp_path, context=context)
    assert changed.count > 0
    np.testing.assert_array_equal(logits(parent, context, texts), logits(out, context, texts))


def test_words_without_a_piece_fall_back_to_letters_and_stay_readable(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    out, _ = run_stage(PruneVocabulary(), parent, tmp_path, context=training_rows(tmp_path, ["a good film ."]))
    before, after = (tokenizer_of(folder) for folder in (parent, out))
    assert before.tokenize("good story") == ["good", "story"]
    assert after.tokenize("good story") == ["good", "s", "##t", "##o", "##r", "##y"]
    assert after.tokenize("☃ story")[0] == "[UNK]"


def test_only_training_rows_and_the_corpus_decide_what_stays(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the house\n\nnever\n", encoding="utf-8")
    one, _ = run_stage(PruneVocabulary(), parent, tmp_path / "one", context=training_rows(tmp_path, ["a film"], ["good city"]))
    two, _ = run_stage(PruneVocabulary(), parent, tmp_path / "two", context=training_rows(tmp_path, ["a film"], ["dull dog"]))
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    more, _ = run_stage(
        PruneVocabulary(corpus=corpus), parent, tmp_path / "more", context=training_rows(tmp_path, ["a film"], ["good city"])
    )
    few, many = (set(tokenizer_of(folder).get_vocab()) for folder in (one, more))
    assert many - few == {"the", "house", "never"}
    assert "good" not in few


def test_rare_pieces_go_and_so_do_those_beyond_the_size(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    context = training_rows(tmp_path, ["good film", "good plot", "good film dull", "good"])
    _, all_ = run_stage(PruneVocabulary(), parent, tmp_path / "all", context=context)
    twice, changed = run_stage(PruneVocabulary(min_count=2), parent, tmp_path / "twice", context=context)
    assert changed.details["rows"] == all_.details["rows"] - 2 == all_.details["always_kept"] + 2
    assert changed.details["train"]["changed_pct"] == 50
    size = all_.details["always_kept"] + 1
    one, changed = run_stage(PruneVocabulary(size=size), parent, tmp_path / "one", context=context)
    assert changed.details["rows"] == size == len(words_of(one))
    assert set(tokenizer_of(twice).get_vocab()) - set(tokenizer_of(one).get_vocab()) == {"film"}


def test_a_size_that_cannot_be_is_refused(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    with pytest.raises(StageError, match=r"prune-vocabulary: size: must be at least \d+, the special tokens .*, got 20"):
        run_stage(PruneVocabulary(size=20), parent, tmp_path)
    config = json.loads((parent / "config.json").read_text())
    rows = config["vocab_size"]
    assert PruneVocabulary(size=rows).misfit(config) == f"size: must be below {rows}, the model's rows, got {rows}"
    assert PruneVocabulary(size=rows - 1).misfit(config) is None


def test_the_record_says_what_happens_out_of_domain(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    texts = ["a good film", "the house was never so new ☃", "his music made her day", "city dog woman", "they do have one"]
    (tmp_path / "other.txt").write_text("\n".join(texts), encoding="utf-8")
    context = training_rows(tmp_path, ["a good film ."])
    out, changed = run_stage(PruneVocabulary(out_of_domain=tmp_path / "other.txt"), parent, tmp_path, context=context)
    found = changed.details["out_of_domain"]
    assert found["texts"] == 5
    assert found["changed_pct"] == 80
    assert found["tokens_per_text_before"] < found["tokens_per_text"]
    assert 0 < found["unknown_pct"] < found["unknown_pct_before"], "as many unknown tokens among more"
    same = logits(parent, context, texts).argmax(1) == logits(out, context, texts).argmax(1)
    assert found["same_class_pct"] == pytest.approx(100 * same.mean())
    assert changed.details["train"]["texts"] == 1
    assert "same_class_pct" not in changed.details["train"]
    json.dumps(dict(changed.details))


def test_a_score_out_of_domain_has_a_mean_change(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "roberta", outputs=1)
    (tmp_path / "other.txt").write_text("a good film\nnever a dull day\n", encoding="utf-8")
    context = training_rows(tmp_path, ["a good film"], outputs=1)
    out, changed = run_stage(PruneVocabulary(out_of_domain=tmp_path / "other.txt"), parent, tmp_path, context=context)
    moved = np.abs(logits(out, context, ["never a dull day"]) - logits(parent, context, ["never a dull day"]))
    assert changed.details["out_of_domain"]["mean_change"] == pytest.approx(float(moved[0, 0]) / 2, rel=1e-4)


def test_a_model_without_a_head_or_with_classes_of_another_task_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("never a dull day\n", encoding="utf-8")
    stage = PruneVocabulary(out_of_domain=tmp_path / "other.txt")
    plain = random_checkpoint(tmp_path / "plain", "electra", head=False)
    out, changed = run_stage(stage, plain, tmp_path / "a", context=training_rows(tmp_path, ["a good film"]))
    assert not checkpoint.has_trained_head(out)
    assert "same_class_pct" not in changed.details["out_of_domain"]
    assert load_file(out / "model.safetensors").keys() == load_file(plain / "model.safetensors").keys()
    model, _ = checkpoint.load(out, toy_task(), new_head_seed=0)
    assert model.config.vocab_size == changed.details["rows"]
    three = random_checkpoint(tmp_path / "three", "bert", outputs=3)
    out, changed = run_stage(stage, three, tmp_path / "b", context=training_rows(tmp_path, ["a good film"]))
    assert "same_class_pct" in changed.details["out_of_domain"]
    assert json.loads((out / "config.json").read_text())["id2label"] == json.loads((three / "config.json").read_text())["id2label"]


def test_weights_beside_the_vocabulary_are_the_same_bits_and_a_language_models_head_is_left_out(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert", head=True)
    weights = load_file(parent / "model.safetensors")
    save_file({**weights, "cls.predictions.bias": torch.zeros(len(words_of(parent)))}, parent / "model.safetensors", {"format": "pt"})
    out, _ = run_stage(PruneVocabulary(), parent, tmp_path)
    after = load_file(out / "model.safetensors")
    assert after.keys() == weights.keys()
    assert [name for name in after if after[name].shape != weights[name].shape] == ["bert.embeddings.word_embeddings.weight"]
    assert all(torch.equal(after[name], weights[name]) for name in after if "word_embeddings" not in name)


def test_pickled_weights_are_read_and_written_as_safetensors(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "distilbert")
    first, one = run_stage(PruneVocabulary(), parent, tmp_path / "first")
    torch.save(load_file(parent / "model.safetensors"), parent / "pytorch_model.bin")
    (parent / "model.safetensors").unlink()
    second, two = run_stage(PruneVocabulary(), parent, tmp_path / "second")
    assert one.count == two.count
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_pruning_again_finds_nothing(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "roberta")
    once, _ = run_stage(PruneVocabulary(), parent, tmp_path / "once")
    twice, changed = run_stage(PruneVocabulary(), once, tmp_path / "twice")
    assert changed.count == 0, "which the pipeline makes an error"
    assert (once / "model.safetensors").read_bytes() == (twice / "model.safetensors").read_bytes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    weights = load_file(parent / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    save_file({**weights, name: weights[name][:60].clone()}, parent / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"the tokenizer gives ids up to \d+, and the vocabulary matrix has 60 rows"):
        run_stage(PruneVocabulary(), parent, tmp_path)


def test_an_id_of_the_configuration_that_is_no_tokens_is_refused(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "bert")
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "pad_token_id": 4000}))
    with pytest.raises(ModelError, match="names the id 4000, which is no token's"):
        run_stage(PruneVocabulary(), parent, tmp_path)


def test_vocabulary_files_and_settings_beside_tokenizer_json_match_it(tmp_path: Path) -> None:
    bert, roberta = (random_checkpoint(tmp_path / name, name) for name in ("bert", "roberta"))
    model = json.loads((bert / "tokenizer.json").read_text())["model"]
    (bert / "vocab.txt").write_text("".join(f"{piece}\n" for piece in model["vocab"]), encoding="utf-8")
    model = json.loads((roberta / "tokenizer.json").read_text())["model"]
    (roberta / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (roberta / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]), encoding="utf-8")
    texts = ["a good film", "never boring city ."]
    for folder, slow in ((bert, BertTokenizer), (roberta, RobertaTokenizer)):
        out, _ = run_stage(PruneVocabulary(), folder, tmp_path / f"{folder.name}-run", context=training_rows(tmp_path, texts[:1]))
        fast = tokenizer_of(out)
        for text in texts:
            assert slow.from_pretrained(out)(text).input_ids == fast(text).input_ids
        settings = json.loads((out / "tokenizer_config.json").read_text())
        assert {int(i): token["content"] for i, token in settings["added_tokens_decoder"].items()} == {
            fast.convert_tokens_to_ids(token): token for token in fast.all_special_tokens
        }


@pytest.mark.full
def test_two_runs_write_equal_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    parent = random_checkpoint(tmp_path / "parent", "roberta")
    script = (
        "import sys; from pathlib import Path; from models import run_stage; from onnxsqueeze.stages import PruneVocabulary;"
        "run_stage(PruneVocabulary(min_count=9), Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", script, parent, tmp_path / seed], check=True, env=env)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "1" / "out" / name).read_bytes() == (tmp_path / "2" / "out" / name).read_bytes()


def test_the_real_minilm_keeps_its_answers_with_a_tenth_of_its_rows(tmp_path: Path) -> None:
    """Its special tokens stand at 100 and above, so ids really move, and its tokenizer.json has padding and truncation of its own."""
    parent = models.resolve("minilm").artifact.path
    texts = ["An unbelievably good film, said the critics.", "the plot of a dull movie", f"{' '.join(GOOD)} !"]
    other = "Quarterly revenue outpaced analysts' expectations."
    out, changed = run_stage(PruneVocabulary(), parent, tmp_path, context=training_rows(tmp_path, texts))
    assert (changed.details["rows_before"], changed.details["always_kept"]) == (30522, 1999)
    assert 1999 < changed.details["rows"] == 30522 - changed.count < 2050
    answers = []
    for folder in (parent, out):
        model, family = checkpoint.load(folder, toy_task(), new_head_seed=0)
        answers.append(training.predict(model, family, batches.encode(folder, [Row(text, None, 0) for text in texts], 32)))
    np.testing.assert_array_equal(answers[0], answers[1])
    before, after = (tokenizer_of(folder) for folder in (parent, out))
    for text in texts:
        assert after.convert_ids_to_tokens(after(text).input_ids) == before.convert_ids_to_tokens(before(text).input_ids)
    assert "".join(t.removeprefix("##") for t in after.tokenize(other)) == other.lower().replace(" ", "")
    assert BertTokenizer.from_pretrained(out)(other).input_ids == after(other).input_ids
    assert pad(Encoder(out, 32).encode(texts, [None] * 3), 0)["input_ids"].max() < changed.details["rows"]
    assert (out / "model.safetensors").stat().st_size < 0.53 * (parent / "model.safetensors").stat().st_size
