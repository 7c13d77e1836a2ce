"""Taking pieces out of random tokenizers: what the library then makes of random texts."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from models import random_checkpoint
from onnxsqueeze.errors import ModelError
from onnxsqueeze.splitting import ByteLevelBpe, merges_of
from onnxsqueeze.vocabulary import Reading, Vocabulary

# "z" and "☃" are no pieces of the WordPiece vocabularies: words with them are unknown. Of the byte-level ones every text is readable.
TEXT = st.text("aaabbbccdz☃ .", max_size=30)
TEXTS = st.lists(TEXT, min_size=1, max_size=8)
LIMITS = st.tuples(st.integers(1, 4), st.none() | st.integers(0, 12))


@st.composite
def word_pieces(draw: st.DrawFn) -> Tokenizer:
    """A vocabulary that can read every word of a, b, c and d, with longer pieces by chance, in an order by chance."""
    longer = draw(st.sets(st.tuples(st.sampled_from(["", "##"]), st.text("abcd", min_size=2, max_size=5)), max_size=25))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *"abcd", *(f"##{c}" for c in "abcd"), *sorted(a + b for a, b in longer)]
    order = draw(st.permutations(pieces))
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(order)}, unk_token="[UNK]", max_input_chars_per_word=12))  # noqa: S106, no password
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    ends = [(name, order.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends)
    return tokenizer


@st.composite
def byte_pairs(draw: st.DrawFn) -> Tokenizer:
    """Merges by chance over the byte alphabet, some of which make one piece in two ways."""
    pieces = ["a", "b", "c", "d", "Ġ", "z"]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 25))):
        pair = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if len("".join(pair)) <= 6 and pair not in merges:
            merges.append(pair)
            pieces.append("".join(pair))
    every = ["<s>", "<pad>", "</s>", "<unk>", *pre_tokenizers.ByteLevel.alphabet(), *pieces]
    order, turn = sorted(set(every)), draw(st.integers(0, 300))
    vocabulary = {piece: i for i, piece in enumerate(order[turn:] + order[:turn])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))  # noqa: S106, no password
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]))
    return tokenizer


ANY = st.one_of(word_pieces(), byte_pairs())


class Pruned:
    """A tokenizer before and after ``texts`` and the limits decided what stays."""

    def __init__(self, before: Tokenizer, texts: list[str], min_count: int = 1, spare: int | None = None) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder, out = Path(place) / "before", Path(place) / "after"
            folder.mkdir()
            out.mkdir()
            before.save(str(folder / "tokenizer.json"))
            self.vocabulary = Vocabulary(folder)
            self.words = self.vocabulary.words(texts)
            self.size = None if spare is None else len(self.vocabulary.always) + spare
            self.kept = self.vocabulary.choose(self.words, min_count=min_count, size=self.size)
            self.vocabulary.write(self.kept, out)
            self.before, self.after = before, Tokenizer.from_file(str(out / "tokenizer.json"))
            self.data = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))


def cut(tokenizer: Tokenizer, text: str) -> list[str]:
    tokens: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
    return tokens


def by_word(tokenizer: Tokenizer, text: str) -> list[str | None]:
    """What is written in each word's tokens; None for a word that is unknown."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    words: dict[int, list[str]] = {}
    for token, word in zip(encoding.tokens, encoding.word_ids, strict=True):
        words.setdefault(word, []).append(token)
    return [None if "[UNK]" in tokens else tokens[0] + "".join(t.removeprefix("##") for t in tokens[1:]) for tokens in words.values()]


@settings(max_examples=100, deadline=None)
@given(ANY, TEXTS, LIMITS, TEXTS)
def test_a_text_is_made_of_what_stayed_and_nothing_readable_becomes_unknown(
    tokenizer: Tokenizer, texts: list[str], limits: tuple[int, int | None], others: list[str]
) -> None:
    pruned = Pruned(tokenizer, texts, *limits)
    for text in (*texts, *others):
        assert set(cut(pruned.after, text)) <= pruned.kept
        assert by_word(pruned.after, text) == by_word(tokenizer, text)


