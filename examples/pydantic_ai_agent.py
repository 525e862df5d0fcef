"""pydantic-ai as an agent: it calls a tool, and answers with text.

pip install 'pydantic-ai-slim[openai]'
aios-run -- /path/to/venv/bin/python examples/pydantic_ai_agent.py
"""

from __future__ import annotations

from arithmetic import MODEL, QUESTION, SYSTEM, calc
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel


def main() -> None:
    settings = {"temperature": 0.0, "max_tokens": 128}
    agent = Agent(OpenAIChatModel(MODEL), system_prompt=SYSTEM, tools=[calc], model_settings=settings)
    print("answer:", agent.run_sync(QUESTION).output)


if __name__ == "__main__":
    main()
