"""A call as the JSON that an endpoint takes.

Options that cannot be passed on and would change the answer are refused by name. `top_k`, `min_p` and `repeat_penalty`
are no part of OpenAI's API: their defaults are left out, other values are refused. Differences between endpoints are in
`Dialect`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from aiosd.errors import refuse
from libaios.wire import Generate, Sampling

_DEFAULTS = Sampling()
#: Options that only a model in a process of aiosd's has.
_LOCAL = (
    "top_k",
    "min_p",
    "repeat_penalty",
    "ignore_eos",
    "min_tokens",
    "stop_tokens",
    "dry_multiplier",
    "xtc_probability",
    "mirostat",
)


#: Options that some models accept with the default value only.
_FIXED = ("temperature", "top_p")
_UNSUPPORTED = ("unsupported_value", "unsupported_parameter")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one endpoint wants its calls, as learned from its refusals. `limit`: its name for the limit of tokens;
    `without`: options that are sent only if the caller chose another value than the default."""

    limit: str = "max_tokens"
    without: frozenset[str] = frozenset()

    def after(self, why: str, code: str) -> Dialect | None:
        """The dialect after a refusal; None: the refusal shows nothing new."""
        if "max_completion_tokens" in why and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        named = {name for name in _FIXED if code in _UNSUPPORTED and f"'{name}'" in why}
        return replace(self, without=self.without | named) if named - self.without else None


def path(request: Generate) -> str:
    return "chat/completions" if request.messages is not None else "completions"


def body(request: Generate, model: str, budget: int | None, given: str, dialect: Dialect) -> dict[str, Any]:
    """The request. `budget`: tokens that the call may still use; `given`: the text that a completion continues. Raises
    OSError EINVAL."""
    check(request)
    sampling = request.sampling
    made: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": min(sampling.temperature, 2.0),
        "top_p": sampling.top_p,
        "seed": sampling.seed % (1 << 31),
    }
    for name in dialect.without:
        if getattr(sampling, name) == getattr(_DEFAULTS, name):
            del made[name]
    limits = [limit for limit in (sampling.max_tokens, budget) if limit is not None]
    if limits:
        made[dialect.limit] = min(limits)
    if sampling.stop:
        made["stop"] = sampling.stop
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            made[name] = getattr(sampling, name)
    if sampling.logit_bias:  # its caller knows the endpoint's tokens
        made["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if request.messages is None:
        if sampling.logprobs:
            made["logprobs"] = sampling.top_logprobs
        return made | {"prompt": f"{request.prompt}{given}"}
    if sampling.logprobs:
        made["logprobs"] = True
        if sampling.top_logprobs:
            made["top_logprobs"] = sampling.top_logprobs
    made["messages"] = [_message(message) for message in request.messages]
    if request.template_args:
        made["reasoning_effort"] = request.template_args["reasoning_effort"]
    if request.tools:
        made |= {"tools": [_tool(tool) for tool in request.tools], "tool_choice": _choice(request.tool_choice)}
        if not request.parallel_tool_calls:
            made["parallel_tool_calls"] = False
    if request.schema is not None:
        schema = {} if request.schema is True else request.schema
        made["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return made


def encoded(request: Generate, model: str, budget: int | None, given: str, dialect: Dialect) -> bytes:
    """The same as JSON. Raises OSError EINVAL also for values that JSON does not have."""
    try:
        return msgspec.json.encode(body(request, model, budget, given, dialect))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise refuse(f"messages: not to be written as JSON: {error}") from None


def check(request: Generate) -> None:
    changed = [name for name in _LOCAL if getattr(request.sampling, name) != getattr(_DEFAULTS, name)]
    if changed:
        raise refuse(f"{changed[0]}: a model that is served elsewhere does not take it")
    given = [name for name in ("grammar", "lora") if getattr(request, name)]
    given += ["template_args"] if request.template_args and not _is_effort(request) else []
    if given:
        raise refuse(f"{given[0]}: a model that is served elsewhere does not take it")
    if not isinstance(request.prompt, str) and request.messages is None:
        raise refuse("prompt: a model that is served elsewhere takes text, no token ids")
    if request.given and not isinstance(request.given, str):
        raise refuse("given: a model that is served elsewhere goes on from text, not from tokens")
    if request.schema is False:
        raise refuse("schema: nothing fits it")
    if request.schema is not None and request.messages is None:
        raise refuse("schema: a model that is served elsewhere keeps to one in a chat only")
    if request.tools and (request.messages is None or request.schema is not None):
        raise refuse("tools: they need a chat, and no schema beside them")


def _is_effort(request: Generate) -> bool:
    """Whether the only template argument is an effort (the gateway sends it in both forms), which this API has, too."""
    args = dict(request.template_args)
    effort = args.pop("reasoning_effort", None)
    return (
        request.messages is not None and isinstance(effort, str) and args in ({}, {"enable_thinking": effort != "none"})
    )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with tool calls as the API has them: aiosd also accepts arguments as a dict, and the inner dict
    alone."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return {name: value for name, value in message.items() if name != "tool_calls"}
    return message | {"tool_calls": [_called(call) for call in calls]}


def _called(call: Any) -> Any:
    if not isinstance(call, dict):
        return call  # the endpoint refuses it
    function = call.get("function", call)
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    made = {"type": "function", "function": {"name": function.get("name"), "arguments": text}}
    return made | ({"id": call["id"]} if "id" in call else {})


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as the API has it; the caller may have sent the inner dict alone."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def tools_of(request: Generate) -> dict[str, dict[str, Any]]:
    """name → JSON Schema of the arguments."""
    inner = [_tool(tool)["function"] for tool in request.tools or ()]
    return {str(each.get("name")): each.get("parameters") or {} for each in inner if isinstance(each, dict)}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any]:
    if isinstance(choice, dict):
        return choice if "type" in choice else {"type": "function", **choice}
    return choice or "auto"
