"""AutoGen 0.7 as an agent: an AssistantAgent with a tool, which answers from the tool's result.

    pip install autogen-agentchat 'autogen-ext[openai]'
    aios-run -- venv/bin/python examples/autogen_agent.py
    aios-run --preload autogen_agentchat.agents,autogen_ext.models.openai --python venv examples/autogen_agent.py

A model that AutoGen does not know must be described to it (`model_info`).
"""

from __future__ import annotations

import asyncio

from arithmetic import MODEL, QUESTION, SYSTEM, calc
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = ModelInfo(vision=False, function_calling=True, json_output=True, structured_output=True, family="unknown")


async def main() -> None:
    client = OpenAIChatCompletionClient(model=MODEL, model_info=INFO, temperature=0, max_tokens=128)
    agent = AssistantAgent(
        "assistant", model_client=client, tools=[calc], system_message=SYSTEM, reflect_on_tool_use=True
    )
    result = await agent.run(task=QUESTION)
    print("answer:", result.messages[-1].to_text())
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
