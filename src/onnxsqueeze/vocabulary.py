"""A tokenizer with fewer pieces: which of them some texts need, what a word falls back to without the others, and its files written anew.

Text and JSON alone: no torch, no weights. What stays readable, and why: docs/decisions/vocabulary.md.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from onnxsqueeze.errors import ModelError
from onnxsqueeze.splitting import ByteLevelBpe, Splitting, WordPiece, merges_of

TOKENIZER_FILE = "tokenizer.json"
_AT_ONCE = 4096  # texts that are encoded together: bounds the memory for their encodings

_Item = TypeVar("_Item")


class Vocabulary:
    """The pieces of the tokenizer.json in one model folder.

    ``must_stay`` are ids that stay whatever the texts: those that config.json names. Beside them stay the special and added tokens
    and all pieces of one character.

    Raises ModelError for a file that is missing or broken, and for a kind of tokenizer whose pieces cannot be taken out here.
    """

    def __init__(self, folder: Path, must_stay: Collection[int] = ()) -> None:
        self._folder = folder
        self._tokenizer, self._data = _read(folder)
        self._model: dict[str, Any] = self._data["model"]
        splitting = self._splitting()
        added = {token["content"]: int(token["id"]) for token in self._data.get("added_tokens", [])}
        self.ids: dict[str, int] = {**self._model["vocab"], **added}
        self._by_id = {id_: token for token, id_ in self.ids.items()}
        unknown = self._model.get("unk_token")
        named = {added[token] for token in added} | set(must_stay) | self._ids_elsewhere()
        if unknown is not None:
            named.add(self.ids[unknown])
        strange = sorted(named - self._by_id.keys())
        if strange:
            raise ModelError(
                f"{folder.name}: config.json or {TOKENIZER_FILE} names the id {strange[0]}, which is no token's",
                remedy="correct it: it must be the id of a token in tokenizer.json",
            )
        self._marks = {id_ for id_ in named if self._by_id[id_] in added or self._by_id[id_] == unknown}
        tokens = {self._by_id[id_] for id_ in named} | set(splitting.singles())
        self.always: frozenset[str] = frozenset().union(*(splitting.needs(token) for token in tokens))
        if isinstance(splitting, WordPiece):
            self._require_characters(splitting, added.keys())

    def words(self, texts: Iterable[str]) -> Counter[str]:
        """How often each word occurs in ``texts``, as this tokenizer finds words; what it cannot read and what is an added token left out."""
        splitting, found = self._splitting(), Counter[str]()
        for some in _some(texts):
            for encoding in self._tokenizer.encode_batch(some, add_special_tokens=False):
                pieces: list[str] = []
                last = None
                for id_, piece, word in zip(encoding.ids, encoding.tokens, encoding.word_ids, strict=True):
                    if pieces and (word != last or id_ in self._marks):  # an unknown letter parts a word of byte-level BPE
                        found[splitting.joined(pieces)] += 1
                        pieces = []
                    if id_ not in self._marks:
                        pieces.append(piece)
                    last = word
                if pieces:
                    found[splitting.joined(pieces)] += 1
        return found

    def choose(self, words: Mapping[str, int], *, min_count: int = 1, size: int | None = None) -> frozenset[str]:
        """The tokens that stay: those that always do, and the pieces that ``words`` are cut into, with what these are made of.

        While a piece occurs fewer than ``min_count`` times, or more than ``size`` would stay, the rarest is taken away (of equals the
        longest, then the first by id) and the words that had it are cut anew, so that what they fall back to is counted. So in
        the end every piece beside ``always`` is part of at least ``min_count`` pieces of the words, as the remaining ones cut them.

        Raises ValueError where ``size`` is below the number of those that always stay.
        """
        if size is not None and size < len(self.always):
            raise ValueError(f"size is below {len(self.always)}")
        splitting = self._splitting()
        uses = _Uses(splitting, words, self.always)
        heap = [self._entry(part, n) for part, n in uses.count.items()]
        heapq.heapify(heap)
        while heap:
            n, _, _, rarest = heap[0]
            if uses.count[rarest] != n:  # counted anew since: another entry says how often
                heapq.heappop(heap)
                continue
            if n >= min_count and (size is None or len(self.always) + len(uses.count) <= size):
                break
            splitting.take(rarest)
            for part in uses.cut_anew(rarest):
                heapq.heappush(heap, self._entry(part, uses.count[part]))
        return self.always | uses.count.keys()

    def kept_ids(self, kept: Collection[str]) -> list[int]:
        """The ids of ``kept``, rising; the place of each in this list is its new id."""
        return sorted({self.ids[token] for token in kept})

    def write(self, kept: Collection[str], out: Path) -> None:
        """Write tokenizer.json into ``out`` with ``kept`` alone, ids without gaps in the old order, and those files beside it that hold ids or pieces."""
        new = {old: i for i, old in enumerate(self.kept_ids(kept))}
        vocab = {token: new[id_] for token, id_ in self._model["vocab"].items() if token in kept}
        model = {**self._model, "vocab": vocab}
        if "merges" in model:
            texts = self._model["merges"]
            model["merges"] = [
                text for text, (a, b) in zip(texts, merges_of(self._model), strict=True) if a + b in vocab
            ]  # kept pieces have their parts
            _write(out / "merges.txt", "".join(f"{a} {b}\n" for a, b in merges_of(model)), "#version: 0.2\n", self._folder)
        data = {
            **self._data,
            "added_tokens": [{**token, "id": new[token["id"]]} for token in self._data.get("added_tokens", [])],
            "model": model,
            "post_processor": _renumbered(self._data.get("post_processor"), new.__getitem__),
        }
        if data.get("padding"):
            data["padding"] = {**data["padding"], "pad_id": new[data["padding"]["pad_id"]]}
        (out / TOKENIZER_FILE).write_text(_json(data), encoding="utf-8")
        _write(out / "vocab.txt", "".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__)), "", self._folder)
        _write(out / "vocab.json", _json(vocab), "", self._folder)
        config = self._folder / "tokenizer_config.json"
        if config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
            if "added_tokens_decoder" in settings:
                decoder = settings["added_tokens_decoder"]
                settings["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in decoder.items() if int(old) in new}
            (out / config.name).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _entry(self, piece: str, n: int) -> tuple[int, int, int, str]:
        """The rarest, of equals the longest, then the first by id, sorts first."""
        return n, -len(piece), self.ids[piece], piece

    def _splitting(self) -> WordPiece | ByteLevelBpe:
        kind = self._model.get("type")
        if kind == "WordPiece":
            return WordPiece(self._model)
        if kind != "BPE":
            raise self._unknown(f"model {kind}")
        if not any(step["type"] == "ByteLevel" for step in _steps(self._data.get("pre_tokenizer"), "pretokenizers")):
            raise self._unknown("model BPE without a ByteLevel pre-tokenizer")
        other = [name for name in _OTHER_BPE if self._model.get(name)]
        if other:
            raise self._unknown(f"model BPE with {other[0]}: {json.dumps(self._model[other[0]])}")
        return ByteLevelBpe(self._model)

    def _unknown(self, what: str) -> ModelError:
        return ModelError(
            f"{self._folder.name}: {TOKENIZER_FILE}: {what}: its pieces cannot be taken out yet; known: WordPiece, byte-level BPE",
            remedy="leave the vocabulary as it is, or describe this kind: a class beside WordPiece in onnxsqueeze/splitting.py "
            "(how it cuts a word, what each piece needs, which pieces must stay so that every word can be cut)",
        )

    def _ids_elsewhere(self) -> set[int]:
        """Ids that the post-processor and the padding put in."""
        found: set[int] = set()

        def note(id_: int) -> int:
            found.add(id_)
            return id_

        _renumbered(self._data.get("post_processor"), note)
        if self._data.get("padding"):
            note(self._data["padding"]["pad_id"])
        return found

    def _require_characters(self, splitting: WordPiece, added: Collection[str]) -> None:
        """Raise ModelError where a piece that text can reach holds a character which has no piece of its own."""
        cutter = self._tokenizer.pre_tokenizer
        bare = {piece: piece.removeprefix(self._model["continuing_subword_prefix"]) for piece in self._model["vocab"]}
        lost = [
            piece
            for piece in self._model["vocab"]
            if piece not in added
            and splitting.uncovered(piece)
            and (cutter is None or [word for word, _ in cutter.pre_tokenize_str(bare[piece])] == [bare[piece]])
        ]
        if lost:
            raise ModelError(
                f"{self._folder.name}: {TOKENIZER_FILE}: {len(lost)} pieces hold a character that is no piece by itself, first {lost[0]!r}: "
                "without other pieces, words with it could not be read",
                remedy="leave the vocabulary as it is, or take these pieces out of the tokenizer and the model",
            )


class _Uses:
    """How often each piece is part of a word, pieces that always stay left out. ``count`` holds those alone that occur."""

    def __init__(self, splitting: Splitting, words: Mapping[str, int], always: Collection[str]) -> None:
        self._splitting, self._words, self._always = splitting, words, always
        self.count = Counter[str]()
        self._of: dict[str, list[str]] = {}
        self._users: defaultdict[str, set[str]] = defaultdict(set)
        for word in words:
            self._cut(word)

    def cut_anew(self, piece: str) -> set[str]:
        """Cut every word anew that had ``piece``; the pieces that occur and may do so more or less often than before."""
        changed: set[str] = set()
        for word in list(self._users[piece]):
            for part in self._of[word]:
                changed.add(part)
                self._users[part].discard(word)
                self.count[part] -= self._words[word]
                if not self.count[part]:
                    del self.count[part]
            changed.update(self._cut(word))
        return changed & self.count.keys()

    def _cut(self, word: str) -> list[str]:
        parts = [part for piece in self._splitting.split(word) for part in self._splitting.needs(piece) if part not in self._always]
        self._of[word] = parts
        for part in parts:
            self._users[part].add(word)
            self.count[part] += self._words[word]
        return parts


_OTHER_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")  # settings that cut otherwise


class Reading:
    """What two tokenizers make of the same texts, counted as they come; special tokens around a text do not count."""

    def __init__(self, before: Path, after: Path, max_length: int) -> None:
        both = [_read(folder) for folder in (before, after)]
        self._tokenizers = [tokenizer for tokenizer, _ in both]
        self._unknown = [tokenizer.token_to_id(data["model"].get("unk_token") or "") for tokenizer, data in both]
        self._room = max_length
        self.texts = 0
        self.changed: list[int] = []  # places of the texts that are cut otherwise, counted from 0
        self.tokens, self.unknown, self.too_long = [0, 0], [0, 0], [0, 0]

    def add(self, rows: Iterable[tuple[str, str | None]]) -> None:
        """Count rows: a text and, where the task has pairs, its second one."""
        for some in _some(rows):
            inputs = [text if pair is None else (text, pair) for text, pair in some]
            read = [tokenizer.encode_batch(inputs, add_special_tokens=False) for tokenizer in self._tokenizers]
            for (_, pair), *both in zip(some, *read, strict=True):
                if both[0].tokens != both[1].tokens:
                    self.changed.append(self.texts)
                self.texts += 1
                for i, encoding in enumerate(both):
                    room = self._room - self._tokenizers[i].num_special_tokens_to_add(pair is not None)
                    self.tokens[i] += len(encoding.ids)
                    self.unknown[i] += encoding.ids.count(self._unknown[i])
                    self.too_long[i] += len(encoding.ids) > room

    def details(self) -> dict[str, Any]:
        """For the record. ``_pct`` of texts, of unknown tokens that of all tokens; ``cut`` are texts longer than the task's max_length."""
        texts, words = max(self.texts, 1), [max(n, 1) for n in self.tokens]
        return {
            "texts": self.texts,
            "tokens_per_text_before": self.tokens[0] / texts,
            "tokens_per_text": self.tokens[1] / texts,
            "changed_pct": 100 * len(self.changed) / texts,
            "unknown_pct_before": 100 * self.unknown[0] / words[0],
            "unknown_pct": 100 * self.unknown[1] / words[1],
            "cut_pct_before": 100 * self.too_long[0] / texts,
            "cut_pct": 100 * self.too_long[1] / texts,
        }


