"""From a forked child to an MCP server: confined by its settings, then the program that they name is executed.

Its settings (there may be keys in its environment) come in a memfd, which the supervisor passes on and does not read.
The reason why it cannot start is written to a pipe, which Linux closes when the program begins.

A confined server may reach: the system's programs and libraries, the folder of its program, files and folders that its
arguments name with their whole path, its `cwd`, the paths in `read` and `write`, and a folder of its own, which is its
HOME; but nothing of aiosd's own data, where other agents' files are.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from dataclasses import dataclass

from msgspec import msgpack

from aiosd import kin
from aiosd.birth import confinement, fork, modules
from aiosd.sandbox import box as boxes
from aiosd.sandbox import cage
from aiosd.sandbox.box import LEVELS, Box
from aiosd.tools.spec import MEMORY_BYTES, McpServer
from libaios import wire

#: Limits of each of its processes.
LIMITS = (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_FSIZE, 1 << 30),
    (resource.RLIMIT_NOFILE, 1024),
    (resource.RLIMIT_DATA, MEMORY_BYTES),
)


@dataclass(frozen=True, slots=True)
class House:
    """The settings that all servers of a system have in common. `level`: the strongest that the machine can do;
    `strict`: none runs in a weaker one. `data`: aiosd's own; `folder`: the folder that has a folder for each server."""

    level: str
    strict: bool
    data: str
    folder: str


def become(name: str, fds: list[int], house: House) -> int:
    """Become the server, in the child. `fds`: the settings, its stdin and stdout, and the pipe for the reason of a
    failure. Returns only when it could not start."""
    os.setsid()
    modules.show()
    settings, stdin, stdout, report = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds)
    try:
        _become(name, settings, stdin, stdout, report, house)
    except Exception as err:  # any error is reported to the person who has configured the server
        os.write(report, f"{type(err).__name__}: {err}".encode(errors="replace")[:2048])
    return 127


def _become(name: str, settings: int, stdin: int, stdout: int, report: int, house: House) -> None:
    import shutil  # in this process alone: it is large

    supervisor = os.getppid()
    kin.adopt_orphans()  # processes that it starts stay below it, and end with it
    for fd, number in ((stdin, 0), (stdout, 1), (os.open(os.devnull, os.O_WRONLY), 2)):
        os.dup2(fd, number)
    fork.keep_only((settings, report, *cage.descriptors()))
    server = msgpack.decode(os.pread(settings, os.fstat(settings).st_size, 0), type=McpServer)
    workspace = os.path.join(house.folder, name)
    os.makedirs(os.path.join(workspace, "tmp"), mode=0o700, exist_ok=True)
    env = {"HOME": workspace, "TMPDIR": os.path.join(workspace, "tmp"), **server.env}
    program = shutil.which(server.command, path=env.get("PATH", os.defpath)) or server.command
    cwd = server.cwd or os.getcwd()
    level = level_of(server, house)
    if level != "none":
        confinement.apply(box_of(server, program, level, workspace, house.data))
        kin.die_with_parent(supervisor)  # Linux drops this signal when rights change
    for which, most in LIMITS:
        confinement.limit(which, most)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and programs do not expect
        signal.signal(number, signal.SIG_DFL)
    try:
        os.chdir(cwd)
        os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY))
    except OSError:
        if server.cwd:
            raise
        os.chdir(workspace)
    fork.keep_only((report,))
    os.execve(program, [server.command, *server.args], env)


def level_of(server: McpServer, house: House) -> str:
    """The configured level, or the strongest; if the machine cannot do it, the strongest that it can."""
    wanted = LEVELS[-1] if house.strict else server.sandbox or house.level
    return min(wanted, house.level, key=LEVELS.index)


def box_of(server: McpServer, program: str, level: str, workspace: str, data: str) -> Box:
    """The box of a server. Raises OSError (EINVAL) if aiosd's own data would be in it."""
    named = [*_of_program(program, data)]
    for argument in server.args:
        if os.path.isabs(argument) and os.path.exists(argument):
            named += _with_folder(argument, data)
    if server.cwd:
        named.append(server.cwd)
    own = [path for path in map(os.path.realpath, named) if not _is_broad(path, data)]
    read = [*own, *(os.path.realpath(path) for path in server.read)]
    write = [os.path.realpath(path) for path in server.write]
    found = Box(
        level,
        server.net or "all",
        wire.os_text(os.path.realpath(workspace)),
        [wire.os_text(path) for path in dict.fromkeys(read)],
        [wire.os_text(path) for path in dict.fromkeys(write)],
    )
    boxes.refuse_data(found, os.path.realpath(data), os.path.realpath(workspace))
    return found


def _of_program(program: str, data: str) -> list[str]:
    """The folders of the program and of its link's target; if a folder is `bin` (node: `.bin`), the one above it."""
    found: list[str] = []
    for path in (program, os.path.realpath(program)):
        folder = os.path.dirname(path)
        above = os.path.dirname(folder)
        if os.path.basename(folder) in ("bin", ".bin") and not _is_broad(os.path.realpath(above), data):
            found.append(above)
        else:
            found += _with_folder(path, data)
    return found


def _with_folder(path: str, data: str) -> list[str]:
    """A folder itself; for a file its folder, or the file alone if the folder is too broad."""
    if os.path.isdir(path):
        return [path]
    folder = os.path.dirname(path)
    return [path] if _is_broad(os.path.realpath(folder), data) else [folder]


def _is_broad(folder: str, data: str) -> bool:
    """Whether the folder contains the user's home or aiosd's data, or lies in the data."""
    home, data = os.path.realpath(os.path.expanduser("~")), os.path.realpath(data)
    prefix = folder.rstrip("/") + "/"
    return any((place + "/").startswith(prefix) for place in (home, data)) or (folder + "/").startswith(data + "/")
