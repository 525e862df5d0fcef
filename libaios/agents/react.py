"""A ReAct agent: it thinks, acts with a tool, observes the result, and goes on until it can answer.

    $ aios-run -m libaios.agents.react "What is 37 * 91?"
    The answer is 3367.

`react()` is the whole loop. It takes a `chat` callable (`aios.llm.chat`, or a script in a test) and a `Toolkit`, and
works with any chat model that can call tools. The tools are arithmetic, notes and files, and there are two sets of
them:

    Toolbox    used by the command. Each tool is done by a tool of aiosd's toolbox (`aios.tool`; `IN_TOOLBOX` lists
               which). So limits, access rules and denials hold as for any agent, and an agent that is started again
               under its name has its notes and files again
    Toolkit    plain functions inside this process, over a list of notes and a folder of files

Input from the model is untrusted: arithmetic is bounded in size and never done by `eval`, and no path leads out of the
folder. When a tool fails or is denied, the model gets the reason as an observation and decides what to do. The loop
itself ends with an answer or with an `AgentError`.
"""

import errno
import os
import posixpath
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import click

from libaios import arithmetic, sto, tool
from libaios.agents import run, the_question
from libaios.loop import observation

SYSTEM = "You are a helpful agent. Think, use a tool when you need one, and then answer briefly."

ChatMessage = dict[str, Any]


class AgentError(Exception):
    """The agent cannot answer; the text is the reason, for a person."""


class ToolError(Exception):
    """A tool cannot do what the model asked for; the text is for the model."""


# --- calc -----------------------------------------------------------------------------------------


def calc(expression: str) -> str:
    """As `arithmetic.calc`. Raises ToolError."""
    try:
        return arithmetic.calc(expression)
    except ValueError as err:
        raise ToolError(str(err)) from None


# --- notes ----------------------------------------------------------------------------------------

_SMALL_WORDS = frozenset((
    "a", "an", "the", "is", "are", "was", "were", "am", "be", "of", "to", "in", "on", "at", "for", "and", "or",
    "do", "does", "did", "what", "which", "who", "whose", "when", "where", "why", "how", "i", "my", "me", "mine",
    "you", "your", "we", "our", "us", "it", "its", "that", "this", "about", "note", "notes", "tell", "told",
    "know", "much", "remember", "recall", "have", "has", "had", "please", "many", "there",
))  # fmt: skip
_VAGUE_WORDS = frozenset(("name", "named", "called", "all", "everything", "anything"))


def _words(text: str) -> list[str]:
    return [w.removesuffix("'s") for w in re.findall(r"[^\W_]+(?:'\w+)?", text.lower().replace("’", "'"))]


def _alike(a: str, b: str) -> bool:
    """Whether one word is probably a form of the other, as `park` and `parked`, `ticket` and `tickets`."""
    return a == b or (min(len(a), len(b)) >= 4 and (a.startswith(b) or b.startswith(a)))


def search(notes: Sequence[str], query: str) -> list[str]:
    """The note that has most of the query's keywords, and at least half of them; a word that few notes have counts
    more. Of equal notes the newest is taken. A query without keywords, such as "everything", finds all notes."""
    words = [w for w in _words(query) if w not in _SMALL_WORDS]
    telling = [w for w in words if w not in _VAGUE_WORDS] or [w for w in words if w.startswith("name")]
    if not telling:
        return list(notes)
    contents = [_words(note) for note in notes]
    hits = [{w for w in telling if any(_alike(w, c) for c in content)} for content in contents]
    spread = {w: sum(w in h for h in hits) for w in telling}
    best = max(range(len(notes)), default=None, key=lambda i: (sum(1 / spread[w] for w in hits[i]), i))
    if best is None or 2 * len(hits[best]) < len(set(telling)):
        return []
    return [notes[best]]


# --- the five tools -------------------------------------------------------------------------------

MAX_FILE = 100_000  # bytes
MAX_NOTES = 50  # that one call of the toolbox lists or finds


