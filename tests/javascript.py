"""Runtimes for JavaScript, with the npm packages of tests/js/package.json below $ONNXSQUEEZE_NPM_DIR, where they stay, or a temporary folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import browser
import pytest

HERE = Path(__file__).parent / "js"
FOLDER_VARIABLE = "ONNXSQUEEZE_NPM_DIR"


def modules(temporary: Path) -> Path:
    """The folder that holds node_modules; skips the test without node, npm, or the network."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no node and npm here")
    wanted = (HERE / "package.json").read_bytes()
    place = Path(os.environ.get(FOLDER_VARIABLE) or temporary) / hashlib.sha256(wanted).hexdigest()[:12]
    if not (place / ".ready").exists():
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_bytes(wanted)
        # no scripts: the one of onnxruntime-node downloads libraries for CUDA
        words = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install its packages: {done.stderr.splitlines()[-1:]}")
        (place / ".ready").touch()
    return place


def node(script: str, *words: object) -> dict[str, Any]:
    """The JSON that a script of tests/js prints."""
    done = subprocess.run(["node", HERE / script, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def chromium(place: Path, model: Path, feeds: Path) -> dict[str, Any]:
    """What tests/js/page.html posts from a real browser; skips the test where there is none."""
    name = browser.find()
    if name is None:
        pytest.skip("no Chromium here")
    files = {"/": HERE / "page.html", "/answer.mjs": HERE / "answer.mjs", "/model.onnx": model, "/feeds.json": feeds}
    found = browser.ask(name, files, {"/dist/": place / "node_modules" / "onnxruntime-web" / "dist"}, timeout_s=200)
    assert "error" not in found, found
    return found
