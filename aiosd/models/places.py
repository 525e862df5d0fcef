"""The folders in which models lie: aiosd's own, and those of other programs, in which nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path


def ours() -> Path:
    """aiosd's own folder: $AIOSD_MODELS, else one in the user's cache. `make models` fetches models into it, and the
    user may put any GGUF there."""
    return _named("AIOSD_MODELS") or cache() / "aiosd" / "models"


def hub() -> Path:
    """The cache of huggingface_hub, found by the rules of that library."""
    return _named("HF_HUB_CACHE") or (_named("HF_HOME") or cache() / "huggingface") / "hub"


def ollama() -> list[Path]:
    """Ollama's folders: that of the user, and that of its system service."""
    named = _named("OLLAMA_MODELS")
    return _existing([named] if named else [home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")])


def lmstudio() -> list[Path]:
    """LM Studio's folders: the one in its settings, and its default folders of today and of earlier versions."""
    base = home() / ".lmstudio"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        base = Path((home() / ".lmstudio-home-pointer").read_text().strip() or base)
    named: list[Path] = []
    with contextlib.suppress(OSError, ValueError):  # missing, or not JSON
        settings = json.loads((base / "settings.json").read_text())
        folder = settings.get("downloadsFolder") if isinstance(settings, dict) else None
        named = [Path(folder).expanduser()] if isinstance(folder, str) and folder else []
    return _existing([*named, base / "models", cache() / "lm-studio" / "models"])


def cache() -> Path:
    return _named("XDG_CACHE_HOME") or home() / ".cache"


def home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and the user is not in the passwd database: no folder to search
        return Path("/")


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(os.path.expanduser(value)) if value else None


def _existing(folders: list[Path]) -> list[Path]:
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