class Toolkit:
    """The tools over one folder and one list of notes. Every tool takes and returns text or raises ToolError. `tools`:
    the descriptions that the model gets."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        return TOOLS

    def __init__(self, folder: Path, notes_file: Path | None = None) -> None:
        self.folder = folder.resolve()
        self.notes_file = notes_file
        self.notes: list[str] = []
        if notes_file is not None and notes_file.exists():
            self.notes = [line for line in notes_file.read_text("utf-8").splitlines() if line.strip()]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """One tool call as the model wrote it, and the observation it gets; a failure reads `error: …`."""
        tools: dict[str, Callable[..., str]] = {
            "calc": self.calc,
            "remember": self.remember,
            "recall": self.recall,
            "read_file": self.read_file,
            "write_file": self.write_file,
        }
        try:
            if name not in tools:
                raise ToolError(f"no such tool: {name}")
            wanted = PARAMETERS[name]
            if set(arguments) != set(wanted) or not all(isinstance(v, str) for v in arguments.values()):
                raise ToolError(f"{name} takes {' and '.join(wanted)}, as text")
            return tools[name](**arguments)
        except ToolError as e:
            return f"error: {e}"

    def calc(self, expression: str) -> str:
        return calc(expression)

    def remember(self, text: str) -> str:
        note = " ".join(text.split())
        if not note:
            raise ToolError("nothing to remember")
        if self.notes_file is not None:
            try:
                with self.notes_file.open("a", encoding="utf-8") as f:
                    f.write(note + "\n")
            except OSError as e:
                raise ToolError(f"cannot keep notes: {e.strerror}") from e
        self.notes.append(note)
        return "ok"

    def recall(self, query: str) -> str:
        return "\n".join(search(self.notes, query)) or "nothing found"

    def read_file(self, path: str) -> str:
        try:
            with self._inside(path).open("rb") as f:
                data = f.read(MAX_FILE + 1)
        except OSError as e:
            raise _file_error(path, e) from e
        if len(data) > MAX_FILE:
            raise ToolError(f"file too large: {path}")
        try:
            return data.decode().rstrip("\n")
        except UnicodeDecodeError:
            raise ToolError(f"not a text file: {path}") from None

    def write_file(self, path: str, content: str) -> str:
        target = self._inside(path)
        if len(content.encode()) > MAX_FILE:
            raise ToolError("content too large")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content + "\n", "utf-8")
        except OSError as e:
            raise _file_error(path, e) from e
        return "ok"

    def _inside(self, path: str) -> Path:
        """The file that `path` names, links followed. It must lie in the folder."""
        try:
            target = (self.folder / path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
            raise ToolError(f"not a path: {path!r}") from None
        if not target.is_relative_to(self.folder):
            raise ToolError(f"outside the working folder: {path}")
        return target


#: For each tool of the agent, the tools of the toolbox that do it. The embedded model has learnt these five names,
#: their arguments (`TOOLS`) and how their observations are worded, and knows no others; so calls and results are
#: translated.
IN_TOOLBOX = {
    "calc": ("calc",),
    "remember": ("remember",),
    "recall": ("list_notes", "search_notes"),
    "read_file": ("read_stored",),
    "write_file": ("write_stored",),
}


class Toolbox(Toolkit):
    """The same tools, done by the toolbox, and `more` of its tools, which the model is offered as they are.

    Files belong to the agent's name; those of an agent without a name would end with it, so they belong to its group. A
    file that is not stored is read from the working folder, as this process may read it. With `folder` the files, with
    `notes_file` the notes are real files instead, as in `Toolkit`. Errors that concern the agent and not the tool (a
    budget, a lost connection) are raised."""

    def __init__(
        self, folder: Path | None = None, notes_file: Path | None = None, more: Sequence[tool.ToolInfo] = ()
    ) -> None:
        super().__init__(folder or Path.cwd(), notes_file)
        self.files_stored, self.notes_stored = folder is None, notes_file is None
        self.more = {info.name: info for info in more if info.name not in IN_TOOLBOX}
        self._space: str | None = None

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [*TOOLS, *map(tool.function_of, self.more.values())] if self.more else TOOLS

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self.more:
            return super().call(name, arguments)
        try:
            return tool.result_text(tool.call(name, arguments))
        except OSError as err:
            return observation(err)

    def calc(self, expression: str) -> str:
        return str(_done("calc", expression=expression))

    def remember(self, text: str) -> str:
        if not self.notes_stored:
            return super().remember(text)
        note = " ".join(text.split())
        if not note:
            raise ToolError("nothing to remember")
        _done("remember", text=note)
        return "ok"

    def recall(self, query: str) -> str:
        """From the newest notes, and of many those that fit the query, the one with most of its keywords."""
        if self.notes_stored:
            found = _done("list_notes", limit=MAX_NOTES)
            if len(found) == MAX_NOTES:
                found += _done("search_notes", query=query, k=MAX_NOTES)
            texts = {note["id"]: note["text"] for note in found if not note.get("damaged")}
            self.notes = [text for _, text in sorted(texts.items())]
        return super().recall(query)

    def read_file(self, path: str) -> str:
        if not self.files_stored:
            return super().read_file(path)
        try:
            text = str(_called("read_stored", path=self._stored(path), of=self._whose()))
        except FileNotFoundError:
            return super().read_file(path)
        except OSError as err:
            raise _file_error(path, err) from err
        if len(text.encode()) > MAX_FILE:
            raise ToolError(f"file too large: {path}")
        return text.rstrip("\n")

    def write_file(self, path: str, content: str) -> str:
        if not self.files_stored:
            return super().write_file(path, content)
        if len(content.encode()) > MAX_FILE:
            raise ToolError("content too large")
        try:
            _called("write_stored", path=self._stored(path), content=content + "\n", of=self._whose())
        except OSError as err:
            raise _file_error(path, err) from err
        return "ok"

    def _whose(self) -> str:
        if self._space is None:
            self._space = "" if sto.stats()["lasting"] else "group"
        return self._space

    @staticmethod
    def _stored(path: str) -> str:
        name = posixpath.normpath(path)
        if name.startswith(("/", "../")) or name == "..":
            raise ToolError(f"outside the working folder: {path}")
        return name


def _called(name: str, **arguments: Any) -> Any:
    """Call a tool of the toolbox. Raises OSError."""
    return tool.call(name, arguments)


def _done(name: str, **arguments: Any) -> Any:
    """The same, but an error is a ToolError with the toolbox's message, for the model."""
    try:
        return _called(name, **arguments)
    except OSError as err:
        raise ToolError(observation(err).removeprefix("error: ")) from err


