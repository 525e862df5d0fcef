"""Make the plan that `native/confine.c` carries out from an agent's box: bytes, made in the agent's own process.

Most of a plan is the same for all agents (`Ground`): the parts of the system that they may read, the seccomp programs,
the cage. This part is made once in the supervisor, before any agent is forked. The rest are the agent's own paths.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import stat
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from aiosd.sandbox import cage, filter, hosts, landlock, places, protected
from aiosd.sandbox.box import PROXIES, VARIABLES, Box
from aiosd.sandbox.cage import Cage
from aiosd.sandbox.places import Machine
from libaios.wire import os_bytes, os_str, os_text

_HEAD = struct.Struct("=6I3Q5iI")
_RULE = struct.Struct("=Q3Ii")

#: Programs and libraries.
_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/nix/store", "/etc/alternatives")
#: Files of /etc that programs need; some others there are secrets (/etc/shadow, /etc/ssl/private).
_ETC = (
    "passwd", "group", "nsswitch.conf", "hosts", "host.conf", "resolv.conf", "gai.conf", "services", "protocols",
    "localtime", "timezone", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl/certs", "ssl/openssl.cnf",
    "ca-certificates", "pki/tls/certs", "pki/ca-trust", "mime.types", "os-release", "debian_version", "lsb-release",
    "gitconfig", "inputrc", "terminfo",
    "profile", "bash.bashrc", "fonts", "magic", "login.defs", "shells", "java",
)  # fmt: skip
#: All of /proc, because a rule on /proc/self would hold for one process only. Landlock itself protects the memory,
#: files and environment of other processes.
_KERNEL = ("/proc", "/sys/devices/system/cpu", "/sys/fs/cgroup")
#: File systems of a cage's own.
_PRIVATE = {"/tmp": landlock.WRITE, "/dev/shm": landlock.WRITE, "/dev/pts": landlock.DEVICE | landlock.READ_DIR}
_PRIVATE |= {"/dev": landlock.READ_DIR}
_OUTPUT = landlock.WRITE_FILE | landlock.TRUNCATE
_KEEP_NETWORK, _OWN_NETWORK = -1, -2  # as in `native/cage.h`
_NO_CAGE = (-1, -1, -1, -1, _KEEP_NETWORK, 0)


@dataclass(frozen=True, slots=True)
class Ground:
    """The common part of the plans of all agents on this machine."""

    ruleset: landlock.Ruleset
    rules: bytes
    count: int
    filters: dict[tuple[bool, bool], bytes]  # by whether there is a network, and a door
    machine: Machine
    cage: Cage | None = None  # the one that was built, if this machine can do it
    common: tuple[tuple[str, int], ...] = ()  # paths and rights of the common rules, which `rules` are made of


def ground(python_path: Iterable[str], built: Cage | None = None) -> Ground:
    """`python_path`: the folders where a Python agent looks for modules. `built`: the cage, if there is one."""
    ruleset = landlock.ruleset(landlock.abi())
    common = tuple((path, rights & ruleset.files) for path, rights in common_rules(python_path))
    rules = [_rule(path, rights) for path, rights in common]
    filters = {(network, doors): filter.program(network, doors) for network in (False, True) for doors in (False, True)}
    return Ground(ruleset, b"".join(rules), len(rules), filters, machine(common), built, common)


def opened(ground: Ground) -> tuple[Ground, tuple[int, ...]]:
    """The same ground with a descriptor in each common rule instead of a path. It is for processes that are forked from
    this one and confine themselves soon: they inherit the descriptors, need not open the paths, and close the
    descriptors when they are confined. A path inside of a folder with the same rights gets no rule. The rules hold in
    the cage, too, because it has the same files."""
    found: dict[str, tuple[int, int]] = {}  # by real path: rights, descriptor
    rules: list[bytes] = []
    for path, rights in ground.common:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:  # for example, no descriptor is left: each of those processes opens the path itself
            rules.append(_rule(path, rights))
            continue
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= landlock.ON_FILES
        real = os.readlink(f"/proc/self/fd/{fd}")
        if real in found:
            rights |= found[real][0]
            os.close(fd)
            fd = found[real][1]
        found[real] = (rights, fd)
    kept = {real: (rights, fd) for real, (rights, fd) in found.items() if not _is_covered(real, rights, found)}
    for real in found.keys() - kept.keys():
        os.close(found[real][1])
    rules += [_rule("", rights, fd=fd) for rights, fd in kept.values()]
    return replace(ground, rules=b"".join(rules), count=len(rules)), tuple(fd for _, fd in kept.values())


def _is_covered(path: str, rights: int, found: Mapping[str, tuple[int, int]]) -> bool:
    return any(
        above != path and not rights & ~more and places.inside(path, (above,)) for above, (more, _) in found.items()
    )


def common_rules(python_path: Iterable[str]) -> list[tuple[str, int]]:
    """The rights of all confined agents, by folder or file."""
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *_modules(python_path)}
    rules = [(path, landlock.READ) for path in (*_PROGRAMS, *sorted(python), *(f"/etc/{name}" for name in _ETC))]
    rules += [(path, landlock.READ_FILE | landlock.READ_DIR) for path in _KERNEL]
    return rules + [(path, landlock.DEVICE) for path in places.DEVICES]


def granted(python_path: Iterable[str]) -> dict[str, list[str]]:
    """For people: the parts of the machine that every confined agent may use besides its own files, and the variables
    that it gets from the environment of its start."""
    there = [(path, rights) for path, rights in common_rules(python_path) if os.path.exists(path)]
    return {
        "read": [path for path, rights in there if rights != landlock.DEVICE],
        "devices": [path for path, rights in there if rights == landlock.DEVICE],
        "environment": [*VARIABLES, *PROXIES],
    }


def _modules(python_path: Iterable[str]) -> Iterator[str]:
    """Folders of modules. If one is the root, the user's home or a folder above it, only aiosd itself is taken. Such a
    folder comes there by chance: an empty word in PYTHONPATH stands for the folder in which aiosd was started."""
    homes = [os.path.realpath(os.path.expanduser("~"))]
    with contextlib.suppress(KeyError):  # a user without an entry
        homes.append(os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir))
    for folder in map(os.path.abspath, python_path):
        if any(places.inside(home, (os.path.realpath(folder),)) for home in homes):
            yield from (os.path.join(folder, name) for name in ("aiosd", "libaios"))
        else:
            yield folder


def machine(common: Iterable[tuple[str, int]]) -> Machine:
    """The parts of the machine that are in a cage: /etc as a whole, because files in it get replaced."""
    paths = [path for path, _ in common]
    etc = [path for path in paths if path.startswith("/etc/")]
    return cage.look((*(path for path in paths if path not in etc), "/etc"), etc)


def plan(
    ground: Ground,
    box: Box,
    doors: bool,
    network_fd: int = -1,
    outputs: Iterable[int] = (),
    terminal: str = "",
    names: Iterable[str] = (),
) -> bytes:
    """The whole plan for one agent. `doors`: a listener decides about its Unix sockets (see `doors`). `network_fd`: the
    network to enter instead of a new one, if the box names single hosts. `outputs`: descriptors that the agent gets
    open for writing; their files may be opened again, because scripts do so by names such as /dev/stderr.
    `terminal`: the path of its own terminal, or "". `names`: paths as the agent got them, which may contain links."""
    ruleset, network = ground.ruleset, box.net != hosts.NONE
    entry, mounts = _cage(ground, box, network_fd, terminal, names) if box.level == "cage" else (_NO_CAGE, b"")
    own = [_rule(path, landlock.READ, strict=True) for path in box.read]
    own += [_rule(path, landlock.WRITE & ruleset.files, strict=True) for path in box.write]
    own += [_rule(f"/proc/self/fd/{fd}", _OUTPUT & ruleset.files) for fd in outputs if _is_file(fd)]
    own.append(_rule(box.workspace, landlock.WRITE & ruleset.files, must=True))
    if mounts and terminal:
        own.append(_rule(places.CONSOLE, landlock.DEVICE & ruleset.files))
    if mounts:
        own += [_rule(path, rights & ruleset.files, must=True) for path, rights in _PRIVATE.items()]
    program = ground.filters[network, doors]
    head = _HEAD.pack(
        ground.count + len(own),
        len(program) // 8,
        ruleset.size,
        True,
        doors,
        0,
        ruleset.files,
        0 if network else ruleset.net,
        ruleset.scoped,
        *entry,
    )
    return b"".join((head, program, mounts, ground.rules, *own))


def _cage(
    ground: Ground, box: Box, network_fd: int, terminal: str, names: Iterable[str]
) -> tuple[tuple[int, ...], bytes]:
    """The cage's part of the head, and the records of its places. Raises OSError if there is no cage."""
    if ground.cage is None:
        raise OSError(errno.ENOTSUP, "sandbox: there is no cage here")
    fixed: dict[str, bool] = {}
    for folder in box.write:
        fixed |= {os_text(path): writable for path, writable in protected.find(os_str(folder)).items()}
    links = (
        map(os_text, link) for name in names if name[:1] == "/" and "\0" not in name for link in cage.links_to(name)
    )
    ways = places.needed(ground.machine, links, (*box.read, *box.write, box.workspace))
    found = places.of_agent(ground.machine, box.workspace, box.read, box.write, fixed, terminal, ways)
    user, machine, root, ipc, none = ground.cage.fds()
    own = network_fd if network_fd >= 0 else _OWN_NETWORK
    net = {hosts.NONE: none, hosts.ALL: _KEEP_NETWORK}.get(box.net, own)
    return (user, machine, root, ipc, net, len(found)), places.packed(found)


def _is_file(fd: int) -> bool:
    """Whether a rule about the descriptor's file is possible that grants no more than the descriptor does. (For a pipe
    no rule is possible, and none is needed.)"""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        return False
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _rule(path: str, rights: int, strict: bool = False, must: bool = False, fd: int = -1) -> bytes:
    """A rule for a path, or for `fd`, if the path was opened already. A missing path grants nothing, or is an error if
    it `must` exist. `strict`: a path through a symbolic link grants nothing either. It had no link when it was named,
    so another process has changed it since."""
    encoded = os_bytes(path) + b"\0"
    encoded += bytes(-len(encoded) % 8)
    return _RULE.pack(rights & ~landlock.MAKE_DEVICES, must, strict, len(encoded), fd) + encoded
