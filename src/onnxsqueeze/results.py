"""What a run writes to results.json: one typed model, and nothing else writes or reads that file.

Metrics and their deltas are fractions (correlations as they are). Ratios are baseline ÷ target: above 1 is better.
Times are milliseconds where a name ends in ``_ms`` and seconds where it ends in ``_s``. Fields are added within
``schema`` 1, never changed. Nothing here may hold an absolute path, a host name or a user name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxsqueeze.errors import DataError

RESULTS_FILE = "results.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Split(_Part):
    """One file of rows, by name and digest."""

    name: str
    n: int
    source: str = Field(description="File name or 'generated'; never a path")
    sha256: str
    role: Literal["train", "selection", "dev"] = "dev"
    dropped: int = Field(0, description="Training rows dropped because a selection row holds or is their text")
    looks: int = Field(0, description="How often this split's figures had been measured on this machine before this run")


class TaskRecord(_Part):
    """The task, and the rows that were used."""

    name: str
    primary: str
    max_length: int
    batch: int = Field(description="Rows a session call when the metric was measured")
    splits: tuple[Split, ...] = Field(description="The splits whose metrics were measured, in order; the first one decides")
    training: tuple[Split, ...] = Field((), description="The rows that were trained and chosen on")
    generated: bool = Field(default=False, description="True where the sentences come from a grammar, not from people")
    note: str = ""
    compare: Literal["cosine"] | None = Field(
        None, description="How the vectors of a pair become its score, where the models embed single texts"
    )
    pooling: Literal["mean", "first"] | None = Field(None, description="How a text's vector is made of its tokens' last states")


class Environment(_Part):
    """The machine and the installation, without a name of either."""

    cpu: str = Field(description="CPU model name")
    instruction_set: str = Field(description="Best integer instruction set: amx_int8, avx512_vnni, avx_vnni, avx512, avx2, neon, …")
    features: tuple[str, ...] = ()
    cores: float = Field(description="Cores this process may use: affinity and cgroup quota")
    memory_bytes: int
    os: str
    python: str
    versions: dict[str, str]
    providers: tuple[str, ...] = Field(description="Execution providers that started a session")
    accelerator: str | None = None


class Latency(_Part):
    """One shape's measured times."""

    p50_ms: float
    p90_ms: float
    p99_ms: float | None = Field(description="null below 459 runs: too few to tell")
    n: int
    batch: int
    sequence: int
    threads: int
    mean_ms: float | None = Field(None, description="Of all counted runs; what counts where rows take unequal ways, as with early exits")
    load_s: float
    first_run_ms: float
    min_ms: float
    max_ms: float
    processes: int = Field(1, description="How often the model got a new process; load and first run are medians of all but the first")
    warmup: int = Field(description="Runs before the first counted one of each process")
    steady: bool = Field(description="False where the warm-up ended at its bound")
    valid: bool = Field(default=True, description="False where others disturbed a block to the end, or the times drifted")
    repeated_blocks: int = Field(0, description="Blocks run again because others took more than 5 % of the cores, or waiting models of one")
    disturbed_blocks: int = Field(0, description="Blocks of the 20 in which they still did when no repetition was left")
    idle_cpu_share: float | None = Field(
        None,
        description="Of one core, at most in a counted block, what the models measured beside it used while they waited; null where alone",
    )
    peak_memory_bytes: int | None = Field(
        None,
        description="Host memory that loading the model and its first run took at most: VmHWM of its process then, less VmRSS before the load",
    )
    samples: str | None = Field(None, description="Every run in microseconds, one array a round: a compressed .npz beside results.json")
    lengths: Literal["fixed", "task"] = Field(
        "fixed", description="task: rows of the first dev split, each call padded to its longest; sequence is then their median length"
    )
    text_p50_ms: float | None = Field(None, description="From text to padded ids, in this process, for the task's rows")
    whole_p50_ms: float | None = Field(None, description="From text to logits: the median of the sums over the same calls")
    date: str = Field(description="UTC day of the measurement; older than the run where the store had it")


