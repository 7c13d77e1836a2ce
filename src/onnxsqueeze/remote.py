"""A model behind a URL, over the Open Inference Protocol v2 (REST): what Triton, KServe and `onnxsqueeze serve` answer to.

Tensors go as JSON, which every such server reads; over one connection that is kept open.

Source: the protocol's "Inference Protocol (HTTP/REST)", version 2.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from onnxsqueeze.errors import MeasureError, Unavailable, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DATATYPES = {"INT64": "int64", "INT32": "int32"}  # of token ids
_SHOWN = 200  # characters of an answer that is no use


class Remote:
    """One model of a server. ``inputs`` maps its input names to "INT64" or "INT32", ``name`` is the server's name for it.

    ``url`` is http(s)://host[:port], or that with /v2/models/NAME where the server has several. Raises UsageError where it is no such
    URL or names no single model, Unavailable where nothing answers there, MeasureError where what answers does not speak the protocol.
    """

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url}: not a server's URL", remedy="write http://HOST:PORT, or http://HOST:PORT/v2/models/NAME")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        try:
            self._connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        except ValueError as error:
            raise UsageError(f"{url}: {error}", remedy="write http://HOST:PORT") from error
        self.host = parts.hostname
        root, models, name = parts.path.rstrip("/").partition("/v2/models/")
        self._root = root.removesuffix("/v2")
        self.name = name.partition("/")[0] if models else self._only_model()
        about = self._ask("GET", f"/v2/models/{quote(self.name)}")
        try:
            self.inputs: dict[str, str] = {tensor["name"]: tensor["datatype"] for tensor in about["inputs"]}
            outputs: list[str] = [tensor["name"] for tensor in about["outputs"]]
        except (KeyError, TypeError) as error:
            raise self._no_protocol(f"its description of {self.name} lacks {error}") from error
        self._output = "logits" if "logits" in outputs else outputs[0]

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """The first output (or ``logits``) for one call. ``feed`` may hold more inputs than the model has.

        Raises MeasureError where the server refuses, or answers with another tensor; Unavailable where it is gone.
        """
        import numpy as np

        absent = self.inputs.keys() - feed.keys()
        strange = {kind for kind in self.inputs.values() if kind not in _DATATYPES}
        if absent or strange:
            raise MeasureError(
                f"{self._server}: {self.name}: reads {', '.join(f'{n} {t}' for n, t in self.inputs.items())}, not token ids",
                remedy="name the model that takes input_ids and attention_mask",
            )
        tensors = [
            {"name": name, "shape": list(feed[name].shape), "datatype": kind, "data": feed[name].ravel().tolist()}
            for name, kind in self.inputs.items()
        ]
        found = self._ask("POST", f"/v2/models/{quote(self.name)}/infer", {"inputs": tensors, "outputs": [{"name": self._output}]})
        try:
            tensor = next(one for one in found["outputs"] if one["name"] == self._output)
            return np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise self._no_protocol(f"its answer holds no tensor {self._output}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _only_model(self) -> str:
        """The name of the only model, by Triton's repository index."""
        found = self._ask("POST", "/v2/repository/index", {})
        names = sorted({one["name"] for one in found if isinstance(one, dict) and "name" in one}) if isinstance(found, list) else []
        if len(names) != 1:
            raise UsageError(
                f"{self._server}: {'serves ' + ', '.join(names) if names else 'does not say what it serves'}",
                remedy=f"name the model: {self._server}/v2/models/NAME",
            )
        return str(names[0])

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        try:
            try:
                answer, text = self._send(method, path, body)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):  # the server closed it between two calls
                answer, text = self._send(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(
                f"{self._server}: does not answer: {error or type(error).__name__}", remedy="is it started, and ready at this port?"
            ) from error
        if answer.status >= 400:
            if path.endswith("/index") and answer.status in (404, 405, 501):  # KServe has none
                return []
            raise MeasureError(
                f"{self._server}: {method} {path}: {answer.status} {answer.reason}: {_error(text)}",
                remedy="look at the server's log; the name of the model is part of the URL",
            )
        try:
            return json.loads(text) if text else {}
        except ValueError as error:
            raise self._no_protocol(f"{method} {path} gives {text[:_SHOWN]!r}") from error

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer with its body; the connection is closed where there is none, and opened again by the next call."""
        try:
            self._connection.request(method, self._root + path, body, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            return answer, answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def _no_protocol(self, why: str) -> MeasureError:
        return MeasureError(
            f"{self._server}: does not speak the Open Inference Protocol v2: {why}",
            remedy="name a server of `onnxsqueeze serve`, Triton or KServe",
        )


def _error(text: bytes) -> str:
    """The reason in an error's body, where it has one."""
    try:
        return str(json.loads(text)["error"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return repr(text[:_SHOWN])
