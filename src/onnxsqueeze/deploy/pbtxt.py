"""config.pbtxt, Triton's description of a model: written with a reason beside each number, and read back by Triton's own protobuf.

Source: triton-inference-server/common, protobuf/model_config.proto; server, docs/user_guide/model_configuration.md; onnxruntime_backend, README.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxsqueeze.errors import ModelError, UsageError

# numpy's names of types, and Triton's. Source: model_configuration.md, "Datatypes".
DATA_TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32", "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
}  # fmt: skip
_INSTEAD = "please report the recipe: the file would not be what was meant"


@dataclass(frozen=True)
class Tensor:
    """An input or output. ``dims`` are without the batch where there is one; -1 is free. ``labels`` is a file in the model's folder."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    labels: str = ""


@dataclass(frozen=True)
class Sample:
    """One warm-up call of ``batch_size`` equal rows; ``inputs`` are tensors without free dims, each with its file in the folder ``warmup``."""

    name: str
    batch_size: int
    inputs: tuple[tuple[Tensor, str], ...]


@dataclass(frozen=True)
class Config:
    """What a config.pbtxt says. ``accelerators`` are (list, name) as in ("gpu_execution_accelerator", "tensorrt"). ``notes`` are comments, by the field they stand above."""

    name: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    instance_kind: str
    instance_count: int = 1
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    accelerators: tuple[tuple[str, str], ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()
    warmup: tuple[Sample, ...] = ()
    platform: str = "onnxruntime_onnx"
    backend: str = "onnxruntime"
    model_file: str = "model.onnx"
    versions: int = 1
    notes: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def batches(self) -> bool:
        """Whether Triton joins requests: its scheduler for that is only there above one row."""
        return self.max_batch_size > 1


def write(config: Config) -> str:
    """The text of config.pbtxt. Raises ModelError where Triton's protobuf reads something else out of it than ``config``, UsageError where that is not installed."""
    text = "\n".join(_lines(config)) + "\n"
    found = read(text)
    if found != config:
        wrong = [name for name in Config.__dataclass_fields__ if name != "notes" and getattr(found, name) != getattr(config, name)]
        raise ModelError(f"config.pbtxt of {config.name}: reads back otherwise: {', '.join(wrong)}", remedy=_INSTEAD)
    return text


def read(text: str) -> Config:
    """What Triton's protobuf reads out of the text of a config.pbtxt. Raises ModelError where it is none, UsageError where the extra is missing."""
    try:
        from tritonclient.grpc import model_config_pb2
    except (ModuleNotFoundError, RuntimeError) as error:  # RuntimeError: tritonclient without its part for gRPC
        raise UsageError(
            "--to triton: Triton's own protobuf, which reads config.pbtxt back, is not installed",
            remedy="pip install 'onnxsqueeze[triton]'",
        ) from error
    from google.protobuf import text_format

    message: Any = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ModelError(f"config.pbtxt: Triton cannot read it: {error}", remedy=_INSTEAD) from error
    types, kinds = model_config_pb2.DataType, model_config_pb2.ModelInstanceGroup.Kind
    groups, batching, accelerators = message.instance_group, message.dynamic_batching, message.optimization.execution_accelerators
    return Config(
        name=message.name,
        max_batch_size=message.max_batch_size,
        inputs=tuple(Tensor(one.name, types.Name(one.data_type), tuple(one.dims)) for one in message.input),
        outputs=tuple(Tensor(one.name, types.Name(one.data_type), tuple(one.dims), one.label_filename) for one in message.output),
        instance_kind=", ".join(kinds.Name(group.kind) for group in groups),
        instance_count=sum(group.count for group in groups),
        preferred_batch_sizes=tuple(batching.preferred_batch_size),
        max_queue_delay_us=batching.max_queue_delay_microseconds,
        accelerators=tuple(
            (side, one.name) for side in ("gpu_execution_accelerator", "cpu_execution_accelerator") for one in getattr(accelerators, side)
        ),
        parameters=tuple(sorted((key, value.string_value) for key, value in message.parameters.items())),
        warmup=tuple(Sample(one.name, one.batch_size, _warmed(one, types)) for one in message.model_warmup),
        platform=message.platform,
        backend=message.backend,
        model_file=message.default_model_filename,
        versions=message.version_policy.latest.num_versions,
    )


def _warmed(sample: Any, types: Any) -> tuple[tuple[Tensor, str], ...]:
    return tuple(
        (Tensor(name, types.Name(one.data_type), tuple(one.dims)), one.input_data_file) for name, one in sorted(sample.inputs.items())
    )


def _lines(config: Config) -> Iterator[str]:
    def noted(name: str) -> Iterator[str]:
        if name in config.notes:
            yield f"# {name}: {config.notes[name]}"

    yield f"name: {_quoted(config.name)}  # the folder must have this name"
    yield f"platform: {_quoted(config.platform)}"
    yield f"backend: {_quoted(config.backend)}"
    yield f"default_model_filename: {_quoted(config.model_file)}"
    yield from noted("max_batch_size")
    yield f"max_batch_size: {config.max_batch_size}"
    yield f"version_policy {{ latest {{ num_versions: {config.versions} }} }}"
    for side, tensors in (("input", config.inputs), ("output", config.outputs)):
        for tensor in tensors:
            yield from (f"{side} {{", *_tensor(tensor), "}")
    if config.batches:
        yield from noted("preferred_batch_size")
        yield from noted("max_queue_delay_microseconds")
        yield "dynamic_batching {"
        if config.preferred_batch_sizes:
            yield f"  preferred_batch_size: {_listed(config.preferred_batch_sizes)}"
        yield f"  max_queue_delay_microseconds: {config.max_queue_delay_us}"
        yield "}"
    yield from noted("instance_group")
    yield f"instance_group {{ kind: {config.instance_kind} count: {config.instance_count} }}"
    yield from noted("execution_accelerators")
    for side, name in config.accelerators:
        yield f"optimization {{ execution_accelerators {{ {side} {{ name: {_quoted(name)} }} }} }}"
    yield from noted("parameters")
    for key, value in config.parameters:
        yield f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
    yield from noted("model_warmup")
    for sample in config.warmup:
        yield "model_warmup {"
        yield f"  name: {_quoted(sample.name)}"
        yield f"  batch_size: {sample.batch_size}"
        for tensor, file in sample.inputs:
            dims = f"data_type: {tensor.data_type} dims: {_listed(tensor.dims)} input_data_file: {_quoted(file)}"
            yield f"  inputs {{ key: {_quoted(tensor.name)} value {{ {dims} }} }}"
        yield "}"


def _tensor(tensor: Tensor) -> Iterator[str]:
    yield f"  name: {_quoted(tensor.name)}"
    yield f"  data_type: {tensor.data_type}"
    yield f"  dims: {_listed(tensor.dims)}"
    if tensor.labels:
        yield f"  label_filename: {_quoted(tensor.labels)}"


def _listed(numbers: Iterable[int]) -> str:
    return f"[ {', '.join(str(number) for number in numbers)} ]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
