"""smolagents as an agent: its own loop of thoughts and tools, on the model that aiosd shares.

    pip install 'smolagents[openai]'
    aios-run --tokens 20k -- /path/to/venv/bin/python examples/smolagents_agent.py

A ToolCallingAgent sends `tool_choice: required`, so each of its steps is a valid call, whatever the model.
"""

from __future__ import annotations

import os

from arithmetic import MODEL, QUESTION, calc
from smolagents import OpenAIModel, ToolCallingAgent, tool


def main() -> None:
    model = OpenAIModel(model_id=MODEL, api_base=os.environ["OPENAI_BASE_URL"], max_tokens=200)
    agent = ToolCallingAgent(tools=[tool(calc)], model=model, max_steps=2, verbosity_level=0)
    print("answer:", agent.run(QUESTION))
    print("steps:", len(agent.memory.steps))


if __name__ == "__main__":
    main()