@settings(max_examples=100, deadline=None)
@given(ANY, TEXTS, LIMITS, TEXTS)
def test_a_text_whose_pieces_all_stayed_is_cut_as_before(
    tokenizer: Tokenizer, texts: list[str], limits: tuple[int, int | None], others: list[str]
) -> None:
    pruned = Pruned(tokenizer, texts, *limits)
    ids = pruned.vocabulary.kept_ids(pruned.kept)
    for text in (*texts, *others):
        before = tokenizer.encode(text, text)  # with the special tokens of a pair
        if set(before.tokens) <= pruned.kept:
            after = pruned.after.encode(text, text)
            assert after.tokens == before.tokens
            assert [ids[i] for i in after.ids] == before.ids


@settings(max_examples=60, deadline=None)
@given(ANY, TEXTS)
def test_without_limits_the_texts_are_cut_as_before(tokenizer: Tokenizer, texts: list[str]) -> None:
    pruned = Pruned(tokenizer, texts)
    for text in texts:
        assert cut(pruned.after, text) == cut(tokenizer, text)


@settings(max_examples=100, deadline=None)
@given(ANY, TEXTS, LIMITS)
def test_what_stays_is_used_often_enough_as_the_remaining_pieces_cut_the_texts(
    tokenizer: Tokenizer, texts: list[str], limits: tuple[int, int | None]
) -> None:
    pruned = Pruned(tokenizer, texts, *limits)
    used = Counter(token for text in texts for token in cut(pruned.after, text))
    parts = {part for pair in merges_of(pruned.data["model"]) for part in pair} if "merges" in pruned.data["model"] else set()
    for piece in pruned.kept - pruned.vocabulary.always - parts:  # parts are needed by what is made of them
        assert used[piece] >= limits[0]
    assert pruned.size is None or len(pruned.kept) <= pruned.size


@settings(max_examples=60, deadline=None)
@given(ANY, TEXTS)
def test_words_are_cut_here_as_the_library_cuts_them(tokenizer: Tokenizer, texts: list[str]) -> None:
    vocabulary = Pruned(tokenizer, texts).vocabulary
    splitting = vocabulary._splitting()
    ours = Counter[str]()
    for word, n in vocabulary.words(texts).items():
        for piece in splitting.split(word):
            ours[piece] += n
    theirs = Counter(token for text in texts for token in cut(tokenizer, text) if token != "[UNK]")  # noqa: S105, no password
    assert ours == theirs


def small(pieces: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(["[UNK]", *pieces])}, unk_token="[UNK]"))  # noqa: S106, no password
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


LETTERS = [*"abcd", *(f"##{c}" for c in "abcd")]


def test_what_a_rare_piece_falls_back_to_is_counted_and_kept() -> None:
    pruned = Pruned(small([*LETTERS, "abc", "ab", "bc"]), ["abc abc abd ab"], min_count=3)
    assert pruned.kept - set(LETTERS) == {"[UNK]", "ab"}, "'ab' occurs twice, and four times once 'abc' is gone"
    assert cut(pruned.after, "abc abd") == ["ab", "##c", "ab", "##d"]


def test_a_limit_takes_the_rarest_first() -> None:
    tokenizer = small([*LETTERS, "ab", "cd", "da"])
    assert Pruned(tokenizer, ["ab ab ab cd da da"], spare=2).kept - set(LETTERS) == {"[UNK]", "ab", "da"}
    assert Pruned(tokenizer, ["ab ab ab cd da da"], spare=1).kept - set(LETTERS) == {"[UNK]", "ab"}


def test_a_limit_below_what_always_stays_is_refused() -> None:
    with pytest.raises(ValueError, match="size is below 9"):
        Pruned(small([*LETTERS, "ab"]), ["ab"], spare=-1)


