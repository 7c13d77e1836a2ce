"""How tokenizers cut a word into pieces, with pieces taken away: WordPiece and byte-level BPE. Text alone; files: `onnxsqueeze.vocabulary`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol


class Splitting(Protocol):
    """How one kind of tokenizer cuts a word, while pieces are taken away from it."""

    def split(self, word: str) -> Sequence[str]:
        """The pieces of ``word``; none where it cannot be read."""

    def needs(self, piece: str) -> frozenset[str]:
        """``piece`` and every piece without which it is never made."""

    def take(self, piece: str) -> None:
        """Take ``piece`` away, with every piece that needs it."""

    def joined(self, pieces: Sequence[str]) -> str:
        """The word that was cut into ``pieces``."""


class WordPiece:
    """The longest piece that a word begins with, then the longest that its rest begins with. Source: tokenizers' models.WordPiece."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._prefix = str(model["continuing_subword_prefix"])
        self._longest_word = int(model["max_input_chars_per_word"])
        self._live = set(model["vocab"])

    def split(self, word: str) -> Sequence[str]:
        """The pieces of ``word``; none where it is too long or some part of it is no piece."""
        pieces: list[str] = []
        start = 0
        while start < len(word) <= self._longest_word:
            prefix = self._prefix if start else ""
            end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in self._live), None)
            if end is None:
                return ()
            pieces.append(prefix + word[start:end])
            start = end
        return pieces

    def needs(self, piece: str) -> frozenset[str]:
        """The piece itself."""
        return frozenset((piece,))

    def take(self, piece: str) -> None:
        """Take ``piece`` away."""
        self._live.discard(piece)

    def joined(self, pieces: Sequence[str]) -> str:
        """The word that was cut into ``pieces``."""
        return pieces[0] + "".join(piece.removeprefix(self._prefix) for piece in pieces[1:])

    def singles(self) -> Iterator[str]:
        """The pieces of one character, at the beginning of a word and inside it."""
        return (piece for piece in self._live if len(piece) == 1 or (self._continues(piece) and len(piece) == len(self._prefix) + 1))

    def uncovered(self, piece: str) -> bool:
        """Whether a character of ``piece`` has no piece of its own where it stands: a word could not fall back to characters there."""
        inside = piece.removeprefix(self._prefix) if self._continues(piece) else piece[1:]
        first = [] if self._continues(piece) else [piece[:1]]
        return any(single not in self._live for single in (*first, *(self._prefix + letter for letter in inside)))

    def _continues(self, piece: str) -> bool:
        return bool(self._prefix) and piece.startswith(self._prefix) and piece != self._prefix


class ByteLevelBpe:
    """Neighbours are merged, the earliest merge of the list first, the leftmost of equals first. Source: tokenizers' models.BPE."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._live = set(model["vocab"])
        self._rank: dict[tuple[str, str], int] = {}
        self._parts: defaultdict[str, set[str]] = defaultdict(set)  # piece → those that a merge makes it of
        self._wholes: defaultdict[str, set[str]] = defaultdict(set)  # piece → those that a merge makes of it
        self._needs: dict[str, frozenset[str]] = {}
        for rank, pair in enumerate(merges_of(model)):
            self._rank.setdefault(pair, rank)
            for part in pair:
                self._parts["".join(pair)].add(part)
                self._wholes[part].add("".join(pair))

    def split(self, word: str) -> Sequence[str]:
        """The pieces of ``word``."""
        pieces = list(word)
        while True:
            ranked = (
                (self._rank[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in self._rank and "".join(pair) in self._live
            )
            _, at = min(ranked, default=(0, None))
            if at is None:
                return pieces
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]

    def needs(self, piece: str) -> frozenset[str]:
        """``piece`` and all parts, and parts of parts, of every merge that makes it."""
        if piece not in self._needs:
            self._needs[piece] = frozenset((piece,)).union(*(self.needs(part) for part in self._parts[piece]))
        return self._needs[piece]

    def take(self, piece: str) -> None:
        """Take ``piece`` away, and what is made of it: its merges are gone."""
        if piece in self._live:
            self._live.remove(piece)
            for whole in self._wholes[piece]:
                self.take(whole)

    def joined(self, pieces: Sequence[str]) -> str:
        """The word that was cut into ``pieces``, in the byte-level alphabet."""
        return "".join(pieces)

    def singles(self) -> Iterator[str]:
        """The byte alphabet."""
        return (piece for piece in self._live if len(piece) == 1)


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model in their order, from either way of writing them ("a b" or ["a", "b"])."""
    return [(a, b) for a, b in (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])]
