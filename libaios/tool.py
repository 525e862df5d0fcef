"""Tools: list them, call them, define new ones. The toolbox runs the tools, each call in a process apart from the
agent.

    aios.tool.list()                                   # every tool, with the JSON Schema of its arguments
    aios.tool.call("calc", expression="2*21")          # -> "42"
    for text in aios.tool.stream("shell", command="make"): print(text, end="")
    aios.llm.chat(messages, tools=["calc", "fetch"])   # tools by name; the calls of the answer are not made
    aios.llm.run(messages, tools=["calc"])             # … or the whole loop: they are made, until there is an answer

A call is made at most once: when the process that runs it dies, its caller gets EIO. Arguments are checked against the
tool's schema before anything runs. A call waits for its turn while other calls use what it needs (see `define`).

A person adds tools by `aiosd --tools FILE.py`:

    from libaios.tool import define

    @define(reads=["file:{path}"], time=10)
    def count_words(path: str) -> int:
        '''Count the words of a text file.

        Args:
            path: the file
        '''
        return len(open(path).read().split())
"""

from __future__ import annotations

import builtins
import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

from msgspec import Struct
from msgspec.structs import replace

from libaios import wire
from libaios.agent import connection
from libaios.connection import decode_body
from libaios.plan import Plan, Steps, syscall, syscalls
from libaios.pure import computation
from libaios.wire import Sys, ToolInfo

__all__ = ["Definition", "ToolInfo", "call", "define", "list", "schema", "stream"]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__aios_tool__"


# ── calling ───────────────────────────────────────────────────────────────────────────────────────────────