def test_merges_that_make_or_use_a_removed_piece_go_and_those_that_lead_to_a_kept_one_stay() -> None:
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc", "abcd", "cd", "bc"]
    merges = [("a", "b"), ("ab", "c"), ("c", "d"), ("abc", "d"), ("b", "c")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pruned = Pruned(tokenizer, ["abc", "cd"])
    assert cut(tokenizer, "abcd") == ["abcd"]
    assert pruned.data["model"]["merges"] == [["a", "b"], ["ab", "c"], ["c", "d"]], "'ab' never occurs, but 'abc' is made of it"
    assert cut(pruned.after, "abcd") == ["abc", "d"]
    assert cut(pruned.after, "bc") == ["b", "c"]


def test_what_is_made_of_a_removed_piece_goes_with_it_though_another_merge_makes_it_too() -> None:
    merges = [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]
    splitting = ByteLevelBpe({"vocab": {piece: i for i, piece in enumerate(["a", "b", "c", "ab", "abc", "bc"])}, "merges": merges})
    assert splitting.split("abc") == ["abc"]
    assert splitting.needs("abc") == {"a", "b", "c", "ab", "bc", "abc"}
    splitting.take("ab")
    assert splitting.split("abc") == ["a", "bc"]


def test_words_inside_added_tokens_are_none_and_added_tokens_stay(tmp_path: Path) -> None:
    tokenizer = small([*LETTERS, "abcd", "dcba"])
    tokenizer.add_tokens(["<abcd>", "dcba"])
    pruned = Pruned(tokenizer, ["<abcd> dcba ab"])
    assert dict(pruned.words) == {"ab": 1}
    assert pruned.kept == {"[UNK]", "<abcd>", "dcba", *LETTERS}
    assert cut(pruned.after, "<abcd>dcba abcd") == ["<abcd>", "dcba", "a", "##b", "##c", "##d"]
    assert pruned.after.get_vocab_size() == len(pruned.kept)


def refusal(tmp_path: Path, tokenizer: Tokenizer, **changes: Any) -> str:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    for key, change in changes.items():
        data[key].update(change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError) as caught:
        Vocabulary(tmp_path)
    return str(caught.value)


def test_other_kinds_of_tokenizers_are_refused_by_name_with_what_would_have_to_be_written(tmp_path: Path) -> None:
    message = refusal(tmp_path, Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0)))
    assert "model Unigram: its pieces cannot be taken out yet; known: WordPiece, byte-level BPE" in message
    assert "a class beside WordPiece in onnxsqueeze/splitting.py" in message
    assert "model WordLevel" in refusal(tmp_path, Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))  # noqa: S106, no password


def test_other_kinds_of_bpe_are_refused_by_name(tmp_path: Path) -> None:
    plain = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    assert "model BPE without a ByteLevel pre-tokenizer" in refusal(tmp_path, plain)
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    assert "model BPE with ignore_merges: true" in refusal(tmp_path, plain, model={"ignore_merges": True})
    assert "model BPE with end_of_word_suffix" in refusal(tmp_path, plain, model={"end_of_word_suffix": "</w>"})


def test_a_piece_with_a_character_that_is_none_by_itself_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, small([*LETTERS, "abµ", "##µd"]))
    assert "2 pieces hold a character that is no piece by itself, first 'abµ'" in message
    small([*LETTERS, "[ab]", "a.b"]).save(str(tmp_path / "tokenizer.json"))
    Vocabulary(tmp_path)  # no text reaches these: brackets and dots are words by themselves


def test_an_unknown_post_processor_and_an_id_of_no_token_are_refused(tmp_path: Path) -> None:
    tokenizer = small(LETTERS)
    tokenizer.post_processor = processors.BertProcessing(("[UNK]", 77), ("[UNK]", 0))
    assert "names the id 77, which is no token's" in refusal(tmp_path, tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Vocabulary(tmp_path)


def test_a_reading_counts_tokens_texts_that_changed_and_those_cut_off(tmp_path: Path) -> None:
    for name, pieces in (("before", ["abcd"]), ("after", [])):
        (tmp_path / name).mkdir()
        small([*LETTERS, *pieces]).save(str(tmp_path / name / "tokenizer.json"))
    reading = Reading(tmp_path / "before", tmp_path / "after", max_length=4)
    reading.add([("ab", None), ("abcd z", None), ("ab", "abcd")])
    assert reading.changed == [1, 2]
    assert reading.details() == {
        "texts": 3,
        "tokens_per_text_before": (2 + 2 + 3) / 3,
        "tokens_per_text": (2 + 5 + 6) / 3,
        "changed_pct": pytest.approx(200 / 3),
        "unknown_pct_before": pytest.approx(100 / 7),
        "unknown_pct": pytest.approx(100 / 13),
        "cut_pct_before": 0.0,
        "cut_pct": pytest.approx(200 / 3),
    }


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_test_models_tokenizers_are_known(tmp_path: Path, name: Any) -> None:
    vocabulary = Vocabulary(random_checkpoint(tmp_path, name))
    assert {"[CLS]", "##a"} <= vocabulary.always or {"<s>", "Ġ"} <= vocabulary.always
