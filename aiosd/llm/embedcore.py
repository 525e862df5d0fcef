"""The process of a model that only makes vectors (`--embed-model`): EMBED and TOKENIZE, no generations.

Encoders such as BERT cannot generate, and what can generate makes poor vectors, so an embedding model is a core of its
own kind. It is a `service.Server` that the kernel takes for one more llm core, and refuses generations. A call of an
agent that is stopped waits after the batch that is being computed.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from aiosd.errors import UsageError, WorldError
from aiosd.ipc import link
from aiosd.ipc.heartbeat import Rounds
from aiosd.ipc.service import Pause, Server
from aiosd.llm import libraries, modelfile
from aiosd.llm.purse import Purses
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.channel import Channel
from libaios.wire import Sys

if TYPE_CHECKING:
    from aiosd.llm.embed import EmbeddingEngine
    from aiosd.llm.llama import Model

#: A call of a stopped agent is looked at again when a message comes, and at the latest after this time.
STOPPED_S = 60.0

_THREADS = 2  # more bring little for texts of a few dozen tokens, and agents share the machine


def main(channel: Channel, spec: ModelSpec, rounds: Rounds) -> int:
    """As `core.main`."""
    faulthandler.enable(sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libraries.prepare()
    from aiosd.llm import llama
    from aiosd.llm.embed import EmbeddingEngine

    llama.start(spec.verbose)
    threads = spec.threads or min(_THREADS, len(os.sched_getaffinity(0)))
    layers = spec.gpu_layers if spec.gpu_layers >= 0 else 1 << 20
    try:
        modelfile.read(spec.path)  # says better what is wrong with a file than llama.cpp does
        model = llama.Model(spec.path, layers, lambda fraction: _tell(channel, link.LoadProgress("loading", fraction)))
        embedder = EmbeddingEngine(model, threads)
        width = len(embedder.embed(["vectors"]).data) // 4
    except UsageError as err:
        _tell(channel, link.LoadFailed(f"{spec.name}: {err}"))
        channel.pump()
        return 1
    except (WorldError, OSError) as err:
        _tell(channel, link.LoadFailed(f"{spec.name}: {spec.path}: makes no vectors: {err}".replace("\n", " ")))
        channel.pump()
        return 1
    calls = EmbedService(model, embedder, spec, threads, width)
    server = Server(
        channel,
        calls.handlers(),
        calls.stats,
        info=calls.info(),
        others=calls.others,
        on_keep=calls.keep,
        on_gone=calls.gone,
        charge=lambda body: body.prompt_tokens if isinstance(body, wire.Embedded) else 0,
    )
    return server.run(rounds)


def _tell(channel: Channel, message: link.FromService) -> None:
    channel.send(link.encode(message))


class EmbedService:
    def __init__(self, model: Model, embedder: EmbeddingEngine, spec: ModelSpec, threads: int, width: int) -> None:
        self._model, self._embedder, self._spec = model, embedder, spec
        self._threads, self._width = threads, width
        self._texts = 0
        self._purses = Purses()
        self._stopped: set[int] = set()  # peers whose agents are stopped

    def others(self, message: link.ToService) -> link.FromService | None:
        """Messages that cores get and services do not."""
        match message:
            case link.Submit(key=key):
                return link.Failed(key, errno.EINVAL, "model: this one makes vectors; it does not generate")
            case link.Park(peer=peer, parked=parked, number=number):
                (self._stopped.add if parked else self._stopped.discard)(peer)
                return link.Parked(number) if number else None
        return None

    def keep(self, peers: list[int]) -> None:
        """There is a new kernel: it sends again which agents are stopped."""
        self._stopped.clear()

    def gone(self, peer: int) -> None:
        self._stopped.discard(peer)

    def handlers(self) -> dict[int, Any]:
        contexts = (Sys.CTX_SAVE, Sys.CTX_RESTORE, Sys.CTX_CLOSE, Sys.CTX_LIST, Sys.CTX_REMOVE)
        handlers: dict[int, Any] = dict.fromkeys(contexts, self._no_context)
        return handlers | {Sys.EMBED: self._embed, Sys.TOKENIZE: self._tokenize, Sys.DETOKENIZE: self._detokenize}

    def _embed(self, ask: link.Ask, args: wire.Embed) -> Generator[Pause, None, wire.Embedded]:
        """A batch at a time: between two of them other calls have their turn, so a query does not wait for thousands of
        notes."""
        embedded = None

        def pay(tokens: int) -> None:
            self._purses.spend(ask.key, ask.caller.shares, tokens, time.monotonic())

        yield from self._while_stopped(ask)
        for embedded in self._embedder.in_steps(args.texts, pay=pay if ask.caller.shares else None):
            if embedded is None:
                yield Pause()
                yield from self._while_stopped(ask)
        assert embedded is not None
        self._texts += embedded.n
        return embedded

    def _while_stopped(self, ask: link.Ask) -> Generator[Pause, None, None]:
        while ask.key[0] in self._stopped:
            yield Pause(time.monotonic() + STOPPED_S)

    def _tokenize(self, ask: link.Ask, args: wire.Tokenize) -> list[int]:
        if args.call is not None:
            raise wire.error(errno.EINVAL, "model: this one makes vectors; it has no calls")
        return self._model.tokenize(args.text, bos=args.bos, special=args.special)

    def _detokenize(self, ask: link.Ask, args: wire.Detokenize) -> str | list[bytes]:
        if any(token >= self._model.n_vocab for token in args.tokens):
            raise wire.error(errno.EINVAL, f"tokens: the model has {self._model.n_vocab}")
        return self._model.apart(args.tokens) if args.apart else self._model.text(args.tokens)

    def _no_context(self, ask: link.Ask, args: Any) -> None:
        raise wire.error(errno.EINVAL, "model: this one makes vectors; it keeps no contexts")

    def info(self) -> dict[str, Any]:
        """For `link.Loaded`."""
        model = self._model
        return {
            "path": self._spec.path,
            "description": model.description,
            "n_params": model.n_params,
            "n_ctx": model.n_ctx_train,
            "n_slots": 0,
            "n_vocab": model.n_vocab,
            "n_embd": self._width,
            "gpu_layers": self._spec.gpu_layers,
            "chat": False,
            "tools": False,
        }

    def stats(self) -> dict[str, Any]:
        return {"model_bytes": self._model.size, "threads": self._threads, "texts": self._texts, "vectors_only": True}
