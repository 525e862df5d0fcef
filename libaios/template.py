"""Templates: warm processes from which agents are forked, named by an interpreter and the modules that it has imported.

Paths are looked up here, by the person's process, because neither kernel nor supervisor looks any up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from libaios import wire


def wish(modules: Iterable[str], python: str = "") -> wire.Template:
    """`python`: an interpreter, or the folder of a virtual environment; "": aiosd's own.

    Raises FileNotFoundError, PermissionError: there is no such interpreter, or it cannot be executed."""
    return wire.Template(wire.os_text(_interpreter(python)) if python else "", list(dict.fromkeys(modules)))


def _interpreter(named: str) -> str:
    """Links in it are kept: an environment's python is a link, and its place tells which environment it is."""
    path = os.path.abspath(os.path.expanduser(named))
    if os.path.isdir(path):
        path = os.path.join(path, "bin", "python")
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, f"{path}: there is no such interpreter")
    if not os.access(path, os.X_OK):
        raise PermissionError(errno.EACCES, f"{path}: cannot be executed")
    return path
