"""A loaded model on one execution provider, in a process of its own, which never runs quietly on another provider."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onnxsqueeze.backends.process import Worker
from onnxsqueeze.errors import MeasureError, without_paths

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Block:
    """Runs that were timed one after the other: ``times_ms[runs] float64``, and the CPU seconds that their process used meanwhile."""

    times_ms: NDArray[np.float64]
    cpu_s: float


@dataclass(frozen=True)
class Replay:
    """Calls in their order: ``begins_ms[calls]`` and ``ends_ms[calls]`` float64 since the start, and the CPU seconds of their process."""

    begins_ms: NDArray[np.float64]
    ends_ms: NDArray[np.float64]
    cpu_s: float

    @property
    def times_ms(self) -> NDArray[np.float64]:
        """What each call took."""
        return self.ends_ms - self.begins_ms


@dataclass(frozen=True)
class NodeTime:
    """One node of a session: its operator, where it ran, and the microseconds of all profiled runs together."""

    name: str
    operator: str
    provider: str
    us: float


class Answers(Protocol):
    """What a call is put to: a session, or a model behind a server."""

    def run(self, feed: Feed) -> NDArray[np.float32]:
        """``{input_ids, attention_mask, …}[batch, tokens]`` → ``logits[batch, outputs] float32``."""

    def close(self) -> None:
        """End it."""


class Session:
    """Runs one .onnx file in a process of ``python``.

    ``inputs`` are its input names in order, ``types`` theirs as ONNX Runtime has them ("tensor(int64)"), ``output`` is the one that is read,
    ``load_s`` what making the session took.

    Raises MeasureError where the file does not load, where the provider does not start, or where ONNX Runtime gave nodes to another one.
    """

    def __init__(
        self, onnx: Path, provider: str, threads: int, *, python: str = sys.executable, options: Mapping[str, str] | None = None
    ) -> None:
        self._onnx, self._name = onnx, f"{onnx.parent.name}/{onnx.name}"  # no absolute path may reach a record
        self._worker = Worker(python, f"{self._name} on {provider}")
        try:
            facts = self._opened(provider, threads, dict(options or {}))
        except BaseException:
            self._worker.close()
            raise
        self.load_s: float = facts["load_s"]
        self.types: dict[str, str] = facts["inputs"]
        self.output: str = "logits" if "logits" in facts["outputs"] else facts["outputs"][0]
        self.inputs = tuple(self.types)

    def _opened(self, provider: str, threads: int, options: dict[str, str]) -> dict[str, Any]:
        facts, _ = self._worker.ask("open", path=str(self._onnx.absolute()), provider=provider, threads=threads, options=options)
        if "error" in facts:
            raise MeasureError(
                f"{self._name}: {provider} cannot load it: {self._spoken(facts['error'])}",
                remedy="check the file with `onnx.checker`, or leave out the stage that wrote it on this backend",
            )
        if facts["started"][0] != provider:
            raise MeasureError(
                f"{self._name}: {provider} did not start, {facts['started'][0]} would have run it", remedy="see `onnxsqueeze doctor`"
            )
        if facts["moved"]:
            most = sorted(facts["moved"].items(), key=lambda item: -item[1])[:5]
            raise MeasureError(
                f"{self._name}: {sum(facts['moved'].values())} nodes do not run on {provider} and fell back: "
                + ", ".join(f"{n} {operator}" for operator, n in most),
                remedy=f"choose stages whose operators {provider} has kernels for",
            )
        return facts

    def run(self, feed: Feed) -> NDArray[np.float32]:
        """``{input_ids, attention_mask, …}[batch, tokens]`` → ``logits[batch, outputs] float32``.

        Names that the graph does not have are left out; int64 is cast where the graph wants int32. Raises MeasureError.
        """
        import numpy as np

        answer, arrays = self._worker.ask("run", self._given(feed), output=self.output)
        self._check(answer)
        return np.asarray(arrays["logits"], np.float32)

    def hold(self, feeds: Sequence[Feed]) -> None:
        """Make ``feeds`` the input of what follows. Raises MeasureError as `run` does."""
        arrays = {f"{i}/{name}": array for i, feed in enumerate(feeds) for name, array in self._given(feed).items()}
        self._check(self._worker.ask("hold", arrays, output=self.output, count=len(feeds))[0])

    def time(self, least_runs: int, least_ms: float, *, uncounted: int = 0) -> Block:
        """Run the first held feed until there are enough runs and they took long enough, after some that do not count; see `worker.Model.times`."""
        answer, arrays = self._worker.ask("time", least_runs=least_runs, least_ms=least_ms, uncounted=uncounted)
        self._check(answer)
        return Block(arrays["times_us"] / 1e3, answer["cpu_s"])

    def replay(self, order: Sequence[int], arrivals_s: Sequence[float] | None = None) -> Replay:
        """Run the held feeds in this order, each as soon as the one before has ended and not before its arrival; see `worker.Model.replay`."""
        listed = None if arrivals_s is None else list(arrivals_s)
        answer, arrays = self._worker.ask("replay", order=list(order), arrivals_s=listed)
        self._check(answer)
        return Replay(arrays["begins_us"] / 1e3, arrays["ends_us"] / 1e3, answer["cpu_s"])

    def profile(self, runs: int, *, uncounted: int) -> list[NodeTime]:
        """The runtime's own profile of some runs of the first held feed, after some that do not count; see `worker.Model.profile`."""
        answer, _ = self._worker.ask("profile", runs=runs, uncounted=uncounted)
        self._check(answer)
        return [NodeTime(*node) for node in answer["nodes"]]

    def cpu_s(self) -> float | None:
        """CPU seconds that the process has used; see `Worker.cpu_s`."""
        return self._worker.cpu_s()

    def memory_bytes(self) -> int | None:
        """What the process held at most so far, less what it held before the file was loaded; None where the system does not tell."""
        answer, _ = self._worker.ask("memory")
        before, peak = answer["before_bytes"], answer["peak_bytes"]
        return None if before is None or peak is None else max(0, peak - before)

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _given(self, feed: Feed) -> dict[str, NDArray[Any]]:
        import numpy as np

        try:
            return {name: feed[name].astype(np.int32) if kind == "tensor(int32)" else feed[name] for name, kind in self.types.items()}
        except KeyError as error:
            raise MeasureError(
                f"{self._name}: its input {error} is not one of {', '.join(feed)}",
                remedy="export it again with the inputs input_ids, attention_mask, token_type_ids",
            ) from error

    def _check(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise MeasureError(
                f"{self._name}: stopped while running: {self._spoken(answer['error'])}",
                remedy="run it in a stock session on the same input; if that works, report this as a bug",
            )

    def _spoken(self, text: str) -> str:
        return without_paths(text.replace(str(self._onnx.absolute()), self._name))


class Shared:
    """One session for callers that would each open and close their own: opened when the first of them does, closed with this."""

    def __init__(self, opener: Callable[[], Session]) -> None:
        self._opener = opener
        self._session: Session | None = None

    def open(self, *_: object) -> Answers:
        """The session, for one caller; whatever it is asked to open. Raises as the opener does."""
        self._session = self._session or self._opener()
        return _Lent(self._session)

    def close(self) -> None:
        """End it, where it was opened."""
        if self._session:
            self._session.close()


@dataclass(frozen=True)
class _Lent:
    session: Session

    def run(self, feed: Feed) -> NDArray[np.float32]:
        return self.session.run(feed)

    def close(self) -> None:
        pass
