"""openai-agents as an agent: a Runner that calls model and tools until there is a final output.

    pip install openai-agents
    aios-run -- /path/to/venv/bin/python examples/openai_agents_agent.py

By default it uses the responses API; this example chooses chat completions. aiosd serves both.
"""

from __future__ import annotations

from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_api
from arithmetic import MODEL, QUESTION, SYSTEM, calc


def main() -> None:
    set_default_openai_api("chat_completions")
    settings = ModelSettings(temperature=0, max_tokens=128)
    agent = Agent(
        name="assistant", instructions=SYSTEM, model=MODEL, tools=[function_tool(calc)], model_settings=settings
    )
    print("answer:", Runner.run_sync(agent, QUESTION, max_turns=8).final_output)


if __name__ == "__main__":
    main()
