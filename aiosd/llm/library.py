"""The calls about contexts: save, restore, close, list, remove.

A separate thread writes and reads the files, so that no generation waits for a disk. This is safe without a lock,
because a piece never changes. The thread also computes the model's checksum, which for a large file takes seconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from aiosd import threads
from aiosd.errors import as_oserror
from aiosd.ipc import link
from aiosd.llm import adapters, ggml, modelfile
from aiosd.llm.arrays import Tokens
from aiosd.llm.cache import Cache
from aiosd.llm.saved import Opened, Saved, file_sha256
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.wire import Sys

Answer = Callable[[link.CallKey, object], None]
Refuse = Callable[[link.CallKey, OSError], None]


def _identity(spec: ModelSpec) -> list[tuple[int, int, int, int]]:
    """A value that changes when a file of the model or of an adapter is replaced."""
    paths = [*map(str, modelfile.parts(spec.path)), *(lora.path for lora in spec.lora)]
    found = [os.stat(path) for path in paths]
    return [(part.st_dev, part.st_ino, part.st_size, part.st_mtime_ns) for part in found]


class Library:
    """Contexts by name, for one core. Without a folder they cannot be saved."""

    def __init__(self, spec: ModelSpec, cache: Cache, answer: Answer, fail: Refuse, **fits: Any) -> None:
        self._folder, self._spec, self._fits = spec.folder, spec, fits
        self._loaded = _identity(spec)
        self._cache = cache
        self._answer, self._fail = answer, fail
        self._thread = ThreadPoolExecutor(1, "saved-contexts")
        self._saved: Saved | None = None
        self._pending: list[tuple[Future[Any], Callable[[Any], object], link.CallKey]] = []
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # rung by the thread after finished work

    @property
    def busy(self) -> bool:
        return bool(self._pending)

    def fds(self) -> list[int]:
        """Descriptors that can be read when the thread has finished some work."""
        return [self._bell] if self._pending else []

    def handle(self, message: link.Ask, args: Any, conversation: Sequence[int] = ()) -> None:
        """Start one call. `conversation`: the tokens of `args.messages`, if there are any, in the form in which the
        prompt of a call that continues them begins."""
        group, tokens = message.caller.group, np.asarray(conversation, np.int32)
        match message.sys:
            case Sys.CTX_SAVE:
                self._save(message, args, tokens)
            case Sys.CTX_RESTORE:
                self._restore(message, args)
            case Sys.CTX_CLOSE:
                self._cache.release(adapters.scope(group, args.lora or ""), tokens, message.key[0])
                self._answer(message.key, None)
            case Sys.CTX_LIST:
                self._later(message.key, lambda: self._files().list(group), lambda found: found)
            case Sys.CTX_REMOVE:
                self._later(message.key, lambda: self._files().remove(group, args.name), lambda was: was)

    def poll(self) -> None:
        """Reply to the calls whose work the thread has finished."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)  # first, because the bell rings again for work that is finished later
        done = [item for item in self._pending if item[0].done()]
        self._pending = [item for item in self._pending if not item[0].done()]
        for future, finish, key in done:
            try:
                self._answer(key, finish(future.result()))
            except Exception as error:  # a bug in one of these: it costs this call, and no other
                self._fail(key, as_oserror(error))

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        os.close(self._bell)

    def _later(self, key: link.CallKey, work: Callable[[], Any], finish: Callable[[Any], object]) -> None:
        future = threads.submit(self._thread, work)
        future.add_done_callback(lambda _: os.eventfd_write(self._bell, 1))
        self._pending.append((future, finish, key))

    def _files(self) -> Saved:
        if not self._folder:
            raise wire.error(errno.ENOSYS, "this core has no folder for saved contexts")
        if self._saved is None:
            digest, known = file_sha256(self._spec.path), adapters.fingerprints(self._spec)
            if _identity(self._spec) != self._loaded:  # the file was replaced, but the states belong to the old one
                digest = f"replaced while it was in use, {os.getpid()} {time.time()}"
            fits = {"model": digest, "llama.cpp": ggml.build(), **self._fits}
            layout = self._cache.store.layout if self._cache.store is not None else None
            if layout is not None:
                fits["layout of the state"] = layout.description
            self._saved = Saved(self._folder, fits, layout, known)
        return self._saved

    def _save(self, message: link.Ask, args: wire.SaveContext, tokens: Tokens) -> None:
        lora = args.lora or ""
        piece = self._cache.export(adapters.scope(message.caller.group, lora), tokens, message.key[0])
        self._later(
            message.key,
            lambda: self._files().write(message.caller.group, args.name, args.messages, tokens, piece, lora),
            lambda saved: saved,
        )

    def _restore(self, message: link.Ask, args: wire.NamedContext) -> None:
        def taken(opened: Opened) -> wire.RestoredContext:
            cached = 0
            if opened.piece is not None:
                scope = adapters.scope(message.caller.group, opened.lora)
                cached = self._cache.take_in(scope, opened.tokens, opened.piece, message.key[0])
            return wire.RestoredContext(opened.messages, len(opened.tokens), cached, opened.refused, opened.lora)

        self._later(message.key, lambda: self._files().read(message.caller.group, args.name), taken)
