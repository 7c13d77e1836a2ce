"""Answers and refusals, and a request's body read within its limits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope

from onnxsqueeze.serving.settings import MAX_BODIES_BYTES

Header = tuple[bytes, bytes]
JSON: Header = (b"content-type", b"application/json")
CLOSE: Header = (b"connection", b"close")
GONE = 499  # no answer: the client left before its request had arrived. nginx's number


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back."""

    body: bytes
    status: int = 200
    headers: tuple[Header, ...] = (JSON,)


class Refused(Exception):  # noqa: N818  # an answer, not a mistake of the program
    """An answer that says where the fault is, what it is, what was found, and what to do."""

    def __init__(self, status: int, message: str, headers: tuple[Header, ...] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    def answer(self) -> Answer:
        """As JSON: ``{"error": message}``."""
        return Answer(json.dumps({"error": self.message}).encode(), self.status, (JSON, *self.headers))


def json_answer(value: Any) -> Answer:
    """``value`` as JSON. Raises Refused (500) where it holds a number that JSON has no word for."""
    try:
        return Answer(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except ValueError:
        raise Refused(
            500,
            "model: its answer to this request is not finite (NaN or infinite); ask for binary outputs to see it, or serve another file",
        ) from None


def header(headers: Iterable[Header], name: bytes) -> bytes | None:
    """The first header of this (lower-case) name."""
    for key, value in headers:
        if key == name:
            return value
    return None


class Intake:
    """Reads bodies: each at most ``limit_bytes``, all that are arriving at most `MAX_BODIES_BYTES`. When one is late: `connection`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Refused: 413 before any of it is read where its length is announced, 415, 503, 499 where the client left."""
        announced = header(scope["headers"], b"content-length")
        if announced is not None and int(announced) > self.limit_bytes:  # the parser let digits alone pass
            raise self._too_long(int(announced))
        coding = header(scope["headers"], b"content-encoding")
        if coding not in (None, b"identity"):
            raise Refused(415, f"Content-Encoding: bodies are not unpacked here, got {coding!r}; send the body as it is")
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            body: bytes = message["body"]
            if len(body) > self.limit_bytes:
                raise self._too_long(len(body))
            return body
        parts, size = [], 0
        try:
            while True:
                if message["type"] != "http.request":
                    raise Refused(GONE, "the client left")
                part = message["body"]
                parts.append(part)
                size += len(part)
                self._held_bytes += len(part)
                if size > self.limit_bytes:
                    raise self._too_long(size)
                if self._held_bytes > MAX_BODIES_BYTES:
                    raise Refused(503, "server: too many large requests are arriving at once; try again", ((b"retry-after", b"1"),))
                if not message.get("more_body"):
                    return b"".join(parts)
                message = await receive()
        finally:
            self._held_bytes -= size

    def _too_long(self, found: int) -> Refused:
        return Refused(
            413,
            f"body: must be at most {self.limit_bytes} bytes, got {found} or more; send fewer rows in a request",
        )
