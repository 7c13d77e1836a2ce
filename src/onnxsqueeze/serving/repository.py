"""The version that is served: found, opened, and put in place of the one before without a request lost."""

from __future__ import annotations

import asyncio
import sys
import time
import weakref
from collections.abc import Callable

from onnxsqueeze.errors import without_paths
from onnxsqueeze.serving.answer import Refused
from onnxsqueeze.serving.folder import Place, find
from onnxsqueeze.serving.metrics import Metrics
from onnxsqueeze.serving.model import Model
from onnxsqueeze.serving.settings import WATCH_S, Settings

Open = Callable[[Place], Model]


class Repository:
    """Holds one model; requests keep the one that they came to, so that an old one is released after its last request.

    All but the opening runs in the event loop's thread.
    """

    def __init__(self, settings: Settings, first: Model, opens: Open, metrics: Metrics) -> None:
        self._settings, self._opens, self._metrics = settings, opens, metrics
        self._opening = asyncio.Lock()
        self._refused: tuple[Place, str] | None = None
        self._serve(first)

    def _serve(self, model: Model) -> None:
        self.model = model
        self._metrics.models.inc()
        loop = asyncio.get_running_loop()

        def released() -> None:
            """Called by whichever thread drops the last reference."""
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._metrics.models.dec)

        weakref.finalize(model, released).atexit = False
        self._metrics.served(model.version, time.time())

    def named(self, name: str, version: str | None = None) -> Model:
        """The model, where it has this name and version. Raises Refused (404)."""
        if name != self._settings.name:
            raise Refused(404, f"model {name[:100]!r}: unknown; this server has {self._settings.name!r}")
        if version is not None and version != str(self.model.version):
            raise Refused(404, f"model {name!r}, version {version[:100]!r}: is not served; version {self.model.version} is")
        return self.model

    @property
    def opening(self) -> bool:
        """Whether a version is being loaded."""
        return self._opening.locked()

    async def watch(self) -> None:
        """Look at the folder for ever; a version that was refused is tried again when its files change."""
        while True:
            await asyncio.sleep(WATCH_S)
            place = await asyncio.to_thread(find, self._settings.folder)
            if place is not None and place != self.model.place and (self._refused is None or place != self._refused[0]):
                try:
                    await self._load(place)
                except Refused as refused:
                    print(f"onnxsqueeze serve: {refused.message}", file=sys.stderr, flush=True)  # noqa: T201  # progress goes to stderr

    async def load(self) -> Model:
        """What the folder holds now, loaded where it is not what is served. Raises Refused (409) and leaves the old one in its place."""
        place = await asyncio.to_thread(find, self._settings.folder)
        if place is None:
            raise Refused(409, f"version {self.model.version} goes on: the folder holds no model; put one there")
        return await self._load(place)

    async def _load(self, place: Place) -> Model:
        async with self._opening:
            if place == self.model.place:
                return self.model
            try:
                model = await asyncio.to_thread(self._opens, place)
            except Exception as error:  # the files can be anything; whatever they raise, the old version goes on
                self._refused = place, str(error)
                self._metrics.reload("refused")
                raise Refused(
                    409, f"version {place.version} is refused, version {self.model.version} goes on: {without_paths(str(error))}"
                ) from error
            self._refused = None
            self._serve(model)
            self._metrics.reload("loaded")
            return model
