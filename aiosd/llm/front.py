"""Work on text that takes long, in a process of its own.

Most requests are prepared in the core itself, in a millisecond. Work that turns out to take longer (a prompt of many
new characters, a large schema, a template with long loops) raises `Later` there, and is done here instead: by a process
that has loaded the model's vocabulary and nothing else. Meanwhile the core continues to decode. If the process dies, or
takes longer than MAX_SECONDS, only that call fails, and the next one gets a new process.

The process is started when it is first needed, by `exec`: after a fork of the core, every page of the KV cache that
changes would exist twice. It gets one job at a time, so the core never blocks while it sends.

    core ──(kind, request)──▶ front        front ──(errno, sentence or result)──▶ core
"""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from msgspec import Struct, msgpack

from aiosd.errors import as_oserror
from aiosd.kin import die_with_parent

logger = logging.getLogger("llm.front")

MAX_SECONDS = 60.0
CANCELLED_SECONDS = 2.0  # … for a cancelled job: starting a new process takes a second

#: Kinds of jobs, by what is sent → what comes back: `Generate` → `Prepared`; `Tokenize` → tokens; texts → the tokens of
#: each, as it is embedded; (messages, tools) → the tokens with which the next call about this conversation begins;
#: (query, documents) → the tokens of each pair.
PREPARE, TOKENIZE, TEXTS, CONVERSATION, PAIRS = "prepare", "tokenize", "texts", "conversation", "pairs"
TEMPLATE = "template"  # no job: there is no answer


class FrontReply(Struct, array_like=True):
    errno: int
    sentence: str
    result: bytes


class _Job(Struct):
    key: Any
    kind: str
    payload: bytes
    done: Callable[[bytes], None]
    failed: Callable[[OSError], None]
    began: float = 0.0
    limit: float = MAX_SECONDS


class Front:
    """The core's side. `template`: the chat template that is used instead of the model's. `clock` and `command` are
    there for tests."""

    def __init__(
        self,
        path: str,
        ctx: int,
        template: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        command: list[str] | None = None,
    ) -> None:
        self._command = command or [sys.executable, "-P", "-m", "aiosd.llm.front", path, str(ctx)]
        self._template = template
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._waiting: deque[_Job] = deque()  # the process works on the first

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    @property
    def pid(self) -> int:
        """Its process id; 0: the process does not run."""
        return self._process.pid if self._process is not None else 0

    def fds(self) -> list[int]:
        """Descriptors that can be read when there is an answer."""
        return [self._connection.fileno()] if self._waiting and self._connection is not None else []

    def ask(
        self, key: Any, kind: str, payload: bytes, done: Callable[[bytes], None], failed: Callable[[OSError], None]
    ) -> None:
        """Queue a job. `poll` later calls `done` with the result, or `failed` with the reason."""
        self._waiting.append(_Job(key, kind, payload, done, failed))
        if len(self._waiting) == 1:
            self._send_first()

    def cancel(self, keys: Callable[[Any], bool]) -> None:
        """Forget jobs. The one being worked on may still finish, within CANCELLED_SECONDS."""
        if not self._waiting:
            return
        first, *others = self._waiting
        self._waiting = deque([first, *(job for job in others if not keys(job.key))])
        if keys(first.key):
            first.done, first.failed = (lambda _: None), (lambda _: None)
            first.limit = CANCELLED_SECONDS

    def poll(self, timeout: float = 0.0) -> None:
        """Look for an answer; wait at most `timeout` seconds."""
        if not self._waiting or self._connection is None:
            return
        job, reply = self._waiting[0], None
        try:
            if self._connection.poll(timeout):
                reply = msgpack.decode(self._connection.recv_bytes(), type=FrontReply)
        except (EOFError, OSError):
            self._give_up(job, "it died while it worked on this text")
            return
        if reply is not None:
            self._waiting.popleft()
            self._send_first()
            if reply.errno:
                job.failed(OSError(reply.errno, reply.sentence))
            else:
                job.done(reply.result)
        elif self._clock() - job.began > job.limit:
            self._give_up(job, f"it took more than {job.limit:g} s over this text")

    def close(self) -> None:
        self._waiting.clear()
        self._end()

    def _send_first(self) -> None:
        """Have the process work on the first job. A job fails if there is no process and none can be started."""
        while self._waiting:
            try:
                if self._connection is None:
                    self._start()
            except OSError as err:
                why = f"the text could not be prepared: no process can be started for it: {err.strerror}"
                self._waiting.popleft().failed(OSError(err.errno, why))
                continue
            job = self._waiting[0]
            job.began = self._clock()
            self._send((job.kind, job.payload))
            return

    def _send(self, message: tuple[str, bytes]) -> None:
        assert self._connection is not None
        with contextlib.suppress(OSError):  # the process is dead: `poll` will notice
            self._connection.send_bytes(msgpack.encode(message))

    def _give_up(self, job: _Job, why: str) -> None:
        logger.warning("the process that prepares texts: %s", why)
        self._end()
        self._waiting.popleft()
        self._send_first()
        job.failed(OSError(errno.EIO, f"the text could not be prepared: {why}"))

    def _start(self) -> None:
        """Raises OSError."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
            self._connection = Connection(ours.detach())
        if self._template:
            self._send((TEMPLATE, self._template.encode()))

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


# ── the process ───────────────────────────────────────────────────────────────────────────────────────────


def main(path: str, ctx: str, fd: str) -> int:
    """Serve until the core closes its end of the connection."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(fd))
    from aiosd.llm import llama
    from aiosd.llm.pairs import tokens_of_pairs
    from aiosd.llm.request import Requests
    from libaios import wire

    llama.start()
    model = llama.Model(path, 0, lambda fraction: None, vocabulary_only=True)
    requests = Requests(model, int(ctx))
    work: dict[str, Callable[[bytes], Any]] = {
        PREPARE: lambda payload: requests.prepare(msgpack.decode(payload, type=wire.Generate)),
        TOKENIZE: lambda payload: _tokenized(model, msgpack.decode(payload, type=wire.Tokenize)),
        TEXTS: lambda payload: [model.tokenize(text, bos=True, special=False) for text in msgpack.decode(payload)],
        PAIRS: lambda payload: list(tokens_of_pairs(model, *msgpack.decode(payload))),
        CONVERSATION: lambda payload: requests.conversation(*msgpack.decode(payload)),
    }
    while True:
        try:
            kind, payload = msgpack.decode(connection.recv_bytes())
        except (EOFError, OSError):
            return 0
        if kind == TEMPLATE:
            model.own_template = payload.decode()
            requests = Requests(model, int(ctx))
            continue
        try:
            reply = FrontReply(0, "", msgpack.encode(work[kind](payload)))
        except Exception as error:  # whatever goes wrong with one job, the next one is served
            refused = as_oserror(error)
            reply = FrontReply(refused.errno or errno.EINVAL, refused.strerror or str(refused), b"")
        connection.send_bytes(msgpack.encode(reply))


def _tokenized(model: Any, request: Any) -> list[int]:
    tokens: list[int] = model.tokenize(request.text, bos=request.bos, special=request.special)
    return tokens


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
