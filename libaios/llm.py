"""The language model: chat, complete, embed, tokenize.

    r = chat([{"role": "user", "content": "hi"}], max_tokens=64)
    r.text, r.tokens, r.finish_reason, r.usage
    for piece in chat(messages, stream=True): print(piece.text, end="")

Sampling: `temperature` 0 always takes the likeliest token. `seed` makes a sampled text repeatable (None: a new seed
each time). `stop` strings end the text and are not part of it. `max_tokens` None: up to the end of the context. A
`schema` (JSON Schema) or `tools` (a list of {"type": "function", "function": {"name", "description", "parameters"}})
limit what can be generated. Of a tool only the name is required, and the inner dict alone may be given. A tool of the
toolbox (`libaios.tool`) may be given by its name. `tool_choice`:
"auto", "none", "required" (one call or more), or {"type": "function", "function": {"name": …}} (exactly one).
`parallel_tool_calls=False`: one call at most.

What a thinking model thinks is in `reasoning`, apart from `text`. `template_args` go to the model's chat template
(`{"enable_thinking": False}`, a date, …). Before a `schema` a model thinks only with `{"enable_thinking": True}`.
Messages that end with the assistant's are continued: the text is what follows. What the model has computed for a prompt
is shared within the agent's group, and for a `public` prompt with the public prompts of all groups. (By the time that a
call takes, its caller can find out whether the beginning of its prompt was sent before.)

`logprobs` and `top_logprobs` give the natural logarithm of each token's probability, and of the likeliest at its place,
as the model has them: before temperature, filters and penalties. `presence_penalty` and `frequency_penalty` count what
has been generated. `logit_bias` is added to what the model gives for a token. `stop_tokens` end the text as the
model's own end does; neither comes before `min_tokens` tokens (a grammar may still end). A `grammar` (GBNF, the
notation of llama.cpp) describes the whole text. DRY (`dry_multiplier` > 0), XTC (`xtc_probability` > 0) and `mirostat`
(1 or 2) work as in llama.cpp, with the same parameters. `n`: the number of results for one prompt, with seeds seed,
seed + 1, …; the first of them is returned, and all are in its `.choices`. `lora` names an adapter that the model was
loaded with.

`finish_reason`: "stop" (the model or a stop string ended it), "length" (max_tokens or the context), "tool_calls"
(also if max_tokens was reached at the very end of a call), "limit" (the agent's token budget). Errors are OSErrors:
EINVAL with what was wrong with which argument, EMSGSIZE for a prompt longer than the context, TimeoutError, EDQUOT over
a budget, EIO when the model's process died twice under a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from libaios import tool, wire
from libaios.context import Context, forget, restored, saved
from libaios.generate import CallPiece, Piece, Result, Stream, generate, generate_args
from libaios.loop import Finished, Think, local, observation, steps
from libaios.plan import Plan, syscall
from libaios.plan import run as run_plan
from libaios.wire import ModelInfo, Sys, ToolCall, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CallPiece",
    "Finished",
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
    "rerank",
    "restore",
    "run",
    "saved",
    "tokenize",
]


@overload
def chat(messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any) -> Stream: ...
@overload
def chat(messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any) -> Result: ...
def chat(messages: Sequence[Mapping[str, Any]], **options: Any) -> Result | Stream:
    """Generate the next message of a conversation. A message is {"role": "system" | "user" | "assistant" | "tool",
    "content": "…"}.

    Options: max_tokens, temperature (0.8), top_p (0.95), top_k (40), min_p (0.05), repeat_penalty (1.0),
    presence_penalty, frequency_penalty (0), logit_bias ({token id: -100 to 100}), seed, stop, stop_tokens, min_tokens,
    ignore_eos, logprobs, top_logprobs (up to 20), n, tools, tool_choice, parallel_tool_calls, schema, grammar,
    template_args, stream, timeout (seconds), model, lora, public; dry_*, xtc_* and mirostat* as in llama.cpp; see the
    top of this module. Returns a `Result`, or a `Stream` of `Piece`s. Tool calls are in `.tool_calls`, valid for the
    tool's schema. Raises OSError.
    """
    n = options.pop("n", 1)
    if names := tool.names_in(options.get("tools")):
        options["tools"] = tool.resolved(options["tools"], tool.known(names))
    return generate(generate_args(messages, None, **options), n)


def run(
    messages: str | Sequence[Mapping[str, Any]],
    tools: Sequence[str | Mapping[str, Any]] = (),
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    max_steps: int = 16,
    **options: Any,
) -> Finished:
    """The whole loop of an agent with tools: send the conversation to the model, make the tool calls of its answer, add
    the results to the conversation, and repeat this until an answer has no call, or for `max_steps` turns.

    `messages` may be the text of a user's message. `tools`: names of the toolbox, or functions as `chat` takes them;
    the latter are called in this process, as `functions[name](**arguments)`. Other options as for `chat`. The model
    gets the error of a tool as its result; an error that concerns the agent itself (a budget, a lost connection) is
    raised.
    """
    own = functions or {}
    asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if names := tool.names_in(tools):
        tools = tool.resolved(tools, tool.known(names))
    loop = steps(asked, max_steps)
    try:
        step = next(loop)
        while True:
            if isinstance(step, Think):
                step = loop.send(chat(step.messages, tools=tools or None, **options))
            else:
                step = loop.send(local(own, step) if step.name in own else _called(step))
    except StopIteration as end:
        finished: Finished = end.value
        return finished


def _called(call: ToolCall) -> str:
    try:
        return tool.result_text(tool.call(call.name, call.arguments))
    except OSError as err:
        return observation(err)


@overload
def complete(prompt: str | Sequence[int], *, stream: Literal[True], **options: Any) -> Stream: ...
@overload
def complete(prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Any) -> Result: ...
def complete(prompt: str | Sequence[int], **options: Any) -> Result | Stream:
    """Continue a text, or token ids, which are used as they are (no BOS is added). Options as for `chat`."""
    n = options.pop("n", 1)
    return generate(generate_args(None, prompt, **options), n)


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
def rerank(
    query: str, documents: Sequence[str], model: str | None = None, timeout: float | None = None
) -> Plan[list[float]]:
    """How well each document answers the query: one score each, in the order of the documents. More is better; the
    meaning of a score of 1 depends on the model. Raises OSError: EINVAL for a model that does not rank."""
    args = wire.Rerank(query, list(documents), model, timeout)
    return Plan(Sys.RERANK, args, _scores, timeout)


def _scores(body: wire.Ranked) -> list[float]:
    return body.scores


@syscall
def tokenize(text: str, model: str | None = None, special: bool = False) -> Plan[list[int]]:
    """Token ids of a text, without BOS. `special`: special tokens such as <|im_end|> in the text are recognised."""
    return Plan(Sys.TOKENIZE, wire.Tokenize(text, model, special))


@syscall
def detokenize(tokens: Sequence[int], model: str | None = None) -> Plan[str]:
    """The text of token ids."""
    return Plan(Sys.DETOKENIZE, wire.Detokenize([int(token) for token in tokens], model))


@syscall
def models() -> Plan[list[ModelInfo]]:
    """The models of this system, the default one first."""
    return Plan(Sys.MODELS, wire.NoArgs())


def context(
    messages: Sequence[Mapping[str, Any]] = (),
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    model: str | None = None,
    lora: str | None = None,
) -> Context:
    """A conversation that stays with the model between calls: `.chat()`, `.fork()`, `.save(name)`, `.close()`; see
    `libaios.context`."""
    return Context(messages, tools=tools, model=model, lora=lora)


def restore(name: str, model: str | None = None) -> Context:
    """A context that an agent of this group has saved, perhaps before aiosd was started again. Raises
    FileNotFoundError, or EIO when the file is damaged. State that no longer fits the model is computed again."""
    found = run_plan(restored(name, model))
    return Context(found.messages, model=model, lora=found.lora or None)