class OperatorTime(_Part):
    """All nodes of one operator on one provider: the mean of their time in a run."""

    operator: str
    provider: str
    nodes: int
    ms: float


class Proof(_Part):
    """What really ran, from the runtime's own profile of ``runs`` calls at the shape that decides."""

    runs: int
    total_ms: float = Field(description="Mean of the time of all nodes in a run, while profiled")
    nodes_per_provider: dict[str, int]
    operators: tuple[OperatorTime, ...] = Field(description="The longest first")
    fusions: dict[str, int] = Field(
        description="Operators of which the session runs more nodes than the file has: what it made when it loaded"
    )
    memcpy_nodes: int = Field(description="Copies between devices that the runtime put in")
    governor: str | None = Field(None, description="The CPU's frequency governor; null where the system does not tell")


class ServerTrial(_Part):
    """Requests at one rate: how long 99 % of them waited at most, and whether that held the bound."""

    rate_per_s: float
    n: int
    p99_ms: float
    held: bool


class Load(_Part):
    """One session under load, on rows of the task."""

    single_stream_p90_ms: float
    single_stream_n: int
    offline_rows_per_s: float
    offline_batch: int
    server_rows_per_s: float | None = Field(description="Highest rate that held the bound; 0 where none did; null where none was searched")
    server_bound_ms: float | None
    server_trials: tuple[ServerTrial, ...]
    threads: int
    mean_tokens: float


class MetricValue(_Part):
    """A metric with its 95 % interval over ``n`` rows."""

    value: float
    ci95: tuple[float, float]
    n: int


class MetricDelta(_Part):
    """Target against baseline on the same rows."""

    delta: float = Field(description="target - baseline on the same rows")
    ci95: tuple[float, float]
    p_value: float


class VsBaseline(_Part):
    """A target against its backend's baseline."""

    baseline: str
    size_ratio: float
    speedup: float | None
    speedup_ci95: tuple[float, float] | None
    speed: Literal["faster", "slower", "tie", "unproven"]
    metrics: dict[str, dict[str, MetricDelta]]
    quality: Literal["better", "worse", "tie"]


class VsParent(_Part):
    """A target against the one that holds the file it was made from: whether its own stages have made it faster."""

    parent: str
    speedup: float = Field(description="Parent p50 ÷ target p50 at the measured shape")
    speedup_ci95: tuple[float, float] | None = Field(description="null where they were not timed in turns")
    speed: Literal["faster", "slower", "tie", "unproven"]


class WeightClass(_Part):
    """All weights of one class and one stored type in the written file."""

    class_: str = Field(alias="class", description="embedding, attention, feed_forward, head, norm, other")
    dtype: str
    n: int
    zeros: int
    bytes: int


class SizeParts(_Part):
    """What the bytes of the written file are; they sum to ``size_bytes``. A tensor counts with its name and shape."""

    layers: int = Field(description="Weights of layers and heads")
    embeddings: int = Field(description="Vocabulary, positions and token types")
    scales: int = Field(description="Scales and zero points")
    biases_and_norms: int
    constants: int = Field(description="Nothing that is learned: shapes, axes, positions, scalars")
    decoders: int = Field(description="Tables and constants that the decoders of packed weights share")
    graph: int = Field(description="Everything that is no initializer: operators, decoders' too, names, and the provenance")


class FileRecord(_Part):
    """One file of a target's folder."""

    path: str = Field(description="Relative to the folder of results.json")
    sha256: str
    bytes: int


class Gate(_Part):
    """One gate of the recipe and what came of it."""

    name: str
    limit: float
    value: float
    passed: bool


class StageRecord(_Part):
    """One stage: what it took and what it changed."""

    id: str
    kind: str
    seconds: float = Field(description="What making it took, also where the store had it")
    changed: dict[str, Any] = Field(description='{"count": …, "what": …, "details": {…}}; counted in the result')
    reused: bool = Field(default=False, description="True where the store had it")
    skipped: str | None = Field(None, description="Why the stage was skipped")
    key: str | None = None


