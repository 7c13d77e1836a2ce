"""Other Python environments for tests, made in a moment: their packages are this one's."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def environment(folder: Path, *, packages: bool) -> Path:
    """A new environment in ``folder``; ``packages`` lets it see what is installed here. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    if packages:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "python"
