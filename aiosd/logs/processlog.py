"""Logging of aiosd's own processes: lines on stderr, each with the name of the process that wrote it."""

from __future__ import annotations

import logging
import sys


def setup(process: str, level: str) -> None:
    """To be called once in each process, after the fork."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s aiosd[{process}] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.raiseExceptions = False  # a full disk under stderr must not hurt
    set_level(level)


def set_level(level: str) -> None:
    logging.getLogger().setLevel(level.upper())
