"""A page in a real headless Chromium, and the JSON that it posts: for benchmarks, and for tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_TYPES = {
    ".html": "text/html",
    ".mjs": "text/javascript",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")


def find() -> str | None:
    """The Chromium that is installed here, if one is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def ask(browser: str, files: Mapping[str, Path], folders: Mapping[str, Path], *, query: str = "", timeout_s: float = 600) -> dict[str, Any]:
    """Open ``/`` and wait for what it posts, in a new browser with a profile of its own.

    ``files`` are served by their URL's path, what lies in one of ``folders`` below its ("/dist/"); all with the headers that isolate a page: threads of
    WebAssembly, and a clock of 5 microseconds. Raises TimeoutError.
    """
    found: list[dict[str, Any]] = []
    there = threading.Event()

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0]
            above, _, last = name.rpartition("/")
            page = files.get(name) or (folders[f"{above}/"] / last if f"{above}/" in folders else None)
            if page is None or not page.is_file():
                self.send_error(404)
                return
            content = page.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", _TYPES.get(page.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            there.set()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/{query}"
        words = [browser, *_FLAGS, "--disable-sync", f"--user-data-dir={profile}", page]
        opened = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not there.wait(timeout_s):
                raise TimeoutError(f"no answer in {timeout_s:.0f} s")
        finally:
            opened.terminate()
            opened.wait(30)
            server.shutdown()
    return found[0]
