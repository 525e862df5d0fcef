"""GGUF files for tests, made in a fraction of a second from a seed: random weights, a real tokenizer.

The text of a tiny model is meaningless but deterministic, so the engine (batching, parking, grammars, stop strings)
can be checked token by token.

`write` makes a Llama with a ChatML vocabulary; `write_family` one with the special tokens, the kind of tokenizer and
the chat template of a family of models; `write_like` one of another architecture (sliding window, recurrent). The
templates were written for these tests: they give the same text as the families' own, but are shorter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_cpp import llama_cpp as C

from benchmarks.models import byte_to_char, write_llama

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.content == 'refuse me' %}{{- raise_exception('Roles must be user or assistant.') }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


#: Does this processor have the instructions for our own attention? If so, a core must use it.
OWN_ATTENTION = "avx2" in Path("/proc/cpuinfo").read_text().split()


def write(path: Path, *, template: str | None = CHATML, **shape: Any) -> Path:
    """A model of some 100,000 parameters (see `benchmarks.models.write_llama` for what `shape` may say)."""
    return write_llama(path, template=template, **shape)


def quantise(path: Path, kind: str) -> Path:
    """The same model as a file of another type, beside it. For K-quants `d` and `ff` are multiples of 256."""
    target = path.with_name(f"{path.stem}-{kind}.gguf")
    params = C.llama_model_quantize_default_params()
    params.ftype = getattr(C, f"LLAMA_FTYPE_MOSTLY_{kind}{'_S' if kind == 'Q4_K' else ''}")
    params.nthread, params.pure = 1, True
    if C.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params)):
        raise OSError(f"llama.cpp could not make {target}")
    return target


def write_lora(
    path: Path,
    model: Path,
    *,
    seed: int = 0,
    strength: float = 4.0,
    targets: tuple[str, ...] = ("ffn_down", "attn_v"),
    arch: str = "llama",
    kind: str = "lora",
    width: int = 0,
    halves: str = "ab",
) -> Path:
    """A LoRA adapter of rank 2 for a model. It changes some weights of the first layer at random, and so strongly that
    the text changes. `width`, `halves`: to make a file that fits no model."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", 2.0)
    shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(model).tensors}
    for target in targets:
        name = f"blk.0.{target}.weight"
        columns, rows = (int(size) for size in shapes[name])
        made = {
            "a": rng.standard_normal((2, width or columns)) / np.sqrt(columns),
            "b": rng.standard_normal((rows, 2)) * strength,
        }
        for half in halves:
            writer.add_tensor(f"{name}.lora_{half}", made[half].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spoil(path: Path, token: int, how: str) -> Path:
    """Make a token's V in the first layer infinite, or its embedding NaN."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}
    if how == "nan":
        tensors["token_embd.weight"][token] = np.nan
    else:
        tensors["token_embd.weight"][:, 0] = 0
        tensors["token_embd.weight"][token] = np.eye(1, tensors["token_embd.weight"].shape[1])
        tensors["blk.0.attn_v.weight"][:, 0] = 1e6
    return path


# ── families of chat models ───────────────────────────────────────────────────────────────────────────────

_ALTERNATE = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
)

_LLAMA3 = """\
{{- bos_token }}
{%- set in_user = tools_in_user_message if tools_in_user_message is defined else true %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + (date_string or '26 Jul 2024') + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools is not none and in_user %}
    {%- if not messages %}
        {{- raise_exception('Cannot put tools in the first user message when there is none!') }}
    {%- endif %}
    {%- set first = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- 'Respond with {"name": function name, "parameters": object}.\\n' }}
    {%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

_MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% elif message.role == 'assistant' %}"
    "{{ message.content + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

