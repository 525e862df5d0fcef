"""A Reflexion agent with an evaluator of its own: it tries until its answer passes, and learns from each failure.

    aios-run --name learner examples/reflexion_agent.py "What is 37 * 91?"

An evaluator is a function of a trial; here it checks that the answer contains the number that Python computes. Where
there is no such check, `libaios.agents.reflexion.judging` asks the model. Lessons and verdicts are notes of the agent;
an agent with a --name has them again when it is started again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import libaios as aios
from libaios.agents.react import AgentError, Toolbox, calc
from libaios.agents.reflexion import Notes, Trial, Verdict, reflexion

QUESTION = "What is 37 * 91?"


def evaluate(trial: Trial) -> Verdict:
    """Whether the answer contains the value of the expression in the question."""
    expression = re.search(r"\d[\d\s+*/().-]*\d", trial.question)
    if expression is None:
        return Verdict(True, "there is nothing to compute")
    wanted = calc(expression[0])
    if wanted in trial.answer:
        return Verdict(True, "it is what Python computes")
    return Verdict(False, "the number is wrong; calc computes it")


def main() -> int:
    question = " ".join(sys.argv[1:]) or QUESTION

    def watch(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        answer = reflexion(question, aios.llm.chat, Toolbox(Path.cwd()), Notes(question), evaluate, watch=watch)
        print("answer:", answer)
    except AgentError as err:
        print(err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
