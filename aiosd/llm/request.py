"""Makes a Sequence from a submitted call, or raises an OSError with a sentence for its caller.

All work that depends only on the call and the model is done here, once: the template, tokens, limits, grammars. After
that the engine has nothing to refuse: a call can only fail by what happens while it runs.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import Struct, msgpack

from aiosd.budgets.price import FREE
from aiosd.errors import refuse
from aiosd.ipc.link import Submit
from aiosd.llm import adapters, llama
from aiosd.llm.chat import PLAIN_STOPS, ChatMessage, ChatTemplate, loose_tools, normal_messages, normal_tools
from aiosd.llm.dialects import CallStream, ToolCallReader, ToolDict
from aiosd.llm.gbnf import GrammarConstraint, check
from aiosd.llm.options import SamplerFactory
from aiosd.llm.sequence import Sequence
from aiosd.llm.structured import (
    AfterThoughts,
    Constraint,
    ToolConstraint,
    WholeText,
    schema_grammar,
    tools_grammar,
)
from aiosd.llm.text import TextStream
from aiosd.llm.tokens import QUOTED, CachingTokenizer
from libaios import parts
from libaios.wire import Generate

logger = logging.getLogger("llm.request")

_UNLIMITED = 1 << 30
_GRAMMAR_BYTES = 8 << 20  # how much memory the remembered grammars may take

#: The scope of prompts that are marked public. No group can have this name.
PUBLIC = "*"


class Prepared(Struct):
    """The result of all work on the text of a request."""

    prompt: list[int]
    inside: bool  # the prompt ends inside the model's thoughts
    tools: list[ToolDict]
    choice: str  # "auto", "none" or "required"
    second: bool  # made with the model's second template, the one for tools
    stops: list[str]
    trim: bool
    aside: tuple[str, str] | None
    switches: dict[str, int]
    after_thoughts: bool  # the grammar applies only after the end of the thoughts
    grammar: str = ""


class Requests:
    """Makes sequences for one model with `ctx` tokens per slot. It knows nothing of the engine's state."""

    def __init__(self, model: llama.Model, ctx: int) -> None:
        self._model = model
        self._ctx = ctx
        self._tokenizer = CachingTokenizer(model)
        self._quick = False
        self._grammars: dict[bytes, str] = {}  # those of recent tools and schemas, the oldest first
        self._grammar_bytes = 0
        self._samplers = SamplerFactory(model)
        template, for_tools = model.chat_templates
        self.template = ChatTemplate(
            template, model.token_text(model.bos), model.token_text(model.eos), self._tokenizer.controls, for_tools
        )
        if self.template.broken:
            logger.warning("the model's chat template is broken, chats will be refused: %s", self.template.broken)
        dialects = {self.template.dialect, self.template.suited([{}]).dialect}
        marks = {*self.template.marks.controls, *(mark for dialect in dialects for mark in dialect.controls)}
        self._revealed = self._reveal({*marks, *(dialect.trigger for dialect in dialects)})

    def _reveal(self, marks: set[str]) -> set[str]:
        """Control tokens have no text. Give one to those that begin or end a part of an answer, so that they can be
        found in the text that the engine makes of tokens. Returns the names of these tokens."""
        revealed = set()
        for text in marks & set(self._tokenizer.controls):
            token = self._tokenizer.controls[text]
            if token not in self._model.end_tokens:
                self._model.pieces[token] = parts.control(text).encode()
                revealed.add(text)
        return revealed

    def _spelled(self, mark: str) -> str:
        """How a mark looks in that text."""
        for text in self._revealed:
            mark = mark.replace(text, parts.control(text))
        return mark

    def prepare(self, request: Generate, quick: bool = False) -> Prepared:
        """Do all work on the text of a call: template, tools, schema, tokens. It depends only on the model and the
        request, and its result can be sent to another process. With `quick` it raises `Later` where it would take
        long."""
        self._quick = quick
        tools, choice = self._tools(request)
        template = self.template.suited(tools)
        template.quick = quick
        prompt, inside, closed = self._prompt(request, tools, template)
        chat, marks = request.messages is not None, template.marks
        plain = chat and template.plain
        prepared = Prepared(
            prompt=prompt,
            inside=inside,
            tools=tools,
            choice=choice,
            second=template is not self.template,
            stops=[*request.sampling.stop, *(PLAIN_STOPS if plain else ())],
            trim=plain,
            aside=(self._spelled(marks.think[0]), self._spelled(marks.think[1])) if chat and marks.think else None,
            switches={self._spelled(mark): to for mark, to in marks.switches.items()} if not closed else {},
            after_thoughts=chat and not closed,
        )
        if request.grammar is not None:
            if tools or request.schema is not None:
                raise refuse("grammar: not together with tools or a schema")
            check(request.grammar)
        elif request.schema is not None:
            if tools:
                raise refuse("schema: not together with tools")
            schema = request.schema
            prepared.grammar = self._remembered([schema], lambda: schema_grammar(schema, quick))
        elif tools:
            # A tool that is named is called once. Small models would repeat the call until the context is full.
            several = request.parallel_tool_calls and not isinstance(request.tool_choice, dict)
            dialect, loose = template.dialect, loose_tools(request.tools)
            prepared.grammar = self._remembered(
                [tools, choice, several, dialect.name, sorted(loose)],
                lambda: tools_grammar(self._model, dialect, tools, choice, several, quick, loose),
            )
        return prepared

    def _remembered(self, what: list[Any], make: Callable[[], str]) -> str:
        """The grammar of `what`. `make` is called only if it is not remembered: an agent sends its tools each time."""
        key = msgpack.encode(what)
        grammar = self._grammars.pop(key, None)
        if grammar is None:
            grammar = make()
            self._grammar_bytes += len(key) + len(grammar)
        self._grammars[key] = grammar
        while self._grammar_bytes > _GRAMMAR_BYTES and len(self._grammars) > 1:
            oldest = next(iter(self._grammars))
            self._grammar_bytes -= len(oldest) + len(self._grammars.pop(oldest))
        return grammar

    def sequence(self, submit: Submit, order: int, now: float, prepared: Prepared | None = None) -> Sequence:
        """The record for the engine. `prepared`: the result of `prepare` for this request, if it is there already."""
        request = submit.request
        prepared = prepared or self.prepare(request)
        template = self.template.suited([{}]) if prepared.second else self.template
        reader = ToolCallReader(template.dialect, prepared.tools) if prepared.tools else None
        sampling = request.sampling
        self.check_lora(request.lora)
        self.check_ids(list(sampling.logit_bias), "logit_bias")
        self.check_ids(sampling.stop_tokens, "stop_tokens")
        constraint = self._constraint(request, prepared, reader)
        sequence = Sequence(
            key=submit.key,
            group=submit.group,
            scope=adapters.scope(PUBLIC if request.public else submit.group, request.lora or ""),
            lora=request.lora or "",
            nice=submit.nice,
            order=order,
            arrived=now,
            prompt=np.asarray(prepared.prompt, np.int32),
            max_tokens=_UNLIMITED if sampling.max_tokens is None else sampling.max_tokens,
            chain=self._samplers.chain(sampling, constrained=constraint is not None),
            stream=request.stream,
            new_text=lambda: self._text(submit, prepared, reader),
            constraint=constraint,
            dialect=reader,
            budget=submit.budget,
            money=submit.money,
            price=submit.price or FREE,
            watched=request.stream or bool(prepared.stops) or reader is not None,
        )
        if sequence.chain.mirostat is not None and submit.mu is not None:
            sequence.chain.mirostat.mu = submit.mu
        try:
            self._force(sequence, request.given)
        except BaseException:  # the constraint's memory is llama.cpp's: it must be freed whatever was raised
            if sequence.constraint is not None:
                sequence.constraint.close()
            raise
        return sequence

    def _text(self, submit: Submit, prepared: Prepared, reader: ToolCallReader | None) -> TextStream:
        """The text stream of a generation, as it is before the first token."""
        shown = reader is not None and submit.request.stream and reader.dialect.streams
        return TextStream(
            prepared.stops,
            self._spelled(reader.trigger) if reader is not None else None,
            prepared.aside,
            prepared.inside,
            head=reader.head() if reader is not None else None,
            switches=prepared.switches or None,
            calls=CallStream(reader.dialect, submit.key) if shown and reader is not None else None,
            trim=prepared.trim,
        )

    def _tools(self, request: Generate) -> tuple[list[ToolDict], str]:
        """The tools that a call may use, and whether it must call one: "auto", "none" or "required"."""
        tools, choice = normal_tools(request.tools), request.tool_choice or "auto"
        if isinstance(choice, dict):
            function = choice.get("function", choice)
            name = function.get("name") if isinstance(function, dict) else None
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not tools:
                raise refuse(f"tool_choice: {name!r} is not among the tools"[:200])
            return tools, "required"
        if choice not in ("auto", "none", "required"):
            raise refuse(f"tool_choice must be auto, none, required or a function, not {choice!r}"[:200])
        if choice == "required" and not tools:
            raise refuse("tool_choice: required, but there are no tools")
        return tools, choice

    def conversation(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, quick: bool = False
    ) -> list[int]:
        """The tokens of a conversation as the next call about it begins. `quick`: as in `prepare`."""
        if not messages:
            raise refuse("messages: there are none")
        listed = normal_tools(tools)
        template = self.template.suited(listed)
        self._quick = template.quick = quick
        return self._chat_tokens(self._rendered(messages, listed, template))

    def _prompt(self, request: Generate, tools: list[ToolDict], template: ChatTemplate) -> tuple[list[int], bool, bool]:
        """The tokens, whether they end inside the model's thoughts, and whether the model cannot think after them."""
        if (request.messages is None) == (request.prompt is None):
            raise refuse("give either messages or a prompt")
        if request.messages is not None:
            args = request.template_args
            thinking = request.schema is None or args.get("enable_thinking") is True
            # If one tool is named, only the grammar is limited to it. The prompt lists all tools, so that it begins
            # like those of other calls and can share their computed state.
            text = self._rendered(request.messages, normal_tools(request.tools), template, thinking=thinking, args=args)
            if request.schema is not None:
                text += template.marks.answer
            think, end = template.marks.think, text.rstrip()
            inside = think is not None and end.endswith(think[0])
            answered = _answers(request, template) or (think is not None and (end.endswith(think[1]) or not thinking))
            closed = not template.thinks or answered
            return self._measured(self._chat_tokens(text)), inside, closed
        if tools:
            raise refuse("tools: they need a chat, a completion has no place for them")
        if isinstance(request.prompt, str):
            return self._measured(self._tokens(request.prompt) if request.prompt else []), False, True
        assert request.prompt is not None
        self.check_ids(request.prompt, "prompt")
        return self._measured(request.prompt), False, True

    def _rendered(
        self,
        messages: list[ChatMessage],
        tools: list[ToolDict],
        template: ChatTemplate,
        *,
        thinking: bool = True,
        args: dict[str, Any] | None = None,
    ) -> str:
        """The prompt as text. What must not become a control token in it has a mark (see `_disarmed`). `thinking`: the
        value that the template gets for it; False for a schema, unless the call asks for thoughts."""
        return template.render(
            [self._disarmed(message) for message in normal_messages(messages)],
            [self._disarmed(tool) for tool in tools],
            thinking=thinking,
            args=self._disarmed(args or {}),
        )

    def _disarmed(self, value: Any) -> Any:
        """`value` with a mark inside every name of a control token, so that it is tokenised as plain text. A message
        may quote such names: a tool's output, for instance, and then the arguments of the next call."""
        pattern = self._tokenizer.pattern
        if pattern is None:
            return value
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0][0] + QUOTED + match[0][1:], value)
        if isinstance(value, list):
            return [self._disarmed(item) for item in value]
        if isinstance(value, dict):
            return {self._disarmed(key): self._disarmed(item) for key, item in value.items()}
        return value

    def _chat_tokens(self, text: str) -> list[int]:
        return self._tokens(text, quoted=True)

    def _tokens(self, text: str, *, quoted: bool = False) -> list[int]:
        """The tokens of a text, with the model's BOS token first, but not twice: many templates write it themselves."""
        if not self._model.has_tokenizer:
            raise refuse("prompt: this model has no tokenizer, give token ids")
        if len(text) > self._ctx * max(self._model.longest_piece, 64):  # too long in any case: refused without the work
            raise refuse(f"prompt: {len(text)} characters, but the context holds {self._ctx} tokens", errno.EMSGSIZE)
        tokens, bos = self._tokenizer.of(text, quoted=quoted, quick=self._quick), self._model.bos
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

    def check_lora(self, name: str | None) -> None:
        if name is not None and name not in self._model.adapters:
            there = ", ".join(self._model.adapters) or "none (aiosd --lora NAME=PATH)"
            raise refuse(f"lora: this model has no adapter {name!r}; there are: {there}")

    def _constraint(self, request: Generate, prepared: Prepared, reader: ToolCallReader | None) -> Constraint | None:
        constraint: Constraint
        if request.grammar is not None:
            return GrammarConstraint(self._model, request.grammar)
        if not prepared.grammar:
            return None
        if reader is not None:
            constraint = ToolConstraint(self._model, prepared.grammar, reader.dialect, choice=prepared.choice)
            if prepared.choice != "required":
                return constraint
        else:
            constraint = WholeText(self._model, prepared.grammar, "schema")
        if not prepared.after_thoughts:
            return constraint
        return AfterThoughts(self._model, constraint, not prepared.inside)

    def _force(self, sequence: Sequence, given: list[int] | str) -> None:
        """Begin with tokens that the caller has already: text and grammar read them, but they are not sent again."""
        if isinstance(given, str):
            raise refuse("given: this model goes on from tokens, not from a text")
        self.check_ids(given, "given")
        if len(sequence.prompt) + len(given) > self._ctx:
            raise refuse("given: more tokens than the context holds", errno.EMSGSIZE)
        for token in given:
            if sequence.constraint is not None:
                sequence.constraint.replay(sequence.text, token)
            sequence.text.feed(self._model.pieces[token])
        sequence.out = list(given)
        if sequence.chain.top_logprobs is not None:
            sequence.logprobs = [None] * len(given)
        sequence.forced = sequence.sent = sequence.fed = len(given)
        sequence.text.take()


def _answers(request: Generate, template: ChatTemplate) -> bool:
    """Does the prompt end inside the answer, so that no thoughts can come before it?"""
    last = (request.messages or [{}])[-1]
    return (request.schema is not None and bool(template.marks.answer)) or (
        last.get("role") == "assistant" and not last.get("tool_calls")
    )
