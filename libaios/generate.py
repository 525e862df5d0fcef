"""Calls that generate text: their arguments, their result, and the stream of its pieces."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from libaios import parts, wire
from libaios.agent import connection
from libaios.connection import Connection, Pending, decode_body
from libaios.parts import CallPiece
from libaios.plan import Plan, run
from libaios.wire import Sys, ToolCall, Usage

__all__ = ["CallPiece", "Piece", "Pieces", "Result", "Stream", "generate", "generate_args", "objects"]

_seeds = random.SystemRandom()

MOST_CHOICES = 128


class Result:
    """A finished generation. `tokens` are the ids of the generated tokens, without the stop token; `logprobs` has one
    entry for each token if log probabilities were requested, else it is None. `reasoning`: what a thinking model wrote
    before its answer. `model`: the name of the model that answered (the caller may have named a route). `choices`: with
    `n` > 1 all results, this one first."""

    __slots__ = ("_others", "finish_reason", "logprobs", "model", "reasoning", "text", "tokens", "tool_calls", "usage")

    def __init__(self, body: wire.Generated) -> None:
        self._others: list[Result] = []
        self.logprobs: wire.Logprobs | None = body.logprobs
        self.text, self.reasoning, _ = parts.Splitter().split(body.text)
        self.tokens: list[int] = body.tokens
        self.tool_calls: list[ToolCall] = body.tool_calls
        self.finish_reason: str = body.finish_reason
        self.usage: Usage = body.usage
        self.model: str = body.model

    @property
    def choices(self) -> list[Result]:
        return [self, *self._others]

    @classmethod
    def of(cls, bodies: Sequence[wire.Generated]) -> Result:
        """The first result, with all results in `choices`."""
        first, *others = map(cls, bodies)
        first._others = others
        return first

    def __repr__(self) -> str:
        return f"Result({self.text!r}, finish_reason={self.finish_reason!r}, tool_calls={self.tool_calls!r})"


class Piece:
    """Part of a stream: whole characters of the answer or of the thoughts before it (`reasoning`), parts of tool calls
    (`calls`, where the model writes them in a way that allows it), and the tokens that they are made of, with their
    `logprobs` if these were requested. Only the last piece has `finish_reason`, `usage`, the complete `tool_calls`, and
    `model`; if the call named a route, the first piece has `model`, too."""

    __slots__ = ("calls", "finish_reason", "logprobs", "model", "reasoning", "text", "tokens", "tool_calls", "usage")

    def __init__(
        self,
        text: str,
        tokens: list[int],
        end: wire.Generated | None = None,
        reasoning: str = "",
        calls: Sequence[CallPiece] = (),
        logprobs: wire.Logprobs | None = None,
        model: str = "",
    ) -> None:
        self.logprobs = logprobs
        self.text = text
        self.reasoning = reasoning
        self.calls = list(calls)
        self.tokens = tokens
        self.finish_reason: str | None = end.finish_reason if end is not None else None
        self.usage: Usage | None = end.usage if end is not None else None
        self.model = model
        self.tool_calls: list[ToolCall] = end.tool_calls if end is not None else []

    def __repr__(self) -> str:
        return f"Piece({self.text!r}, finish_reason={self.finish_reason!r})"


class Stream:
    """An iterator of `Piece`s. The generation ends when its loop is left early, at `close()` (from any thread), or when
    the last reference is gone. If another thread iterates at that moment, it gets ECANCELED."""

    def __init__(self, connection: Connection, args: wire.Generate) -> None:
        self._connection = connection
        self._call: Pending = connection.submit(Sys.GENERATE, args, stream=True)
        # A function, not a method: the generator must hold no reference to the stream, or the stream would live for
        # ever.
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


class Pieces:
    """Makes the pieces of one stream."""

    def __init__(self) -> None:
        self._splitter = parts.Splitter()

    def piece(self, part: wire.Piece | wire.Generated) -> Piece:
        text, reasoning, calls = self._splitter.split(part.text)
        end = part if isinstance(part, wire.Generated) else None
        return Piece(text, part.tokens, end, reasoning, calls, part.logprobs, part.model)


def _pieces(connection: Connection, call: Pending, timeout: float | None) -> Iterator[Piece]:
    pieces = Pieces()
    for piece in connection.pieces(call, timeout):
        yield pieces.piece(piece)
    assert call.final is not None
    yield pieces.piece(decode_body(call.final, wire.Generated))


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
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = True,
    template_args: Mapping[str, Any] | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    stop_tokens: Sequence[int] = (),
    min_tokens: int = 0,
    logprobs: bool = False,
    top_logprobs: int = 0,
    grammar: str | None = None,
    lora: str | None = None,
    dry_multiplier: float = 0.0,
    dry_base: float = 1.75,
    dry_allowed_length: int = 2,
    dry_last_n: int = 64,
    dry_breakers: Sequence[str] | None = None,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    mirostat: int = 0,
    mirostat_tau: float = 5.0,
    mirostat_eta: float = 0.1,
) -> wire.Generate:
    """The arguments of the call as they are sent. The kernel checks types and ranges."""
    sampling = wire.Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        # The seed is drawn here, so that a call that must be submitted again gives the same text.
        seed=_seeds.getrandbits(62) if seed is None else seed,
        ignore_eos=ignore_eos,
        stop=[stop] if isinstance(stop, str) else _list(stop, "stop", "texts"),
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias={int(token): bias for token, bias in (logit_bias or {}).items()},
        min_tokens=min_tokens,
        stop_tokens=_list(stop_tokens, "stop_tokens", "token ids"),
        logprobs=logprobs or top_logprobs > 0,
        top_logprobs=top_logprobs,
        dry_multiplier=dry_multiplier,
        dry_base=dry_base,
        dry_allowed_length=dry_allowed_length,
        dry_last_n=dry_last_n,
        dry_breakers=None if dry_breakers is None else _list(dry_breakers, "dry_breakers", "texts"),
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        mirostat=mirostat,
        mirostat_tau=mirostat_tau,
        mirostat_eta=mirostat_eta,
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
        tool_choice=dict(tool_choice) if isinstance(tool_choice, Mapping) else tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        template_args=dict(template_args or {}),
        grammar=grammar,
        lora=lora,
    )


#: How Python's TypeError for an unknown option begins, if a caller used one of these names.
generate_args.__qualname__ = "chat/complete"


def objects(value: Sequence[Mapping[str, Any]], what: str) -> list[dict[str, Any]]:
    """Check that this is a list of dicts, and copy it. Raises OSError EINVAL."""
    items = _list(value, what, "dicts")
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise wire.error(errno.EINVAL, f"{what}[{i}]: a dict, not {item!r:.60}")
    return [dict(item) for item in items]


def _list(value: Any, what: str, of: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise wire.error(errno.EINVAL, f"{what}: a list of {of}, not {value!r:.60}")
    return list(value)


def variants(args: wire.Generate, n: Any) -> list[wire.Generate]:
    """The same call `n` times, with seeds one after the other. The prompt is computed once: by the first of them that
    gets a slot; the others wait for that."""
    if not isinstance(n, int) or not 1 <= n <= MOST_CHOICES:
        raise wire.error(errno.EINVAL, f"n: from 1 to {MOST_CHOICES}, not {n!r:.60}")
    if n == 1:
        return [args]
    if args.stream:
        raise wire.error(errno.EINVAL, "n: a stream has one result; make several calls")
    sampling = args.sampling
    seeds = [(sampling.seed + i) % (1 << 63) for i in range(n)]
    return [replace(args, sampling=replace(sampling, seed=seed)) for seed in seeds]


def generate(args: wire.Generate, n: Any = 1) -> Result | Stream:
    several = variants(args, n)
    if args.stream:
        return Stream(connection(), args)
    if n == 1:
        return run(Plan(Sys.GENERATE, args, Result, args.timeout_s))
    conn = connection()
    calls: list[Pending] = []
    try:
        for each in several:
            calls.append(conn.submit(Sys.GENERATE, each))
        return Result.of([conn.result(call, wire.Generated, args.timeout_s) for call in calls])
    except BaseException:  # of any kind: the others must not run on
        for call in calls:
            conn.abandon(call)
        raise
