"""Explains a denial by the sandbox (a file, a network or a variable of the environment): what was denied, and which
setting would allow it.

The exception names the file, but not the operation. That is read from the call that failed, in the source at the end of
the traceback: the mode of an `open`, the name of the function.
"""

from __future__ import annotations

import ast
import errno
import linecache
import os
import re
import socket
from itertools import islice
from types import FrameType, TracebackType

from aiosd.sandbox import hosts, places
from aiosd.sandbox.box import Box
from libaios import wire

_CHANGES = {
    "mkdir", "makedirs", "remove", "unlink", "rmdir", "removedirs", "rename", "renames", "replace", "truncate",
    "symlink", "symlink_to", "link", "hardlink_to", "chmod", "lchmod", "chown", "lchown", "utime", "mkfifo", "mknod",
    "touch", "write_text", "write_bytes", "setxattr", "removexattr",
}  # fmt: skip
_NO_NETWORK = {errno.ENETUNREACH, errno.EAFNOSUPPORT}
_READS = {"listdir", "scandir", "iterdir", "stat", "lstat", "chdir", "readlink", "read_text", "read_bytes", "walk"}
#: Patterns for variables that should have held a key, in error messages of programs.
_SECRET = re.compile(r"\b[A-Z][A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)\b")
_PLAIN = (ast.Name, ast.Attribute, ast.BinOp, ast.BitOr, ast.Constant, ast.Load)  # these may be evaluated once more


def words(err: BaseException, box: Box, seen: tuple[str, ...]) -> str:
    """A sentence in parentheses; "": the error has another cause. `seen`: the paths of the machine in the cage."""
    if not isinstance(err, OSError):
        return _environment(err, box)
    if not isinstance(err.filename, str | bytes):
        return _network(err, box)
    path = os.path.abspath(os.fsdecode(err.filename))
    change = err.errno == errno.EROFS or _wants_to_change(err)
    if err.errno == errno.ENOENT:
        if box.level != "cage" or places.inside(path, (*seen, box.workspace, *box.read, *box.write)):
            return ""
        if os.path.dirname(path) in ("/tmp", "/dev/shm"):  # its own folder: a missing file was not made
            return ""
        grant, end = "write" if change else "read", "would show it, if it is there"
    elif isinstance(err, PermissionError) or err.errno == errno.EROFS:
        if change is None:
            change = _is_readable(path)
        grant, end = "write" if change else "read", "would allow it"
    else:
        return ""
    if grant == "write" and not os.path.lexists(path):
        path = os.path.dirname(path)  # a file that does not exist yet cannot be granted
    if grant == "write":
        end += f"; it may write in its home, {wire.os_shown(box.workspace)}"
    return f"(sandbox {box.level}: aios-run --{grant} {path}, or {grant} of [[group]] in aiosd.toml, {end})"


def _environment(err: BaseException, box: Box) -> str:
    """For a program that misses a variable: os.environ["X"], or an error message that names a variable for a key."""
    name = err.args[0] if isinstance(err, KeyError) and _is_of_environ(err) else _named(err)
    if not isinstance(name, str) or not name or name in os.environ:
        return ""
    return f"(sandbox {box.level}: aios-run -e {name}, or env of [[group]] in aiosd.toml, passes it on where it is set)"


def _is_of_environ(err: BaseException) -> bool:
    last = _end_of(err)
    return last is not None and last.tb_frame.f_globals.get("__name__") == "os"


def _named(err: BaseException) -> str:
    try:
        found = _SECRET.search(str(err))
    except Exception:  # of the agent's own class, whatever it raises
        return ""
    return found[0] if found is not None else ""


def _network(err: OSError, box: Box) -> str:
    """For a program that does not use the proxy, or has no network at all."""
    inner = getattr(err, "reason", None)  # of urllib
    cause = inner if isinstance(inner, OSError) else err
    if box.net == hosts.ALL or not (isinstance(cause, socket.gaierror) or cause.errno in _NO_NETWORK):
        return ""
    if hosts.grants(box.net):
        return f"(sandbox {box.level}: its network is the proxy of HTTPS_PROXY in its environment, to {box.net})"
    return f"(sandbox {box.level}: {hosts.would_allow_one(box.level)})"


def _wants_to_change(err: BaseException) -> bool | None:
    """Whether the call that failed would have changed the file; None: unknown."""
    last = _end_of(err)
    call = _call_of(last) if last is not None else None
    if last is None or call is None:
        return None
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    if name == "open":
        return _opens_to_change(call, last.tb_frame)
    return True if name in _CHANGES else False if name in _READS else None


def _end_of(err: BaseException) -> TracebackType | None:
    last = err.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last


def _call_of(last: TracebackType) -> ast.Call | None:
    """The call at the end of a traceback, from its source."""
    code = last.tb_frame.f_code
    first, end, left, right = next(islice(code.co_positions(), last.tb_lasti // 2, None), (None,) * 4)
    if first is None or end is None or left is None or right is None:
        return None
    lines = [linecache.getline(code.co_filename, number).encode() for number in range(first, end + 1)]
    lines[-1] = lines[-1][:right]
    lines[0] = lines[0][left:]
    try:
        tree = ast.parse(b"".join(lines).decode(), mode="eval").body
    except (SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.Call) else None


def _opens_to_change(call: ast.Call, frame: FrameType) -> bool | None:
    """Whether a call opens a file for changes, by the mode of open() or the flags of os.open()."""
    mode = next((word.value for word in call.keywords if word.arg in ("mode", "flags")), None)
    position = 1 if isinstance(call.func, ast.Name) or _is_module(call.func, frame) else 0  # Path.open has no path
    if mode is None and len(call.args) > position:
        mode = call.args[position]
    if mode is None:
        return False
    if not all(isinstance(node, _PLAIN) for node in ast.walk(mode)):
        return None
    try:
        value = eval(compile(ast.Expression(mode), "<mode>", "eval"), frame.f_globals, frame.f_locals)
    except Exception:  # of the agent's code, whatever it raises: then the mode is not known
        return None
    if isinstance(value, str):
        return any(letter in value for letter in "wax+")
    return bool(value & (os.O_WRONLY | os.O_RDWR)) if isinstance(value, int) else None


def _is_module(function: ast.expr, frame: FrameType) -> bool:
    """Whether the function belongs to a module: `os.open`, `io.open`, `codecs.open` …"""
    owner = function.value if isinstance(function, ast.Attribute) else None
    if not isinstance(owner, ast.Name):
        return False
    found = frame.f_locals.get(owner.id, frame.f_globals.get(owner.id))
    return isinstance(found, type(os))


def _is_readable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
