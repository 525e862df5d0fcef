"""Remembers how the system was last started with `aiosd -d`, for `aiosd restart`.

Stored beside the data: the words of the command line, the folder in which relative paths among them begin, and those
variables of the environment that are settings. The other variables are not stored, because there may be secrets among
them: after a restart they are those of `aiosd restart`.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field

from libaios.home import Home
from libaios.wire import ENV_HOME

PREFIX = "AIOSD_"
OTHERS = (ENV_HOME, "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Start:
    pid: int  # of the guardian
    words: list[str]
    cwd: str
    env: dict[str, str] = field(default_factory=dict)


def remember(home: Home, pid: int, words: list[str], cwd: str) -> None:
    """Store it. A disk error is ignored: it prevents a later restart, but not this start."""
    env = {key: value for key, value in os.environ.items() if key.startswith(PREFIX) or key in OTHERS}
    with contextlib.suppress(OSError):
        new = home.data / "started.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            json.dump(asdict(Start(pid, words, cwd, env)), file)
        os.replace(new, home.data / "started.json")


def recall(home: Home) -> Start | None:
    """The last start; None: nothing is stored, or it cannot be read."""
    try:
        with open(home.data / "started.json", encoding="utf-8", errors="surrogateescape") as file:
            return Start(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None


def apply(start: Start) -> None:
    """Give this process the variables and the folder of that start. Raises OSError if the folder is gone."""
    for key in [key for key in os.environ if key.startswith(PREFIX) or key in OTHERS]:
        del os.environ[key]
    os.environ.update(start.env)
    os.chdir(start.cwd)
