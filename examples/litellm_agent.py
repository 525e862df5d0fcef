"""litellm as an agent: a loop of our own around `litellm.completion`, and a streamed answer.

    pip install litellm
    aios-run -- /path/to/venv/bin/python examples/litellm_agent.py

litellm reads OPENAI_BASE_URL and OPENAI_API_KEY, which aios-run sets. Its names of models begin with the provider.
"""

from __future__ import annotations

import json
from typing import Any

import litellm
from arithmetic import MODEL, QUESTION, SYSTEM, calc

EXPRESSION = {"type": "string", "description": "for example 3 * 4", "maxLength": 30}
CALC: Any = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Computes arithmetic.",
        "parameters": {"type": "object", "properties": {"expression": EXPRESSION}, "required": ["expression"]},
    },
}


def main() -> None:
    model = f"openai/{MODEL}"
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    reply: Any = litellm.completion(model=model, messages=messages, tools=[CALC], tool_choice="required", temperature=0)
    messages.append(reply.choices[0].message)
    for call in messages[-1].tool_calls:
        result = calc(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print("answer: ", end="")
    for chunk in litellm.completion(
        model=model, messages=messages, tools=[CALC], tool_choice="none", temperature=0, max_tokens=64, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
