"""Open-Interpreter as an agent: its tool runs code, here without asking the user.

    pip install open-interpreter litellm==1.83.0 'setuptools<81'
    aios-run -- /path/to/venv/bin/python examples/interpreter_agent.py

The code that the model writes runs as this user; only the agent's sandbox confines it.
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
    # Python only: if code ends the shell (any syntax error does), Open-Interpreter waits for the shell for ever.
    interpreter.computer.languages = [one for one in interpreter.computer.languages if one.name == "Python"]
    interpreter.system_message = "Answer briefly. Run code where you need to compute something."
    for message in interpreter.chat(QUESTION, display=False):
        if message["type"] == "code":
            print("tool:", message["format"], repr(message["content"]))
        elif message["role"] == "assistant":
            print("answer:", message["content"])


if __name__ == "__main__":
    main()
