"""The messages between the toolbox and its workers: msgpack frames over a socket pair (`libaios.stream`).

The toolbox checks every frame from a worker, because a tool can write to its worker's socket.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, msgpack


class Tool(Struct, array_like=True, frozen=True):
    """One tool, as a worker describes it. `reads` and `writes`: its locks, with `{argument}`s to be filled in."""

    name: str
    description: str
    parameters: dict[str, Any]
    instances: int = 1
    time_s: float = 60.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    concerns: tuple[str, ...] = ()  # its resources, `type:{argument}`; see `concerns`
    asks: bool = False  # its server marks it as destructive


class Described(Struct, array_like=True, frozen=True, tag=True):
    """The tools of a source; `error`: why it cannot be loaded."""

    tools: list[Tool]
    error: str = ""


class Run(Struct, array_like=True, frozen=True, tag=True):
    """Service → worker. `folder`: the working directory of the call. `files` and `hosts`: see `held`."""

    tool: str
    arguments: dict[str, Any]
    folder: str
    files: dict[str, tuple[int, ...]] | None = None
    hosts: list[str] | None = None


class Wrote(Struct, array_like=True, frozen=True, tag=True):
    text: str


class Done(Struct, array_like=True, frozen=True, tag=True):
    """`errno` 0: `result` is the answer. `spent`: this process should serve no other call."""

    result: Any = None
    errno: int = 0
    message: str = ""
    spent: bool = False


FromWorker = Described | Wrote | Done
decode_from_worker = msgpack.Decoder(FromWorker).decode
encode = msgpack.Encoder(enc_hook=repr).encode