_MISTRAL_V3 = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(n=0) %}
{%- for message in messages if message.role != 'tool' and not message.tool_calls %}
    {%- if (message.role == 'user') != (ns.n % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- set ns.n = ns.n + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- set head = system + '\\n\\n' if loop.last and system is defined else '' %}
        {{- '[INST] ' + head + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}
            {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + (message.content | string) + ', "call_id": "' + message.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

_MISTRAL_V13 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}
        {%- if tools and loop.index0 == (1 if messages[0].role == 'system' else 0) %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""

_QWEN_TOOLS = """\
{%- macro calls(message, content) %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n' if content or not loop.first }}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
{%- macro result(message, before, after) %}
    {%- if not before or before.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- if not after or after.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endmacro %}
{%- set first = messages[0].content if messages[0].role == 'system' else DEFAULT %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (first + '\\n\\n' if first else '') + '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each call, return JSON within <tool_call></tool_call>:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif first %}
    {{- '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}
{%- endif %}
"""

_QWEN25 = (
    _QWEN_TOOLS.replace("DEFAULT", "'You are Qwen.'")
    + """\
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- result(message, loop.previtem, loop.nextitem) }}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {{- calls(message, message.content) + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)

_QWEN3 = (
    _QWEN_TOOLS.replace("DEFAULT", "''")
    + """\
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- result(message, loop.previtem, loop.nextitem) }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thoughts = message.reasoning_content or '' %}
        {%- if not thoughts and '</think>' in message.content %}
            {%- set thoughts = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and thoughts %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content + calls(message, content) + '<|im_end|>\\n' }}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
)

_GEMMA_TURNS = (
    "{%- for message in messages %}" + _ALTERNATE + "{{- '<start_of_turn>' }}"
    "{{- ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
    "{{- (head if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
_GEMMA2 = (
    "{{- bos_token }}{%- set head = '' %}{%- if messages[0].role == 'system' %}"
    "{{- raise_exception('System role not supported') }}{%- endif %}" + _GEMMA_TURNS
)
_GEMMA3 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set head = messages[0].content + '\\n\\n' %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set head = '' %}{%- endif %}" + _GEMMA_TURNS
)


@dataclass(frozen=True)
class Family:
    """What chat models of one family have in common. `defined`: special tokens that show as text."""

    template: str
    bos: str
    eos: str
    control: tuple[str, ...]
    defined: tuple[str, ...] = ()
    spm: bool = False  # SentencePiece; else byte-level BPE
    add_bos: bool = True
    space_prefix: bool = False


_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_INST += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<tool_call>", "</tool_call>")

