"""The program of an agent: a Python script, a module, or a program of another kind.

A script and a module run in this process, as `python FILE` and `python -m MODULE` would run them: the same `__main__`,
sys.argv and sys.path, the same exit codes and tracebacks, and the same end (`end`).

`find` looks the program up; its exception is the reason why the agent cannot start. `Program.run` then runs it.
"""

from __future__ import annotations

import builtins
import errno
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType

from aiosd.birth import confinement, end, frames
from aiosd.birth.report import NOT_FOUND, Report
from aiosd.ipc.letter import Letter
from libaios import digest, wire

STDIN = "-"  # name of a script that is read from stdin


@dataclass(slots=True)
class Program:
    letter: Letter
    run: Callable[[Program, Report], int]
    path: str = ""
    folder: str = ""  # of a script, with links resolved
    source: bytes = b""

    @property
    def is_python(self) -> bool:
        return self.run is not _execute


def find(letter: Letter) -> Program:
    """Look the program up, in the agent's working directory. Raises OSError with a sentence."""
    if letter.kind == "exec":
        return Program(letter, _execute, letter.target)
    if letter.kind == "module":
        return Program(letter, _run_module, folder=letter.cwd)
    if letter.target == STDIN:
        return Program(letter, _run_stdin)
    return _find_file(letter)


def _find_file(letter: Letter) -> Program:
    target = letter.target
    path = os.path.join(letter.cwd, target)
    try:
        with open(path, "rb") as file:
            source = file.read()
            folder = os.path.dirname(os.readlink(f"/proc/self/fd/{file.fileno()}"))  # resolves links without a search
    except FileNotFoundError:
        hint = f"; for the program: aios-run -- {target}" if "/" not in target and _in_path(letter) else ""
        raise OSError(errno.ENOENT, f"{target}: not found{hint}") from None
    except OSError as err:
        raise OSError(err.errno, f"{target}: {_words(err)}") from None
    if letter.sha256 and digest.of(source) != letter.sha256:
        raise OSError(errno.ESTALE, f"{target}: has changed since it was to be started, and a rule names its content")
    if not target.endswith(".py") and _is_for_others(source):
        if letter.sha256:  # a program's file would be read once more
            raise OSError(errno.ENOEXEC, f"{target}: a rule names its content, which only Python scripts can prove")
        if not os.access(path, os.X_OK):
            raise OSError(errno.EACCES, f"{target}: is no Python script, and not executable")
        return Program(letter, _execute, path)
    return Program(letter, _run_script, path if os.path.isabs(target) else os.path.normpath(path), folder, source)


def _words(err: OSError) -> str:
    return (err.strerror or str(err)).lower()


def _is_for_others(source: bytes) -> bool:
    """Whether the file is a program, or a script of another language."""
    interpreter = _interpreter(source)
    return source.startswith(b"\x7fELF") or (bool(interpreter) and "python" not in interpreter)


def _interpreter(source: bytes) -> str:
    """The interpreter in the first line of a script; as in Linux, a CR at its end belongs to the name."""
    line = source.partition(b"\n")[0]
    return os.fsdecode(line[2:].strip(b" ")) if line.startswith(b"#!") else ""


def _in_path(letter: Letter) -> str | None:
    """The first program of that name in the agent's PATH, else the first file. Searched here, because `os.execvpe`
    would try to execute each."""
    other = None
    for folder in wire.os_str(letter.env.get("PATH", os.defpath)).split(os.pathsep):
        path = os.path.join(folder or os.curdir, letter.target)
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            other = other or path
    return other


def command_line(letter: Letter) -> list[str]:
    """The command line that `ps` shows: as a shell would have started it."""
    how = {"file": [sys.executable], "module": [sys.executable, "-m"], "exec": []}
    return [*how[letter.kind], letter.target, *letter.args]


# ── programs of other kinds ───────────────────────────────────────────────────────────────────────────────


def _execute(program: Program, report: Report) -> int:
    """Execute a program. If this succeeds, Linux closes the report's socket."""
    letter = program.letter
    # Undo changes by Python, such as ignored signals, that a program does not expect.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    path = program.path if "/" in program.path else _in_path(letter)
    try:
        if path is None:
            raise FileNotFoundError(errno.ENOENT, "not found")
        os.execve(path, [program.path, *letter.args], os.environ)
    except (FileNotFoundError, NotADirectoryError) as err:
        return report.refuse(err, f"{letter.target}: {_what_is_missing(path)}")
    except OSError as err:
        words = "is a directory" if os.path.isdir(program.path) else _words(err)
        return report.refuse(err, f"{letter.target}: {words}")


def _what_is_missing(path: str | None) -> str:
    """Details for ENOENT, where Linux reports only that there is no such file."""
    try:
        with open(path or "", "rb") as file:
            interpreter = _interpreter(file.read(256)).split(" ")[0]
    except OSError:
        return "not found"
    return f"its interpreter {interpreter or 'or loader'} was not found"


