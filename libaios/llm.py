"""The language model: chat, complete, embed, tokenize.

    r = chat([{"role": "user", "content": "hi"}], max_tokens=64)
    r.text, r.tokens, r.finish_reason, r.usage
    for piece in chat(messages, stream=True): print(piece.text, end="")

Sampling: `temperature` 0 always takes the likeliest token; `seed` makes a sampled text repeatable (None: a new one each
time). `stop` strings end the text and are not part of it. `max_tokens` None: up to the end of the context. A `schema`
(JSON Schema) or `tools` (a list of {"type": "function", "function": {"name", "description", "parameters"}}) constrain
what can be generated; of a tool only the name must be given, and the inner dict will do. What has been computed of a
prompt is shared within the agent's group; a `public` prompt with everyone's public prompts (who asks can tell by the
time it takes whether someone sent its beginning before).

`finish_reason`: "stop" (the model or a stop string ended it), "length" (max_tokens or the context), "tool_calls",
"limit" (the agent's token budget). Errors are OSErrors: EINVAL with what was wrong with which argument, EMSGSIZE for a
prompt longer than the context, TimeoutError, EDQUOT over a budget, EIO when the model's process died twice
under a call.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from libaios import wire
from libaios.agent import Call, Connection, connection, decode_body
from libaios.plan import Plan, run, syscall
from libaios.wire import ModelInfo, Sys, ToolCall, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from libaios.context import Context

__all__ = [
    "ModelInfo",
    "Piece",
    "Result",
    "Stream",
    "ToolCall",
    "Usage",
    "chat",
    "complete",
    "context",
    "detokenize",
    "embed",
    "forget",
    "models",
    "restore",
    "saved",
    "tokenize",
]

_seeds = random.SystemRandom()


class Result:
    """A finished generation. `tokens` are the generated ids, the stop token not among them."""

    __slots__ = ("finish_reason", "text", "tokens", "tool_calls", "usage")

    def __init__(self, body: wire.Generated) -> None:
        self.text: str = body.text
        self.tokens: list[int] = body.tokens
        self.tool_calls: list[ToolCall] = body.tool_calls
        self.finish_reason: str = body.finish_reason
        self.usage: Usage = body.usage

    def __repr__(self) -> str:
        return f"Result({self.text!r}, finish_reason={self.finish_reason!r}, tool_calls={self.tool_calls!r})"


class Piece:
    """Part of a stream: whole characters and the tokens they came from. The last piece alone has `finish_reason`,
    `usage` and `tool_calls`."""

    __slots__ = ("finish_reason", "text", "tokens", "tool_calls", "usage")

    def __init__(self, text: str, tokens: list[int], end: wire.Generated | None = None) -> None:
        self.text = text
        self.tokens = tokens
        self.finish_reason: str | None = end.finish_reason if end is not None else None
        self.usage: Usage | None = end.usage if end is not None else None
        self.tool_calls: list[ToolCall] = end.tool_calls if end is not None else []

    def __repr__(self) -> str:
        return f"Piece({self.text!r}, finish_reason={self.finish_reason!r})"


class Stream:
    """Iterate for `Piece`s. Leaving the loop early, `close()` (from any thread), or losing the last reference ends the
    generation; whoever iterates in another thread gets ECANCELED."""

    def __init__(self, connection: Connection, args: wire.Generate) -> None:
        self._connection = connection
        self._call: Call = connection.submit(Sys.GENERATE, args, stream=True)
        # A function, not a method: what it holds must not hold the stream, or no last reference would ever go.
        self._pieces = _pieces(connection, self._call, args.timeout_s)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        self._connection.abandon(self._call)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if call is not None:
            self._connection.abandon(call)


def _pieces(connection: Connection, call: Call, timeout: float | None) -> Iterator[Piece]:
    for piece in connection.pieces(call, timeout):
        yield Piece(piece.text, piece.tokens)
    assert call.final is not None
    end = decode_body(call.final, wire.Generated)
    yield Piece(end.text, end.tokens, end)


def generate_args(
    messages: Sequence[Mapping[str, Any]] | None,
    prompt: str | Sequence[int] | None,
    *,
    max_tokens: int | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 40,
    min_p: float = 0.05,
    repeat_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    schema: Mapping[str, Any] | bool | None = None,
    stream: bool = False,
    timeout: float | None = None,
    model: str | None = None,
    public: bool = False,
) -> wire.Generate:
    """The arguments as the kernel wants them; it checks types and ranges."""
    sampling = wire.Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        # Drawn here, so that a call that has to be submitted again is the same call.
        seed=_seeds.getrandbits(62) if seed is None else seed,
        ignore_eos=ignore_eos,
        stop=[stop] if isinstance(stop, str) else _list(stop, "stop", "texts"),
    )
    return wire.Generate(
        messages=None if messages is None else objects(messages, "messages"),
        prompt=prompt if prompt is None or isinstance(prompt, str) else [int(token) for token in prompt],
        model=model,
        sampling=sampling,
        tools=None if tools is None else objects(tools, "tools"),
        schema=dict(schema) if isinstance(schema, Mapping) else schema,
        stream=stream,
        timeout_s=timeout,
        public=public,
    )


def objects(value: Sequence[Mapping[str, Any]], what: str) -> list[dict[str, Any]]:
    """The list of dicts that this is to be. Raises OSError EINVAL."""
    items = _list(value, what, "dicts")
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise wire.error(errno.EINVAL, f"{what}[{i}]: a dict, not {item!r:.60}")
    return [dict(item) for item in items]


def _list(value: Any, what: str, of: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise wire.error(errno.EINVAL, f"{what}: a list of {of}, not {value!r:.60}")
    return list(value)


def _generate(args: wire.Generate) -> Result | Stream:
    if args.stream:
        return Stream(connection(), args)
    return run(Plan(Sys.GENERATE, args, Result, args.timeout_s))


@overload
def chat(messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any) -> Stream: ...
@overload
def chat(messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any) -> Result: ...
def chat(messages: Sequence[Mapping[str, Any]], **options: Any) -> Result | Stream:
    """Answer a conversation: messages {"role": "system" | "user" | "assistant" | "tool", "content": "…"}.

    Options: max_tokens, temperature (0.8), top_p (0.95), top_k (40), min_p (0.05), repeat_penalty (1.0), seed, stop,
    ignore_eos, tools, schema, stream, timeout (seconds), model, public; see the top of this module. Returns a `Result`,
    or a `Stream` of `Piece`s. Tool calls are in `.tool_calls`, valid against the tool's schema. Raises OSError.
    """
    return _generate(generate_args(messages, None, **options))


@overload
def complete(prompt: str | Sequence[int], *, stream: Literal[True], **options: Any) -> Stream: ...
@overload
def complete(prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Any) -> Result: ...
def complete(prompt: str | Sequence[int], **options: Any) -> Result | Stream:
    """Go on from a text, or from token ids, which are taken verbatim (no BOS is added). Options as for `chat`."""
    return _generate(generate_args(None, prompt, **options))


@syscall
def embed(
    texts: str | Sequence[str], model: str | None = None, timeout: float | None = None
) -> Plan[npt.NDArray[np.float32]]:
    """One vector per text: float32 of shape (n, d), each of unit length. Needs numpy."""
    args = wire.Embed([texts] if isinstance(texts, str) else list(texts), model, timeout)
    return Plan(Sys.EMBED, args, _vectors, timeout)


def _vectors(body: wire.Embedded) -> npt.NDArray[np.float32]:
    import numpy as np

    return np.frombuffer(body.data, np.float32).reshape(body.n, body.d).copy()


@syscall
def tokenize(text: str, model: str | None = None, special: bool = False) -> Plan[list[int]]:
    """Token ids of a text, without BOS; `special`: read special tokens such as <|im_end|> as what they are."""
    return Plan(Sys.TOKENIZE, wire.Tokenize(text, model, special))


@syscall
def detokenize(tokens: Sequence[int], model: str | None = None) -> Plan[str]:
    """The text of token ids."""
    return Plan(Sys.DETOKENIZE, wire.Detokenize([int(token) for token in tokens], model))


@syscall
def models() -> Plan[list[ModelInfo]]:
    """The models that are served, the default one first."""
    return Plan(Sys.MODELS, wire.NoArgs())


def context(
    messages: Sequence[Mapping[str, Any]] = (),
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    model: str | None = None,
) -> Context:
    """A conversation that stays with the model between calls: `.chat()`, `.fork()`, `.save(name)`, `.close()`; see
    `libaios.context`."""
    from libaios.context import Context

    return Context(messages, tools=tools, model=model)


def restore(name: str, model: str | None = None) -> Context:
    """A context saved by an agent of this group, also before aiosd was started again. Raises FileNotFoundError; EIO
    when the file is damaged. State that does not fit the model any more is computed again."""
    from libaios.context import Context, restored

    return Context(run(restored(name, model)).messages, model=model)


def saved(model: str | None = None) -> list[wire.SavedContext]:
    """The saved contexts of the caller's group: name, tokens, bytes, created (Unix time)."""
    from libaios.context import saved

    return saved(model)


def forget(name: str, model: str | None = None) -> bool:
    """Remove a saved context. Was there one?"""
    from libaios.context import forget

    return forget(name, model)
