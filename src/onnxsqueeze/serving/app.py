"""The endpoints: who answers which path, counted and with every refusal as JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from onnxsqueeze import __version__
from onnxsqueeze.serving import classify, protocol
from onnxsqueeze.serving.answer import GONE, Answer, Intake, Refused, header, json_answer
from onnxsqueeze.serving.batching import Batcher
from onnxsqueeze.serving.metrics import Metrics
from onnxsqueeze.serving.repository import Repository
from onnxsqueeze.serving.rows import check
from onnxsqueeze.serving.settings import Settings

_TEXT = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)


@dataclass
class Service:
    """What the endpoints share. ``draining``: the server is ending, and no longer ready."""

    settings: Settings
    repository: Repository
    batcher: Batcher
    metrics: Metrics
    intake: Intake
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokens"))  # long texts, one request at a time
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A request: the names in its path, its headers, its body."""

    names: dict[str, str]
    scope: Scope
    body: bytes


Respond = Callable[[Service, Call], Awaitable[Answer]]


class Endpoint:
    """One path, as ASGI. ``queues``: a full queue is told before the body is read."""

    def __init__(self, service: Service, name: str, respond: Respond, *, queues: bool) -> None:
        self._service, self._name, self._respond, self._queues = service, name, respond, queues

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, answer, count."""
        began = time.perf_counter()
        service = self._service
        try:
            if self._queues:
                service.batcher.require_room()
            body = b"" if scope["method"] in ("GET", "HEAD") else await service.intake.read(scope, receive)
            answer = await self._respond(service, Call(scope["path_params"], scope, body))
        except Refused as refused:
            answer = refused.answer()
        if answer.status != GONE:
            await _send(answer, send)
        service.metrics.request(self._name, answer.status, time.perf_counter() - began)


async def _send(answer: Answer, send: Send) -> None:
    length = (b"content-length", str(len(answer.body)).encode())
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})
    await send({"type": "http.response.body", "body": answer.body})


def application(service: Service) -> Starlette:
    """The ASGI application of one process."""

    def route(path: str, name: str, respond: Respond, method: str = "GET", *, queues: bool = False) -> Route:
        return Route(path, Endpoint(service, name, respond, queues=queues), methods=[method])

    one, versioned = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        method, path = request.method, request.url.path[:200]
        text = {404: f"{path}: unknown path; see GET /v2 and docs/serve.md", 405: f"{path}: does not take {method}"}
        message = text.get(status, f"{path}: failed within the server; its standard error says where")
        answer = Refused(status, message).answer()
        service.metrics.request("other", status, 0.0)
        return Response(answer.body, status, media_type="application/json", headers=getattr(error, "headers", None))

    return Starlette(
        routes=[
            route(f"{one}/infer", "infer", _infer, "POST", queues=True),  # the first: routes are tried in turn
            route(f"{versioned}/infer", "infer", _infer, "POST", queues=True),
            route("/classify", "classify", _classify, "POST", queues=True),
            route("/v2/health/live", "live", _live),
            route("/v2/health/ready", "ready", _ready),
            route("/metrics", "metrics", _metrics),
            route("/v2", "server", _server),
            route(one, "model", _model),
            route(versioned, "model", _model),
            route(f"{one}/ready", "model-ready", _model_ready),
            route(f"{versioned}/ready", "model-ready", _model_ready),
            route("/v2/repository/index", "index", _index, "POST"),
            route("/v2/repository/models/{name}/load", "load", _load, "POST"),
        ],
        exception_handlers={HTTPException: refuse, Exception: refuse},
    )


async def _infer(service: Service, call: Call) -> Answer:
    name = call.names["name"]
    model = service.repository.named(name, call.names.get("version"))
    asked = protocol.decode(call.body, header(call.scope["headers"], protocol.JSON_LENGTH), model)
    rows, length = check(asked.feed, model.limits)
    service.batcher.reserve(rows)
    outputs = await service.batcher.submit(model, asked.feed, rows, length)
    return protocol.encode(asked, name, model, outputs)


async def _classify(service: Service, call: Call) -> Answer:
    model = service.repository.model
    texts = classify.texts_of(protocol.document(call.body), model)
    service.batcher.reserve(len(texts))
    try:
        if sum(len(first) + len(second or "") for first, second in texts) > classify.LARGE_CHARACTERS:
            rows = await asyncio.get_running_loop().run_in_executor(service.tokenizing, classify.tokens_of, texts, model)
        else:
            rows = classify.tokens_of(texts, model)
    except BaseException:
        service.batcher.unreserve(len(texts))
        raise
    outputs = await service.batcher.submit(model, model.padded(rows), len(rows), max(len(row) for row in rows))
    return json_answer(
        {
            "model": service.settings.name,
            "version": str(model.version),
            "results": classify.results(model.said(outputs), model),
        }
    )


async def _live(service: Service, call: Call) -> Answer:  # noqa: ARG001
    return json_answer({"live": True})


async def _ready(service: Service, call: Call) -> Answer:  # noqa: ARG001
    if service.draining:
        raise Refused(503, "server: is ending; send requests to another one")
    return json_answer({"ready": True})


async def _metrics(service: Service, call: Call) -> Answer:  # noqa: ARG001
    service.metrics.waiting.set(service.batcher.waiting_rows)
    return Answer(service.metrics.text(), headers=_TEXT)


async def _server(service: Service, call: Call) -> Answer:  # noqa: ARG001
    settings = service.settings
    told: dict[str, Any] = {
        "threads": settings.threads,
        "workers": settings.workers,
        "max_batch": settings.max_batch,
        "max_delay_ms": settings.max_delay_ms,
        "queue": settings.queue,
        "timeout_s": settings.timeout_s,
        "max_body_bytes": service.intake.limit_bytes,
    }
    return json_answer(
        {"name": "onnxsqueeze", "version": __version__, "extensions": ["binary_tensor_data", "model_repository"], "parameters": told}
    )


async def _model(service: Service, call: Call) -> Answer:
    model = service.repository.named(call.names["name"], call.names.get("version"))
    return json_answer(protocol.metadata(call.names["name"], model))


async def _model_ready(service: Service, call: Call) -> Answer:
    service.repository.named(call.names["name"], call.names.get("version"))
    return await _ready(service, call)


async def _index(service: Service, call: Call) -> Answer:  # noqa: ARG001
    model = service.repository.model
    return json_answer([{"name": service.settings.name, "version": str(model.version), "state": "READY"}])


async def _load(service: Service, call: Call) -> Answer:
    service.repository.named(call.names["name"])
    if call.body and protocol.document(call.body).get("parameters"):
        raise Refused(400, "parameters: are not understood here; put the model's files into the served folder")
    model = await service.repository.load()
    return json_answer({"name": call.names["name"], "version": str(model.version)})