def _read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of a model folder, without padding and truncation, and its file as JSON."""
    from tokenizers import Tokenizer

    try:
        text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a broken file
        raise ModelError(
            f"{folder.name}: {TOKENIZER_FILE} cannot be read: {error}",
            remedy="save the model's fast tokenizer beside its weights (tokenizer.save_pretrained)",
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, json.loads(text)


def _some(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """``items`` in lists of bounded length."""
    rest = iter(items)
    while some := list(islice(rest, _AT_ONCE)):
        yield some


def _renumbered(processor: Any, renumber: Callable[[int], int]) -> Any:
    """A post-processor with its ids replaced. Raises ModelError for one that is not known."""
    if processor is None:
        return None
    kind = processor["type"]
    if kind == "Sequence":
        return {**processor, "processors": [_renumbered(one, renumber) for one in processor["processors"]]}
    if kind == "TemplateProcessing":
        tokens = {name: {**token, "ids": [renumber(id_) for id_ in token["ids"]]} for name, token in processor["special_tokens"].items()}
        return {**processor, "special_tokens": tokens}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**processor, **{name: [processor[name][0], renumber(processor[name][1])] for name in ("sep", "cls")}}
    if kind == "ByteLevel":
        return processor
    raise ModelError(
        f"{TOKENIZER_FILE}: post_processor {kind}: its ids cannot be renumbered yet; known: Sequence, TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel",
        remedy="leave the vocabulary as it is, or say in onnxsqueeze/vocabulary.py where this post-processor holds ids",
    )


def _steps(step: Any, name: str) -> list[Any]:
    """The parts of a tokenizer's step, which may be a sequence of steps."""
    if step is None:
        return []
    return [part for one in step[name] for part in _steps(one, name)] if step["type"] == "Sequence" else [step]


def _write(file: Path, text: str, head: str, parent: Path) -> None:
    """Write a file that the parent has, too."""
    if (parent / file.name).is_file():
        file.write_text(head + text, encoding="utf-8")


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"
