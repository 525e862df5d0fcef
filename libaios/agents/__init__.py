"""Agents that are ready to run: `aios-run -m libaios.agents.react "What is 37 * 91?"`."""

import sys
from typing import NoReturn

import click

INTERRUPTED = 130  # as a shell has it for a program that Ctrl-C has ended


def run(command: click.Command) -> NoReturn:
    """Run an agent's command line and exit. click itself makes 1 of Ctrl-C, which callers take for a failure."""
    try:
        sys.exit(command.main(standalone_mode=False))
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)
