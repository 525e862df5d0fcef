"""The files that a person grants to an agent by starting it: those of its program, and those named in options.

Paths are looked up here, in the person's process, before the agent exists, and are made absolute and free of symbolic
links. The kernel looks up no path that comes from an agent, and a confined agent's own process sees no more than it was
granted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from libaios import digest, wire
from libaios.home import Home

#: Variables that name files with the certificates that programs trust: such files may be read.
CERTIFICATES = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "PIP_CERT", "GIT_SSL_CAINFO",
    "NIX_SSL_CERT_FILE", "AWS_CA_BUNDLE",
)  # fmt: skip
#: Folders where things of many programs lie side by side.
SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/home", "/media", "/mnt", "/root", "/run", "/var", "/etc", "/dev")
#: Programs whose first argument is the program that a person means.
INTERPRETERS = re.compile(r"(python|pypy|node|nodejs|deno|bun|ruby|perl|php|lua|bash|dash|sh|zsh|ksh|Rscript)[\d.]*")


def wish(
    kind: str,
    target: str,
    cwd: str,
    env: Mapping[str, str],
    *,
    args: Sequence[str] = (),
    level: str | None = None,
    read: Iterable[str] = (),
    write: Iterable[str] = (),
    variables: Iterable[str] = (),
    net: str | Iterable[str] | None = None,
    needed: Iterable[str] = (),
) -> wire.Sandbox:
    """The sandbox that is sent with a spawn. `target`, `args` and so on are as in `wire.Spawn`, but as Python has them.
    `needed`: paths that the program needs besides its own folder."""
    program, own = _own(kind, target, cwd, env)
    of_agent = wire.ENV_PID in os.environ  # what agents start proves nothing to rules
    alone = own == [program]
    is_program = kind == "exec" or (kind == "file" and not target.endswith(".py"))
    script = _of_interpreter(program, args, cwd) if is_program else ""
    own += [_folder_of(script)] if script else []
    if kind == "exec":
        own += _user_sites(env.get("PYTHONUSERBASE", ""))
    own += map(_real, needed)
    own += filter(os.path.isfile, (_real(env.get(name, "")) for name in CERTIFICATES))
    own += [path for path in map(_real, env.get("PYTHONPATH", "").split(os.pathsep)) if path and not is_broad(path)]
    return wire.Sandbox(
        level=level or "",
        net=_net(net),
        read=[wire.os_text(_real(path, cwd)) for path in read],
        write=[wire.os_text(_real(path, cwd)) for path in write],
        own=[wire.os_text(path) for path in dict.fromkeys(own)],
        env=list(variables),
        program=wire.os_text(program),
        script=wire.os_text(script),
        alone=alone,
        sha256=digest.of_file(program) if kind == "file" and program != "-" and not of_agent else b"",
    )


def _net(net: str | Iterable[str] | None) -> str:
    """The network as it is sent: without blanks, in small letters, each host once. The kernel checks it."""
    words = [net] if isinstance(net, str) else net or ()
    return ",".join(dict.fromkeys(word.strip().lower() for text in words for word in text.split(",")))


def _own(kind: str, target: str, cwd: str, env: Mapping[str, str]) -> tuple[str, list[str]]:
    """The path by which later agents of this program are recognised, and the paths that it must be able to read: the
    folder in which it lies, or the file alone if that folder is too broad. A program that is executed also gets its
    working folder, because its arguments mostly name files there (`python app.py`), and the environment of Python in
    which it lies."""
    if kind == "module" or target == "-":
        return target, [] if is_broad(_real(cwd)) else [_real(cwd)]
    named = os.path.join(cwd, target)
    if kind == "exec" and "/" not in target:
        named = _in_path(target, env) or named
    real = _real(named)
    folder = os.path.dirname(real)
    own = [real] if is_broad(folder) else [folder]
    linked = _real(os.path.dirname(named))
    if linked != folder and not is_broad(linked):
        own.append(linked)  # a link to the program lies there
    if kind == "exec":
        found = [_real(cwd), *_environments(linked), *_environments(folder)]
        own += [path for path in found if path not in own and not is_broad(path)]
    return real, own


def _of_interpreter(program: str, args: Sequence[str], cwd: str) -> str:
    """The script that an interpreter is to run (`python -u DIR/app.py`), which counts as one that is named without it.
    Other arguments grant nothing: they may be text from another person."""
    if not INTERPRETERS.fullmatch(os.path.basename(program)):
        return ""
    for arg in args:
        if arg[:1] != "-":
            path = _real(arg, cwd)
            return path if os.path.isfile(path) else ""
        if arg[:2] in ("-c", "-e", "-m", "-p") or arg == "-":  # the program is text, or a module
            break
    return ""


def _folder_of(script: str) -> str:
    folder = os.path.dirname(script)
    return script if is_broad(folder) else folder


def user_base(env: Mapping[str, str]) -> str:
    """The folder in which Python finds what `pip install --user` has installed. "": there is none, or the environment
    names it already. (In a sandbox the home is another folder, so Python would not find it.)"""
    base = os.path.expanduser("~/.local")
    return base if "PYTHONUSERBASE" not in env and _user_sites(base) else ""


def _user_sites(base: str) -> list[str]:
    library = os.path.join(_real(base), "lib")
    try:
        versions = [name for name in os.listdir(library) if name.startswith("python3")] if base else []
    except OSError:
        return []
    found = [os.path.join(library, name, "site-packages") for name in versions]
    return [path for path in found if os.path.isdir(path)]


def _environments(folder: str) -> list[str]:
    """The roots of the environment of Python or Node whose programs are in this folder; [] if the folder belongs to
    none. A virtual environment has its interpreter and its library elsewhere; `shims` stand for programs of several
    environments."""
    root = os.path.dirname(folder)
    if os.path.basename(folder) == "shims" or os.path.isdir(os.path.join(root, "lib", "node_modules")):
        return [root] if root not in ("/", "/usr", "/usr/local") else []
    try:
        with open(os.path.join(root, "pyvenv.cfg"), encoding="utf-8", errors="replace") as file:
            settings = dict(line.partition("=")[::2] for line in file)
    except OSError:
        own = root not in ("/", "/usr")  # all agents may read these
        return [root] if own and _has_library(os.path.join(root, "lib")) else []
    home = next((value.strip() for name, value in settings.items() if name.strip() == "home"), "")
    return [root, *([os.path.dirname(_real(home))] if os.path.isabs(home) else [])]


def _has_library(folder: str) -> bool:
    try:
        versions = [name for name in os.listdir(folder) if name.startswith("python3")]
    except OSError:
        return False
    return any(os.path.isfile(os.path.join(folder, name, "os.py")) for name in versions)


def _in_path(name: str, env: Mapping[str, str]) -> str | None:
    for folder in env.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(folder or os.curdir, name)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return None


def is_broad(folder: str) -> bool:
    """Whether a folder contains the user's home, data or settings (with keys) of aiosd, or files of many programs: too
    much to be granted without an option that names it."""
    if folder in SHARED or folder == _real(os.environ.get("TMPDIR", "")):
        return True
    own = Home().texts
    places = (_real(os.path.expanduser("~")), _real(own["data"]), _real(own["config"]))
    return any(place == folder or place.startswith(folder.rstrip("/") + "/") for place in places)


def _real(path: str, cwd: str = "/") -> str:
    return os.path.realpath(os.path.join(cwd, os.path.expanduser(path))) if path else ""
