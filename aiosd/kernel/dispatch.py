"""From a request to its reply: decode, check, call the handler or the service.

An agent can make no exception travel beyond this file: what it sends is decoded against its row of `wire.TABLE` at one
place, rights are asked for at one place, and the `except` here turns a bug of ours into EIO for the caller and a
traceback in the log.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Raw

from aiosd.kernel import ledger
from aiosd.kernel.access import Access, Verdict
from aiosd.kernel.calls import PENDING, Calls, reply
from aiosd.kernel.peer import UNKNOWN, Call, Peer, read_args, read_request
from aiosd.kernel.service import Asker
from aiosd.link import Key
from libaios import wire
from libaios.wire import Again, Sys

logger = logging.getLogger("kernel")

Handler = Callable[[Call, Any], Any]

NO_ARGS = wire.raw(wire.NoArgs())


def pid_of(peer: Peer) -> int:
    return peer.proc.pid if peer.proc is not None else 0


def ppid_of(peer: Peer) -> int:
    return peer.proc.ppid if peer.proc is not None else 0


#: Calls without arguments whose answer is known of every caller: they cannot fail and need not be opened.
KNOWN: dict[int, Callable[[Peer], int]] = {
    Sys.GETPID: pid_of,
    Sys.GETPPID: ppid_of,
}


class Dispatcher:
    """`handlers`: of the calls that the kernel answers itself. `memo`: the encoded bodies of replies that calls which
    take effect once got from a kernel that has died."""

    def __init__(
        self,
        calls: Calls,
        rights: Access,
        asker: Asker,
        handlers: Mapping[int, Handler],
        memo: Callable[[Key], bytes | None],
    ) -> None:
        self._calls = calls
        self._rights = rights
        self._asker = asker
        self._handlers = handlers
        self._memo = memo

    def dispatch(self, peer: Peer, payload: bytes) -> None:
        """Do what a request asks for, and answer."""
        answer = self.answer(peer, payload)
        if answer is not None:
            self._calls.send(peer, answer)

    def answer(self, peer: Peer, payload: bytes) -> bytes | None:
        """Do what a request asks for. Returns its final reply, or None: it was sent, or will be. Raises ProtocolError
        for what is no request."""
        request = read_request(payload)
        calls = self._calls
        if request.id in peer.calls:
            calls.refuse(peer, request.id, errno.EINVAL, f"call id {request.id} is in use")
            return None
        calls.counters["calls"] += 1
        proc = peer.proc
        if proc is not None:
            proc.row[ledger.CALLS] = proc.calls = proc.calls + 1
        known = KNOWN.get(request.sys)
        if known is not None and request.args == NO_ARGS:
            return reply(request.id, known(peer))
        call = calls.open(peer, request, len(payload))
        try:
            body = self._execute(call, request)
        except OSError as err:
            calls.fail(call, err.errno or errno.EIO, err.strerror or str(err))
        except Exception:  # a bug of one handler: it costs this call, and no other
            logger.exception("system call %s of %d: a bug of the kernel", wire.call_name(request.sys), peer.id)
            calls.fail(call, errno.EIO, "the kernel made a mistake; its log has the details")
        else:
            if body is not PENDING and calls.close(call):
                return reply(call.id, body)
        return None

    def _execute(self, call: Call, request: wire.Request) -> Any:
        row = call.row
        if row is UNKNOWN:
            self._note_unknown(call.peer, request.sys)
            raise wire.error(errno.ENOSYS, f"there is no system call {request.sys}")
        self._calls.check_room(call)
        args = read_args(row, request.args)
        if self._rights.check(call.peer, row, args) is Verdict.LATER:
            return PENDING
        return self.proceed(call, args, request.args)

    def proceed(self, call: Call, args: Any, raw: Raw) -> Any:
        """A call that is allowed. Returns the body of its reply, or PENDING."""
        row = call.row
        if row.again is Again.ONCE and call.again:
            served = self._memo(call.key)
            if served is not None:
                return Raw(served)
        handler = self._handlers.get(row.sys)
        if handler is not None:
            return handler(call, args)
        self._asker.ask(call, args, Raw(bytes(raw)))
        return PENDING

    @staticmethod
    def _note_unknown(peer: Peer, number: int) -> None:
        """Once for each peer: there may be many."""
        if not peer.strange:
            peer.strange = True
            logger.warning("pid %d: unknown system call %d", peer.id, number)
