"""A Reflexion agent: it tries, is judged, writes down what it should do differently, and tries again.

    $ aios-run --name bob -m libaios.agents.reflexion --expect 3367 "What is 37 * 91?"
    The answer is 3367.

After Shinn et al., "Reflexion: Language Agents with Verbal Reinforcement Learning" (2023, arXiv:2303.11366). There are
three roles, all played by the same model: the *actor* answers (here the ReAct agent with its tools), the *evaluator*
judges the answer, *self-reflection* makes of trial and verdict a lesson in words. And there are three memories:

    trajectory    what the actor thought, called and observed in this trial; forgotten with it (short-term memory)
    lessons       what self-reflection wrote; the last `MOST_LESSONS` go into the next trial's prompt (long-term memory)
    verdicts      the answer of each trial and how it was judged: an answer that was wrong once is wrong again
                  without being judged, and self-reflection is shown how earlier trials went

The paper has the first two; the third is the evaluator's record, which it keeps in its training loop. Lessons and
verdicts are notes (`aios.mem`) of this question. So an agent with a name that is killed in its second trial, and
started again has the lesson of its first. The prompt of a trial never contains a verdict, or what was expected.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from libaios import mem
from libaios.agents import run, the_question
from libaios.agents.react import IN_TOOLBOX, AgentError, Chat, ChatMessage, Toolbox, Toolkit, react

MOST_LESSONS = 3  # the paper's Ω: more do not fit into a prompt, and help little
TRAJECTORY_CHARS = 4000  # the end of a trajectory, which self-reflection gets
LESSON_CHARS = 400

REFLECT = (
    "You are an agent that has failed a task. Say in one or two sentences why it went wrong, and what to do "
    "differently at the next attempt. Do not answer the task."
)
JUDGE = "You judge whether an answer to a task is correct and complete, given what was observed. Be strict."
VERDICT_SCHEMA = {
    "type": "object",
    "properties": {"correct": {"type": "boolean"}, "why": {"type": "string", "maxLength": 200}},
    "required": ["correct", "why"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Trial:
    """One attempt: its trajectory, line by line, and its answer (or why there is none)."""

    question: str
    trajectory: list[str]
    answer: str
    answered: bool


@dataclass(frozen=True)
class Verdict:
    correct: bool
    why: str


class Memory(Protocol):
    """What lasts beyond a trial; the oldest first."""

    def lessons(self) -> list[str]: ...

    def verdicts(self) -> list[tuple[str, Verdict]]:
        """Answers and how they were judged."""
        ...

    def keep_lesson(self, text: str) -> None: ...

    def keep_verdict(self, answer: str, verdict: Verdict) -> None: ...


class Notes:
    """The memory of one question as notes of the agent."""

    def __init__(self, question: str) -> None:
        self._tag = f"task-{hashlib.sha256(' '.join(question.split()).encode()).hexdigest()[:16]}"

    def lessons(self) -> list[str]:
        return [note.text for note in self._notes("lesson")]

    def verdicts(self) -> list[tuple[str, Verdict]]:
        notes = self._notes("verdict")
        return [(note.text, Verdict(bool(note.metadata["correct"]), str(note.metadata["why"]))) for note in notes]

    def keep_lesson(self, text: str) -> None:
        mem.add(text, tags=["reflexion", "lesson", self._tag])

    def keep_verdict(self, answer: str, verdict: Verdict) -> None:
        metadata = {"correct": verdict.correct, "why": verdict.why}
        mem.add(answer or "(none)", tags=["reflexion", "verdict", self._tag], metadata=metadata)

    def _notes(self, kind: str) -> list[mem.Note]:
        notes = mem.list(tags=["reflexion", kind, self._tag], limit=100)
        return [note for note in reversed(notes) if not note.damaged]


Evaluator = Callable[[Trial], Verdict]


def expecting(pattern: str) -> Evaluator:
    """An evaluator for a task whose solution is known: the answer must contain what this regular expression finds."""
    wanted = re.compile(pattern)

    def evaluate(trial: Trial) -> Verdict:
        if wanted.search(trial.answer):
            return Verdict(True, "as expected")
        return Verdict(False, "the answer is not the expected one")

    return evaluate


def judging(chat: Chat, max_tokens: int = 256) -> Evaluator:
    """An evaluator that asks the model."""

    def evaluate(trial: Trial) -> Verdict:
        shown = f"Task: {trial.question}\n\n{_shown(trial)}\n\nAnswer: {trial.answer}"
        messages = [{"role": "system", "content": JUDGE}, {"role": "user", "content": shown}]
        text = chat(messages, schema=VERDICT_SCHEMA, temperature=0.0, max_tokens=max_tokens).text
        try:
            found = json.loads(text)
            return Verdict(bool(found["correct"]), str(found["why"]))
        except (ValueError, KeyError, TypeError):
            return Verdict(False, "the evaluator gave no verdict")

    return evaluate


def reflexion(
    question: str,
    chat: Chat,
    toolkit: Toolkit,
    memory: Memory,
    evaluate: Evaluator,
    max_trials: int = 3,
    max_steps: int = 8,
    max_tokens: int = 512,
    watch: Callable[[str], None] = lambda line: None,
) -> str:
    """Answers a question. `watch` is called with all that happens. Raises AgentError when no trial was judged correct,
    and whatever `chat` and `memory` raise."""
    for number in range(1, max_trials + 1):
        watch(f"trial {number} of {max_trials}")
        trial = _try(question, chat, toolkit, memory.lessons()[-MOST_LESSONS:], max_steps, max_tokens, watch)
        verdict = _judge(trial, memory, evaluate)
        watch(f"verdict: {'correct' if verdict.correct else 'wrong'}: {verdict.why}")
        if verdict.correct:
            return trial.answer
        if number < max_trials:
            lesson = _reflect(trial, verdict, chat, memory, max_tokens)
            watch(f"lesson: {lesson}")
            memory.keep_lesson(lesson)
    raise AgentError(f"no answer was judged correct in {max_trials} trials; the last one: {trial.answer}")


def _try(
    question: str,
    chat: Chat,
    toolkit: Toolkit,
    lessons: Sequence[str],
    max_steps: int,
    max_tokens: int,
    watch: Callable[[str], None],
) -> Trial:
    """Run the actor with the lessons so far."""
    trajectory: list[str] = []

    def note(line: str) -> None:
        trajectory.append(line)
        watch(line)

    try:
        answer = react(question, chat, toolkit, max_steps, max_tokens, note, lessons)
        return Trial(question, trajectory, answer, True)
    except AgentError as err:
        return Trial(question, trajectory, str(err), False)


def _judge(trial: Trial, memory: Memory, evaluate: Evaluator) -> Verdict:
    """Judge the trial and keep the verdict. An answer that was judged wrong before is wrong: the evaluator is not
    called."""
    before = next((old for answer, old in memory.verdicts() if answer == trial.answer and not old.correct), None)
    if not trial.answered:
        verdict = Verdict(False, f"there was no answer: {trial.answer}")
    elif before is not None:
        verdict = Verdict(False, f"the same answer was wrong before: {before.why}")
    else:
        verdict = evaluate(trial)
    memory.keep_verdict(trial.answer, verdict)
    return verdict


def _reflect(trial: Trial, verdict: Verdict, chat: Chat, memory: Memory, max_tokens: int) -> str:
    """The lesson of a trial that went wrong."""
    earlier = [f"- {answer}: {old.why}" for answer, old in memory.verdicts()[:-1]]
    parts = [f"Task: {trial.question}", _shown(trial), f"Answer: {trial.answer}", f"Verdict: {verdict.why}"]
    parts += ["Earlier answers, all wrong:\n" + "\n".join(earlier[-MOST_LESSONS:])] if earlier else []
    messages: list[ChatMessage] = [
        {"role": "system", "content": REFLECT},
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
    ]
    text = " ".join(chat(messages, temperature=0.0, max_tokens=max_tokens).text.split())[:LESSON_CHARS]
    return text or f"The answer {trial.answer!r} was wrong: {verdict.why}. Try another way."


def _shown(trial: Trial) -> str:
    return "\n".join(trial.trajectory)[-TRAJECTORY_CHARS:]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("question", nargs=-1)
@click.option("-v", "--verbose", is_flag=True, help="Show trials, verdicts and lessons on stderr.")
@click.option("--expect", metavar="REGEX", help="What a correct answer contains; else the model judges its answers.")
@click.option("--max-trials", default=3, show_default=True, type=click.IntRange(1), help="Attempts at most.")
@click.option("--max-steps", default=8, show_default=True, type=click.IntRange(1), help="Turns of one attempt.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1), help="Tokens of one turn.")
@click.option(
    "--folder", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Work on the files of this folder."
)
@click.option("--tool", "tools", multiple=True, metavar="NAME", help="Offer this tool, too (aiosd tools lists them).")
@click.option("--model", default=None, help="Which model to ask; the first one loaded by default.")
def main(
    question: tuple[str, ...],
    verbose: bool,
    expect: str | None,
    max_trials: int,
    max_steps: int,
    max_tokens: int,
    folder: Path | None,
    tools: tuple[str, ...],
    model: str | None,
) -> None:
    """Answer QUESTION (or the text on stdin), and learn from attempts that were judged wrong.

    Lessons and verdicts are notes of the agent: with a --name they are there when it is started again.

    \b
    aios-run --name bob -m libaios.agents.reflexion --expect 3367 "What is 37 * 91?"
    aios-run --name bob -m libaios.agents.reflexion -v "Read a.txt and double the number in it."
    """
    import libaios as aios  # here, since the loop can be used without a kernel

    def chat(messages: list[ChatMessage], **options: Any) -> Any:
        return aios.llm.chat(messages, model=model, **options)

    text = the_question(question)
    if taken := [name for name in tools if name in IN_TOOLBOX]:
        raise click.UsageError(f"--tool {taken[0]}: the agent has a tool of this name already")
    try:
        evaluate = expecting(expect) if expect is not None else judging(chat)
    except re.error as err:
        raise click.UsageError(f"--expect {expect}: {err}") from None
    try:
        watch = (lambda line: print(line, file=sys.stderr, flush=True)) if verbose else (lambda line: None)
        toolkit = Toolbox(folder, more=aios.tool.known(tools) if tools else ())
        print(reflexion(text, chat, toolkit, Notes(text), evaluate, max_trials, max_steps, max_tokens, watch))
    except (AgentError, OSError, UnicodeDecodeError) as err:
        print(f"reflexion: {err}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
