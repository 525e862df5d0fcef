"""A worker: a process that has loaded one source of tools, and runs their calls, one at a time.

    python -m aiosd.tools.worker FD SOURCE [boxed[,FD…]]    SOURCE: a module, or the path of a file

A boxed worker gets a box (`sandbox.box`) as its first frame, and confines itself with it for the rest of its life. FD…
are the cage (`sandbox.cage`), if there is one, and the network of an agent that reaches single hosts, if the worker
belongs to that agent: then it enters that network, and reaches the same hosts by the same gates.

A worker sends `Described`, then serves `Run`s until its other end is closed. Output of a tool (prints and yields) is
sent while it runs (`Wrote`); its return value comes with `Done`. The service does not trust a worker, because a tool
may manipulate this process.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import io
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import msgpack

from aiosd.kin import adopt_orphans, die_with_parent
from aiosd.tools import held
from aiosd.tools.definition import Function, functions_of
from aiosd.tools.messages import Described, Done, FromWorker, Run, Wrote, encode
from libaios.stream import FrameSocket

MESSAGE_BYTES = 4096  # of the text of an error
CAGE = 5  # descriptors of the cage
#: Limits of every call, besides those of its tool.
LIMITS = ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 1 << 30), (resource.RLIMIT_NOFILE, 1024))


class _Output(io.TextIOBase):
    """The standard output of a tool: what is written there goes out at once, up to a limit."""

    def __init__(self, frames: FrameSocket) -> None:
        self._frames = frames
        self.left = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        shown = text[: self.left]
        self.left -= len(shown.encode("utf-8", "replace"))
        if shown:
            send(self._frames, Wrote(shown.encode("utf-8", "replace").decode()))
        return len(text)


def main(fd: str, source: str, boxed: str = "") -> int:
    adopt_orphans()  # processes that a tool starts stay below this process, and end with it
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("PYTHONPATH", None)  # for this process, not for what a tool starts
    frames = FrameSocket(socket.socket(fileno=int(fd)))
    os.set_inheritable(int(fd), False)
    limit(*LIMITS)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - for the whole life of the process
    output = _Output(frames)
    sys.stdout = sys.stderr = output
    try:
        functions = functions_of(_load(source))
        if boxed:
            _confine(frames.recv_blocking()[0], [int(fd) for fd in boxed.split(",")[1:]])
    except BaseException as err:  # a person's file may raise any exception, SystemExit included
        send(frames, Described([], _why_not_loaded(source, err)[:MESSAGE_BYTES]))
        return 1
    send(frames, Described([function.tool for function in functions.values()]))
    while True:
        try:
            payload, _ = frames.recv_blocking()
        except (EOFError, OSError):
            return 0
        request = msgpack.decode(payload, type=Run)
        done = _serve(functions[request.tool], request, output)
        send(frames, done)
        if done.spent:
            return 0


def _confine(box: bytes, fds: list[int]) -> None:
    """Confine this process. Raises OSError."""
    from aiosd.sandbox import confine, filter, plan
    from aiosd.sandbox.box import Box
    from aiosd.sandbox.cage import Cage

    native = confine.load()
    if native is None or not filter.known_here():
        raise OSError(errno.ENOTSUP, "a process cannot be confined here")
    cage = Cage(*fds[:CAGE]) if fds else None
    network = fds[CAGE] if len(fds) > CAGE else -1
    native.confine(plan.plan(plan.ground(sys.path, cage), msgpack.decode(box, type=Box), False, network))
    held.proxied = network >= 0
    for fd in fds:
        os.close(fd)


def _load(source: str) -> dict[str, Any]:
    """The names of a module or of a file."""
    if not source.endswith(".py"):
        return vars(importlib.import_module(source))
    path = Path(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} is no Python file")
    sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return vars(module)


def _why_not_loaded(source: str, err: BaseException) -> str:
    """The error in one line, with the line of the source where that is known."""
    text = err.msg if isinstance(err, SyntaxError) and err.filename == source else str(err)
    line = _line_in(source, err)
    parts = [f"line {line}" if line else "", type(err).__name__, " ".join(text.split())]
    return ": ".join(filter(None, parts))


def _line_in(source: str, err: BaseException) -> int | None:
    """The number of the last line of the source that the error came through; of a syntax error its own."""
    if isinstance(err, SyntaxError) and err.filename == source:
        return err.lineno
    found, step = None, err.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == source:
            found = step.tb_lineno
        step = step.tb_next
    return found


def _serve(function: Function, request: Run, output: _Output) -> Done:
    output.left = function.tool.output_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (function.tool.memory_bytes, hard))
    held.files, held.hosts = request.files, request.hosts
    try:
        os.chdir(request.folder)
        os.environ.update(HOME=request.folder, TMPDIR=request.folder, PWD=request.folder)
        result = function.run(request.arguments)
        if isinstance(result, Iterator):
            result = _written(result, output)
        return _checked(result, function.tool.output_bytes)
    except MemoryError:
        return Done(None, errno.ENOMEM, f"more than {function.tool.memory_bytes >> 20} MB of memory", spent=True)
    except msgspec.ValidationError as err:
        return Done(None, errno.EINVAL, str(err)[:MESSAGE_BYTES])
    except OSError as err:
        return Done(None, err.errno or errno.EREMOTEIO, _os_message(err)[:MESSAGE_BYTES])
    except ValueError as err:
        return Done(None, errno.EINVAL, str(err)[:MESSAGE_BYTES] or "a value that the tool refuses")
    except BaseException as err:  # any exception of a tool is reported to its caller
        return Done(None, errno.EREMOTEIO, f"{type(err).__name__}: {err}"[:MESSAGE_BYTES])


def _written(pieces: Iterator[Any], output: _Output) -> Any:
    """Send the pieces of a generator; what it returns is the result, if it returns something."""
    while True:
        try:
            output.write(str(next(pieces)))
        except StopIteration as end:
            return end.value


def _checked(result: Any, limit: int) -> Done:
    """The result as a value of JSON; other types as msgspec writes them."""
    plain = msgspec.to_builtins(result, str_keys=True, enc_hook=repr)
    size = len(encode(plain))
    if size > limit:
        return Done(None, errno.EMSGSIZE, f"a result of {size} bytes; this tool may return {limit}")
    return Done(plain)


def _os_message(err: OSError) -> str:
    text = err.strerror or str(err)
    return f"{text}: {err.filename}" if err.filename else text


def limit(*limits: tuple[int, int]) -> None:
    """Lower soft limits for this process and all that it starts."""
    for which, value in limits:
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def send(frames: FrameSocket, message: FromWorker) -> None:
    """Send a message; wait if the service reads slowly."""
    frames.send(encode(message))
    while not frames.flush():
        _wait_writable(frames.fileno())


def _wait_writable(fd: int) -> None:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
