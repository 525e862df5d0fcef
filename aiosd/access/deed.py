"""Deeds: what an agent is about to do, in the form that rules and people get.

A deed is a tool or a system call, with the things that it concerns (its resources) by type. A person is shown its
`details`, word for word. An approval is for the `digest`: it covers tool, arguments, resources, and in `bound`
everything else that must stay the same (the schema of the tool, the version of the file), so that only the deed that
was shown is done.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct, json, msgpack

from libaios import digest

#: Types of resources, in the order in which they are shown.
KINDS = ("path", "host", "group", "signal")
DETAIL_CHARS = 1 << 16  # of one text for people,
ALL_CHARS = 1 << 18  # … and about as many of all together

_encode = msgpack.Encoder().encode


class Deed(Struct, array_like=True, frozen=True):
    """A deed. `default`: why a person is asked if no rule matches; "": no person is asked. `unknown`: types of
    resources that it may concern without naming them. `base`: the folder to which relative paths in rules refer.
    `once`: it cannot be allowed for all times."""

    what: str  # the name of a tool, or of a system call as in `wire.call_name`
    tool: bool = False
    resources: list[tuple[str, str]] = []  # type and value
    details: list[tuple[str, str]] = []  # label and text
    bound: bytes = b""
    default: str = ""
    unknown: list[str] = []
    base: str = ""
    once: bool = False
    reason: str = ""  # why it is refused if no person allows it

    @property
    def digest(self) -> bytes:
        return _hash((self.what, self.tool, self.resources, self.details, self.bound, self.base))

    @property
    def arguments(self) -> bytes:
        """The digest of the call's arguments, independent of its folder and of the state of files."""
        return _hash((self.what, self.tool, self.details))

    @property
    def schema(self) -> str:
        """The description of a tool: the first part of `bound`."""
        return self.bound[:16].hex() if self.tool else ""

    def lasting(self) -> list[tuple[str, str]]:
        """Its resources in a form that means the same for another agent: paths in its own folder begin with `./`."""
        own = f"{self.base}/" if self.base else "\0"
        return sorted(
            (kind, f"./{value.removeprefix(own)}" if kind == "path" and value.startswith(own) else value)
            for kind, value in self.resources
        )

    @property
    def shown(self) -> str:
        """The deed in a few words."""
        things = ", ".join(f"{kind} {value}" for kind, value in self.resources)
        return f"{self.what} {things}" if things else self.what

    def values(self, kind: str) -> list[str]:
        return [value for other, value in self.resources if other == kind]


class Subject(Struct, array_like=True, frozen=True):
    """The agent of a deed, never identified by a name that an agent chose. `program`: the hash of its path
    (`program_key`), `sha256`: that of its content; b"" if that is not proved, or matters to no rule."""

    group: str
    program: bytes = b""
    sha256: bytes = b""


class Unapproved(Exception):
    """Raised by a service: this deed must be allowed before the call is done."""

    def __init__(self, deed: Deed) -> None:
        super().__init__(deed.shown)
        self.deed = deed


def _hash(content: object) -> bytes:
    return digest.short(_encode(content), 16)


def program_key(path: bytes) -> bytes:
    """The hash that stands for the path of a program where the path itself must not be shown."""
    return digest.short(path, 16, b"aiosd program")


def detail(label: str, value: object) -> tuple[str, str]:
    """A text for people. A text that is too long is cut, with a mark that has the hash of the whole text."""
    text = value if isinstance(value, str) else json.encode(value).decode()
    if len(text) > DETAIL_CHARS:
        left = len(text) - DETAIL_CHARS
        whole = digest.of(text.encode("utf-8", "surrogatepass")).hex()
        text = f"{text[:DETAIL_CHARS]}[… {left} more characters, not shown; SHA-256 of the whole: {whole}]"
    return label, text


def details_of(arguments: Iterable[tuple[str, object]]) -> list[tuple[str, str]]:
    """The same for many. Together they have a limit, too; the texts beyond it are cut as one."""
    found: list[tuple[str, str]] = []
    left, rest = ALL_CHARS, []
    for name, value in arguments:
        if left > 0:
            found.append(detail(name[:DETAIL_CHARS], value))
            left -= len(found[-1][0]) + len(found[-1][1])
        else:
            rest.append((name, value))
    if rest:
        whole = digest.of(json.encode(rest)).hex()
        found.append(("more", f"[… {len(rest)} more arguments, not shown; SHA-256 of them: {whole}]"))
    return found