def _file_error(path: str, error: OSError) -> ToolError:
    """The error as the model gets it (a denial names its rule). Raises the error itself if it concerns the agent."""
    words = observation(error).removeprefix("error: ")
    if isinstance(error, PermissionError) and error.filename is None:
        return ToolError(words)
    if isinstance(error, FileNotFoundError):
        return ToolError(f"no such file: {path}")
    return ToolError(f"{os.strerror(error.errno or errno.EIO).lower()}: {path}")


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {p: {"type": "string", "description": d} for p, d in parameters.items()}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(parameters),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    _tool("calc", "Computes arithmetic.", expression="for example (3 + 4) * 2.5"),
    _tool("remember", "Keeps a note.", text="the fact to keep, as a sentence"),
    _tool("recall", "Finds a note.", query="what the note is about"),
    _tool("read_file", "Reads a text file of the working folder.", path="the file's name"),
    _tool("write_file", "Writes a text file.", path="the file's name", content="the whole text"),
]
PARAMETERS = {t["function"]["name"]: t["function"]["parameters"]["required"] for t in TOOLS}


# --- the loop -------------------------------------------------------------------------------------


class ChatToolCall(Protocol):
    id: str
    name: str
    arguments: dict[str, Any]


class ChatReply(Protocol):
    """The part of a chat's result that the loop reads; the result of `aios.llm.chat` has it."""

    text: str
    tool_calls: Sequence[Any]  # of ChatToolCall
    finish_reason: str