class Older(_Part):
    """A deployed file that was rewritten for an older ONNX Runtime, and what came of it there. All other figures of the record are of ``measured``."""

    runtime: str = Field(description="The ONNX Runtime that it was made for and tried in: onnxruntime 1.18.1")
    changed: tuple[str, ...] = Field(description="What was lowered, in words; empty where that version takes the measured file as it is")
    measured: tuple[FileRecord, ...] = Field(description="The model's files as they were measured")
    max_abs_diff: float = Field(description="Largest distance of a golden answer there, from the one here")
    tolerance: float
    turned: int = Field(description="Golden answers whose class is another one there")


class Target(_Part):
    """One target's numbers: a record."""

    name: str
    backend: str
    provider: str
    runtime: str | None = Field(
        None,
        description="Distribution and version of the ONNX Runtime that ran it, which may be in another Python: onnxruntime-openvino 1.24.1",
    )
    status: Literal["ok", "skipped", "failed"]
    baseline: bool = False
    reason: str | None = None
    remedy: str | None = None
    model: str | None = Field(None, description="The .onnx, relative to the folder of results.json")
    size_bytes: int | None = None
    size_gzip_bytes: int | None = None
    size_entropy_bytes: int | None = Field(
        None, description="The weights by their order-0 entropy: about what a packed file would have, see onnxsqueeze.entropy"
    )
    size_dense_bytes: int | None = Field(
        None, description="The dense twin: the file with its packed weights unpacked; the file itself where nothing is packed"
    )
    size_dense_gzip_bytes: int | None = Field(None, description="The dense twin after gzip -9")
    size_dense_zstd_bytes: int | None = Field(
        None,
        description="The dense twin after zstd -12; -19 makes a hundredth less in twenty times the time",
    )
    size_bound_bytes: int | None = Field(
        None,
        description="Order-0 entropy of each integer weight of the dense twin, zeros included, summed, and the bytes of scales and zero points; null without integer weights",
    )
    size_parts_bytes: SizeParts | None = None
    size_provenance_bytes: int | None = Field(
        None, description="Of the .onnx, what its provenance takes: recipe, digests, versions, metric; null where it carries none"
    )
    tokenizer_bytes: int | None = None
    latency: Latency | None = None
    latencies: tuple[Latency, ...] = ()
    metrics: dict[str, dict[str, MetricValue]] = Field(default_factory=dict)
    vs_baseline: VsBaseline | None = None
    vs_parent: VsParent | None = Field(None, description="null where no other target holds the file that this one was made from")
    files: tuple[FileRecord, ...] = ()
    weights: tuple[WeightClass, ...] = ()
    operators: dict[str, int] = Field(default_factory=dict, description="Nodes per operator in the written file")
    stages: tuple[StageRecord, ...] = Field((), description="The whole chain from the starting model to this file")
    gates: tuple[Gate, ...] = ()
    proof: Proof | None = None
    load: Load | None = None
    extra: dict[str, Any] = Field(default_factory=dict, description="Per stage or measure kind")
    older: Older | None = Field(
        None, description="Where `deploy --ort` made the file for an older ONNX Runtime; null where it is the measured file"
    )


class Results(_Part):
    """One run."""

    schema_: Literal[1] = Field(1, alias="schema")
    recipe: str
    recipe_sha256: str
    seed: int
    command: str
    model: str = Field(description="Name of the starting checkpoint")
    model_sha256: str
    task: TaskRecord
    environment: Environment
    stages: tuple[StageRecord, ...] = Field(description="The shared stages")
    targets: tuple[Target, ...]
    date: str = Field(description="UTC day of the run")
    threads: int | None = Field(None, description="Threads that stages could use; trained bytes can depend on it")

    def to_json(self) -> str:
        """The text of results.json: stable order, two spaces, final newline."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"


def read_results(path: Path) -> Results:
    """Read ``results.json``, or the one inside the folder ``path``.

    Raises DataError where there is none or it is not of schema 1.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read: {error.strerror}", remedy="give the output folder of `onnxsqueeze run`, or its results.json"
        ) from error
    try:
        return Results.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{file}: is not a record of schema 1: {place}: {first['msg']}", remedy="write it again with `onnxsqueeze run`"
        ) from error
