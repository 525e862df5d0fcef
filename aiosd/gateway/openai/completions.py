"""POST /v1/completions: the continuation of one prompt or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from aiosd.gateway.openai import fields, generation, named
from aiosd.gateway.openai.chat import DONE, FINGERPRINT, FINISH, new_id, usage
from aiosd.gateway.web import HttpRequest, Problem, encode
from libaios import wire
from libaios.generate import Piece, generate_args
from libaios.wire import ModelInfo

MOST_PROMPTS = 128


class Completion(fields.SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]] | UnsetType = UNSET
    logprobs: int | bool | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None
    return_token_ids: bool | None = None  # as vLLM has it


async def complete(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), Completion)
    request.names = named.of(asked)
    model = await fields.model_for(request, asked.model)
    args, echoes = _arguments(asked, model)
    head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": model.name}
    with_usage = fields.wants_usage(asked)
    if asked.stream:
        form = CompletionForm(head, echoes, len(args), with_usage, bool(asked.return_token_ids))
        await generation.stream(request, args, form)
        return
    found = await generation.results(request, args)
    per_prompt = len(args) // len(echoes)
    choices = [
        choice(
            i,
            echoes[i // per_prompt] + result.text,
            result.logprobs,
            FINISH.get(result.finish_reason, "stop"),
            result.tokens if asked.return_token_ids else None,
        )
        for i, result in enumerate(found)
    ]
    used = usage(generation.total([result.usage for result in found], per_prompt))
    answered = {"model": found[0].model or model.name}  # of a route, the model that answered
    await request.reply({**head, **answered, "system_fingerprint": FINGERPRINT, "choices": choices, "usage": used})


def _arguments(asked: Completion, model: ModelInfo) -> tuple[list[wire.Generate], list[str]]:
    """What to generate, and for each prompt the text to put before its answer. Raises Problem (400)."""
    prompts = _prompts(asked.prompt)
    if asked.best_of is not None and asked.best_of > (asked.n or 1):
        raise Problem(400, "best_of: more than n is not supported", param="best_of", code="unsupported_parameter")
    if asked.echo and (asked.logprobs or not all(isinstance(prompt, str) for prompt in prompts)):
        raise Problem(400, "echo: only with texts, and without logprobs", param="echo", code="unsupported_parameter")
    given = fields.options(asked)
    if asked.logprobs is not None and asked.logprobs is not False:
        given["logprobs"], given["top_logprobs"] = True, int(asked.logprobs)
    most = max(1, fields.MOST_CHOICES // len(prompts))
    args: list[wire.Generate] = []
    for prompt in prompts:
        args += fields.choices(asked, generate_args(None, prompt, model=model.name, **given), most)
    return args, [prompt if asked.echo and isinstance(prompt, str) else "" for prompt in prompts]


def _prompts(prompt: str | list[str | int | list[int]] | UnsetType) -> Sequence[str | list[int]]:
    if isinstance(prompt, UnsetType):
        raise Problem(400, "prompt: it is missing", param="prompt")
    prompts: list[Any] = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if any(isinstance(one, int) for one in prompts):
        raise Problem(400, "prompt: texts, or lists of token ids, not both", param="prompt")
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise Problem(400, f"prompt: from 1 to {MOST_PROMPTS} of them, not {len(prompts)}", param="prompt")
    return prompts


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(one, int) for one in value)


def choice(
    index: int, text: str, found: wire.Logprobs | None, reason: str | None, ids: list[int] | None = None, at: int = 0
) -> dict[str, Any]:
    """One choice. `at`: the place in the whole answer at which the text of these tokens begins."""
    made = {"index": index, "text": text, "logprobs": _logprobs(found, at), "finish_reason": reason}
    return made if ids is None else {**made, "token_ids": ids}


def _logprobs(found: wire.Logprobs | None, at: int) -> dict[str, Any] | None:
    """Log probabilities in the form of this API: lists with one entry for each token."""
    if found is None:
        return None
    known = [one for one in found if one is not None]
    texts = [_text(one.piece) for one in known]
    offsets = []
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in known],
        "top_logprobs": [{_text(other.piece): other.logprob for other in one.top} for one in known],
        "text_offset": offsets,
    }


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


class CompletionForm:
    kind, comment = generation.EVENTS, generation.COMMENT

    def __init__(
        self, head: dict[str, Any], echoes: list[str], count: int, with_usage: bool, with_ids: bool = False
    ) -> None:
        self._with_ids = with_ids
        self._head = {**head, "system_fingerprint": FINGERPRINT}
        self._front = b""
        self._back = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage
        self._echoes, self._count = echoes, count
        self._at = [0] * count  # the length of each choice's text so far

    def begin(self, model: str) -> bytes:
        head = {**self._head, "model": model or self._head["model"]}
        self._front = b"data: " + encode(head)[:-1] + b',"choices":['
        parts = [choice(i, self._echo_of(i), None, None) for i in range(self._count) if self._echo_of(i)]
        return b"".join([self._front + encode(part) + self._back for part in parts])

    def _echo_of(self, index: int) -> str:
        return self._echoes[index * len(self._echoes) // self._count]

    def piece(self, index: int, piece: Piece) -> bytes:
        made = b""
        ids = piece.tokens if self._with_ids else None
        if piece.text or piece.logprobs or ids:
            part = choice(index, piece.text, piece.logprobs, None, ids, self._at[index])
            self._at[index] += sum(len(_text(one.piece)) for one in piece.logprobs or () if one is not None)
            made += self._front + encode(part) + self._back
        if piece.finish_reason is not None:
            reason = FINISH.get(piece.finish_reason, "stop")
            made += self._front + encode(choice(index, "", None, reason)) + self._back
        return made

    def end(self, usages: Sequence[wire.Usage]) -> bytes:
        if not self._with_usage:
            return DONE
        used = generation.total(usages, len(usages) // len(self._echoes))
        return self._front + b'],"usage":' + encode(usage(used)) + b"}\n\n" + DONE
