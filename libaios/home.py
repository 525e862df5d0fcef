"""Where one system lives: the folders and files of an AIOS home.

`AIOS_HOME` puts everything under one folder, so that several systems can live side by side. Without it the socket is
in `$XDG_RUNTIME_DIR/aios` (else in a private folder of the temporary directory), data in `$XDG_STATE_HOME/aios`, and
settings in `$XDG_CONFIG_HOME/aios/aiosd.toml`.
"""

from __future__ import annotations

import os
from pathlib import Path

from libaios.wire import ENV_HOME


class Home:
    """Paths of one system. Nothing is created here."""

    __slots__ = ("config", "data", "explicit", "logs", "root", "socket")

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        chosen = os.fspath(root) if root is not None else os.environ.get(ENV_HOME, "")
        self.explicit = bool(chosen)
        if chosen:
            self.root = Path(os.path.abspath(chosen))
            self.socket = self.root / "aiosd.sock"
            self.data = self.root / "data"
            self.config = self.root / "aiosd.toml"
        else:
            state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
            config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
            self.root = self.data = Path(state) / "aios"
            self.socket = _runtime_folder() / "aiosd.sock"
            self.config = Path(config) / "aios" / "aiosd.toml"
        self.logs = self.data / "logs"


def _runtime_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "aios"
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"aios-{os.getuid()}"
