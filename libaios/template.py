"""Templates: warm processes from which agents are forked, named by an interpreter and the modules that it has imported.

Paths are looked up here, by the person's process, because neither kernel nor supervisor looks up paths.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from libaios import wire
from libaios.sandbox import is_broad


def wish(modules: Iterable[str], python: str = "") -> wire.Template:
    """`python`: an interpreter, or the folder of a virtual environment; "": aiosd's own.

    Raises FileNotFoundError, PermissionError: there is no such interpreter, or it cannot be executed."""
    return wire.Template(wire.os_text(_interpreter(python)) if python else "", list(dict.fromkeys(modules)))


def folders(template: wire.Template | None) -> list[str]:
    """The folders that a confined agent must be able to read to import more: the environment of the interpreter, and
    the one from which that was made. aiosd's own is readable in every sandbox."""
    if template is None or not template.python:
        return []
    prefix = os.path.dirname(os.path.dirname(wire.os_str(template.python)))
    found = [prefix]
    try:
        with open(os.path.join(prefix, "pyvenv.cfg"), encoding="utf-8", errors="surrogateescape") as file:
            found += [os.path.dirname(line.partition("=")[2].strip()) for line in file if line.startswith("home")]
    except OSError:
        pass  # no virtual environment
    return [folder for folder in found if os.path.isdir(folder) and not is_broad(folder)]


def _interpreter(named: str) -> str:
    """The absolute path of an interpreter. The last link of it is kept: in a virtual environment `python` is a link,
    and its place shows which environment it is. Links above are resolved, since a sandbox has none."""
    path = os.path.abspath(os.path.expanduser(named))
    if os.path.isdir(path):
        path = os.path.join(path, "bin", "python")
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, f"{path}: there is no such interpreter")
    if not os.access(path, os.X_OK):
        raise PermissionError(errno.EACCES, f"{path}: cannot be executed")
    return path
