"""Where models lie on this machine: a folder of our own, and those of other programs, which are only read."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path


def ours() -> Path:
    """What `make models` fetches, and any GGUF that a person puts there: $AIOSD_MODELS, else the user's cache."""
    return _named("AIOSD_MODELS") or cache() / "aiosd" / "models"


def hub() -> Path:
    """The cache of huggingface_hub, by the rules of that library."""
    return _named("HF_HUB_CACHE") or (_named("HF_HOME") or cache() / "huggingface") / "hub"


def ollama() -> list[Path]:
    """Ollama's folders: the user's, and that of its service."""
    named = _named("OLLAMA_MODELS")
    return _existing([named] if named else [home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")])


def lmstudio() -> list[Path]:
    """LM Studio's folders: where its settings say, and where it keeps models if they say nothing, today and before."""
    base = home() / ".lmstudio"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        base = Path((home() / ".lmstudio-home-pointer").read_text().strip() or base)
    named: list[Path] = []
    with contextlib.suppress(OSError, ValueError):  # not there, or not JSON
        settings = json.loads((base / "settings.json").read_text())
        folder = settings.get("downloadsFolder") if isinstance(settings, dict) else None
        named = [Path(folder).expanduser()] if isinstance(folder, str) and folder else []
    return _existing([*named, base / "models", cache() / "lm-studio" / "models"])


def cache() -> Path:
    return _named("XDG_CACHE_HOME") or home() / ".cache"


def home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry, and no HOME: there is nothing of theirs to find
        return Path("/")


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(os.path.expanduser(value)) if value else None


def _existing(folders: list[Path]) -> list[Path]:
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
