"""A Triton model repository: config.pbtxt out of the ONNX signature and the record, driven once as Triton would drive the model.

    DIR/README.md  model_analyzer.yaml  perf_input.json      Triton looks at folders alone here
    DIR/<model>/config.pbtxt  labels.txt  warmup/            what it reads of a model
    DIR/<model>/1/model.onnx                                 with external data: 1/model.onnx/model.onnx and its data beside it
    DIR/<model>/tokenizer.json  config.json  golden.json  results.json

The last line is for clients and for `verify`; Triton leaves files of a model's folder alone that config.pbtxt does not name.
Source: triton-inference-server/server, docs/user_guide/model_repository.md, "Repository Layout" and "ONNX Models".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsqueeze import environment, graph
from onnxsqueeze.artifact import MODEL_FILE, TRITON_CONFIG_FILE
from onnxsqueeze.backends import Backends
from onnxsqueeze.deploy import batching, pbtxt
from onnxsqueeze.deploy.card import title, triton_readme
from onnxsqueeze.deploy.source import Source
from onnxsqueeze.errors import MeasureError, ModelError
from onnxsqueeze.measure import golden
from onnxsqueeze.results import RESULTS_FILE
from onnxsqueeze.tokens import Encoded, Encoder, pad

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = dict[str, NDArray[np.int64]]  # input → [batch, tokens]

_LABELS, _WARMUP, _ANALYZER, _PERF = "labels.txt", "warmup", "model_analyzer.yaml", "perf_input.json"
_MOUNTED = "/models"  # where the containers of README.md have the repository

# Triton's ONNX Runtime backend has these providers and no other; CUDA is what an instance on a GPU runs on without being told.
# Source: onnxruntime_backend, README, sections "ONNX Runtime with …"; src/onnxruntime.cc, ModelState::LoadModel.
_KINDS = {"cpu": "KIND_CPU", "openvino": "KIND_CPU", "cuda": "KIND_GPU", "tensorrt": "KIND_GPU"}
_ACCELERATORS = {
    "openvino": (("cpu_execution_accelerator", "openvino"),),
    "tensorrt": (("gpu_execution_accelerator", "tensorrt"),),
}
_ACCELERATOR_NOTE = {
    "openvino": "device CPU, as measured; the server must be built with OpenVINO, and its number of threads cannot be set here",
    "tensorrt": "no parameters: TensorRT's defaults, as measured; engines are built while the model is loaded, which takes minutes",
}


@dataclass(frozen=True)
class _Row:
    """A row of real token ids for warming up: of a generated sentence, or of several as one text."""

    name: str
    ids: Encoded


def files(source: Source, without_paths: dict[str, Path | bytes], backends: Backends) -> dict[str, Path | bytes]:
    """The repository, by its files' names; ``without_paths`` are files of the source's folder in a form that names no machine.

    The configuration is read back by Triton's protobuf and driven in a session of the target's backend. Raises UsageError where the extra is
    missing, ModelError where Triton cannot have this model, MeasureError where a session says otherwise than the golden answers, Unavailable
    where the backend does not start.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", title(source))
    values = graph.values(graph.read(source.folder / MODEL_FILE))
    encoder = Encoder(source.folder, source.golden.max_length)
    batches = _batching(source, values)
    warm = _warm_rows(source, encoder)
    config = _config(source, name, values, batches, warm)
    text = pbtxt.write(config)
    drive(pbtxt.read(text), source, backends)
    parts = source.files("1" if len(source.model) == 1 else f"1/{MODEL_FILE}") | without_paths
    if _labels(source):
        parts[_LABELS] = ("\n".join(_labels(source)) + "\n").encode()
    parts |= {
        f"{_WARMUP}/{file}": _raw(row.ids, tensor, encoder.pad_id)
        for row, sample in zip(warm, config.warmup, strict=False)
        for tensor, file in sample.inputs
    }
    model = next(place for place in parts if place.endswith(f"/{MODEL_FILE}"))
    parts[RESULTS_FILE] = source.results(parts, model).to_json().encode()
    parts[TRITON_CONFIG_FILE] = text.encode()  # not among the record's files: it is there to be tuned
    repository = {f"{name}/{place}": content for place, content in parts.items()}
    repository[_PERF] = _perf_input(source, config)
    repository[_ANALYZER] = _analyzer(source, config).encode()
    repository["README.md"] = triton_readme(source, name, config.max_batch_size, mounted=_MOUNTED).encode()
    return repository


