"""One client's connection: uvicorn's, and beside it a limit on how many there are, on headers, and on how long a request may take to arrive."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from onnxsqueeze.serving.answer import CLOSE, Refused
from onnxsqueeze.serving.app import Service
from onnxsqueeze.serving.settings import MAX_CONNECTIONS, MAX_HEAD_BYTES


class Connection(HttpToolsProtocol):
    """``service`` is set by the server, on a class of its own."""

    service: Service

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self._arriving, self._in_head, self._head_bytes = True, True, 0
        self._late: asyncio.TimerHandle | None = None
        self._too_many = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Count it; more than `MAX_CONNECTIONS` are told so when they ask, more than twice as many are cut."""
        super().connection_made(transport)
        self._too_many = len(self.connections) > MAX_CONNECTIONS
        if len(self.connections) > 2 * MAX_CONNECTIONS:
            transport.abort()
            return
        self._wait_for_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget its timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; a request whose end has not come has until the time-out, counted from its first byte."""
        super().data_received(data)
        if not self._arriving:
            self._stop_waiting()
            if not self.owes and self.timeout_keep_alive_task is None and not self.transport.is_closing():  # answered before it had arrived
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            return
        if self._late is None:
            self._wait_for_rest()
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._turn_away(431, f"headers: must be at most {MAX_HEAD_BYTES} bytes; send shorter ones")

    def on_message_begin(self) -> None:
        """A request's first line."""
        self._arriving, self._in_head, self._head_bytes = True, True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        self._in_head = False
        super().on_headers_complete()
        if self.service.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._arriving = False
        super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        refuse: Any = self._refuse  # starlette's types of ASGI are wider than uvicorn's
        super()._start_asgi_task(cycle, refuse if self._too_many else app)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's signature
        message = f"server: more than {MAX_CONNECTIONS} connections are open; close some, or try again later"
        answer = Refused(503, message, (CLOSE, (b"retry-after", b"1"))).answer()
        self.service.metrics.turned_away(503)
        length = (b"content-length", str(len(answer.body)).encode())
        await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})
        await send({"type": "http.response.body", "body": answer.body})

    @property
    def owes(self) -> bool:
        """Whether a request has no answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._turn_away(400, f"request: is not HTTP/1.1: {msg}")

    def _wait_for_rest(self) -> None:
        self._late = self.loop.call_later(self.service.settings.timeout_s, self._too_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if self.transport.is_closing():
            return
        if self.owes and self._in_head:  # the next request is late, the one before is not answered yet
            self._wait_for_rest()
            return
        if (self.owes and self.cycle.response_started) or (not self.owes and not (self._in_head and self._head_bytes)):
            self.transport.close()  # nothing was asked, or it is answered already
            return
        seconds = self.service.settings.timeout_s
        self._turn_away(408, f"request: did not arrive within {seconds:g} s; send it faster, or start with a larger --timeout-s")

    def _turn_away(self, status: int, message: str) -> None:
        """Answer past the application, and close."""
        self.service.metrics.turned_away(status)
        body = Refused(status, message).answer().body
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
