"""The selection split: rows of the training file on which choices are made, and of which training sees nothing.

What counts as a row's *text*: its words, case folded. A word is a run of letters and digits, or one punctuation mark, so
neither spaces nor capitals tell two texts apart. A pair and the same pair swapped are the same text.
A text *lies inside* another where its words are a run of consecutive words there ("art of" is not inside "smart offer") and the
two are not the same text; a pair lies inside a pair where each of its texts is, or lies inside, another one of the other pair's.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks.rows import Row, SplitRows

_SHARE = 10  # one candidate in ten is drawn
_MOST = 2_000
_WANTED = 200  # drawn where the tenth is less, if that is no more than a fifth of the file
_FEWEST = 50
_SHORT = 3  # words: shorter texts may be inside a selection row and stay in training ("a film" tells nothing)
_WORD = re.compile(r"\w+|[^\w\s]")

# One or two texts, sorted; each is its words between single spaces, with a space at either end, so that `in` finds runs of whole words.
Text = tuple[str, ...]
Run = tuple[str, ...]


def split_training(file: SplitRows, seed: int, train_rows: int | None = None) -> tuple[SplitRows, SplitRows]:
    """(train, selection) of a training file; both keep the file's order and name its source.

    Selection: a seeded tenth of the rows whose text lies inside no other row, 50 to 2,000 rows. Train: the other rows without
    those whose text is that of a selection row, or has three words or more and lies inside one (``dropped`` counts them); then
    a seeded draw of ``train_rows``. The draw depends on seed, file order and row count alone. Raises DataError for too few rows.
    """
    texts = [text_of(row) for row in file.rows]
    held = inside(texts, texts)
    candidates = [i for i, text in enumerate(texts) if text not in held]
    size = _size(file, len(candidates))
    chosen = set(draw(candidates, size, f"selection {seed}"))
    kept_out = {texts[i] for i in chosen}
    rest = [i for i in range(len(texts)) if i not in chosen]
    leaked = kept_out | inside([text for text in held if _words(text) >= _SHORT], kept_out)
    kept = [i for i in rest if texts[i] not in leaked]
    if not kept:
        raise DataError(
            f"{file.source}: no row is left to train on: the text of every other row is, or lies inside, one of the selection split",
            remedy="give more training rows",
        )
    trained = kept if train_rows is None else draw(kept, train_rows, f"train {seed}")
    train = replace(file, rows=tuple(file.rows[i] for i in trained), dropped=len(rest) - len(kept))
    return train, replace(file, name="selection", role="selection", rows=tuple(file.rows[i] for i in sorted(chosen)))


def text_of(row: Row) -> Text:
    """The text of a row as this module compares it: equal for the same text, also for a pair and the same pair swapped."""
    parts = (row.text,) if row.text_pair is None else (row.text, row.text_pair)
    return tuple(sorted(f" {' '.join(_WORD.findall(part.casefold()))} " for part in parts))


def inside(texts: Iterable[Text], hosts: Iterable[Text]) -> set[Text]:
    """Those of ``texts`` that lie inside one of ``hosts``; exact, some two seconds for 70,000 sentences.

    A text is looked for only where its rarest run of three words occurs; where it has fewer words, where all of them do.
    """
    distinct = dict.fromkeys(hosts)
    frequency = Counter(chain.from_iterable(_runs(host, _SHORT) for host in distinct))
    sought: dict[int, defaultdict[Run, list[Text]]] = {n: defaultdict(list) for n in range(1, _SHORT + 1)}
    for text in set(texts):
        n = min(_SHORT, max([part.count(" ") for part in text]) - 1)
        rarest = min(_runs(text, n), key=frequency.__getitem__ if n == _SHORT else None, default=None)
        # a run that occurs once in all hosts does so in the text itself, where that is one of them
        if rarest is not None and (n < _SHORT or frequency[rarest] > (text in distinct)):
            sought[n][rarest].append(text)
    found: set[Text] = set()
    for n, waiting in sought.items():
        runs = set(waiting)
        for host in distinct if runs else ():
            for run in runs.intersection(_runs(host, n)):
                left = [text for text in waiting[run] if not _lies_inside(text, host)]
                found.update(set(waiting[run]).difference(left))
                waiting[run] = left
                if not left:
                    runs.remove(run)
    return found


def _lies_inside(text: Text, host: Text) -> bool:
    if text == host or len(text) != len(host):
        return False
    if len(text) == 1:
        return text[0] in host[0]
    return (text[0] in host[0] and text[1] in host[1]) or (text[0] in host[1] and text[1] in host[0])


def _runs(text: Text, n: int) -> Iterator[Run]:
    """Every run of ``n`` words in one of the text's parts."""
    parts = [part.split() for part in text]
    return chain.from_iterable([zip(*[words[i:] for i in range(n)], strict=False) for words in parts])


def _words(text: Text) -> int:
    return sum(len(part.split()) for part in text)


def draw(rows: Sequence[int], size: int, seed: str) -> list[int]:
    """``size`` of ``rows`` in their order, by a hash, so that the draw is the same on every version of every library."""
    return sorted(sorted(rows, key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())[:size])


def _size(file: SplitRows, candidates: int) -> int:
    size = min(candidates // _SHARE, _MOST)
    if size < _WANTED and len(file.rows) >= _WANTED * 5:
        size = min(_WANTED, candidates)
    if size < _FEWEST:
        raise DataError(
            f"{file.source}: the selection split would have {size} rows, and fewer than {_FEWEST} cannot carry a choice:"
            f" it is a tenth of the {candidates} rows (of {len(file.rows)}) whose text lies inside no other row",
            remedy=f"give at least {_FEWEST * _SHARE} training rows with texts of their own",
        )
    return size
