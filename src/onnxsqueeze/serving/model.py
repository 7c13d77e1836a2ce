"""One open version: its session in this process, what it takes and gives, checked against its golden answers and warmed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnxruntime as ort

from onnxsqueeze import backends, environment, graph
from onnxsqueeze.backends.backend import Backend
from onnxsqueeze.backends.worker import runtime_errors
from onnxsqueeze.errors import MeasureError, ModelError, Unavailable, without_paths
from onnxsqueeze.measure import golden
from onnxsqueeze.measure.golden import Golden
from onnxsqueeze.nn.checkpoint import read_config
from onnxsqueeze.nn.family import FAMILIES
from onnxsqueeze.serving.folder import Place
from onnxsqueeze.serving.rows import Limits
from onnxsqueeze.tokens import INPUT_NAMES, Encoded, Encoder, pad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]

Says = Literal["labels", "value", "vector"]  # what one row's answer is

# The protocol's names of ONNX Runtime's types.
_DATATYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(int8)": "INT8", "tensor(uint16)": "UINT16", "tensor(int16)": "INT16",
    "tensor(uint32)": "UINT32", "tensor(int32)": "INT32", "tensor(uint64)": "UINT64", "tensor(int64)": "INT64",
    "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
}  # fmt: skip
_BRANCHES = {"If", "Loop", "Scan"}
DTYPES = {
    name: np.dtype("bool" if name == "BOOL" else name.lower().replace("fp", "float")).newbyteorder("<") for name in _DATATYPES.values()
}


@dataclass(frozen=True)
class Tensor:
    """An input or output: ``sizes`` has a number where the graph fixes one, else the graph's own word for it."""

    name: str
    datatype: str
    sizes: tuple[int | str | None, ...]

    @cached_property
    def shape(self) -> list[int]:
        """As the protocol has it: −1 where the size is free."""
        return [size if isinstance(size, int) else -1 for size in self.sizes]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The type in numpy, as it comes over the wire: little-endian."""
        return DTYPES[self.datatype]


class Model:
    """A version that may be served. `open_model` makes one; nothing changes it afterwards."""

    def __init__(self, place: Place, session: Any, known: Golden, threads: int, max_batch: int) -> None:
        self.place, self.version, self.threads, self.golden = place, place.version, threads, known
        self._session = session
        where = f"{place.folder.name}/{place.onnx.name}"
        self.inputs = {one.name: _tensor(one, where) for one in session.get_inputs()}
        self.outputs = {one.name: _tensor(one, where) for one in session.get_outputs()}
        self.provider: str = session.get_providers()[0]
        self.sha256 = known.sha256
        config = read_config(place.folder)
        self.limits = _limits(config, known, max_batch, self.inputs)
        self.max_length = min(known.max_length, self.limits.tokens)
        self.encoder = Encoder(place.folder, self.max_length)
        self.pad_id = self.encoder.pad_id
        self.fixed_width = next((t.sizes[1] for t in self.inputs.values() if len(t.sizes) == 2 and isinstance(t.sizes[1], int)), None)
        self.says: Says = "vector" if known.vectors else "labels" if len(known.logits[0]) > 1 else "value"
        self.labels = _labels(config, len(known.logits[0])) if self.says == "labels" else ()
        self.output = "logits" if "logits" in self.outputs else next(iter(self.outputs))
        words = {t.sizes for t in self.inputs.values()}
        free = len(words) == 1 and all(len(sizes) == 2 and not any(isinstance(size, int) for size in sizes) for sizes in words)
        rows, tokens = next(iter(words)) if free else (None, None)
        self.steady = graph.operators(place.onnx).keys().isdisjoint(_BRANCHES)  # equal shapes take equal time
        self.mergeable = free and self.inputs.keys() <= set(INPUT_NAMES) and all(t.sizes[:1] == (rows,) for t in self.outputs.values())
        self.per_token = [tokens is not None and tokens in t.sizes[1:2] for t in self.outputs.values()]

    def run(self, feed: Feed) -> list[NDArray[Any]]:
        """All outputs in their order. Raises what ONNX Runtime raises."""
        found: list[NDArray[Any]] = self._session.run(None, feed)
        return found

    def padded(self, rows: Sequence[Encoded]) -> dict[str, NDArray[Any]]:
        """The feed of these rows, padded to one width, as the graph wants it."""
        feed = pad(rows, self.pad_id, self.fixed_width if isinstance(self.fixed_width, int) else None)
        return {name: feed[name].astype(tensor.dtype, copy=False) for name, tensor in self.inputs.items()}

    def said(self, outputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """The output that is the answer: ``[rows, classes or components]``."""
        return np.asarray(outputs[list(self.outputs).index(self.output)], np.float32)


def open_model(place: Place, threads: int, max_batch: int) -> Model:
    """Load a version, compare its answers with the golden ones, and run it at the lengths and batch sizes that will come.

    Raises ModelError where a file is missing, damaged, outside its folder or takes text, DataError where golden.json is, MeasureError where
    it does not run or does not answer as it did when it was measured, Unavailable where its provider does not start.
    """
    known = golden.read(place.folder)
    where = f"{place.folder.name}/{place.onnx.name}"
    if golden.digests(place.onnx.parent) != known.sha256:
        raise ModelError(f"{where}: not the file that golden.json is of (sha256 differs)", remedy="deploy it again: `onnxsqueeze deploy`")
    for file in graph.files_of(place.onnx):
        if not file.is_file():
            raise ModelError(f"{where}: its weights are said to lie in {file.name}, which is not there", remedy="copy the whole folder")
    backend = backends.get(known.backend)
    if backend.provider not in ort.get_available_providers():
        raise Unavailable(
            f"{where}: was made for {backend.name}, and this onnxruntime {ort.__version__} has no {backend.provider}",
            remedy=f"serve it from an environment with {backend.wheel or backend.provider}, or serve a target made for cpu",
        )
    try:
        session = _session(place.onnx, backend, threads)
        model = Model(place, session, known, threads, max_batch)
        if model.provider != backend.provider:
            raise Unavailable(
                f"{where}: {backend.provider} did not start, {model.provider} would run it", remedy="see `onnxsqueeze doctor`"
            )
        rows = _check_golden(model, where)
        _warm_up(model, rows, max_batch)
    except runtime_errors() as error:
        raise MeasureError(f"{where}: does not run: {without_paths(str(error))}", remedy="see `onnxsqueeze verify`") from error
    return model


def _session(onnx: Path, backend: Backend, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as it was measured; an idle server burns nothing
    options.enable_mem_pattern = False  # it keeps a plan of the memory for every shape that ever came
    own = dict(backend.options) | ({backend.threads_option: str(threads)} if backend.threads_option else {})
    if backend.name in ("cuda", "tensorrt") and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return ort.InferenceSession(str(onnx), options, providers=[(backend.provider, own)])


def _check_golden(model: Model, where: str) -> list[Encoded]:
    """The golden sentences as the model reads them. Raises MeasureError where its answers are others."""
    known = model.golden
    rows = model.encoder.encode([first for first, _ in known.sentences], [second for _, second in known.sentences])
    answers = np.concatenate([model.said(model.run(model.padded([row]))) for row in rows])
    machine = environment.processors()
    now = known.model_copy(
        update={
            "cpu": machine["cpu"],
            "instruction_set": machine["instruction_set"],
            "runtime": ort.__version__,
            "logits": tuple(tuple(float(x) for x in row) for row in answers),
        }
    )
    off, _ = golden.distance(known, now)
    allowed = golden.tolerance(known, now)
    if not off <= allowed:  # NaN is not
        raise MeasureError(
            f"{where}: does not answer as golden.json has it: off by {off:.3g} (allowed {allowed:.3g})",
            remedy="see `onnxsqueeze verify`; deploy it again where a file was changed",
        )
    return rows


def _warm_up(model: Model, rows: Sequence[Encoded], max_batch: int) -> None:
    """Two calls each, alone and in a full batch: the shortest and longest golden sentence, and a row as long as /classify cuts."""
    rows = sorted(rows, key=len)
    longest = Encoded((rows[-1].ids * model.max_length)[: model.max_length], (0,) * model.max_length)
    shapes = [(rows[0], 1), (rows[-1], 1), (longest, 1)]
    if model.mergeable and max_batch > 1:
        shapes += [(rows[0], max_batch), (rows[-1], max_batch)]
    for row, count in shapes:
        feed = model.padded([row] * count)
        for _ in range(2):
            model.run(feed)


def _tensor(one: Any, where: str) -> Tensor:
    if one.type not in _DATATYPES:
        raise ModelError(
            f"{where}: {one.name} is a {one.type}: only numbers are served", remedy="deploy the model without text in its graph"
        )
    return Tensor(one.name, _DATATYPES[one.type], tuple(one.shape))


def _limits(config: Mapping[str, Any], known: Golden, max_batch: int, inputs: Mapping[str, Tensor]) -> Limits:
    positions = config.get("max_position_embeddings")
    family = FAMILIES.get(str(config["model_type"]))
    tokens = int(positions) - (family.position_offset if family else 0) if positions else known.max_length
    batch = next((t.sizes[0] for t in inputs.values() if t.sizes and isinstance(t.sizes[0], int)), max_batch)
    words, types = config.get("vocab_size"), config.get("type_vocab_size")
    return Limits(int(batch or 1), tokens, int(words) if words else None, int(types) if types else None)


def _labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))
