"""LangGraph and LangChain as an agent: `create_agent`, whose graph alternates between model and tools.

pip install langchain langgraph langchain-openai
aios-run -- /path/to/venv/bin/python examples/langgraph_agent.py
"""

from __future__ import annotations

from arithmetic import MODEL, QUESTION, SYSTEM, calc
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


def main() -> None:
    model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=128)
    graph = create_agent(model, [tool(calc)], system_prompt=SYSTEM)
    state = graph.invoke({"messages": [("user", QUESTION)]}, {"recursion_limit": 8})
    print("answer:", state["messages"][-1].text)


if __name__ == "__main__":
    main()
