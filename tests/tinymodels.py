"""GGUF files for tests, made in a fraction of a second from a seed: random weights, a real tokenizer.

A tiny model speaks nonsense, but deterministic nonsense: what the engine does with it (batching, parking,
grammars, stop strings) can be checked token by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.models import write_llama

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'bad' %}{{- raise_exception('Roles must be user or assistant.') }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write(path: Path, *, template: str | None = CHATML, **shape: Any) -> Path:
    """A model of some 100,000 parameters (see `benchmarks.models.write_llama` for what `shape` may say)."""
    return write_llama(path, template=template, **shape)