def drive(config: pbtxt.Config, source: Source, backends: Backends) -> None:
    """Call the model as a server would that knows ``config`` alone, at one row and at ``max_batch_size`` rows, and compare with the golden answers.

    Raises ModelError where names, types or dims are not the session's, MeasureError where an answer is another one.
    """
    known = source.golden
    encoder = Encoder(source.folder, known.max_length)
    rows = encoder.encode([first for first, _ in known.sentences], [second for _, second in known.sentences])
    (output,) = (tensor for tensor in config.outputs[:1])
    with closing(backends.open(known.backend, source.folder / MODEL_FILE, known.threads)) as session:
        types = {name: pbtxt.DATA_TYPES.get(_numpy_name(kind), kind) for name, kind in session.types.items()}
        given = {tensor.name: tensor.data_type for tensor in config.inputs}
        if given != types or output.name != session.output:
            raise ModelError(
                f"{source.target.name}: config.pbtxt has {given} → {output.name}, a session {types} → {session.output}",
                remedy="please report the recipe: the configuration does not fit its model",
            )
        sizes = (config.inputs[0].dims[0],) if config.max_batch_size == 0 else dict.fromkeys((1, config.max_batch_size))
        for size in sizes:
            answers = []
            for start in range(0, len(rows), size):
                called = [rows[(start + i) % len(rows)] for i in range(size)]
                feed = _feed(config, called, encoder.pad_id)
                answer = session.run(feed)
                _check_shape(config, output, answer.shape, size)
                answers += answer.tolist()
            now = known.model_copy(
                update={
                    **{key: value for key, value in environment.processors().items() if key in ("cpu", "instruction_set")},
                    "runtime": getattr(backends.get(known.backend).runtime, "version", ""),
                    "logits": tuple(tuple(row) for row in answers[: len(rows)]),
                }
            )
            off, _ = golden.distance(known, now)
            limit = golden.tolerance(known, now) if size == 1 else golden.shared_tolerance(known)
            if not off <= limit:
                raise MeasureError(
                    f"{source.target.name}: driven by config.pbtxt at {size} rows its answers are {off:.3g} from the golden ones (allowed {limit:.3g})",
                    remedy="compare with `onnxsqueeze verify` on the run's folder",
                )


def _config(source: Source, name: str, values: Sequence[tuple[str, str, str, tuple[int | str, ...]]], batches: batching.Batching, warm: Sequence[_Row]) -> pbtxt.Config:  # fmt: skip
    backend = source.target.backend
    if backend not in _KINDS:
        raise ModelError(
            f"{source.target.name}: `--to triton`: Triton's ONNX Runtime backend has no {source.target.provider}",
            remedy=f"deploy a target of backend {', '.join(_KINDS)}",
        )
    labels = _LABELS if _labels(source) else ""
    first = next(value for side, value, _, _ in values if side == "output")
    tensors: dict[str, list[pbtxt.Tensor]] = {"input": [], "output": []}
    for side, value, kind, dims in values:
        whole = tuple(dim if isinstance(dim, int) else -1 for dim in dims)
        inner = whole[1:] if batches.max_batch_size else whole
        if kind not in pbtxt.DATA_TYPES or not inner:
            raise ModelError(f"{source.target.name}: `--to triton`: {side} {value} is {kind} {list(whole)}, which Triton has no form for")
        tensors[side].append(pbtxt.Tensor(value, pbtxt.DATA_TYPES[kind], inner, labels if value == first else ""))
    threads = source.golden.threads
    notes = {
        **batches.why,
        "instance_group": f"one session, as measured; more of them answer at the same time and take as much memory each: at most the server's cores ÷ {threads}",
        "parameters": "as measured: ONNX Runtime's own default is a thread for each core of the host, whatever the container may use",
        "model_warmup": "real sentences, of the lengths that requests have: the model is ready when they are through",
        **({"execution_accelerators": _ACCELERATOR_NOTE[backend]} if backend in _ACCELERATOR_NOTE else {}),
    }
    return pbtxt.Config(
        name=name,
        max_batch_size=batches.max_batch_size,
        inputs=tuple(tensors["input"]),
        outputs=tuple(tensors["output"]),
        instance_kind=_KINDS[backend],
        preferred_batch_sizes=batches.preferred,
        max_queue_delay_us=batches.delay_us,
        accelerators=_ACCELERATORS.get(backend, ()),
        parameters=(("execution_mode", "0"), ("inter_op_thread_count", "1"), ("intra_op_thread_count", str(threads))),
        warmup=tuple(_samples(tensors["input"], batches.max_batch_size, warm)),
        notes=notes,
    )


