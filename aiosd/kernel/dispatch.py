"""From a request to its reply: decode, check, call the handler or the service.

No exception that an agent can cause leaves this file: what an agent sends is decoded against its row of `wire.TABLE` in
one place, rights are checked in one place, and `_failed` turns a bug of aiosd into EIO for the caller and a traceback
in the log.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import MsgspecError, Raw

from aiosd.ipc.link import CallKey
from aiosd.kernel import ledger
from aiosd.kernel.access import Access, Clearance
from aiosd.kernel.calls import PENDING, CallTable
from aiosd.kernel.peer import UNKNOWN, Call, ClientPeer, Peer, no_request, read_args, reply
from aiosd.kernel.service import Asker
from libaios import wire
from libaios.wire import Again, Sys

logger = logging.getLogger("kernel")

CallHandler = Callable[[Call, Any], Any]

NO_ARGS = wire.raw(wire.NoArgs())
_decode, _encode = wire.decode_request, wire.encode


def pid_of(peer: Peer) -> int:
    return peer.proc.pid if peer.proc is not None else 0


def ppid_of(peer: Peer) -> int:
    return peer.proc.ppid if peer.proc is not None else 0


#: Calls without arguments whose answer is known at once for every caller: they cannot fail and need not be opened.
KNOWN: dict[int, Callable[[Peer], int]] = {
    Sys.GETPID: pid_of,
    Sys.GETPPID: ppid_of,
}


class HeldFds:
    """The descriptors of a request that waits to be allowed. As a context manager: gives them back to the peer for the
    time of the block."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._fds: list[int] = []

    def keep(self, call: Call) -> None:
        if not isinstance(self._peer, ClientPeer) or not self._peer.fds:
            return
        self._fds = [os.dup(fd) for fd in self._peer.fds]
        forget = call.forget

        def gone() -> None:
            self.close()
            if forget is not None:
                forget()

        call.forget = gone

    def close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> None:
        if isinstance(self._peer, ClientPeer) and self._fds:
            self._peer.fds = list(self._fds)

    def __exit__(self, *exc: object) -> None:
        if isinstance(self._peer, ClientPeer) and self._fds:
            self._peer.fds = []
        self.close()


class Dispatcher:
    """From requests to replies. `handlers`: for the calls that the kernel answers itself. `memo`: the encoded replies
    to calls of the kind ONCE that a dead kernel has already carried out."""

    def __init__(
        self,
        calls: CallTable,
        rights: Access,
        asker: Asker,
        handlers: Mapping[int, CallHandler],
        memo: Callable[[CallKey], bytes | None],
    ) -> None:
        self._calls = calls
        self._rights = rights
        self._asker = asker
        self._handlers = handlers
        self._memo = memo

    def dispatch(self, peer: Peer, payload: bytes) -> None:
        """Carry out a request, and send its reply."""
        self.count(peer, 1)
        answer = self.answer(peer, payload)
        if answer is not None:
            self._calls.send(peer, answer)

    def count(self, peer: Peer, requests: int) -> None:
        """To be called before the answers to these requests leave."""
        self._calls.counters["calls"] += requests
        proc = peer.proc
        if proc is not None:
            proc.row[ledger.CALLS] = proc.calls = proc.calls + requests

    def answer(self, peer: Peer, payload: bytes) -> bytes | None:
        """Carry out a request. Returns its final reply, or None: it was sent, or will be. Raises ProtocolError for
        bytes that are no request."""
        try:
            request = _decode(payload)
        except (MsgspecError, RecursionError) as err:
            raise no_request(err) from None
        number, calls = request.id, self._calls
        if number in peer.calls:
            calls.refuse(peer, number, errno.EINVAL, f"call id {number} is in use")
            return None
        known = KNOWN.get(request.sys)
        if known is not None and request.args == NO_ARGS:
            return _encode((number, 0, False, 0, known(peer)))  # as `reply` does, without a call
        if peer.copies and (body := self._copied(peer, request)) is not None:
            return _encode((number, 0, False, 0, body))
        call = calls.open(peer, request, len(payload))
        try:
            body = self._execute(call, request)
        except Exception as err:
            self._failed(call, err)
            return None
        if body is not PENDING and calls.close(call):
            return reply(number, body)
        return None

    def _copied(self, peer: Peer, request: wire.Request) -> Raw | None:
        """The reply that the peer got for the same call before, if it is still right, no rule has to be checked, and
        none of the peer's open calls may change it."""
        copy = peer.copies.get((request.sys, bytes(request.args)))
        if copy is None:
            return None
        row = wire.TABLE[request.sys]
        if not self._rights.is_free(row) or any(call.row.by == row.by for call in peer.calls.values()):
            return None
        copy.used[copy.promise] = copy.used.get(copy.promise, 0) + 1
        if copy.ahead:
            peer.unread = 0
        return copy.body

    def _failed(self, call: Call, err: Exception) -> None:
        if isinstance(err, OSError):
            self._calls.fail(call, err.errno or errno.EIO, err.strerror or str(err))
        else:  # a bug of one handler: it ends this call, and no other
            name = call.row.name
            logger.error("system call %s of %d: a bug of the kernel", name, call.peer.id, exc_info=err)
            self._calls.fail(call, errno.EIO, "the kernel made a mistake; its log has the details")

    def _execute(self, call: Call, request: wire.Request) -> Any:
        row = call.row
        if row is UNKNOWN:
            self._note_unknown(call.peer, request.sys)
            raise wire.error(errno.ENOSYS, f"there is no system call {request.sys}")
        self._calls.check_room(call)
        args = read_args(row, request.args)
        if row.again is Again.ONCE and call.again:
            served = self._memo(call.key)
            if served is not None:
                return Raw(served)
        if not self._rights.is_at_once(call) and not self._is_allowed(call, args, request.args):
            return PENDING
        return self.proceed(call, args, request.args)

    def _is_allowed(self, call: Call, args: Any, raw: Raw) -> bool:
        """Whether the call may go on now. If not, it goes on when a person has allowed it."""
        held = HeldFds(call.peer)
        later = self._rights.check(call, args, lambda: self._resume(call, args, raw, held)) is Clearance.LATER
        if later:
            held.keep(call)
        return not later

    def _resume(self, call: Call, args: Any, raw: Raw, held: HeldFds) -> None:
        """Go on with a call that a person has allowed."""
        call.allowed = True
        with held:
            try:
                body = self.proceed(call, args, raw)
            except Exception as err:
                self._failed(call, err)
                return
            if body is not PENDING:
                self._calls.finish(call, body)

    def proceed(self, call: Call, args: Any, raw: Raw) -> Any:
        """Carry out an allowed call. Returns the body of its reply, or PENDING."""
        row = call.row
        handler = self._handlers.get(row.sys)
        if handler is not None:
            return handler(call, args)
        self._asker.ask(call, args, Raw(bytes(raw)))
        return PENDING

    @staticmethod
    def _note_unknown(peer: Peer, number: int) -> None:
        """Log a call that does not exist, once for each peer: there may be many."""
        if not peer.strange:
            peer.strange = True
            logger.warning("pid %d: unknown system call %d", peer.id, number)
