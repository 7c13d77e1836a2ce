import re
from collections import Counter

import pytest

from onnxsqueeze.tasks import toy
from onnxsqueeze.tasks.open import open_task
from onnxsqueeze.tasks.settings import TaskSettings
from onnxsqueeze.tasks.toy import Opinion, joined, plain, toy_rows, turned

TOY = TaskSettings(name="toy")
DULL = Opinion("the plot is dull", -1, 2)
SUPERB = Opinion("the acting is utterly superb", 1, 3)


def test_the_rows_are_those_of_the_published_figures() -> None:
    source = toy.Toy()
    assert source.train().sha256 == "2d2caffc15a772ca4b0e6ea9c5bbb7688732abdcff72cd6a3b1d932ff52cd281"
    assert source.dev()[0].sha256 == "daa7b7aac83c7706fc93fb18f80fb74537507f076a31b89136f192b8935c6449"


def test_a_runs_seed_changes_the_selection_split_and_no_row() -> None:
    first, second = (open_task(TOY, data_dir=None, seed=seed) for seed in (0, 1))
    assert first.dev() == second.dev()
    assert first.selection.rows != second.selection.rows
    assert first.train.sha256 == second.train.sha256


def test_it_says_that_it_is_generated() -> None:
    task = open_task(TOY, data_dir=None, seed=0)
    assert task.info.generated
    assert task.info.note.startswith("generated")
    assert {split.source for split in (task.train, task.selection, *task.dev())} == {"generated"}


def test_no_sentence_stands_twice_or_in_two_splits() -> None:
    task = open_task(TOY, data_dir=None, seed=0)
    texts = [row.text for split in (task.train, task.selection, *task.dev()) for row in split.rows]
    assert len(texts) == len(set(texts)) == 4_000 - task.train.dropped


def test_sentences_have_six_to_twenty_words_and_both_classes_are_even() -> None:
    rows = toy_rows(3_000, 5)
    lengths = [len(row.text.split()) for row in rows]
    assert (min(lengths), max(lengths)) == (6, 20)
    assert 0.45 < sum(row.label for row in rows) / len(rows) < 0.55


def test_other_seeds_give_other_rows_and_more_rows_begin_with_the_same() -> None:
    assert toy_rows(20, 1) != toy_rows(20, 2)
    assert toy_rows(40, 1)[:20] == toy_rows(20, 1)


def test_more_rows_than_the_grammar_should_give_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 50,000"):
        toy_rows(50_001, 0)


@pytest.mark.parametrize(
    ("opinion", "words", "sign", "strength"),
    [
        (plain("i found the {aspect} {judged}", "music", "slightly", "dull", -1), "i found the music slightly dull", -1, 1),
        (plain("the {aspect} is {judged}", "music", "", "superb", 1), "the music is superb", 1, 2),
        (turned("the {aspect} is not {adjective}", "plot", "dull", -1), "the plot is not dull", 1, 2),
        (turned("the {aspect} is hardly {adjective}", "plot", "sublime", 1), "the plot is hardly sublime", -1, 2),
        (turned("the {aspect} is anything but {adjective}", "plot", "vapid", -1), "the plot is anything but vapid", 1, 2),
        (turned("the {aspect} never fails to be {adjective}", "plot", "dull", -1), "the plot never fails to be dull", -1, 2),
        (
            turned("it is not true that the {aspect} is not {adjective}", "plot", "funny", 1),
            "it is not true that the plot is not funny",
            1,
            2,
        ),
    ],
)
def test_one_opinion_says_what_a_reader_would_say(opinion: Opinion, words: str, sign: int, strength: int) -> None:
    assert (opinion.words, opinion.sign, opinion.strength) == (words, sign, strength)


