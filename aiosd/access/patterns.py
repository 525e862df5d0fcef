"""Which resources a rule means, by their type. Pure: nothing is looked up.

path     a file, or a folder with all below it; `*` stands for any text within one name. A path that begins with `/` is
         absolute, others begin at the caller's own folder (in the store: at its space)
host     a name or an address; `*.example.org` is all below example.org, and `*` all hosts
group    a name, or `*`
signal   a name such as TERM, or `*`
"""

from __future__ import annotations

import posixpath
import signal
from fnmatch import fnmatchcase


def matches(kind: str, pattern: str, value: str, base: str = "") -> bool:
    """Whether a value matches. `base`: the folder to which relative paths refer; "": relative paths match nothing."""
    if kind == "path":
        return _path_matches(pattern, value, base)
    if kind == "host":
        return _host_matches(pattern, value)
    return pattern in ("*", value)


def covers(kind: str, wide: str, narrow: str) -> bool:
    """Whether `wide` matches everything that `narrow` matches. False if that is not certain."""
    if kind == "path":
        if wide.startswith("/") != narrow.startswith("/"):
            return False
        mine, others = _names(wide), _names(narrow)
        return others[: len(mine)] == mine
    if kind == "host":
        if narrow.startswith("*."):
            return wide == "*" or (wide.startswith("*.") and narrow[1:].endswith(wide[1:]))
        return _host_matches(wide, narrow)
    return wide in ("*", narrow)


def checked(kind: str, pattern: str) -> str:
    """The pattern in its normal form. Raises ValueError."""
    if not pattern or "\0" in pattern:
        raise ValueError(f"{pattern!r} is no {kind}")
    if kind == "path":
        plain = posixpath.normpath(pattern)
        if plain == ".." or plain.startswith("../") or "**" in plain:
            raise ValueError(f"{pattern!r}: a path names a file, or a folder with all below it ('*' within one name)")
        return "/" + plain.lstrip("/") if plain.startswith("/") else plain
    if kind == "host":
        return _checked_host(pattern)
    if kind == "signal" and pattern != "*":
        name = pattern.upper().removeprefix("SIG")
        if f"SIG{name}" not in signal.Signals.__members__:
            raise ValueError(f"{pattern!r} is no signal")
        return name
    return pattern


def host_of(text: str) -> str:
    """A host in the form in which it is compared: small letters, no dot at the end, and a name of other letters in its
    ASCII form. Raises ValueError."""
    plain = text.rstrip(".").lower()
    try:
        return plain if plain.isascii() else plain.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{text!r} is no name of a host") from None


def _checked_host(pattern: str) -> str:
    rest = pattern.removeprefix("*.")
    if pattern == "*":
        return pattern
    if "*" in rest or "/" in rest or not rest or any(c.isspace() for c in rest):
        raise ValueError(f"{pattern!r} is no host (such as example.org, *.example.org or 192.0.2.1)")
    return pattern[: len(pattern) - len(rest)] + host_of(rest)


def _path_matches(pattern: str, value: str, base: str) -> bool:
    whole = posixpath.join(base, pattern) if base else pattern
    if whole.startswith("/") != value.startswith("/"):
        return False
    names, found = _names(whole), _names(value)
    return len(found) >= len(names) and all(
        fnmatchcase(one, _literal(name)) for name, one in zip(names, found, strict=False)
    )


def _names(path: str) -> list[str]:
    plain = posixpath.normpath(path).lstrip("/")
    return [] if plain in ("", ".") else plain.split("/")


def _literal(name: str) -> str:
    """A name for fnmatch, in which only the star has a meaning."""
    return name.replace("[", "[[]").replace("?", "[?]")


def _host_matches(pattern: str, host: str) -> bool:
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return pattern in ("*", host)
