"""The tools that every system has.

Files are those of the caller's folder; no path leads out of it. `shell` and `python` start there, with the rights of
the user who runs aiosd (see README, "Limits"). `fetch` reaches public addresses only.
"""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from msgspec import Meta

from aiosd.tools import direct, held, web
from libaios.tool import define

MAX_FILE = 1 << 20  # bytes
KEPT_OUTPUT = 200_000  # bytes of what a program writes

Text = Annotated[str, Meta(max_length=MAX_FILE)]
FileName = Annotated[str, Meta(min_length=1, max_length=1024)]

globals().update(direct.FUNCTIONS)  # described with the others; the toolbox runs them itself


@define(instances=4, time=60)
def python(code: Text) -> Generator[str, None, dict[str, Any]]:
    """Runs Python code in a process of its own and returns what it prints.

    Args:
        code: the program; what it should return it must print
    """
    return _program([sys.executable, "-I", "-c", code])


@define(instances=4, time=60)
def shell(command: Text) -> Generator[str, None, dict[str, Any]]:
    """Runs a shell command in the working folder and returns what it writes.

    Args:
        command: for sh
    """
    return _program(["/bin/sh", "-c", command])


@define(instances=64, reads=["file:{path}"], concerns=["path:{path}"])
def read_file(path: FileName) -> str:
    """Reads a text file of the working folder.

    Args:
        path: the file's name
    """
    with os.fdopen(held.open_file(str(_inside(path)), os.O_RDONLY), "rb") as file:
        return _text(file, path)


@define(instances=64, writes=["file:{path}"], concerns=["path:{path}"])
def write_file(path: FileName, content: Text) -> str:
    """Writes a text file of the working folder. An old one of this name is replaced.

    Args:
        path: the file's name
        content: the whole text
    """
    target = _inside(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(held.open_file(str(target), os.O_WRONLY | os.O_CREAT), content)
    return f"{len(content.encode())} bytes written"


@define(instances=64, writes=["file:{path}"], concerns=["path:{path}"])
def edit_file(path: FileName, old: Annotated[Text, Meta(min_length=1)], new: Text) -> str:
    """Replaces one passage of a text file.

    Args:
        path: the file's name
        old: the passage as it stands there, which must be there exactly once
        new: what takes its place
    """
    fd = held.open_file(str(_inside(path)), os.O_RDWR)
    with os.fdopen(os.dup(fd), "rb") as file:
        text = _text(file, path)
    if (times := text.count(old)) != 1:
        os.close(fd)
        raise ValueError(f"the passage is there {times} times, not once")
    _replace(fd, text.replace(old, new))
    return "changed"


@define(instances=64, concerns=["path:{path}"])
def list_files(path: Annotated[str, Meta(max_length=1024)] = ".") -> list[str]:
    """Lists a folder; names of folders end with a slash.

    Args:
        path: the folder
    """
    fd = held.open_file(str(_inside(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(fd) as entries:
            return sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)[:10_000]
    finally:
        os.close(fd)


@define(instances=8, time=30, concerns=["host:{url}"])
def fetch(url: Annotated[str, Meta(max_length=4096)]) -> str:
    """Fetches a text from the web. Addresses that are not public are refused.

    Args:
        url: http:// or https://
    """
    return web.fetch(url)


def _text(file: BinaryIO, path: str) -> str:
    data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{path} is larger than {MAX_FILE >> 20} MB")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file") from None


def _replace(fd: int, content: str) -> None:
    """The whole content of an open file."""
    with os.fdopen(fd, "wb") as file:
        file.seek(0)
        file.truncate()
        file.write(content.encode())


def _inside(path: str) -> Path:
    """A path of the working folder, links followed. Raises PermissionError for one that leads out of it."""
    folder = Path.cwd().resolve()
    try:
        target = (folder / path).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
        raise ValueError(f"{path!r} is no path") from None
    if not target.is_relative_to(folder):
        raise PermissionError(13, f"{path} is outside the working folder")
    return target


def _program(command: list[str]) -> Generator[str, None, dict[str, Any]]:
    """Run a program: yields what it writes, and returns it with the exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    kept: list[str] = []
    left, dropped = KEPT_OUTPUT, 0
    while data := os.read(process.stdout.fileno(), 1 << 16):
        shown, dropped, left = data[:left], dropped + max(0, len(data) - left), max(0, left - len(data))
        text = decoder.decode(shown)
        if text:
            kept.append(text)
            yield text
    if dropped:
        kept.append(f"\n[{dropped} more bytes are left out]\n")
    return {"output": "".join(kept), "exit_code": process.wait()}