@syscall
def list() -> Plan[builtins.list[ToolInfo]]:
    """All tools that the caller may use, by name."""
    return Plan(Sys.TOOL_LIST, wire.NoArgs())


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments. Raises FileNotFoundError."""
    return known([name])[0].parameters


@syscalls
def call(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    /,
    *,
    timeout: float | None = None,
    **more: Any,
) -> Steps[Any]:
    """Call a tool and return its result: a value of JSON.

    Arguments by keyword, or as one mapping (which is needed for an argument named `timeout`). `timeout` in seconds
    includes the time in which the call waits for its turn; the tool's own limit does not.

    Raises FileNotFoundError (no such tool), PermissionError (denied by a rule, by a person, or because no person could
    be asked: the message names the rule), EINVAL (arguments that do not fit the schema, or that the tool refuses),
    TimeoutError, ENOMEM, EIO (the process of the call died; it is not made again), EREMOTEIO (the tool failed: the
    message has its exception).
    """
    args = call_args(name, arguments, more, timeout)
    compute = computation(name, args.arguments) if timeout is None or timeout > 0 else None
    if compute is not None and (yield Plan(Sys.TOOL_ADMIT, wire.AdmitTool(name), timeout=timeout)):
        try:
            return compute()
        except ValueError as err:
            raise wire.error(errno.EINVAL, str(err)) from None
    return (yield Plan(Sys.TOOL_CALL, args, timeout=timeout))


def call_args(
    name: str, arguments: Mapping[str, Any] | None, more: Mapping[str, Any], timeout: float | None
) -> wire.CallTool:
    return wire.CallTool(name, {**(arguments or {}), **more}, timeout)


def stream(name: str, arguments: Mapping[str, Any] | None = None, /, **more: Any) -> Iterator[str]:
    """Call a tool and iterate over what it writes while it runs (its `print`s and `yield`s). The result comes last, if
    it is a text and nothing was written before it. Leaving the loop early ends the call. What a tool writes while there
    is no kernel may be lost; its result is not. Raises as `call`."""
    conn = connection()
    pending = conn.submit(Sys.TOOL_CALL, replace(call_args(name, arguments, more, None), stream=True))
    try:
        wrote = False
        for piece in conn.pieces(pending, None):
            wrote = True
            yield str(piece)
        assert pending.final is not None
        result = decode_body(pending.final, Any)
        if isinstance(result, str) and not wrote:
            yield result
    finally:
        conn.abandon(pending)


def known(names: Sequence[str]) -> builtins.list[ToolInfo]:
    """The tools of these names. Raises FileNotFoundError, whose message lists the tools that exist."""
    there = {tool.name: tool for tool in list()}
    return chosen(there, names)


def chosen(there: Mapping[str, ToolInfo], names: Sequence[str]) -> builtins.list[ToolInfo]:
    missing = [name for name in names if name not in there]
    if missing:
        words = ", ".join(sorted(there)) or "none"
        raise wire.error(errno.ENOENT, f"no such tool: {missing[0]} (there are: {words})")
    return [there[name] for name in names]


def names_in(tools: object) -> builtins.list[str]:
    """Those of the `tools` of a chat that are given by name."""
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        return []
    return [tool for tool in tools if isinstance(tool, str)]


def resolved(tools: Sequence[Any], there: Sequence[ToolInfo]) -> builtins.list[dict[str, Any]]:
    """The `tools` of a chat with all names replaced. `there`: the tools with these names, in this order."""
    found = iter(there)
    return [function_of(next(found)) if isinstance(tool, str) else tool for tool in tools]


def function_of(tool: ToolInfo) -> dict[str, Any]:
    """The tool as a chat takes it. The toolbox checks arguments before a call, so a tool is offered to the model even
    if a grammar cannot express its whole schema."""
    inner = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": False}
    return {"type": "function", "function": inner}


# ── defining ──────────────────────────────────────────────────────────────────────────────────────────────


class Definition(Struct, frozen=True):
    """The arguments of `define`."""

    name: str = ""
    instances: int = 1
    time_s: float = 60.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    concerns: tuple[str, ...] = ()


@overload
def define(function: F, /) -> F: ...
@overload
def define(
    *,
    name: str = "",
    instances: int = 1,
    time: float = 60.0,
    memory: int = 1 << 30,
    output: int = 1 << 20,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    concerns: Sequence[str] = (),
) -> Callable[[F], F]: ...
def define(
    function: F | None = None,
    /,
    *,
    name: str = "",
    instances: int = 1,
    time: float = 60.0,
    memory: int = 1 << 30,
    output: int = 1 << 20,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    concerns: Sequence[str] = (),
) -> F | Callable[[F], F]:
    """Make a function a tool. Its type hints become the JSON Schema, its docstring the descriptions.

    name       of the tool (the function's): 1 to 64 of A-Z a-z 0-9 _ -
    instances  how many calls may run at a time (default 1: one at a time)
    time       seconds that a call may run
    memory     bytes for the process of a call
    output     bytes of what a call writes and returns
    reads, writes
               what a call reads and changes, as keys of your own: "file:{path}", "server:git". `{path}` stands for an
               argument. Calls that write a key run alone among those of all tools that name it.
    concerns   which arguments are what, so that rules (aiosd.toml, [access]) can be about them: "path:{path}",
               "host:{url}", "group:{group}", "signal:{signal}"

    Raises ValueError.
    """
    wanted = Definition(name, instances, float(time), memory, output, tuple(reads), tuple(writes), tuple(concerns))
    for concern in concerns:
        if not re.fullmatch(r"(path|host|group|signal):\{\w+\}", concern):
            raise ValueError(f'{concern!r}: a tool concerns "path:{{argument}}", or a host, a group or a signal alike')
    if instances < 1 or not time > 0 or memory < 1 << 20 or output < 1:
        raise ValueError("a tool needs at least 1 instance, some time, 1 MB of memory and 1 byte of output")

    def mark(function: F) -> F:
        shown = name or function.__name__
        if not re.fullmatch(wire.TOOL_NAME_PATTERN, shown):
            raise ValueError(f"{shown!r} is no name of a tool (1 to 64 of A-Z a-z 0-9 _ -)")
        setattr(function, _MARK, wanted)
        return function

    return mark if function is None else mark(function)


def definition_of(value: object) -> Definition | None:
    """The definition of a function; None: it is no tool."""
    found = getattr(value, _MARK, None) if callable(value) else None
    return found if isinstance(found, Definition) else None


def result_text(result: object) -> str:
    """The result of a tool as a message to a model."""
    if isinstance(result, str):
        return result
    import msgspec

    return msgspec.json.encode(result).decode()
