"""The parts that all commands share: the error line, --help, --version, the exit code.

$ aios-kill 42
aios-kill: 42: no such agent
"""

from __future__ import annotations

import errno
import gc
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import click

from libaios.client import Client

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommandFailed(Exception):
    """The command has failed: the message is its error line, `code` its exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def run(program: str, module: str, args: list[str]) -> int:
    """Run the click command `command` of `module`; returns its exit code. Raises KeyboardInterrupt."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # a TextIOWrapper, never a pipe object
    command: click.Command = import_module(module).command
    click.Context.formatter_class = HelpFormatter
    gc.enable()
    variable = completion_variable(program)
    try:
        if variable in os.environ:
            command.main(args, prog_name=program, complete_var=variable)
        with command.make_context(program, args) as context:
            return command.invoke(context) or 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as err:
        complain(program, _one_line(err.format_message()) + _where_to_look(program, err))
        return err.exit_code
    except CommandFailed as err:
        complain(program, str(err))
        return err.code
    except BrokenPipeError:
        discard_output()
        return 141
    except OSError as err:
        complain(program, reason(err))
        return 1
    except click.Abort:
        raise KeyboardInterrupt from None


def completion_variable(program: str) -> str:
    """The variable that a shell sets when it asks how a command line can be completed."""
    return f"_{program.replace('-', '_').upper()}_COMPLETE"


def complain(program: str, message: str) -> None:
    """Write one line to stderr. Text from arguments or agents cannot break the line or control the terminal."""
    print(f"{program}: {escaped(message)}", file=sys.stderr)


def escaped(text: str) -> str:
    """The text with escapes (`\\x1b`, `\\u202e`) for everything that could control a terminal: control characters (C0,
    DEL and C1), marks that change the direction of writing, and bytes that are not text."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(err: OSError) -> str:
    """The sentence of an error from the kernel or from Linux."""
    words = err.strerror or str(err)
    return f"{err.filename}: {words}" if err.filename else words


def reason_about(subject: str, err: OSError) -> str:
    """`42: no such agent`: the subject, as the user has typed it, and the reason. (The kernel's begins with a pid.)"""
    if err.errno == errno.ESRCH:
        return f"{subject}: no such {'process group' if subject.startswith('-') else 'agent'}"
    return f"{subject}: {re.sub(r'^[0-9]+: ', '', reason(err).removeprefix(f'{subject}: '))}"


def connect() -> Client:
    """A connection to the running system. Raises NoKernel if there is none."""
    return Client()


def completions(words: Mapping[str, str], incomplete: str, listed: bool = False) -> list[CompletionItem]:
    """For a shell: those of `words` that begin with `incomplete`, each with its description. `listed`: `incomplete` is
    a list with commas, and its last item is to be completed."""
    from click.shell_completion import CompletionItem

    known, comma, last = incomplete.rpartition(",") if listed else ("", "", incomplete)
    return [CompletionItem(known + comma + word, help=text) for word, text in words.items() if word.startswith(last)]


class SecondsType(click.FloatRange):
    """A number of seconds; error messages use its name."""

    name = "number of seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = super().convert(value, param, ctx)
        if not seconds <= 1e9:  # inf, and nan, for which no comparison is true
            self.fail(f"{value!r} is out of range (up to 1000000000)", param, ctx)
        return seconds


class Whole(click.IntRange):
    name = "whole number"


C = TypeVar("C", bound=click.Command)


def new(kind: type[C], summary: str, usage: str, examples: str, **extra: Any) -> Callable[[Callable[..., Any]], C]:
    """Decorator: makes a function a command, with the options that all commands have."""

    def decorate(function: Callable[..., Any]) -> C:
        version = click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Print the version and exit.",
        )
        make = click.command(
            cls=kind,
            context_settings=SETTINGS,
            help=summary,
            options_metavar=usage,
            epilog="\b\nExamples:\n" + examples.strip("\n"),
            **extra,
        )
        made = make(function)
        made.params.append(version)
        return made

    return decorate


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from aiosd import __version__

        click.echo(f"{context.find_root().info_name} {__version__}")
        context.exit()


class HelpFormatter(click.HelpFormatter):
    """Breaks lines of help only between words: not within `aios-attach` or `--context-ram`, which users may want to
    copy. (textwrap breaks after hyphens, and click has no option against that.)"""

    STAND_IN = "\ue000"  # for a hyphen, while lines are broken

    def write(self, string: str) -> None:
        super().write(string.replace(self.STAND_IN, "-"))

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", self.STAND_IN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(name, text.replace("-", self.STAND_IN)) for name, text in rows], col_max, col_spacing)


def _where_to_look(program: str, err: click.ClickException) -> str:
    """A hint after the message of a wrongly used command: the command whose help has more, for example `aiosd
    tools`."""
    if not isinstance(err, click.UsageError):
        return ""
    return f" (see {err.ctx.command_path if err.ctx else program} --help)"


def _one_line(text: str) -> str:
    """A message of click as an error line: one line, no full stop, and no brackets around "Did you mean …"."""
    text = re.sub(r"\.? \((Did you mean [^()]*)\)\.?$", r". \1", " ".join(text.split()))
    return _lower_first(text).rstrip(".")


def _lower_first(text: str) -> str:
    """Sentences of click begin with a capital letter, error lines do not; names such as AIOS_HOME keep their capital
    letters."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def discard_output() -> None:
    """Discard stdout's buffer: it cannot be written, and Python would report that once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
