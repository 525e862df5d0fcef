"""Open-Interpreter as an agent: its tool is running code, here without asking.

    pip install open-interpreter litellm==1.83.0 'setuptools<81'
    aios-run -- /path/to/venv/bin/python examples/interpreter_agent.py

What a model writes is run as this user: the agent's sandbox is what keeps it in.
"""

from __future__ import annotations

from arithmetic import MODEL, QUESTION
from interpreter import interpreter


def main() -> None:
    interpreter.offline = interpreter.auto_run = True
    interpreter.llm.model = f"openai/{MODEL}"
    interpreter.llm.temperature = 0
    interpreter.llm.context_window, interpreter.llm.max_tokens = 2048, 128
    interpreter.llm.supports_functions = True
    # It waits for ever for a shell that its code has ended, as any code does in which bash finds a mistake.
    interpreter.computer.languages = [one for one in interpreter.computer.languages if one.name == "Python"]
    interpreter.system_message = "Answer briefly. Run code where you need to compute something."
    for message in interpreter.chat(QUESTION, display=False):
        if message["type"] == "code":
            print("tool:", message["format"], repr(message["content"]))
        elif message["role"] == "assistant":
            print("answer:", message["content"])


if __name__ == "__main__":
    main()
