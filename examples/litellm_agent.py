"""litellm as an agent: one call whole, one in parts, one with tools.

    pip install litellm
    aios-run -- /path/to/venv/bin/python examples/litellm_agent.py

litellm reads OPENAI_BASE_URL and OPENAI_API_KEY, which aios-run sets, and names models with their provider in front.
"""

from __future__ import annotations

from typing import Any

import litellm

MODEL = "openai/local"  # no model's name here, so the default one answers
HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
STOP: Any = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}


def main() -> None:
    answer: Any = litellm.completion(model=MODEL, messages=HELLO, max_tokens=16)
    print("answer:", answer.choices[0].message.content)

    print("stream: ", end="")
    for chunk in litellm.completion(model=MODEL, messages=HELLO, max_tokens=16, stream=True):
        print(chunk.choices[0].delta.content or "", end="")
    print()

    call: Any = litellm.completion(model=MODEL, messages=HELLO, tools=[STOP], tool_choice="required")
    print("call:", call.choices[0].message.tool_calls[0].function.name)


if __name__ == "__main__":
    main()
