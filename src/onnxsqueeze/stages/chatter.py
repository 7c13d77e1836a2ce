"""What libraries print, log and warn while they work: kept off the terminal, and at hand when they fail."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def captured() -> Iterator[list[str]]:
    """Inside the block nothing that Python code prints, logs or warns reaches the terminal; the list holds its lines afterwards.

    Loggers are as before when the block ends, so that a library's `logging.basicConfig` at import changes nothing for the user.
    """
    lines: list[str] = []
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    names = [name for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)]
    loggers = [logging.root, *(logging.getLogger(name) for name in names)]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    logging.root.handlers = [handler]
    try:
        with redirect_stdout(text), redirect_stderr(text), warnings.catch_warnings(record=True) as warned:
            yield lines
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        lines.extend([*text.getvalue().splitlines(), *(str(warning.message) for warning in warned)])
