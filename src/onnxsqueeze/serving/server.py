"""One serving process: open and check the model, answer, and at the end answer what was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from onnxsqueeze.errors import UsageError
from onnxsqueeze.serving.answer import Intake
from onnxsqueeze.serving.app import Service, application
from onnxsqueeze.serving.batching import Batcher
from onnxsqueeze.serving.connection import Connection
from onnxsqueeze.serving.folder import Place, require
from onnxsqueeze.serving.metrics import Metrics
from onnxsqueeze.serving.model import Model, open_model
from onnxsqueeze.serving.repository import Repository
from onnxsqueeze.serving.settings import DRAIN_S, LINGER_S, Settings

_LEAST_BODY_BYTES = 2**20
_VALUE_BYTES = 24  # of one int64 in JSON, with separators: at most 20 digits
_BACKLOG = 1024


def bind(settings: Settings) -> socket.socket:
    """The socket of the server's address, not yet listening. Raises UsageError where it cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host {settings.host} --port {settings.port}: cannot be listened on: {error}", remedy="name another port, or end what has it"
        ) from error
    return bound


def address(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings, bound: socket.socket, ready: Callable[[], None], parent: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or until the pipe ``parent`` ends; the exit code: 1 where accepted requests got no answer in time.

    ``ready`` is called once, when requests are accepted. Raises what `open_model` raises.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads are the session's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while it loads: nothing has been accepted

    def opens(place: Place) -> Model:
        return open_model(place, settings.threads, settings.max_batch)

    first = [opens(require(settings.folder))]  # emptied below: whatever keeps it would keep it in memory after the next version
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, bound, first, opens, ready, parent))


async def _serve(
    settings: Settings,
    bound: socket.socket,
    first: list[Model],
    opens: Callable[[Place], Model],
    ready: Callable[[], None],
    parent: int | None,
) -> int:
    metrics = Metrics()
    batcher = Batcher(
        max_batch=settings.max_batch,
        max_delay_s=settings.max_delay_ms / 1e3,
        queue=settings.queue,
        timeout_s=settings.timeout_s,
        observe=metrics.batch,
    )
    repository = Repository(settings, first.pop(), opens, metrics)
    largest = settings.max_batch * repository.model.limits.tokens * len(repository.model.inputs) * _VALUE_BYTES
    service = Service(settings, repository, batcher, metrics, Intake(max(_LEAST_BODY_BYTES, largest)))
    server = _Server(service)
    if parent is not None:
        asyncio.get_running_loop().add_reader(parent, server.stop)
    watching = asyncio.create_task(service.repository.watch())
    starting = asyncio.create_task(_tell(server, ready))
    await server.serve([bound])
    starting.cancel()
    opening = repository.opening
    watching.cancel()
    ended = await asyncio.to_thread(batcher.stop, 1.0)
    code = 0 if ended and server.answered else 1
    if opening or not ended:
        os._exit(code)  # threads in a load or in a call cannot be stopped, and would be waited for
    return code


async def _tell(server: _Server, ready: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    ready()


class _Server(uvicorn.Server):
    """uvicorn's, which ends with exit code 0 and lets open connections send what is under way."""

    def __init__(self, service: Service) -> None:
        class Ours(Connection):
            pass

        Ours.service = service
        super().__init__(
            uvicorn.Config(
                application(service),
                http=Ours,
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=65,  # above the 60 s for which proxies keep theirs
                timeout_graceful_shutdown=int(DRAIN_S),
            )
        )
        self._service = service
        self.answered = True

    def stop(self) -> None:
        """Begin to end."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end it; unlike uvicorn's, they are not raised again afterwards."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting; answer what comes on open connections for `LINGER_S`; then close the idle ones and wait for the others."""
        self._service.draining = True
        for server in self.servers:
            server.close()
        for one in sockets or []:
            one.close()
        for connection in self._owing():
            connection.cycle.keep_alive = False
        until = asyncio.get_running_loop().time() + LINGER_S
        while self.server_state.connections and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)
        await super().shutdown()
        self.answered = not self._owing()

    def _owing(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection) and one.owes]
