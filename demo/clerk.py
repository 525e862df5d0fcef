"""An agent that works through a list: one question a line on stdin, its answer on stdout.

    $ aios-run --name adder clerk.py < adder.txt

What stands after `=>` is what a right answer contains; the clerk marks it and counts. It keeps its notes from
one question to the next, and its files are those of the folder it runs in.
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
