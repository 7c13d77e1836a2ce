"""Task `toy`: opinions made by a seeded grammar, for a machine with no data and no network.

A sentence holds one or two opinions, each about one aspect of a film; its label is the speaker's final verdict. What makes it hard:
negation and double negation turn an opinion round, contrast ("but", "although") says which of two opinions counts, degree
("slightly", "utterly") decides where both count, other people's opinions do not count, and half of the judging words are rare.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal, TypeVar

from onnxsqueeze.tasks.rows import Row, SplitRows, TaskInfo, rows_sha256

LABELS = ("negative", "positive")
NOTE = "generated: the sentences come from a grammar and were written by no person"
_TRAIN_ROWS, _DEV_ROWS = 3_000, 1_000
_TRAIN_SEED, _DEV_SEED = 20_260_101, 20_260_202  # the task's own: its rows are the same for every seed of a run

Sign = Literal[-1, 1]
_T = TypeVar("_T")

# Judging words. Three in four are drawn from the common ones, so that each rare one occurs about ten times in the training rows.
COMMON: Mapping[Sign, tuple[str, ...]] = {
    1: (
        "good",
        "great",
        "funny",
        "moving",
        "clever",
        "charming",
        "touching",
        "brilliant",
        "fresh",
        "gripping",
        "warm",
        "witty",
        "superb",
        "lively",
    ),
    -1: ("bad", "dull", "boring", "weak", "silly", "clumsy", "awful", "stale", "tedious", "ugly", "shallow", "messy", "lazy", "bland"),
}
RARE: Mapping[Sign, tuple[str, ...]] = {
    1: (
        *(
            "sublime",
            "luminous",
            "beguiling",
            "scintillating",
            "effervescent",
            "resplendent",
            "masterly",
            "incisive",
            "ravishing",
            "piquant",
        ),
        *("mellifluous", "debonair", "winsome", "felicitous", "consummate", "deft", "nimble", "rollicking", "wry", "sumptuous", "astute"),
        *("spellbinding", "trenchant", "buoyant", "poised", "exultant", "redoubtable", "peerless", "zestful", "limpid"),
    ),
    -1: (
        *("insipid", "turgid", "soporific", "lugubrious", "ponderous", "vapid", "mawkish", "execrable", "hackneyed", "maladroit"),
        *("bathetic", "jejune", "leaden", "odious", "cloying", "garbled", "stilted", "torpid", "trite", "lumbering", "abysmal"),
        *("meretricious", "fatuous", "slapdash", "inane", "dismal", "interminable", "puerile", "shambolic", "dreary"),
    ),
}
ASPECTS = (
    *("plot", "acting", "dialogue", "music", "ending", "opening", "humour", "pacing", "camera work", "story", "lead actor", "villain"),
    *("script", "editing", "sequel", "romance", "final act", "score", "direction", "premise", "supporting cast", "denouement"),
)
DEGREES: Mapping[str, int] = {
    **dict.fromkeys(("slightly", "a little", "mildly", "somewhat", "a shade", "vaguely"), 1),
    "": 2,
    **dict.fromkeys(("extremely", "utterly", "deeply", "truly", "exceedingly", "thoroughly"), 3),
}
# How an opinion is said, and whether the words turn the adjective round (-1) or leave it (1: also where two negations meet).
PLAIN = ("the {aspect} is {judged}", "the {aspect} seems {judged}", "i found the {aspect} {judged}", "the {aspect} struck me as {judged}")
TURNED: Mapping[str, Sign] = {
    "the {aspect} is not {adjective}": -1,
    "the {aspect} is never {adjective}": -1,
    "the {aspect} is hardly {adjective}": -1,
    "the {aspect} is anything but {adjective}": -1,
    "the {aspect} is far from {adjective}": -1,
    "the {aspect} fails to be {adjective}": -1,
    "nobody would call the {aspect} {adjective}": -1,
    "i do not think the {aspect} is {adjective}": -1,
    "the {aspect} never fails to be {adjective}": 1,
    "nobody can deny that the {aspect} is {adjective}": 1,
    "it is not true that the {aspect} is not {adjective}": 1,
    "i do not doubt that the {aspect} is {adjective}": 1,
    "no one could say the {aspect} is not {adjective}": 1,
    "the {aspect} is nothing if not {adjective}": 1,
}
# Two opinions, and which of them is the verdict. "stronger": both count, and the degree decides.
JOINED: Mapping[str, Literal["first", "second", "stronger"]] = {
    "{first} , but {second}": "second",
    "{first} , yet in the end {second}": "second",
    "although {first} , {second}": "second",
    "even if {first} , {second}": "second",
    "{second} , although {first}": "second",
    "{first} , and that counts for more than the fact that {second}": "first",
    "critics wrote that {second} , but {first}": "first",
    "my friends insist that {second} ; i disagree , {first}": "first",
    "{first} , whatever people say about how {second}": "first",
    "i used to say that {first} ; now i know that {second}": "second",
    "{first} and {second}": "stronger",
    "{first} , while {second}": "stronger",
    "{first} ; {second}": "stronger",
    "{first} , and besides , {second}": "stronger",
    "weighing it up , {first} and {second}": "stronger",
}
OPENINGS = ("", "", "", "on the whole , ", "to be fair , ", "this time ", "all told , ", "after two hours , ")


@dataclass(frozen=True)
class Opinion:
    """A clause, what it says (1 is praise) and how strongly (1 to 3)."""

    words: str
    sign: Sign
    strength: int


def plain(form: str, aspect: str, degree: str, adjective: str, sign: Sign) -> Opinion:
    """An opinion with a degree: "the plot is slightly dull"."""
    return Opinion(form.format(aspect=aspect, judged=f"{degree} {adjective}".strip()), sign, DEGREES[degree])


def turned(form: str, aspect: str, adjective: str, sign: Sign) -> Opinion:
    """An opinion with one negation or two: "the plot is not dull" is praise."""
    return Opinion(form.format(aspect=aspect, adjective=adjective), 1 if sign == TURNED[form] else -1, 2)


def joined(form: str, first: Opinion, second: Opinion) -> Opinion | None:
    """Two opinions in one sentence; None where both count, differ, and are equally strong: no verdict."""
    rule = JOINED[form]
    words = form.format(first=first.words, second=second.words)
    if rule == "stronger":
        total = first.sign * first.strength + second.sign * second.strength
        return None if total == 0 else Opinion(words, 1 if total > 0 else -1, abs(total))
    verdict = first if rule == "first" else second
    return Opinion(words, verdict.sign, verdict.strength)


def toy_rows(n: int, seed: int, *, without: Container[str] = ()) -> tuple[Row, ...]:
    """``n`` different sentences of 6 to 20 words with their labels (0 negative, 1 positive), none of them in ``without``.

    The same for the same arguments on every machine. Raises ValueError above 50,000 rows.
    """
    if n > 50_000:
        raise ValueError(f"the grammar is asked for at most 50,000 rows, got {n}")
    random = Random(seed)  # noqa: S311 - sentences, not secrets
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < n:
        opinion = _opinion(random) if random.random() < 0.15 else joined(_one(random, tuple(JOINED)), _opinion(random), _opinion(random))
        if opinion is None:
            continue
        text = f"{_one(random, OPENINGS)}{opinion.words} ."
        if 6 <= len(text.split()) <= 20 and text not in seen and text not in without:
            seen.add(text)
            rows.append(Row(text, None, int(opinion.sign == 1)))
    return tuple(rows)


def toy_info(max_length: int) -> TaskInfo:
    """What stages and measurements are told."""
    return TaskInfo("toy", LABELS, ("accuracy",), "accuracy", max_length, generated=True, note=NOTE)


@dataclass(frozen=True)
class Toy:
    """The rows of task `toy`."""

    def train(self) -> SplitRows:
        """3,000 rows, the same always."""
        return _train()

    def dev(self) -> tuple[SplitRows, ...]:
        """1,000 rows, the same always; none of them is a training row."""
        return (_dev(),)


@cache
def _train() -> SplitRows:
    rows = toy_rows(_TRAIN_ROWS, _TRAIN_SEED)
    return SplitRows("train", rows, "generated", rows_sha256(rows), "train")


@cache
def _dev() -> SplitRows:
    rows = toy_rows(_DEV_ROWS, _DEV_SEED, without={row.text for row in _train().rows})
    return SplitRows("validation", rows, "generated", rows_sha256(rows), "dev")


def _opinion(random: Random) -> Opinion:
    sign: Sign = 1 if random.random() < 0.5 else -1
    adjective = _one(random, (COMMON if random.random() < 0.75 else RARE)[sign])
    aspect = _one(random, ASPECTS)
    if random.random() < 0.5:
        return turned(_one(random, tuple(TURNED)), aspect, adjective, sign)
    return plain(_one(random, PLAIN), aspect, _one(random, tuple(DEGREES)), adjective, sign)


def _one(random: Random, items: Sequence[_T]) -> _T:
    return items[int(random.random() * len(items))]  # Random.random alone is promised to be the same in every Python
