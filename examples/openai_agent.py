"""An agent that does not use libaios, only the official client of OpenAI's API.

    pip install openai
    aios-run examples/openai_agent.py                         # in aiosd's own environment
    aios-run -- /path/to/venv/bin/python examples/openai_agent.py

It needs no settings: aios-run puts address and key into its environment.
"""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

client = OpenAI()
QUESTION: list[Any] = [{"role": "user", "content": "What is 6 * 7?"}]
DIGITS = {"type": "integer", "minimum": 0, "maximum": 99}
MULTIPLY: Any = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {"type": "object", "properties": {"a": DIGITS, "b": DIGITS}, "required": ["a", "b"]},
    },
}
NUMBER: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "number",
        "strict": True,
        "schema": {"type": "object", "properties": {"number": DIGITS}, "required": ["number"]},
    },
}


def main() -> None:
    model = client.models.list().data[0].id
    print("model:", model)

    print("stream: ", end="")
    for chunk in client.chat.completions.create(model=model, messages=QUESTION, max_tokens=16, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    choice = client.chat.completions.create(
        model=model, messages=QUESTION, tools=[MULTIPLY], tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    call: Any = (choice.message.tool_calls or [])[0]
    factors = json.loads(call.function.arguments)
    print("call:", call.function.name, sorted(factors))
    result = {"role": "tool", "tool_call_id": call.id, "content": str(factors["a"] * factors["b"])}
    answer = client.chat.completions.create(
        model=model, messages=[*QUESTION, choice.message, result], tools=[MULTIPLY], tool_choice="none", max_tokens=16
    )
    print("answer:", answer.choices[0].message.content)

    form = client.chat.completions.create(model=model, messages=QUESTION, response_format=NUMBER)
    print("form:", sorted(json.loads(form.choices[0].message.content or "{}")))

    vectors = client.embeddings.create(model=model, input=["one", "two"]).data
    print("vectors:", len(vectors), "of", len(vectors[0].embedding))

    response = client.responses.create(model=model, input="Hello!", max_output_tokens=16)
    print("response:", response.output_text)


if __name__ == "__main__":
    main()