FAMILIES = {
    "llama3.1": Family(_LLAMA3, _HEADERS[0], "<|eot_id|>", (*_HEADERS, "<|eom_id|>", "<|python_tag|>")),
    "mistral-v0.1": Family(_MISTRAL_V1, "<s>", "</s>", ("<s>", "</s>"), spm=True, space_prefix=True),
    "mistral-v0.3": Family(_MISTRAL_V3, "<s>", "</s>", _INST, spm=True, space_prefix=True),
    "mistral-v13": Family(
        _MISTRAL_V13, "<s>", "</s>", (*_INST, "[ARGS]", "[CALL_ID]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    ),
    "qwen2.5": Family(_QWEN25, _QWEN[0], "<|im_end|>", _QWEN, _TAGS, add_bos=False),
    "qwen3": Family(_QWEN3, _QWEN[0], "<|im_end|>", _QWEN, (*_TAGS, "<think>", "</think>"), add_bos=False),
    "gemma2": Family(_GEMMA2, "<bos>", "<eos>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), spm=True),
    "gemma3": Family(_GEMMA3, "<bos>", "<eos>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), spm=True),
}


# Families whose calls are not JSON objects with a name, or whose answers have several parts.

_CODER = """\
{%- for message in messages %}
    {%- if message.role == 'system' or (loop.first and tools) %}
        {{- '<|im_start|>system\\n' + (message.content if message.role == 'system' else '') }}
        {%- for tool in tools or [] %}{{- '\\n<function>\\n<name>' + tool.function.name + '</name>\\n' }}
            {{- '<description>' + tool.function.description + '</description>\\n</function>' }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_GLM = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}{{- '<|system|>\\n# Tools' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|observation|>\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>\\n<think></think>\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function.name + '\\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
                {{- (value if value is string else value | tojson) + '</arg_value>\\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|' + message.role + '|>\\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' + ('\\n<think></think>' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif %}
"""

_DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}{{- message.content }}{%- endfor %}
{%- for tool in tools or [] %}{{- '\\n\\n### ' + tool.function.name + '\\n' + (tool.function | tojson) }}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜></think>' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<｜tool▁calls▁begin｜>' if loop.first }}
            {{- '<｜tool▁call▁begin｜>BEFORE' + call.function.name + 'AFTER' }}
            {{- (call.function.arguments | tojson) + 'BEHIND<｜tool▁call▁end｜>' }}
            {{- '<｜tool▁calls▁end｜>' if loop.last }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' + '<think>\\n' }}{%- endif %}
"""
_DEEPSEEK_V31 = _DEEPSEEK.replace("BEFORE", "").replace("AFTER", "<｜tool▁sep｜>").replace("BEHIND", "")
_DEEPSEEK_R1 = (
    _DEEPSEEK.replace("BEFORE", "function<｜tool▁sep｜>").replace("AFTER", "\\n```json\\n").replace("BEHIND", "\\n```")
)

_HARMONY = """\
{{- '<|start|>system<|message|>Knowledge cutoff. Current date: ' + (date or strftime_now('%Y-%m-%d')) + '<|end|>' }}
{{- '<|start|>developer<|message|>' }}
{%- if messages[0].role in ('system', 'developer') %}
    {{- '# Instructions\\n\\n' + messages[0].content }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for tool in tools or [] %}
    {{- '\\n\\n// ' + tool.function.description + '\\ntype ' + tool.function.name + ' = (_: any) => any;' }}
{%- endfor %}
{{- '<|end|>' }}
{%- set ns = namespace(name='') %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {%- set ns.name = call.name %}
        {%- if message.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>commentary to=functions.' + call.name + ' <|constrain|>json<|message|>' }}
        {{- (call.arguments | tojson) + '<|call|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- (message.content | tojson) + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""

_SMOLLM = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SEEK = tuple(f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
_SEEK += ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_PARTS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
_ARGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>", "</think>", *_TAGS)

NEWER = {
    "qwen3-coder": Family(_CODER, _QWEN[0], "<|im_end|>", _QWEN, _TAGS, add_bos=False),
    "glm-4.5": Family(_GLM, "<|endoftext|>", "<|user|>", ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>",
                      "<|assistant|>", "<|observation|>"), _ARGS, add_bos=False),
    "deepseek-v3.1": Family(_DEEPSEEK_V31, _SEEK[5], _SEEK[6], _SEEK, ("<think>", "</think>")),
    "deepseek-r1": Family(_DEEPSEEK_R1, _SEEK[5], _SEEK[6], _SEEK, ("<think>", "</think>")),
    "gpt-oss": Family(_HARMONY, "<|startoftext|>", "<|return|>", ("<|startoftext|>", *_PARTS), add_bos=False),
    "smollm2": Family(_SMOLLM, "<|im_start|>", "<|im_end|>", _QWEN, add_bos=False),
}  # fmt: skip


def write_family(path: Path, name: str, *, arch: str = "llama", **shape: Any) -> Path:
    """A tiny model with a family's vocabulary and template."""
    return write_like(path, arch, family={**FAMILIES, **NEWER}[name], **shape)


# ── architectures ─────────────────────────────────────────────────────────────────────────────────────────


def write_like(
    path: Path,
    arch: str,
    *,
    family: Family = FAMILIES["qwen2.5"],
    seed: int = 0,
    d: int = 32,
    layers: int = 2,
    ctx: int = 4096,
    window: int = 64,
    ranks: str = "",
) -> Path:
    """A random model of one of ARCHITECTURES with the vocabulary of a family. `window`: of its sliding layers. `ranks`:
    a template for pairs of texts; the model then scores such pairs."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(path.stem)
    writer.add_context_length(ctx)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_layer_norm_rms_eps(1e-5)
    vocab = (_spm if family.spm else _bpe)(writer, family)
    writer.add_vocab_size(len(vocab))
    writer.add_bos_token_id(vocab.index(family.bos))
    writer.add_eos_token_id(vocab.index(family.eos))
    writer.add_add_bos_token(family.add_bos)
    writer.add_chat_template(family.template)
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Any:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    writer.add_tensor("token_embd.weight", matrix(len(vocab), d, 3.0))
    writer.add_tensor("output_norm.weight", np.ones(d, np.float32))
    ARCHITECTURES[arch](writer, d, layers, window, matrix)
    if ranks:
        writer.add_uint32(f"{arch}.pooling_type", 4)
        writer.add_array(f"{arch}.classifier.output_labels", ["yes", "no"])
        writer.add_string("tokenizer.chat_template.rerank", ranks)
        writer.add_tensor("cls.output.weight", matrix(2, d))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Matrix = Callable[..., Any]


def _attention(writer: gguf.GGUFWriter, d: int, layers: int, matrix: Matrix, ones: tuple[str, ...]) -> None:
    heads, kv_heads, ff = 4, 2, 2 * d
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(ff)
    kv = d * kv_heads // heads
    shapes = {
        "attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, d),
        "ffn_gate": (ff, d), "ffn_up": (ff, d), "ffn_down": (d, ff),
    }  # fmt: skip
    for i in range(layers):
        for name, (rows, columns) in shapes.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", matrix(rows, columns))
        for name in ("attn_norm", "ffn_norm", *ones):
            width = d // heads if name in ("attn_q_norm", "attn_k_norm") else d
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))


def _llama(writer: gguf.GGUFWriter, d: int, layers: int, window: int, matrix: Matrix) -> None:
    writer.add_rope_dimension_count(d // 4)
    _attention(writer, d, layers, matrix, ())


def _gemma2(writer: gguf.GGUFWriter, d: int, layers: int, window: int, matrix: Matrix) -> None:
    writer.add_sliding_window(window)
    writer.add_key_length(d // 4)
    writer.add_value_length(d // 4)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    _attention(writer, d, layers, matrix, ("post_attention_norm", "post_ffw_norm"))


def _gemma3(writer: gguf.GGUFWriter, d: int, layers: int, window: int, matrix: Matrix) -> None:
    writer.add_sliding_window(window)
    writer.add_key_length(d // 4)
    writer.add_value_length(d // 4)
    _attention(writer, d, layers, matrix, ("post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"))


def _qwen3(writer: gguf.GGUFWriter, d: int, layers: int, window: int, matrix: Matrix) -> None:
    _attention(writer, d, layers, matrix, ("attn_q_norm", "attn_k_norm"))


def _mamba(writer: gguf.GGUFWriter, d: int, layers: int, window: int, matrix: Matrix) -> None:
    inner, state, rank, kernel = 2 * d, 8, 4, 4
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    for i in range(layers):
        block = f"blk.{i}"
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(d, np.float32))
        writer.add_tensor(f"{block}.ssm_in.weight", matrix(2 * inner, d))
        writer.add_tensor(f"{block}.ssm_conv1d.weight", matrix(inner, kernel))
        writer.add_tensor(f"{block}.ssm_conv1d.bias", np.zeros(inner, np.float32))
        writer.add_tensor(f"{block}.ssm_x.weight", matrix(rank + 2 * state, inner))
        writer.add_tensor(f"{block}.ssm_dt.weight", matrix(inner, rank))
        writer.add_tensor(f"{block}.ssm_dt.bias", np.zeros(inner, np.float32))
        writer.add_tensor(f"{block}.ssm_a", -np.abs(matrix(inner, state)))
        writer.add_tensor(f"{block}.ssm_d", np.ones(inner, np.float32))
        writer.add_tensor(f"{block}.ssm_out.weight", matrix(d, inner))


ARCHITECTURES = {"llama": _llama, "gemma2": _gemma2, "gemma3": _gemma3, "qwen3": _qwen3, "mamba": _mamba}


# ── vocabularies ──────────────────────────────────────────────────────────────────────────────────────────


def _bpe(writer: gguf.GGUFWriter, family: Family) -> list[str]:
    """Byte-level BPE as GPT-2's, Llama 3's and Qwen's."""
    names = byte_to_char()
    words = ["he", "th", "in", "er"]
    tokens = [*family.control, *family.defined, *(names[b] for b in range(256)), *words]
    types = [gguf.TokenType.CONTROL] * len(family.control) + [gguf.TokenType.USER_DEFINED] * len(family.defined)
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if "<|eot_id|>" in family.control else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{word[0]} {word[1]}" for word in words])
    return tokens


def _spm(writer: gguf.GGUFWriter, family: Family) -> list[str]:
    """SentencePiece with byte fallback as Mistral's and Gemma's."""
    plain = [chr(c) for c in range(33, 127)]
    words = ["\u2581", "\u2581the", "er", "in", "th", "he"]
    data = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", *family.control, *data, *words, *plain]
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * len(family.control)
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (len(words) + len(plain))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores(
        [0.0] * (len(tokens) - len(words) - len(plain)) + [-float(i) for i in range(len(words) + len(plain))]
    )
    writer.add_add_space_prefix(family.space_prefix)
    return tokens