# ── Python ────────────────────────────────────────────────────────────────────────────────────────────────


_OWN_FOLDER = os.path.dirname(os.path.realpath(sys.argv[0]))  # of aiosd's own script; looked up once, before any fork


def _run_script(program: Program, report: Report) -> int:
    loader = SourceFileLoader("__main__", program.path)
    _set_up_main(program, program.folder, __file__=program.path, __cached__=None, __loader__=loader)
    return _run(lambda: compile(program.source, program.path, "exec", dont_inherit=True))


def _run_stdin(program: Program, report: Report) -> int:
    _set_up_main(program, "", __file__="<stdin>", __cached__=None)
    return _run(lambda: compile(sys.stdin.buffer.read(), "<stdin>", "exec", dont_inherit=True))


def _run_module(program: Program, report: Report) -> int:
    letter = program.letter
    _set_up_main(program, program.folder)
    try:
        found = importlib.util.find_spec(letter.target)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(letter.target + ".__main__")
    except (ImportError, ValueError, AttributeError) as err:
        return _not_found(letter, str(err))
    if found is None or found.loader is None or not hasattr(found.loader, "get_code"):
        return _not_found(letter, f"No module named {letter.target}")
    sys.argv[0] = file = found.origin or letter.target
    _name_main(__file__=file, __cached__=found.cached)
    _name_main(__spec__=found, __loader__=found.loader, __package__=found.parent)
    return _run(lambda: found.loader.get_code(found.name))  # type: ignore[union-attr]


def _not_found(letter: Letter, why: str) -> int:
    print(f"aios-run: {letter.target}: {why}", file=sys.stderr, flush=True)
    return NOT_FOUND


def _set_up_main(program: Program, first_path: str, **names: object) -> None:
    """A new `__main__`, with sys.argv and sys.path as with `python TARGET`. Only sys.modules may refer to it, because
    at the end it must be freed first."""
    letter = program.letter
    sys.modules["__main__"] = ModuleType("__main__")
    _name_main(__builtins__=builtins, __spec__=None, __annotations__={}, **names)
    if sys.path and sys.path[0] == _OWN_FOLDER:
        del sys.path[0]
    sys.argv = [letter.target, *letter.args]
    sys.orig_argv = command_line(letter)
    entries = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:0] = [entry for entry in entries if entry not in sys.path]
    sys.path.insert(0, first_path)
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))  # the agent's setting, not aiosd's


def _name_main(**names: object) -> None:
    sys.modules["__main__"].__dict__.update(names)


def _run(code: Callable[[], CodeType]) -> int:
    """Run code as `__main__` the way the interpreter does, to the end of the process."""
    status = _result(code)
    del code  # so that nothing here refers to the script
    end.leave(status)


def _result(code: Callable[[], CodeType]) -> int:
    _allow_for(sys._getframe())
    try:
        exec(code(), sys.modules["__main__"].__dict__)
    except SystemExit as err:
        return _exit_code(err)
    except BaseException as err:  # whatever the script raises
        return _uncaught(err)
    return 0


def _allow_for(frame: object) -> None:
    """Let the script recurse as deep as with python3: frames below it, and the call of `exec`, do not count."""
    depth = 1
    while frame is not None:
        depth, frame = depth + 1, getattr(frame, "f_back", None)
    sys.setrecursionlimit(sys.getrecursionlimit() + depth)


def _exit_code(err: SystemExit) -> int:
    code = err.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    _write_error(code)
    return 1


def _write_error(words: object) -> None:
    """Write to sys.stderr, or if the script has removed that, to its descriptor."""
    try:
        line = f"{words}\n"
    except Exception:  # python3 leaves the line empty there
        line = "\n"
    if sys.stderr is None:
        os.write(2, line.encode("utf-8", "backslashreplace"))
        return
    try:
        sys.stderr.write(line)
    except Exception as err:  # closed, or the script's own object: the error cannot be reported anywhere
        del err


def _uncaught(err: BaseException) -> int:
    """Pass an exception to sys.excepthook; returns the exit status."""
    trace = err.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    err.__traceback__ = trace
    frames.trim(err)
    if note := confinement.explain(err):
        err.add_note(note)
    sys.last_type, sys.last_value, sys.last_traceback = type(err), err, err.__traceback__
    try:
        sys.excepthook(type(err), err, err.__traceback__)
    except SystemExit as exit:
        return _exit_code(exit)
    except BaseException as second:  # whatever the script's hook raises
        _hook_failed(second, err)
    return end.INTERRUPTED if type(err) is KeyboardInterrupt else 1


def _hook_failed(second: BaseException, err: BaseException) -> None:
    trace = second.__traceback__
    second.__traceback__ = trace.tb_next if trace is not None else None
    second.__context__ = None
    _write_error("Error in sys.excepthook:")
    sys.__excepthook__(type(second), second, second.__traceback__)
    _write_error("\nOriginal exception was:")
    sys.__excepthook__(type(err), err, err.__traceback__)
