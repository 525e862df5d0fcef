"""The chat template of nano, and its rendering for training. The GGUF carries the same text.

It is ChatML, with tool calls as Hermes and Qwen2.5 write them, so a parser for that family reads nano's calls. It
differs in two ways. Tools are listed by name and parameters only, which keeps prompts short. Arguments that are strings
are quoted by hand, because `tojson` differs between renderers (Jinja escapes `<`, `'` and what is not ASCII).
"""

from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

ChatMessage = dict[str, Any]

SYSTEM = "You are a helpful agent."

CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = 'You are a helpful agent.' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\nTools:' }}
    {%- for tool in tools %}
        {%- set function = tool['function'] if tool['function'] is defined else tool %}
        {{- '\\n' + function['name'] + '(' }}
        {%- for name in (function['parameters'] or {}).get('properties', {}) %}
            {{- name if loop.first else ', ' + name }}
        {%- endfor %}
        {{- ')' }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in rest %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'tool' %}
        {{- '<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
    {%- else %}
        {%- if message['content'] %}
            {{- message['content'] }}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] if call['function'] is defined else call %}
            {{- '\\n' if message['content'] or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' }}
            {%- if function['arguments'] is string %}
                {{- function['arguments'] }}
            {%- else %}
                {{- '{' }}
                {%- for name, value in function['arguments'].items() %}
                    {{- '"' if loop.first else ', "' }}
                    {{- name + '": ' }}
                    {%- if value is string %}
                        {{- '"' + (value | replace('\\\\', '\\\\\\\\') | replace('"', '\\\\"') |
                            replace('\\n', '\\\\n') | replace('\\t', '\\\\t')) + '"' }}
                    {%- else %}
                        {{- value | tojson }}
                    {%- endif %}
                {%- endfor %}
                {{- '}' }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_TEMPLATE = _ENVIRONMENT.from_string(CHAT_TEMPLATE)


def render(messages: list[ChatMessage], tools: list[dict[str, Any]] | None, generate: bool = False) -> str:
    """The text of a conversation. `generate`: it ends with the beginning of the assistant's next turn."""
    return _TEMPLATE.render(
        messages=messages,
        tools=tools,
        add_generation_prompt=generate,
        bos_token="",
        eos_token="<|im_end|>",
    )
