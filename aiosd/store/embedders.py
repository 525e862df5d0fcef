"""Embedders make vectors: a table in this process (`static`), or a model in an llm core; or there is none.

The store uses a core as any program does: as a client of the control socket. The kernel recognises this process as a
part of the system and lets it make vectors, and nothing else. The client is used by two threads, one for queries and
one for the queue, so that a query does not wait for a batch of texts. These threads wait for the kernel; the service
does not: it puts texts into a lane and finds answers in `poll`, when its descriptor is readable. When the kernel or the
core is not there the answer is None, and texts in the queue are sent again later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aiosd import threads
from libaios import wire
from libaios.client import Client
from libaios.home import Home

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    OnVectors = Callable[[Sequence[Floats | None] | None], None]

CALL_S = 60.0  # for one batch: the core may be loading
QUERIES = 32  # whose vectors are requested with one call
SHORTEST = 16  # letters: a text that the core finds too long is shortened down to this, and then given up
_PLACES, _PLACE = 64, 64 << 10  # places of a file that are hashed, and bytes of each

_Request = tuple[list[str], "OnVectors"]


class OfCore:
    """The embedder that is the model `model` of this system, whose file is `path`."""

    def __init__(self, home: str | None, model: str, path: str) -> None:
        self.name, self.shown = f"gguf {fingerprint(Path(path))}", model
        self._home = Home(home)
        self._client: Client | None = None
        self._lock = threading.Lock()
        self._answers: deque[tuple[OnVectors, Sequence[Floats | None] | None]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lanes: dict[bool, queue.SimpleQueue[_Request]] = {urgent: queue.SimpleQueue() for urgent in (True, False)}
        self._started: set[bool] = set()  # the lanes that have a thread

    def fileno(self) -> int:
        return self._bell

    def ask(self, texts: list[str], done: OnVectors, urgent: bool = False) -> None:
        """Request vectors. If no thread can be started the answer is None, as without a core."""
        if urgent not in self._started:
            try:
                threads.start(lambda: self._serve(self._lanes[urgent], QUERIES if urgent else 1), "embedder")
            except OSError:
                self._answers.append((done, None))
                os.eventfd_write(self._bell, 1)
                return
            self._started.add(urgent)
        self._lanes[urgent].put((texts, done))

    def poll(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while self._answers:
            done, vectors = self._answers.popleft()
            done(vectors)

    # ── in the threads ────────────────────────────────────────────────────────────────────────────────────

    def _serve(self, lane: queue.SimpleQueue[_Request], most: int) -> None:
        while True:
            requests = [lane.get()]
            while len(requests) < most and not lane.empty():
                requests.append(lane.get())
            vectors = self._vectors([text for texts, _ in requests for text in texts])
            for texts, done in requests:
                mine = None if vectors is None else vectors[: len(texts)]
                vectors = None if vectors is None else vectors[len(texts) :]
                self._answers.append((done, mine))
            os.eventfd_write(self._bell, 1)

    def _vectors(self, texts: list[str]) -> list[Floats | None] | None:
        """The vectors of texts; None: there is no answer."""
        try:
            return list(self._call(texts))
        except OSError as err:
            if err.errno not in (errno.EMSGSIZE, errno.EINVAL):
                self._drop()
                return None
        try:
            return [self._one(text) for text in texts]  # one of the texts is the reason
        except OSError:
            self._drop()
            return None

    def _one(self, text: str) -> Floats | None:
        """The vector of the longest beginning that the model takes; None: it takes none. Raises OSError when there is
        no answer."""
        while True:
            try:
                return self._call([text])[0]
            except OSError as err:
                if err.errno == errno.EMSGSIZE and len(text) > SHORTEST:
                    text = text[: len(text) // 2]
                elif err.errno in (errno.EMSGSIZE, errno.EINVAL):
                    return None
                else:
                    raise

    def _call(self, texts: list[str]) -> list[Floats | None]:
        import numpy as np

        args = wire.Embed(texts, self.shown, CALL_S)
        embedded = self._connected().call(wire.Sys.EMBED, args, wire.Embedded, timeout=CALL_S)
        rows = np.frombuffer(embedded.data, "<f4").reshape(embedded.n, embedded.d)
        return [row if np.isfinite(row).all() else None for row in rows]

    def _connected(self) -> Client:
        """The connection, made if there is none. Raises NoKernel."""
        with self._lock:
            if self._client is None:
                self._client = Client(self._home)
            return self._client

    def _drop(self) -> None:
        """Close the connection after an error: the next call makes a new one."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def fingerprint(path: Path) -> str:
    """The same text for the same file, another one for another file: made from its size and from places all over it,
    since a model may be as large as the memory. Raises OSError."""
    size = path.stat().st_size
    found = hashlib.blake2b(str(size).encode(), digest_size=12)
    with open(path, "rb") as file:
        for place in range(_PLACES):
            file.seek(max(0, size - _PLACE) * place // max(1, _PLACES - 1))
            found.update(file.read(_PLACE))
    return found.hexdigest()
