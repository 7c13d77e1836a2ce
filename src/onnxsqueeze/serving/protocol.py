"""Tensors from and to the Open Inference Protocol, version 2, over HTTP: JSON, and the binary tensor data extension.

Source: https://github.com/kserve/open-inference-protocol (required API) and Triton's extension_binary_data.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsqueeze.errors import nearest
from onnxsqueeze.serving.answer import Answer, Header, Refused, json_answer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxsqueeze.serving.model import Model, Tensor

JSON_LENGTH = b"inference-header-content-length"
_BINARY: Header = (b"content-type", b"application/octet-stream")
_SIZE = "binary_data_size"
# What JSON's numbers may be, by numpy's kind. A bool is no number here.
_NUMBERS: Mapping[str, set[type]] = {"i": {int}, "u": {int}, "f": {int, float}, "b": {bool}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: its tensors in the graph's order, and the outputs that it wants, each with whether as bytes."""

    feed: dict[str, NDArray[Any]]
    wanted: tuple[tuple[str, bool], ...]
    echoed: dict[str, Any]


def document(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises Refused."""
    try:
        found = json.loads(body)
    except UnicodeDecodeError as error:
        raise Refused(400, f"body: is not UTF-8 at byte {error.start}; send JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:
        what = "nests too deep" if isinstance(error, RecursionError) else f"is not JSON: {error}"
        raise Refused(400, f"body: {what}; send one JSON object") from None
    if not isinstance(found, dict):
        raise Refused(400, f"body: must be a JSON object, got {_kind(found)}")
    return found


def decode(body: bytes, json_length: bytes | None, model: Model) -> Asked:
    """What an inference request asks of ``model``; ``json_length`` is the header `JSON_LENGTH`. Raises Refused."""
    cut = len(body)
    if json_length is not None:
        cut = int(json_length) if json_length.isdigit() and len(json_length) < 12 else -1
        if not 0 < cut <= len(body):
            raise Refused(
                400,
                f"Inference-Header-Content-Length: must be from 1 to the body's {len(body)} bytes, got {json_length.decode('latin-1')!r}",
            )
    asked = document(body[:cut])
    listed = asked.get("inputs")
    if not isinstance(listed, list) or not listed:
        raise Refused(400, f"inputs: must be a list of tensors, got {_kind(listed)}; send {', '.join(model.inputs)}")
    found: dict[str, NDArray[Any]] = {}
    for i, one in enumerate(listed):
        where = f"inputs[{i}]"
        tensor = _named(one, where, model.inputs)
        if tensor.name in found:
            raise Refused(400, f"{where}: {tensor.name} is there twice; send each input once")
        found[tensor.name], cut = _tensor(one, where, tensor, body, cut, binary=json_length is not None)
    if cut != len(body):
        raise Refused(400, f"body: {len(body) - cut} bytes are left after the last tensor; state their {_SIZE}")
    if len(found) < len(model.inputs):
        missing = [name for name in model.inputs if name not in found]
        raise Refused(400, f"inputs: {', '.join(missing)} missing; send {', '.join(model.inputs)}")
    parameters = _parameters(asked, "parameters")
    every = parameters.pop("binary_data_output", False)
    echoed: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if "id" in asked:
        if not isinstance(asked["id"], str):
            raise Refused(400, f"id: must be a string, got {_kind(asked['id'])}")
        echoed["id"] = asked["id"]
    return Asked({name: found[name] for name in model.inputs}, _wanted(asked, model, every is True), echoed)


def encode(asked: Asked, name: str, model: Model, outputs: Sequence[NDArray[Any]]) -> Answer:
    """The answer to a request, as JSON alone or followed by the tensors' bytes."""
    listed, tail = [], []
    for wanted, binary in asked.wanted:
        tensor = model.outputs[wanted]
        array = outputs[list(model.outputs).index(wanted)]
        entry: dict[str, Any] = {"name": wanted, "datatype": tensor.datatype, "shape": list(array.shape)}
        if binary:
            content = array.astype(tensor.dtype, copy=False).tobytes()
            entry["parameters"] = {_SIZE: len(content)}
            tail.append(content)
        else:
            entry["data"] = array.ravel().tolist()
        listed.append(entry)
    head = json_answer({"model_name": name, "model_version": str(model.version), **asked.echoed, "outputs": listed})
    if not tail:
        return head
    length = (JSON_LENGTH, str(len(head.body)).encode())
    return Answer(b"".join([head.body, *tail]), headers=(_BINARY, length))


def metadata(name: str, model: Model) -> dict[str, Any]:
    """What GET /v2/models/NAME tells."""

    def listed(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return [{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in tensors.values()]

    return {
        "name": name,
        "versions": [str(model.version)],
        "platform": "onnxruntime_onnx",
        "inputs": listed(model.inputs),
        "outputs": listed(model.outputs),
        "parameters": {
            "provider": model.provider,
            "threads": model.threads,
            "max_rows": model.limits.rows,
            "max_tokens": model.limits.tokens,
            "says": model.says,
            **({"labels": list(model.labels)} if model.labels else {}),
            **{f"sha256:{file}": digest for file, digest in model.sha256.items()},
        },
    }


def _named(one: Any, where: str, known: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        raise Refused(400, f"{where}: must be an object with a name, got {_kind(one)}")
    name = one["name"]
    if name not in known:
        raise Refused(400, f"{where}.name: the model has no {name[:100]!r}{nearest(name[:100], list(known))}")
    return known[name]


def _tensor(one: Mapping[str, Any], where: str, tensor: Tensor, body: bytes, at: int, *, binary: bool) -> tuple[NDArray[Any], int]:
    """One input, and where in the body the next one's bytes begin."""
    if one.get("datatype") != tensor.datatype:
        raise Refused(400, f"{where}.datatype: {tensor.name} must be {tensor.datatype}, got {_short(one.get('datatype'))}")
    shape = one.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise Refused(400, f"{where}.shape: must be a list of sizes that are not negative, got {_short(shape)}")
    if len(shape) != len(tensor.sizes) or any(fixed not in (-1, size) for fixed, size in zip(tensor.shape, shape, strict=False)):
        raise Refused(400, f"{where}.shape: {tensor.name} must be {tensor.shape} (-1 is free), got {_short(shape)}")
    count = 1
    for size in shape:
        count *= size
    parameters = _parameters(one, f"{where}.parameters", _SIZE)
    if _SIZE in parameters:
        size = parameters[_SIZE]
        if not binary:
            raise Refused(400, f"{where}.parameters.{_SIZE}: needs the header Inference-Header-Content-Length")
        if type(size) is not int or size != count * tensor.dtype.itemsize:
            raise Refused(
                400,
                f"{where}.parameters.{_SIZE}: {shape} of {tensor.datatype} are {count * tensor.dtype.itemsize} bytes, got {_short(size)}",
            )
        if "data" in one or at + size > len(body):
            what = "has data in JSON, too" if "data" in one else f"the body ends {at + size - len(body)} bytes too early"
            raise Refused(400, f"{where}: {what}; send the tensor's bytes after the JSON, once")
        array = np.frombuffer(body, tensor.dtype, count, at).reshape(shape).copy()  # aligned, and free of the body
        if tensor.datatype == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
            raise Refused(400, f"{where}: a BOOL is the byte 0 or 1")
        return array, at + size
    return _listed(one.get("data"), where, tensor, shape, count), at


def _listed(data: Any, where: str, tensor: Tensor, shape: list[int], count: int) -> NDArray[Any]:
    """A tensor from JSON, flat or nested; never a value that was not sent. numpy sees nothing but numbers: of text it makes huge arrays."""
    flat, sizes, kinds = data, list[int](), set[type]()
    while isinstance(flat, list):
        sizes.append(len(flat) // max(1, math.prod(sizes)))
        kinds = set(map(type, flat))
        if list not in kinds:
            break
        if kinds != {list} or len(set(map(len, flat))) > 1 or len(sizes) >= len(shape):
            raise Refused(400, f"{where}.data: must be flat or nested as its shape {_short(shape)} is")
        flat = list(chain.from_iterable(flat))
    if not isinstance(flat, list) or not kinds <= _NUMBERS[tensor.dtype.kind]:
        wrong = next(x for x in flat if type(x) not in _NUMBERS[tensor.dtype.kind]) if isinstance(flat, list) else flat
        raise Refused(400, f"{where}.data: must be a list of {tensor.datatype}, got {_kind(wrong)}")
    if len(flat) != count or (len(sizes) > 1 and sizes != shape):
        raise Refused(400, f"{where}.data: the shape {_short(shape)} has {count} values, got {_short(sizes)}")
    if tensor.dtype.kind in "iu" and flat:
        limits = np.iinfo(tensor.dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            raise Refused(400, f"{where}.data: values must fit {tensor.datatype}")
    try:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            return np.array(flat, tensor.dtype).reshape(shape)
    except OverflowError:
        raise Refused(400, f"{where}.data: values must fit {tensor.datatype}") from None


def _wanted(asked: Mapping[str, Any], model: Model, every: bool) -> tuple[tuple[str, bool], ...]:  # noqa: FBT001  # binary_data_output
    listed = asked.get("outputs")
    if listed is None:
        return tuple((name, every) for name in model.outputs)
    if not isinstance(listed, list) or not listed:
        raise Refused(400, f"outputs: must be a list of outputs, got {_kind(listed)}; leave it out to get all")
    wanted: dict[str, bool] = {}
    for i, one in enumerate(listed):
        where = f"outputs[{i}]"
        name = _named(one, where, model.outputs).name
        if name in wanted:
            raise Refused(400, f"{where}: {name} is there twice; ask for each output once")
        binary = _parameters(one, f"{where}.parameters", "binary_data").get("binary_data", every)
        if not isinstance(binary, bool):
            raise Refused(400, f"{where}.parameters.binary_data: must be true or false, got {_short(binary)}")
        wanted[name] = binary
    return tuple(wanted.items())


def _parameters(holder: Mapping[str, Any], where: str, *known: str) -> dict[str, Any]:
    """The parameters of a tensor or, where none are ``known``, of a request, which are echoed."""
    found = holder.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Refused(400, f"{where}: must be an object, got {_kind(found)}")
    for key, value in found.items():
        if known and key not in known:
            raise Refused(400, f"{where}: {key[:100]!r} is not understood here; known: {', '.join(known)}")
        if not isinstance(value, (str, int, float, bool)):
            raise Refused(400, f"{where}.{key[:100]}: must be a string, a number or a boolean, got {_kind(value)}")
    return dict(found)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "nothing",
    }
    found = names.get(type(value), "something else")
    return "an empty list" if value == [] else found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