Chat = Callable[..., Any]  # (messages, tools=…, temperature=…, max_tokens=…) -> ChatReply


def react(
    question: str,
    chat: Chat,
    toolkit: Toolkit,
    max_steps: int = 8,
    max_tokens: int = 512,
    watch: Callable[[str], None] = lambda line: None,
    lessons: Sequence[str] = (),
) -> str:
    """Answers a question. `watch` is called with every thought, call and observation; `lessons` are what the agent has
    learnt before. Raises AgentError when the model finds no answer in `max_steps` turns or is cut off, and whatever
    `chat` raises."""
    learnt = "".join(f"\n- {lesson}" for lesson in lessons)
    system = f"{SYSTEM}\nLearnt from earlier attempts:{learnt}" if lessons else SYSTEM
    messages: list[ChatMessage] = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    for _ in range(max_steps):
        reply: ChatReply = chat(messages, tools=toolkit.tools, temperature=0.0, max_tokens=max_tokens)
        if not reply.tool_calls:
            if reply.finish_reason == "length":
                raise AgentError(f"the model was cut off after {max_tokens} tokens")
            return reply.text.strip()
        if reply.text.strip():
            watch(f"thought: {reply.text.strip()}")
        messages.append(_as_message(reply))
        for call in reply.tool_calls:
            watch(f"call: {call.name} {call.arguments}")
            observation = toolkit.call(call.name, call.arguments)
            watch(f"observation: {observation}")
            messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": observation})
    raise AgentError(f"no answer after {max_steps} steps")


def _as_message(reply: ChatReply) -> ChatMessage:
    calls = [
        {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
        for c in reply.tool_calls
    ]
    return {"role": "assistant", "content": reply.text.strip(), "tool_calls": calls}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("question", nargs=-1)
@click.option("-v", "--verbose", is_flag=True, help="Show thoughts, calls and observations on stderr.")
@click.option("--max-steps", default=8, show_default=True, type=click.IntRange(1), help="Turns of the model at most.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1), help="Tokens of one turn.")
@click.option("--notes", type=click.Path(dir_okay=False, path_type=Path), help="Keep notes in this file instead.")
@click.option(
    "--folder", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Work on the files of this folder."
)
@click.option("--tool", "tools", multiple=True, metavar="NAME", help="Offer this tool, too (aiosd tools lists them).")
@click.option("--model", default=None, help="Which model to ask; the first one loaded by default.")
def main(
    question: tuple[str, ...],
    verbose: bool,
    max_steps: int,
    max_tokens: int,
    notes: Path | None,
    folder: Path | None,
    tools: tuple[str, ...],
    model: str | None,
) -> None:
    """Answer QUESTION (or the text on stdin) with the tools calc, remember, recall, read_file and write_file.

    They are done by aiosd's toolbox (calc, remember, list_notes, search_notes, read_stored, write_stored), so rules and
    budgets are about these.

    Notes and files are kept in the store: for the agent's --name, and files of one without a name for its group
    (aios-sto ls --of group). Files of the working folder can be read, too.

    \b
    aios-run -m libaios.agents.react "What is 37 * 91?"
    aios-run --name bob -m libaios.agents.react "Remember that the rent is 850."
    aios-run --name bob -m libaios.agents.react "What is the rent?"
    aios-run -m libaios.agents.react --folder . "What does a.txt say?"
    """
    import libaios as aios  # here, since loop and tools can be used without a kernel

    def chat(messages: list[ChatMessage], **options: Any) -> Any:
        return aios.llm.chat(messages, model=model, **options)

    text = the_question(question)
    if taken := [name for name in tools if name in IN_TOOLBOX]:
        raise click.UsageError(f"--tool {taken[0]}: the agent has a tool of this name already")
    try:
        toolkit = Toolbox(folder, notes, aios.tool.known(tools) if tools else ())
        watch = (lambda line: print(line, file=sys.stderr, flush=True)) if verbose else (lambda line: None)
        print(react(text, chat, toolkit, max_steps, max_tokens, watch))
    except (AgentError, OSError, UnicodeDecodeError) as e:
        print(f"react: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
