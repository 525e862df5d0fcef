"""In a worker: the files and hosts that the running call may open, as they were when the call was allowed.

Between the decision about a call and its beginning a file could be replaced by another one, or by a link. So a file
that a decision was about is identified by its inode and the time of its last change, and a file that a built-in tool
opens is compared with that before anything is read or written. If nothing was decided about files nothing is compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

#: Device, inode, time of the last change (ns); () for a file that was not there.
Identity = tuple[int, ...]

#: The allowed files by real path, and the allowed hosts; None: nothing was decided about these.
files: Mapping[str, Identity] | None = None
hosts: Iterable[str] | None = None
#: Whether this process has the network of an agent that reaches single hosts, through the proxy alone.
proxied = False


def identity(path: str | int) -> Identity:
    """The identity of a file now; of a link itself, not of its target."""
    try:
        found = os.stat(path, follow_symlinks=False) if isinstance(path, str) else os.fstat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def open_file(path: str, flags: int) -> int:
    """Open a file without changing it. Raises PermissionError if it is another file than the decision was about."""
    if files is None:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)
    expected = files.get(path)
    if expected is None:
        raise PermissionError(13, f"{path} is not what the call was allowed for")
    if not expected and flags & os.O_CREAT:
        return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    fd = os.open(path, (flags & ~os.O_CREAT) | os.O_NOFOLLOW | os.O_CLOEXEC)
    if identity(fd) != expected:
        os.close(fd)
        raise PermissionError(13, f"{path} has changed since the call was allowed")
    return fd


def require_host(host: str) -> None:
    """Raises PermissionError for a host that was not decided about, for example after a redirect."""
    if hosts is not None and host not in hosts:
        raise PermissionError(13, f"the call was allowed for another host than {host}, to which it is redirected")
