"""What a tokenizer.json does to text, as rules that a graph can follow: what stands for each code point, and the pieces by id.

The rules are asked of the tokenizer itself, a code point at a time; nothing of BERT's normalizer is written down here. So they hold as far as
it treats each code point alone, which BertNormalizer does (of several marks behind a letter NFD may change the order; those of category Mn are taken away).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROW, WORD, GONE = (
    "\x01",
    "\x02",
    "\x03",
)  # in the graph: a row begins, a word begins, taken away; the tokenizer takes these out of every text
MARKS = (ROW, WORD, GONE)
BREAKS = "\t\n"  # the operator's table cannot hold these two: they part words as they are

_INSTEAD = "leave out --text, and tokenize outside the graph as the README shows"
_LONGEST_WORD = 100  # letters: BertTokenizer's, and WordPiece's own default
_LONG_RUN = 64  # code points in a row that are treated alike are a range of a regular expression, fewer are lines of the table
_AT_ONCE = 4096
_PLANES = (*range(4), 14)  # of Unicode: 4 to 13 are unassigned, 15 and 16 are private and treated as U+E000 is
_PRIVATE = ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
_PARTED = "0000"  # between words of the probe: no code point becomes this


@dataclass(frozen=True)
class Rules:
    """How to get from a text to ids. A code point that is in none of ``table``, ``gone`` and ``apart`` stays as it is.

    ``pieces`` by id; ``whole`` are tokens that are found in raw text, longest first; ``table`` is what stands for a code point, with spaces around what
    is a word of its own; ``gone`` and ``apart`` are ranges, from the first to the last code point, that are taken away and that are words of their own;
    ``safe`` are the ASCII characters that stay.
    """

    pieces: tuple[str, ...]
    prefix: str
    unknown: str
    start: int
    end: int
    pad: int
    max_length: int
    whole: tuple[str, ...]
    table: Mapping[str, str]
    gone: tuple[tuple[int, int], ...]
    apart: tuple[tuple[int, int], ...]
    safe: str


def read(folder: Path, max_length: int, pad: int) -> Rules:
    """The rules of ``folder``'s tokenizer.json; rows have at most ``max_length`` tokens.

    Raises ModelError where it is not BERT's way of tokenizing: the same ids could not be promised.
    """
    from tokenizers import Tokenizer

    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, added = data["model"], data.get("added_tokens") or []
    _require_bert(data, model, added)
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if _inside(tokenizer, [*MARKS, *BREAKS]) != [*("" for _ in MARKS), *(" " for _ in BREAKS)]:
        raise _unlike("its normalizer keeps control characters (clean_text: false)")
    start, end = _ends(tokenizer)
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    pieces = [f"{GONE}{i}" for i in range(max(ids.values()) + 1)]  # no text becomes this: an id that is nobody's
    for piece, id_ in ids.items():
        if piece and "\n" not in piece:
            pieces[id_] = piece
    seen = dict(_changed(json.dumps([data["normalizer"], data["pre_tokenizer"]])))
    gone = [run for run in _runs(one for one, other in seen.items() if not other) if _long(run)]
    if seen.get("\ue000") == "":
        gone += _PRIVATE
    apart = [run for run in _runs(one for one, other in seen.items() if other == f" {one} ") if _long(run)]
    in_ranges = {chr(i) for first, last in (*gone, *apart) for i in range(first, last + 1)}
    safe = "".join(chr(i) for i in range(128) if chr(i) not in seen and (chr(i).isalnum() or chr(i) == " ")) + BREAKS
    return Rules(
        pieces=tuple(pieces),
        prefix=model["continuing_subword_prefix"],
        unknown=model["unk_token"],
        start=start,
        end=end,
        pad=pad,
        max_length=max_length,
        whole=tuple(sorted((token["content"] for token in added), key=len, reverse=True)),
        table=_needed({one: other for one, other in seen.items() if one not in in_ranges and one not in (*MARKS, *BREAKS)}, pieces),
        gone=tuple(gone),
        apart=tuple(apart),
        safe=safe,
    )


def _require_bert(data: Mapping[str, Any], model: Mapping[str, Any], added: list[dict[str, Any]]) -> None:
    kinds = {part: (data.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")}
    for part, wanted in (("model", "WordPiece"), ("normalizer", "BertNormalizer"), ("pre_tokenizer", "BertPreTokenizer")):
        if kinds[part] != wanted:
            raise _unlike(f"its {part} is {kinds[part]}, not {wanted}")
    if model["max_input_chars_per_word"] != _LONGEST_WORD:
        raise _unlike(f"max_input_chars_per_word is {model['max_input_chars_per_word']}, not {_LONGEST_WORD}")
    odd = [token["content"] for token in added if token["normalized"] or token["single_word"]]
    if odd:
        raise _unlike(f"the added token {odd[0]!r} is looked for in normalized text, or as a word alone")


def _ends(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids that a row begins and ends with."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    row = tokenizer.encode("a")
    if row.ids[1:-1] != bare or any(row.type_ids):
        raise _unlike("a row is not one special token, the text, and one special token")
    return row.ids[0], row.ids[-1]


def _unlike(reason: str) -> ModelError:
    return ModelError(f"--text: this tokenizer cannot be put into the graph with the same ids: {reason}", remedy=_INSTEAD)


@cache
def _changed(parts: str) -> tuple[tuple[str, str], ...]:
    """(a code point, what stands for it inside a word), rising, for each that does not stay as it is: "E" → "e", "!" → " ! ", tab → space.

    ``parts`` is the JSON of a normalizer and a pre-tokenizer. Asking 327,680 code points takes some seconds: models of one process share the answer.
    """
    from tokenizers import Tokenizer, models

    normalizer, pre_tokenizer = json.loads(parts)
    bare = json.loads(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str())  # noqa: S106, the unknown token's name
    tokenizer = Tokenizer.from_str(json.dumps(bare | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}))
    surrogates = range(0xD800, 0xE000)
    every = (chr(i) for i in chain.from_iterable(range(p << 16, (p + 1) << 16) for p in _PLANES) if i not in surrogates)
    changed: list[tuple[str, str]] = []
    while some := list(islice(every, _AT_ONCE)):
        found = _inside(tokenizer, some)
        if len(found) != len(some):
            found = [_inside(tokenizer, [one])[0] for one in some]
        changed += ((one, other) for one, other in zip(some, found, strict=True) if one != other)
    return tuple(changed)


def _inside(tokenizer: Tokenizer, some: list[str]) -> list[str]:
    """What becomes of each inside the word a…a."""
    text = f" {_PARTED} ".join(f"a{one}a" for one in some)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]
    return [one[1:-1] for one in " ".join(words).split(f" {_PARTED} ")]


def _runs(some: Iterator[str]) -> list[tuple[int, int]]:
    """Code points, rising → (first, last) of each stretch without a gap."""
    runs: list[list[int]] = []
    for code in map(ord, some):
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return [(first, last) for first, last in runs]


def _long(run: tuple[int, int]) -> bool:
    return run[1] - run[0] >= _LONG_RUN


def _needed(seen: Mapping[str, str], pieces: list[str]) -> dict[str, str]:
    """The lines that matter: where a code point, and what stands for it, are in no piece, the word is unknown either way."""
    letters = set().union(*pieces)
    kept = {}
    for one, other in seen.items():
        strange = one not in letters and not set(other.strip(" ")) <= letters
        if not other:
            kept[one] = GONE
        elif strange and " " not in other.strip(" "):
            if other != other.strip(" "):
                kept[one] = f" {one} "
        else:
            kept[one] = other
    return kept