def _batching(source: Source, values: Sequence[tuple[str, str, str, tuple[int | str, ...]]]) -> batching.Batching:
    rows = [dims[0] for _, _, _, dims in values if dims and isinstance(dims[0], int)]
    return batching.fixed(rows[0]) if rows else batching.of(source.target)


def _warm_rows(source: Source, encoder: Encoder) -> list[_Row]:
    """The shortest and the longest golden sentence, and a text as long as the task allows."""
    asked = source.golden.sentences
    rows = sorted(encoder.encode([first for first, _ in asked], [second for _, second in asked]), key=len)
    longest = _long_rows(source, source.golden.max_length, 1)[0]
    found = {len(row): row for row in (rows[0], rows[-1], longest)}
    return [_Row(f"{n}_tokens", row) for n, row in found.items()]


def _long_rows(source: Source, tokens: int, n: int) -> list[Encoded]:
    """``n`` rows of ``tokens`` tokens: golden sentences one after the other, cut there."""
    texts = [first for first, _ in source.golden.sentences]
    pairs = source.golden.sentences[0][1] is not None
    repeats = -(-tokens // len(" ".join(texts).split()))  # a word is at least a token
    long = [" ".join((texts[i % len(texts) :] + texts[: i % len(texts)]) * repeats) for i in range(n)]
    return Encoder(source.folder, tokens).encode(long, long if pairs else [None] * n)


def _samples(inputs: Sequence[pbtxt.Tensor], max_batch_size: int, warm: Sequence[_Row]) -> list[pbtxt.Sample]:
    """Each row alone, then each in a full batch, in which Triton repeats it."""
    found = []
    for size in dict.fromkeys((1, max(1, max_batch_size))):
        for row in warm:
            shaped = [
                (
                    pbtxt.Tensor(tensor.name, tensor.data_type, _concrete(tensor.dims, len(row.ids))),
                    f"{tensor.name}-{row.name}",
                )
                for tensor in sorted(inputs, key=lambda tensor: tensor.name)
            ]
            found.append(pbtxt.Sample(f"{row.name}_{size}_rows" if size > 1 else row.name, size, tuple(shaped)))
    return found


def _concrete(dims: Sequence[int], tokens: int) -> tuple[int, ...]:
    return tuple(tokens if dim < 0 else dim for dim in dims)


def _raw(row: Encoded, tensor: pbtxt.Tensor, pad_id: int) -> bytes:
    """One row of one input as its warm-up file holds it: row-major, little-endian."""
    import numpy as np

    kind = next(name for name, known in pbtxt.DATA_TYPES.items() if known == tensor.data_type)
    values = np.resize(pad([row], pad_id, max(tensor.dims[-1], len(row)))[tensor.name][:, : tensor.dims[-1]], tensor.dims)
    return values.astype(np.dtype(kind).newbyteorder("<")).tobytes()


def _feed(config: pbtxt.Config, rows: Sequence[Encoded], pad_id: int) -> Rows:
    """What a client would send: the configured inputs, rows padded to one width."""
    width = next((dim for dim in (config.inputs[0].dims[-1],) if dim > 0), max(len(row) for row in rows))
    padded = pad(rows, pad_id, width)
    missing = [tensor.name for tensor in config.inputs if tensor.name not in padded]
    if missing:
        raise ModelError(f"config.pbtxt of {config.name}: no tokenizer gives the input {missing[0]}")
    return {tensor.name: padded[tensor.name] for tensor in config.inputs}


def _check_shape(config: pbtxt.Config, output: pbtxt.Tensor, shape: Sequence[int], size: int) -> None:
    wanted = (size, *output.dims) if config.max_batch_size else output.dims
    if len(wanted) != len(shape) or any(want not in (-1, got) for want, got in zip(wanted, shape, strict=True)):
        raise ModelError(
            f"config.pbtxt of {config.name}: {output.name} is said to be {list(wanted)}, a session gives {list(shape)}",
            remedy="please report the recipe: the configuration does not fit its model",
        )


def _labels(source: Source) -> tuple[str, ...]:
    """A name a line, by index; none where the model scores or embeds."""
    return () if source.embeds or len(source.golden.logits[0]) < 2 else source.labels


def _numpy_name(kind: str) -> str:
    """``tensor(float)`` → ``float32``, as numpy names what ONNX Runtime has."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _measured_tokens(source: Source) -> int:
    return min(source.target.latency.sequence if source.target.latency else source.golden.max_length, source.golden.max_length)


def _perf_input(source: Source, config: pbtxt.Config) -> bytes:
    """Requests for perf_analyzer, of the length that was measured: by itself it would send ids that no vocabulary has.

    Source: perf_analyzer, docs/input_data.md, "Real Input Data".
    """
    rows = _long_rows(source, _measured_tokens(source), len(source.golden.sentences))
    padded = pad(rows, Encoder(source.folder, 8).pad_id)
    data = [
        {tensor.name: {"content": padded[tensor.name][i].tolist(), "shape": [padded[tensor.name].shape[1]]} for tensor in config.inputs}
        for i in range(len(rows))
    ]
    return (json.dumps({"data": data}) + "\n").encode()


def _analyzer(source: Source, config: pbtxt.Config) -> str:
    """model_analyzer.yaml: which settings to try here. Source: triton-inference-server/model_analyzer, docs/config.md."""
    import yaml

    cores = max(1, int(source.record.environment.cores) // source.golden.threads)
    counts = [n for n in (1, 2, 4, 8) if n <= max(2, cores)]
    tried: dict[str, Any] = {"instance_group": [[{"kind": config.instance_kind, "count": n}] for n in counts]}
    if config.batches:
        tried["dynamic_batching"] = {"max_queue_delay_microseconds": sorted({0, config.max_queue_delay_us or 100, 1000})}
    tokens = _measured_tokens(source)
    model = {
        **({"cpu_only": True} if config.instance_kind == "KIND_CPU" else {}),
        "parameters": {"batch_sizes": [1], "concurrency": [1, 2, 4, 8, 16]},
        "model_config_parameters": tried,
        "perf_analyzer_flags": {
            "input-data": f"{_MOUNTED}/{_PERF}",
            "shape": [f"{tensor.name}:{tokens}" for tensor in config.inputs],
        },
    }
    settings = {
        "model_repository": _MOUNTED,
        "run_config_search_disable": True,
        "objectives": {"perf_latency_p99": 1, "perf_throughput": 1},
        "profile_models": {config.name: model},
    }
    head = "# model-analyzer profile -f model_analyzer.yaml: instances and delays under load, by p99 and throughput alike; README.md has the command\n"
    return head + yaml.safe_dump(settings, sort_keys=False, width=120)
