"""Real text through the tokenizer that `deploy --text` puts into the graph: on which lines its ids are not those of tokenizer.json, and what it costs.

    python benchmarks/text_in.py --texts DIR RUN/TARGET [--lines 100000] [--examples 0]

DIR holds .txt files in UTF-8, a text a line; RUN/TARGET is a target's folder below a run's output, or any folder with tokenizer.json. Prints two tables: lines in
ASCII and others, how many differ and the share with its 95 % interval (Wilson); and the microseconds of a call in one thread, in the graph and by the
tokenizers library outside, at batch 1 and 8, on lines drawn with seed 0. No text is printed unless --examples asks for some that differ.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from onnxsqueeze.text import probe, rules
from onnxsqueeze.tokens import Encoder

MAX_LENGTH = 128
CALLS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--examples", type=int, default=0)
    given = parser.parse_args()
    encoder = Encoder(given.target, MAX_LENGTH)
    graph = probe.InGraph(rules.read(given.target, MAX_LENGTH, encoder.pad_id), encoder)
    texts = list(islice(lines(given.texts), given.lines))
    if not texts:
        raise SystemExit(f"{given.texts}: no lines in .txt files")
    print("| lines | n | other ids | share (95 %) |\n| --- | --- | --- | --- |")
    for name, some in (("ASCII", [one for one in texts if one.isascii()]), ("others", [one for one in texts if not one.isascii()])):
        differing = list(graph.differing(some))
        low, high = wilson(len(differing), len(some))
        print(f"| {name} | {len(some):,} | {len(differing):,} | {len(differing) / max(1, len(some)):.4%} ({low:.4%} to {high:.4%}) |")
        for text in differing[: given.examples]:
            print(ascii(text))
    drawn = random.Random(0).choices(texts, k=CALLS * 8)  # noqa: S311, no secret
    print("\n| batch | in the graph, µs a call | tokenizers outside, µs a call |\n| --- | --- | --- |")
    for batch in (1, 8):
        calls = [drawn[i * batch : (i + 1) * batch] for i in range(CALLS)]
        print(f"| {batch} | {microseconds(graph.inputs, calls):.0f} | {microseconds(graph.expected, calls):.0f} |")


def lines(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.txt")):
        with file.open(encoding="utf-8") as handle:
            yield from (line.rstrip("\n") for line in handle if line.strip())


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % interval of k / n. Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference"."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


def microseconds(call: Callable[[Sequence[str]], object], calls: list[list[str]]) -> float:
    """Median of one call each."""
    times = []
    for some in calls:
        start = time.perf_counter()
        call(some)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


if __name__ == "__main__":
    main()
