import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks.rows import Row, SplitRows
from onnxsqueeze.tasks.selection import inside, split_training, text_of


def training(texts: list[str] | list[tuple[str, str]]) -> SplitRows:
    rows = tuple(Row(text, None, 0) if isinstance(text, str) else Row(*text, 0) for text in texts)
    return SplitRows("train", rows, "own.tsv", "0" * 64, "train")


def sentence(i: int) -> str:
    return f"Row{i} says that item{i} is not like item{i + 1} at all"


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of words of a text without punctuation: the slow way, for comparison."""
    words = text.lower().split()
    return {tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


words = st.lists(st.sampled_from(["a", "b", "c", "ab"]), min_size=1, max_size=6).map(" ".join)


@given(st.lists(words, max_size=12))
def test_inside_finds_exactly_the_texts_that_are_a_run_of_words_of_a_longer_one(texts: list[str]) -> None:
    expected = {text for text in texts for host in texts if text != host and tuple(text.split()) in runs(host)}
    own = {text_of(Row(text, None, 0)): text for text in texts}
    assert {own[found] for found in inside(own, own)} == expected


@given(st.lists(st.tuples(words, words), max_size=8))
def test_a_pair_is_inside_where_each_of_its_texts_is_inside_or_equal_another_one_of_a_pair(pairs: list[tuple[str, str]]) -> None:
    def holds(host: tuple[str, str], pair: tuple[str, str]) -> bool:
        return all(tuple(part.split()) in runs(whole) for part, whole in zip(pair, host, strict=True))

    expected = {tuple(sorted(p)) for p in pairs for q in pairs if sorted(p) != sorted(q) and (holds(q, p) or holds((q[1], q[0]), p))}
    own = {text_of(Row(a, b, 0)): tuple(sorted((a, b))) for a, b in pairs}
    assert {own[found] for found in inside(own, own)} == expected


fragments = st.lists(st.tuples(st.integers(0, 519), st.integers(0, 8), st.integers(1, 10), st.booleans()), max_size=150)


@settings(max_examples=15, deadline=None)
@given(fragments, st.integers(0, 9))
def test_no_training_row_repeats_or_lies_inside_a_selection_row(pieces: list[tuple[int, int, int, bool]], seed: int) -> None:
    parts = [" ".join(sentence(i).split()[start : start + n]) for i, start, n, _ in pieces]
    file = training(
        [sentence(i) for i in range(520)] + [part.upper() if loud else part for part, (*_, loud) in zip(parts, pieces, strict=True)]
    )
    train, selection = split_training(file, seed)
    held = set().union(*(runs(row.text) for row in selection.rows))
    left = [row.text for row in train.rows if len(row.text.split()) >= 3 and tuple(row.text.lower().split()) in held]
    assert left == []
    assert len(train.rows) + train.dropped + len(selection.rows) == len(file.rows)
    everything = [row.text.lower() for row in file.rows]
    assert not any(f" {row.text.lower()} " in f" {other} " for row in selection.rows for other in everything if other != row.text.lower())


def test_short_fragments_of_a_selection_row_stay_and_same_texts_of_any_length_go() -> None:
    base = [sentence(i) for i in range(600)]
    chosen = split_training(training(base), 0)[1].rows[0].text
    first, second, third, *_ = chosen.split()
    added = [f"{first} {second}", f"{first} {second} {third}", f"  {chosen.upper()} ", f"{second} {first}"]
    train, selection = split_training(training(base + added), 0)
    assert Row(chosen, None, 0) in selection.rows
    kept = [row.text for row in train.rows]
    assert [text in kept for text in added] == [True, False, False, True]
    assert train.dropped == 2


def test_the_same_pair_swapped_is_the_same_text_and_another_pairing_of_its_texts_is_not() -> None:
    pairs = [(f"first {i} text", f"second {i} text") for i in range(600)]
    selection = split_training(training(pairs), 0)[1]
    a, b = selection.rows[0].text, str(selection.rows[0].text_pair)
    train, again = split_training(training([*pairs, (b.upper(), a), (a, "second 3 text here")]), 0)
    assert selection.rows[0] in again.rows
    assert train.dropped == 1
    assert (a, "second 3 text here") in [(row.text, row.text_pair) for row in train.rows]


def test_a_fragment_is_never_drawn() -> None:
    fragments_of_it = ["item7 is not", "says that item7"] * 100
    _, selection = split_training(training([sentence(i) for i in range(520)] + fragments_of_it), 3)
    assert not {row.text for row in selection.rows} & set(fragments_of_it)


def test_words_count_not_letters() -> None:
    texts = [text_of(Row(text, None, 0)) for text in ("art of it", "smart of it", "the art of it, too", "art ofit")]
    assert inside(texts, texts) == {texts[0]}


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        (500, 50),
        (999, 99),  # 200 would be more than a fifth
        (1_000, 200),
        (1_990, 200),
        (2_500, 250),
        (20_500, 2_000),
    ],
)
def test_the_size_of_the_selection_split_follows_its_limits(rows: int, drawn: int) -> None:
    train, selection = split_training(training([f"row {i}" for i in range(rows)]), 0)
    assert (len(selection.rows), len(train.rows)) == (drawn, rows - drawn)


def test_too_few_rows_for_a_choice_are_an_error_that_counts_them() -> None:
    with pytest.raises(DataError, match=r"own\.tsv: the selection split would have 49 rows.*of the 499 rows \(of 500\)") as caught:
        split_training(training([*(f"row {i}" for i in range(499)), "row"]), 0)
    assert "at least 500 training rows" in str(caught.value.remedy)


def test_a_file_of_one_text_alone_leaves_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no row is left to train on"):
        split_training(training(["always the same words"] * 600), 0)


def test_the_draw_follows_the_seed_alone_and_keeps_the_order_of_the_file() -> None:
    file = training([sentence(i) for i in range(600)])
    train, selection = split_training(file, 0)
    assert split_training(file, 0) == (train, selection)
    assert split_training(file, 1)[1].rows != selection.rows
    position = {row.text: i for i, row in enumerate(file.rows)}
    for split in (train, selection):
        places = [position[row.text] for row in split.rows]
        assert places == sorted(places)


def test_a_cap_on_training_rows_changes_no_selection_row_and_is_drawn_by_the_seed() -> None:
    file = training([sentence(i) for i in range(600)])
    train, selection = split_training(file, 0)
    few, same = split_training(file, 0, train_rows=100)
    assert same == selection
    assert len(few.rows) == 100
    assert set(few.rows) < set(train.rows)
    assert few.dropped == train.dropped
    assert split_training(file, 0, train_rows=10_000)[0] == train
    assert few.rows[:100] != train.rows[:100]
