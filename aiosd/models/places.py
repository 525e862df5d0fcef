"""Where models lie on this machine: a folder of our own, and those of other programs, which are only read."""

from __future__ import annotations

import os
from pathlib import Path


def ours() -> Path:
    """What `make models` fetches, and any GGUF that a person puts there: $AIOSD_MODELS, else the user's cache."""
    named = os.environ.get("AIOSD_MODELS")
    return Path(named).expanduser() if named else cache() / "aiosd" / "models"


def cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else home() / ".cache"


def home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry, and no HOME: there is nothing of theirs to find
        return Path("/")
