"""What a server does to tensors before and after a call: refusals, which rows share a call, how they are merged and taken apart."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxsqueeze.serving import protocol
from onnxsqueeze.serving.answer import Refused, json_answer
from onnxsqueeze.serving.batching import Batch, Batcher, Job, choose, merge, split
from onnxsqueeze.serving.folder import require
from onnxsqueeze.serving.model import Tensor, open_model
from onnxsqueeze.serving.rows import Limits, check
from servers import bare, model_folder, tensors

LIMITS = Limits(rows=8, tokens=100, vocabulary=50, types=2)


def signature(**inputs: Tensor) -> Any:
    """As much of a model as `protocol.decode` looks at."""
    return SimpleNamespace(inputs=inputs, outputs={"y": Tensor("y", "FP32", ("batch",))})


def job(length: int, rows: int = 1, model: Any = None, width: int | None = None) -> Any:
    feed = tensors([[length] * (width or length)] * rows)
    feed["attention_mask"][:, length:] = 0
    return Job(model or MODEL, feed, rows, length, None)  # type: ignore[arg-type]  # nobody waits for it


MODEL: Any = SimpleNamespace(mergeable=True, pad_id=7)
OTHER: Any = SimpleNamespace(mergeable=True, pad_id=7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_floats_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(Refused, match="x: holds NaN or infinite values; send finite ones"):
        check({"x": np.array([[1.0, value]], np.float32)}, LIMITS)


def test_a_float_beyond_its_type_is_refused_and_one_within_is_taken() -> None:
    model = signature(x=Tensor("x", "FP16", ("batch",)))

    def request(*values: float) -> bytes:
        found = json_answer({"inputs": [{"name": "x", "datatype": "FP16", "shape": [len(values)], "data": list(values)}]}).body
        assert isinstance(found, bytes)
        return found

    assert protocol.decode(request(1.5, 2), None, model).feed["x"].tolist() == [1.5, 2.0]
    with pytest.raises(Refused, match="infinite"):
        check(protocol.decode(request(1e9), None, model).feed, LIMITS)
    with pytest.raises(Refused, match="values must fit FP16"):
        protocol.decode(request(10**400), None, model)


def test_one_long_word_among_many_numbers_is_no_array_of_long_words() -> None:
    body = (
        b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": [200000], "data": ["' + b"a" * 500_000 + b'"' + b",1" * 199_999 + b"]}]}"
    )
    with pytest.raises(Refused, match="must be a list of INT64, got a string"):
        protocol.decode(body, None, signature(x=Tensor("x", "INT64", ("batch",))))


def test_an_answer_that_is_not_finite_is_no_json() -> None:
    with pytest.raises(Refused, match="not finite") as raised:
        json_answer({"value": float("nan")})
    assert raised.value.status == 500


def test_the_length_of_a_row_is_its_last_token_that_is_attended_to() -> None:
    feed = tensors([[5] * 10] * 2)
    feed["attention_mask"][0, 3:] = 0
    feed["attention_mask"][1, 6:] = 0
    assert check(feed, LIMITS) == (2, 6)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 8)), min_size=1, max_size=30), st.integers(8, 32))
def test_a_call_has_few_rows_of_like_length_and_the_oldest_goes_first(sizes: list[tuple[int, int]], most: int) -> None:
    waiting = [job(length, rows) for length, rows in sizes]
    order = list(waiting)
    taken: list[Any] = []
    while waiting:
        oldest, batch = waiting[0], choose(waiting, most)
        assert batch[0] is oldest
        assert sum(one.rows for one in batch) <= most
        longest, shortest = max(one.length for one in batch), min(one.length for one in batch)
        assert longest - shortest <= max(8, longest / 4)
        taken += batch
    assert sorted(map(id, taken)) == sorted(map(id, order))


def test_rows_of_another_model_wait_for_a_call_of_their_own() -> None:
    first, second, third = job(5), job(5, model=OTHER), job(5)
    waiting = [first, second, third]
    assert choose(waiting, 8) == [first, third]
    assert waiting == [second]


def test_merged_rows_are_cut_to_their_real_length_and_padded_with_the_models_padding() -> None:
    merged = merge([job(3, width=9), job(5, rows=2)])
    assert merged["input_ids"].tolist() == [[3, 3, 3, 3, 3], [5] * 5, [5] * 5]  # what was sent beyond the mask stays
    assert merged["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1] * 5]
    assert merge([job(2), job(4)])["input_ids"].tolist() == [[2, 2, 7, 7], [4] * 4]


def test_each_gets_its_own_rows_and_tokens_back() -> None:
    jobs = [job(3, width=9), job(5, rows=2)]
    pooled, each = np.arange(6.0).reshape(3, 2), np.arange(1.0, 31.0).reshape(3, 5, 2)
    first, second = split(jobs, [pooled, each], [False, True])
    assert first[0].tolist() == [[0, 1]]
    assert second[0].tolist() == [[2, 3], [4, 5]]
    assert first[1].shape == (1, 9, 2)
    np.testing.assert_array_equal(first[1][:, :5], each[:1])
    assert not first[1][:, 5:].any()
    np.testing.assert_array_equal(second[1], each[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory, "bert")


def test_rows_that_shared_a_call_say_what_they_say_alone(folder: Path) -> None:
    model = open_model(require(folder), 1, 16)
    feeds = [tensors([[5 + i] * (4 + i)] * (1 + i % 3)) for i in range(12)]
    batches: list[Batch] = []

    async def all_at_once() -> list[Any]:
        batcher = Batcher(max_batch=16, max_delay_s=0, queue=100, timeout_s=30, observe=batches.append)
        futures = []
        for feed in feeds:
            rows, length = check(feed, model.limits)
            batcher.reserve(rows)
            futures.append(batcher.submit(model, feed, rows, length))
        found = await asyncio.gather(*futures)
        assert batcher.waiting_rows == 0
        assert await asyncio.to_thread(batcher.stop, 10)
        return found

    answers = asyncio.run(all_at_once())
    assert sum(batch.rows for batch in batches) == 24
    assert len(batches) < len(feeds)
    for feed, (logits,) in zip(feeds, answers, strict=True):
        np.testing.assert_allclose(logits, bare(folder, feed), atol=1e-5)


def test_a_request_that_breaks_a_shared_call_is_refused_alone(folder: Path) -> None:
    """An id that passes the check (config.json says more words than there are) fails in the kernel."""
    model = open_model(require(folder), 1, 16)
    right, broken = tensors([[5, 6, 7]]), tensors([[5, 100_000, 7]])

    async def all_at_once() -> list[Any]:
        batcher = Batcher(max_batch=16, max_delay_s=0, queue=100, timeout_s=30, observe=list[Batch]().append)
        futures = []
        for feed in (right, right, broken, right):
            batcher.reserve(1)
            futures.append(batcher.submit(model, feed, 1, 3))
        found = await asyncio.gather(*futures, return_exceptions=True)
        assert await asyncio.to_thread(batcher.stop, 10)
        return found

    *others, refused, last = (answer for answer in asyncio.run(all_at_once()))
    assert isinstance(refused, Refused)
    assert refused.status == 500
    assert refused.message.startswith("model: the call failed: ")
    for answer in (*others, last):
        np.testing.assert_allclose(answer[0], bare(folder, right), atol=1e-5)


def test_a_short_call_of_a_lone_request_is_made_by_the_loop_and_all_others_by_the_thread(folder: Path) -> None:
    model = open_model(require(folder), 1, 16)
    callers: list[int] = []
    run = model.run

    def told(feed: Any) -> Any:
        callers.append(threading.get_ident())
        return run(feed)

    model.run = told  # type: ignore[method-assign]  # the same calls, and who made them
    calls: list[Batch] = []

    async def ask() -> None:
        batcher = Batcher(max_batch=16, max_delay_s=0, queue=100, timeout_s=30, observe=calls.append)
        for together in (1, 1, 2, 1):
            for _ in range(together):
                batcher.reserve(1)
            await asyncio.gather(*(batcher.submit(model, tensors([[5, 6, 7]]), 1, 3) for _ in range(together)))
            assert batcher.waiting_rows == 0
        model.steady = False
        batcher.reserve(1)
        await batcher.submit(model, tensors([[5, 6, 7]]), 1, 3)
        assert await asyncio.to_thread(batcher.stop, 10)

    asyncio.run(ask())
    here = threading.get_ident()
    assert sum(call.rows for call in calls) == 6
    assert [caller == here for caller in callers if caller] == [False, True, *[False] * (len(calls) - 4), True, False]
