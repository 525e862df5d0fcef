"""Agents that are ready to run: `aios-run -m libaios.agents.react "What is 37 * 91?"`."""

import select
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

INTERRUPTED = 130  # as a shell has it for a program that Ctrl-C has ended
PATIENCE_S = 0.3  # until a person is shown that the agent waits; a pipe usually has its text by then


def the_question(words: Sequence[str]) -> str:
    """The question in the arguments, else the text on stdin. Raises UsageError where there is none."""
    text = " ".join(words).strip()
    if not text:
        if sys.stderr.isatty() and _nothing_to_read():
            click.echo(
                "The question, please (Ctrl-D on a line of its own ends it; --help: other ways to ask):", err=True
            )
        text = sys.stdin.read().strip()
    if not text:
        raise click.UsageError("no question: it goes behind the options, or to stdin")
    return text


def _nothing_to_read() -> bool:
    """Whether stdin has neither text nor an end. (That it is a person's terminal cannot be seen: aios-run relays one
    through a pipe.)"""
    try:
        return not select.select([sys.stdin], [], [], PATIENCE_S)[0]
    except (OSError, ValueError):  # closed, or no file at all
        return False


def run(command: click.Command) -> NoReturn:
    """Run an agent's command line and exit. click itself makes 1 of Ctrl-C, which callers take for a failure."""
    try:
        sys.exit(command.main(standalone_mode=False))
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)
