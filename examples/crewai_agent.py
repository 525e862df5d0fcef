"""CrewAI as an agent: a crew of one, with one task.

    pip install crewai
    aios-run -- /path/to/venv/bin/python examples/crewai_agent.py

aios-run switches CrewAI's telemetry off, which it would send as soon as it is imported. A model whose name CrewAI does
not know needs `provider`; without it CrewAI looks for litellm.
"""

from __future__ import annotations

from arithmetic import MODEL, QUESTION, SYSTEM, calc
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool


def main() -> None:
    model = LLM(model=MODEL, provider="openai", temperature=0, max_tokens=128)
    agent = Agent(role="assistant", goal="Answer briefly.", backstory=SYSTEM, llm=model, tools=[tool(calc)], max_iter=4)
    task = Task(description=QUESTION, expected_output="A number.", agent=agent)
    print("answer:", Crew(agents=[agent], tasks=[task]).kickoff().raw)


if __name__ == "__main__":
    main()
