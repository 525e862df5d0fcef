"""A submitted call becomes a Sequence, or an OSError with the sentence that its caller shall read.

Everything that depends on the model and on nothing else is done here, once: rendering, tokenising, limits,
grammars. The engine gets a record that can only fail by what happens to it later.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np

from aiosd.link import Submit
from aiosd.llm import llama
from aiosd.llm.chat import THINK, ChatTemplate, Message, normal_messages, normal_tools, refuse
from aiosd.llm.dialects import Tool
from aiosd.llm.sampling import Sampler
from aiosd.llm.sequence import Sequence
from aiosd.llm.structured import Constraint, SchemaConstraint, ToolConstraint
from aiosd.llm.text import TextStream
from aiosd.llm.tokens import Tokens
from libaios.wire import Generate, Sampling

_UNLIMITED = 1 << 30

#: The scope of prompts marked public; no group has this name.
PUBLIC = "*"
_MARK = "\U0010fffe"  # no character; never in a text that means something


class Requests:
    """Makes sequences for one model with `ctx` tokens per slot."""

    def __init__(self, model: llama.Model, ctx: int) -> None:
        self._model = model
        self._ctx = ctx
        self._tokenizer = Tokens(model)
        self.template = ChatTemplate(
            model.meta("tokenizer.chat_template"), model.token_text(model.bos), model.token_text(model.eos)
        )

    def sequence(self, submit: Submit, order: int, now: float) -> Sequence:
        request = submit.request
        tools = normal_tools(request.tools)
        prompt, thinking = self._prompt(request, tools)
        sampling = request.sampling
        dialect = self.template.dialect if tools else None
        trigger = dialect.trigger if dialect else None
        aside = THINK if self.template.thinks else None
        sequence = Sequence(
            key=submit.key,
            group=submit.group,
            scope=PUBLIC if request.public else submit.group,
            nice=submit.nice,
            order=order,
            arrived=now,
            prompt=np.asarray(prompt, np.int32),
            max_tokens=_UNLIMITED if sampling.max_tokens is None else sampling.max_tokens,
            sampler=_sampler(sampling),
            ignore_eos=sampling.ignore_eos,
            stream=request.stream,
            new_text=lambda: TextStream(sampling.stop, trigger, aside, thinking),
            constraint=self._constraint(request, tools),
            dialect=dialect,
            budget=submit.budget,
            watched=request.stream or bool(sampling.stop) or dialect is not None,
        )
        try:
            self._force(sequence, request.given)
        except BaseException:  # its memory is llama.cpp's, and nobody else knows of it
            if sequence.constraint is not None:
                sequence.constraint.close()
            raise
        return sequence

    def conversation(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """The tokens of a conversation as the next call about it begins."""
        return self._chat_tokens(self._rendered(messages, normal_tools(tools)))

    def _prompt(self, request: Generate, tools: list[Tool]) -> tuple[list[int], bool]:
        """The tokens, and whether they end in the middle of the model's thoughts."""
        if (request.messages is None) == (request.prompt is None):
            raise refuse("give either messages or a prompt")
        if request.messages is not None:
            text = self._rendered(request.messages, tools, thinking=request.schema is None)
            return self._measured(self._chat_tokens(text)), text.rstrip().endswith(THINK[0])
        if tools:
            raise refuse("tools: they need a chat, a completion has no place for them")
        if isinstance(request.prompt, str):
            return self._measured(self._tokens(request.prompt) if request.prompt else []), False
        assert request.prompt is not None
        self.check_ids(request.prompt, "prompt")
        return self._measured(request.prompt), False

    def _rendered(self, messages: list[Message], tools: list[Tool], *, thinking: bool = True) -> str:
        """The prompt as text, with a mark in what must not become a control token. A schema leaves no room for
        thoughts: the template is told so."""
        return self.template.render(
            [self._disarmed(message) for message in normal_messages(messages)],
            [self._disarmed(tool) for tool in tools],
            thinking=thinking,
        )

    def _disarmed(self, value: Any) -> Any:
        """Control tokens that a message merely quotes (a tool's output may, and then the arguments of the next call)
        must not become control tokens: a mark goes into the middle of them, at which `_chat_tokens` cuts."""
        pattern = self._tokenizer.pattern
        if pattern is None:
            return value
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0][0] + _MARK + match[0][1:], value)
        if isinstance(value, list):
            return [self._disarmed(item) for item in value]
        if isinstance(value, dict):
            return {self._disarmed(key): self._disarmed(item) for key, item in value.items()}
        return value

    def _chat_tokens(self, text: str) -> list[int]:
        first, *rest = text.split(_MARK)
        tokens = self._tokens(first)
        for part in rest:
            tokens += self._tokenizer.of(part)
        return tokens

    def _tokens(self, text: str) -> list[int]:
        """With the model's BOS in front, but never twice: many templates write it themselves."""
        if not self._model.has_tokenizer:
            raise refuse("this model has no tokenizer: give token ids")
        if len(text) > self._ctx * max(self._model.longest_piece, 64):  # however it is cut: not worth the time
            raise refuse(f"prompt: {len(text)} characters, but the context holds {self._ctx} tokens", errno.EMSGSIZE)
        tokens, bos = self._tokenizer.of(text), self._model.bos
        if self._model.adds_bos and tokens[:1] != [bos]:
            return [bos, *tokens]
        return tokens

    def _measured(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise refuse("prompt: it is empty")
        if len(tokens) >= self._ctx:
            raise refuse(
                f"prompt: {len(tokens)} tokens, but the context holds {self._ctx} (and one must be left to generate)",
                errno.EMSGSIZE,
            )
        return tokens

    def check_ids(self, tokens: list[int], argument: str) -> None:
        n = self._model.n_vocab
        bad = next((i for i, token in enumerate(tokens) if not 0 <= token < n), None)
        if bad is not None:
            raise refuse(f"{argument}[{bad}]: token {tokens[bad]}, but the vocabulary has ids 0 to {n - 1}")

    def _constraint(self, request: Generate, tools: list[Tool]) -> Constraint | None:
        if request.schema is not None:
            if tools:
                raise refuse("schema: not together with tools")
            return SchemaConstraint(self._model, request.schema)
        if tools:
            assert self.template.dialect is not None
            return ToolConstraint(self._model, self.template.dialect, tools)
        return None

    def _force(self, sequence: Sequence, given: list[int]) -> None:
        """Take over tokens that the caller has already: text and grammar go through them, nothing is sent."""
        self.check_ids(given, "given")
        if len(sequence.prompt) + len(given) > self._ctx:
            raise refuse("given: more tokens than the context holds", errno.EMSGSIZE)
        for token in given:
            if sequence.constraint is not None:
                sequence.constraint.replay(sequence.text, token)
            sequence.text.feed(self._model.pieces[token])
        sequence.out = list(given)
        sequence.forced = sequence.sent = sequence.fed = len(given)
        sequence.text.take()


def _sampler(sampling: Sampling) -> Sampler:
    return Sampler(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repeat_penalty=sampling.repeat_penalty,
        seed=sampling.seed,
    )
