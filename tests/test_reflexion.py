"""The Reflexion agent: its loop with scripted models, its memories in a real system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libaios.agents.react import AgentError, Toolkit
from libaios.agents.reflexion import MOST_LESSONS, Trial, Verdict, expecting, judging, reflexion
from tests.conftest import System
from tests.test_react import Call, Reply, Script


class Kept:
    """A memory in a list."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.judged: list[tuple[str, Verdict]] = []

    def lessons(self) -> list[str]:
        return self.texts

    def verdicts(self) -> list[tuple[str, Verdict]]:
        return self.judged

    def keep_lesson(self, text: str) -> None:
        self.texts.append(text)

    def keep_verdict(self, answer: str, verdict: Verdict) -> None:
        self.judged.append((answer, verdict))


def never(trial: Trial) -> Verdict:
    return Verdict(False, "no")


def test_a_lesson_goes_into_the_next_trial(tmp_path: Path) -> None:
    memory = Kept()
    call = Reply("I guess.", [Call("calc", {"expression": "2 + 2"})])
    script = Script(call, Reply("5"), Reply("Use\n the tool."), Reply("4"))
    assert reflexion("2 + 2?", script, Toolkit(tmp_path), memory, expecting("4")) == "4"
    first, second_turn, reflecting, second = script.asked
    assert "Learnt" not in first[0]["content"]
    shown = reflecting[1]["content"]
    assert all(part in shown for part in ("2 + 2?", "thought: I guess.", "observation: 4", "Answer: 5"))
    assert second[0]["content"].endswith("Learnt from earlier attempts:\n- Use the tool.")
    assert len(second) == 2  # the trajectory of the first trial is not in the prompt
    assert memory.texts == ["Use the tool."]
    assert [(answer, verdict.correct) for answer, verdict in memory.judged] == [("5", False), ("4", True)]
    assert second_turn[-1]["role"] == "tool"


def test_only_the_last_lessons_are_shown(tmp_path: Path) -> None:
    memory = Kept()
    memory.texts = [f"lesson {n}" for n in range(MOST_LESSONS + 2)]
    script = Script(Reply("x"))
    with pytest.raises(AgentError, match="in 1 trials; the last one: x"):
        reflexion("?", script, Toolkit(tmp_path), memory, never, max_trials=1)
    shown = script.asked[0][0]["content"]
    assert [f"lesson {n}" in shown for n in range(MOST_LESSONS + 2)] == [False] * 2 + [True] * MOST_LESSONS


def test_the_same_wrong_answer_is_not_judged_again(tmp_path: Path) -> None:
    judged = []

    def evaluate(trial: Trial) -> Verdict:
        judged.append(trial.answer)
        return Verdict(False, "no")

    script = Script(Reply("x"), Reply("think"), Reply("x"), Reply("think harder"), Reply("y"))
    with pytest.raises(AgentError):
        reflexion("?", script, Toolkit(tmp_path), Kept(), evaluate)
    assert judged == ["x", "y"]
    assert "- x: no" in script.asked[3][1]["content"]  # the lesson of the trial before


def test_a_trial_without_an_answer_is_a_failed_one(tmp_path: Path) -> None:
    memory = Kept()
    script = Script(Reply("x", finish_reason="length"), Reply(""), Reply("4"))
    assert reflexion("?", script, Toolkit(tmp_path), memory, expecting("4")) == "4"
    assert "cut off" in memory.judged[0][1].why
    assert "cut off" in memory.texts[0]  # self-reflection gave no lesson


@pytest.mark.parametrize(
    ("text", "correct"),
    [('{"correct": true, "why": "x"}', True), ('{"correct": false, "why": "x"}', False), ("{", False), ("[]", False)],
)
def test_the_model_as_the_judge(text: str, correct: bool) -> None:
    script = Script(Reply(text))
    assert judging(script)(Trial("2 + 2?", ["call: calc"], "4", True)).correct is correct
    assert all(part in script.asked[0][1]["content"] for part in ("2 + 2?", "call: calc", "Answer: 4"))
    assert script.options[0]["schema"]["required"] == ["correct", "why"]


def test_the_example(aiosd: System) -> None:
    path = Path(__file__).parent.parent / "examples" / "reflexion_agent.py"
    done = aiosd.run("aios-run", path)
    assert (done.returncode, done.stdout) == (0, "answer: The answer is 3367.\n")
    assert "verdict: correct: it is what Python computes" in done.stderr


AGENT = ("-m", "libaios.agents.reflexion", "-v")


def test_with_the_embedded_model(aiosd: System) -> None:
    """An agent whose answers never pass notes lessons, and has them when it is started again."""
    done = aiosd.run("aios-run", *AGENT, "--expect", "3367", "What is 37 * 91?")
    assert (done.returncode, "3367" in done.stdout, "trial 2" in done.stderr) == (0, True, False)
    wrong = ("aios-run", "--name", "learner", *AGENT, "--expect", "nothing", "--max-trials", "2", "What is 37 * 91?")
    first = aiosd.run(*wrong)
    assert (first.returncode, first.stdout, first.stderr.count("lesson: ")) == (1, "", 1)
    lesson = next(line for line in first.stderr.splitlines() if line.startswith("lesson: "))
    again = aiosd.run("aios-run", "--name", "learner", "-", input=READ)
    kept = json.loads(again.stdout)
    assert kept["lessons"] == [lesson.removeprefix("lesson: ")]
    assert kept["verdicts"] == [False, False]
    assert kept["of another"] == []


READ = """
import json
from libaios import mem
from libaios.agents.reflexion import Notes
notes = Notes("What is  37 * 91?")
found = {"lessons": notes.lessons(), "verdicts": [verdict.correct for _, verdict in notes.verdicts()]}
print(json.dumps(found | {"of another": Notes("Another?").lessons()}))
mem.clear()
"""
