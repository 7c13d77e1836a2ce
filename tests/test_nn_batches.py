from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from models import random_checkpoint, toy_rows
from onnxsqueeze.nn.batches import by_length, cut_otherwise, encode, epoch_order

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=300)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.integers(1, 5))
def test_an_epoch_shows_every_row_once_in_batches_of_the_asked_size(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    batches = epoch_order(lengths, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sorted(len(batch) for batch in batches)[1:] == [size] * (len(batches) - 1)
    assert batches == epoch_order(lengths, size, seed, epoch)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    lengths = [5] * 100
    orders = [epoch_order(lengths, 10, seed, epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = [(37 * i) % 101 + 1 for i in range(1000)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch_order(lengths, 20, 0, 1))
    assert padded < 1.05 * sum(lengths)


@given(LENGTHS)
def test_batches_by_length_hold_every_row_once_from_short_to_long(lengths: list[int]) -> None:
    order = [i for batch in by_length(lengths, 7) for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)


def test_rows_are_encoded_in_their_order_with_their_labels(tmp_path: Path) -> None:
    rows = toy_rows(5, seed=0, pairs=True)
    examples = encode(random_checkpoint(tmp_path, "roberta"), rows, 12)
    assert list(examples.labels) == [row.label for row in rows]
    assert examples.pad_id == 1
    assert max(len(row) for row in examples.encoded) <= 12


def test_rows_that_two_tokenizers_cut_at_other_places_are_counted(tmp_path: Path) -> None:
    bert, other, roberta = (random_checkpoint(tmp_path / name, name) for name in ("bert", "distilbert", "roberta"))
    rows = toy_rows(20, seed=0)
    assert cut_otherwise(bert, bert, rows, 32) == cut_otherwise(bert, other, rows, 32) == 0, "their files differ, their tokens do not"
    assert cut_otherwise(bert, roberta, rows, 32) == 20
