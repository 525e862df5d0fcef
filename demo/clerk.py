"""An agent that works through a list: it reads one question per line from stdin, and prints the answers.

    $ aios-run --name adder clerk.py < adder.txt

A right answer contains the text after `=>`; the agent marks its answers and counts the right ones. Notes are kept from
one question to the next. Files are those of the folder in which it runs.
"""

import sys
from pathlib import Path

import libaios as aios
from libaios.agents import react


def main() -> None:
    toolkit = react.Toolkit(Path.cwd())
    tasks = [line.split("=>") for line in sys.stdin if line.strip()]
    solved = 0
    for question, expected in tasks:
        answer = ask(question.strip(), toolkit)
        right = expected.strip().lower() in answer.lower()
        solved += right
        print("✓" if right else "✗", question.strip(), "→", answer, flush=True)
    print(f"  {solved} of {len(tasks)} solved")


def ask(question: str, toolkit: react.Toolkit) -> str:
    try:
        return react.react(question, aios.llm.chat, toolkit)
    except react.AgentError as err:
        return f"({err})"


if __name__ == "__main__":
    main()
