"""Where one system lives: the folders and files of an AIOS home.

`AIOS_HOME` puts everything under one folder, so that several systems can live side by side. Without it the socket is
in `$XDG_RUNTIME_DIR/aios` (else in a private folder of the temporary directory), data in `$XDG_STATE_HOME/aios`, and
settings in `$XDG_CONFIG_HOME/aios/aiosd.toml`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from libaios.wire import ENV_HOME

if TYPE_CHECKING:
    from pathlib import Path


class Home:
    """Paths of one system. Nothing is created here. Paths are kept as texts (`texts`) and become `Path`s on demand:
    pathlib takes a twentieth of the start of a command that only looks for the socket."""

    __slots__ = ("explicit", "texts")

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        chosen = os.fspath(root) if root is not None else os.environ.get(ENV_HOME, "")
        self.explicit = bool(chosen)
        if chosen:
            root = os.path.abspath(chosen)
            socket, data, config = (os.path.join(root, name) for name in ("aiosd.sock", "data", "aiosd.toml"))
        else:
            state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
            settings = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
            root = data = os.path.join(state, "aios")
            socket = os.path.join(_runtime_folder(), "aiosd.sock")
            config = os.path.join(settings, "aios", "aiosd.toml")
        logs = os.path.join(data, "logs")
        self.texts = {"root": root, "socket": socket, "data": data, "config": config, "logs": logs}

    @property
    def root(self) -> Path:
        return self._path("root")

    @property
    def socket(self) -> Path:
        return self._path("socket")

    @property
    def data(self) -> Path:
        return self._path("data")

    @property
    def config(self) -> Path:
        return self._path("config")

    @property
    def logs(self) -> Path:
        return self._path("logs")

    def _path(self, name: str) -> Path:
        from pathlib import Path

        return Path(self.texts[name])


def _runtime_folder() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return os.path.join(runtime, "aios")
    return os.path.join(os.environ.get("TMPDIR") or "/tmp", f"aios-{os.getuid()}")