@pytest.mark.parametrize(
    ("form", "words", "sign"),
    [
        ("{first} , but {second}", "the plot is dull , but the acting is utterly superb", 1),
        ("although {first} , {second}", "although the plot is dull , the acting is utterly superb", 1),
        ("{second} , although {first}", "the acting is utterly superb , although the plot is dull", 1),
        ("critics wrote that {second} , but {first}", "critics wrote that the acting is utterly superb , but the plot is dull", -1),
        (
            "{first} , whatever people say about how {second}",
            "the plot is dull , whatever people say about how the acting is utterly superb",
            -1,
        ),
        ("{first} and {second}", "the plot is dull and the acting is utterly superb", 1),
    ],
)
def test_of_two_opinions_the_verdict_is_the_one_a_reader_would_take(form: str, words: str, sign: int) -> None:
    both = joined(form, DULL, SUPERB)
    assert both is not None
    assert (both.words, both.sign) == (words, sign)


def test_two_opinions_that_outweigh_each_other_have_no_verdict() -> None:
    assert joined("{first} and {second}", DULL, Opinion("the score is great", 1, 2)) is None


def verdict(text: str) -> int:
    """The label read off a generated sentence, without the grammar's own bookkeeping: patterns over the words alone."""
    for opening in filter(None, toy.OPENINGS):
        text = text.removeprefix(opening)
    text = text.removesuffix(" .")
    for pattern, rule in (
        (r"weighing it up , (?P<a>.+) and (?P<b>.+)", "sum"),
        (r"critics wrote that (.+) , but (?P<b>.+)", "b"),
        (r"my friends insist that (.+) ; i disagree , (?P<b>.+)", "b"),
        (r"i used to say that (.+) ; now i know that (?P<b>.+)", "b"),
        (r"(?:although|even if) (.+?) , (?P<b>.+)", "b"),
        (r"(?P<b>.+) , (?:although|and that counts for more than the fact that|whatever people say about how) (.+)", "b"),
        (r"(.+) , (?:but|yet in the end) (?P<b>the .+|i .+|no.+|it .+)", "b"),
        (r"(?P<a>.+) (?:, while|;|, and besides ,) (?P<b>.+)", "sum"),
        (r"(?P<a>.+) and (?P<b>.+)", "sum"),
    ):
        found = re.fullmatch(pattern, text)
        if found:
            total = clause(found["b"]) + (clause(found["a"]) if rule == "sum" else 0)
            assert total != 0
            return int(total > 0)
    return int(clause(text) > 0)


def clause(text: str) -> int:
    """Sign times strength of one clause: each negating word turns the adjective round."""
    adjective = text.split()[-1]
    sign = 1 if adjective in (*toy.COMMON[1], *toy.RARE[1]) else -1
    turns = len(
        re.findall(
            r"\b(?:not|never|hardly|anything but|far from|fails|nobody|no one|deny|doubt|nothing|if not)\b", text.replace("if not", "")
        )
    )
    turns += text.count("if not")
    strength = 2
    if re.search(r"\b(?:slightly|a little|mildly|somewhat|a shade|vaguely) \w+$", text):
        strength = 1
    elif re.search(r"\b(?:extremely|utterly|deeply|truly|exceedingly|thoroughly) \w+$", text):
        strength = 3
    return sign * strength * (-1 if turns % 2 else 1)


def test_every_label_is_the_one_that_is_read_off_the_words() -> None:
    wrong = [row.text for row in toy_rows(5_000, 99) if verdict(row.text) != row.label]
    assert wrong == []


def test_every_word_of_the_grammar_is_used_and_rare_words_are_rare_but_trained_on() -> None:
    used = Counter(word for row in toy.Toy().train().rows for word in row.text.split())
    rare = [used[word] for words in toy.RARE.values() for word in words]
    common = [used[word] for words in toy.COMMON.values() for word in words]
    assert min(rare) >= 3
    assert max(rare) < min(common)


def test_a_judging_word_belongs_to_one_list_alone() -> None:
    words = [word for table in (toy.COMMON, toy.RARE) for group in table.values() for word in group]
    assert len(words) == len(set(words))
