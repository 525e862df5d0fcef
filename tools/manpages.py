#!/usr/bin/env python
"""Manual pages of all commands, made from their help: `make man` writes them to build/man/man1.

    $ MANPATH=$PWD/build/man: man aios-ps

There is one page for each command of `bin/`; that of aiosd has its subcommands, too. The text comes from `--help`;
only the sections that all pages share are written here. So the pages cannot differ from the code.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aiosd import __version__  # noqa: E402
from aiosd.commands import MODULES  # noqa: E402

FILES = [
    ("AIOS_HOME", "One folder for socket, data and logs; without it they lie where the XDG rules say."),
    ("$AIOS_HOME/aiosd.toml, else ~/.config/aios/aiosd.toml", "Settings; the keys are the options of aiosd."),
]


def page(program: str) -> str:
    """The page of one command, in roff."""
    module = importlib.import_module(MODULES[program])
    command: click.Command = module.command
    context = click.Context(command, info_name=program, **command.context_settings)
    lines = [f'.TH "{program.upper()}" "1" "" "aiosd {__version__}" "aiosd"']
    lines += [".SH NAME", rf"{escape(program)} \- {escape(_summary(module.__doc__ or '', program))}"]
    lines += [".SH SYNOPSIS", rf"\fB{escape(program)}\fR {escape(_usage(command, context))}"]
    lines += [".SH DESCRIPTION", *_text(command.help or "")]
    lines += [".SH OPTIONS", *_options(command, context)]
    if isinstance(command, click.Group):
        lines += [".SH COMMANDS"]
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            lines += _subcommand(name, subcommand)
    if command.epilog:
        lines += [".SH EXAMPLES", *_text(command.epilog.replace("Examples:\n", "", 1))]
    lines += [".SH ENVIRONMENT AND FILES"]
    for name, words in FILES:
        lines += [".TP", rf"\fB{escape(name)}\fR", escape(words)]
    others = ", ".join(rf"\fB{escape(other)}\fR(1)" for other in MODULES if other != program)
    return "\n".join([*lines, ".SH SEE ALSO", others, ""])


def _summary(docstring: str, program: str) -> str:
    """The first sentence of the module: `aios-ps: the agents of a running system, as ps shows processes.`"""
    first = docstring.partition("\n\n")[0].replace("\n", " ")
    return first.removeprefix(f"{program}: ").rstrip(".")


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join(command.collect_usage_pieces(context))


def _subcommand(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=name, **command.context_settings)
    title = f".SS {escape(name)} {escape(_usage(command, context))}"
    return [title, *_text(command.help or ""), *_options(command, context)]


def _options(command: click.Command, context: click.Context) -> list[str]:
    lines = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1]:
            lines += [".TP", rf"\fB{escape(record[0])}\fR", escape(" ".join(record[1].split()))]
    return lines


def _text(text: str) -> list[str]:
    """Paragraphs; those that click is told not to wrap (\\b) stay line by line."""
    lines: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        if paragraph.lstrip().startswith("\b"):
            rows = paragraph.replace("\b", "", 1).strip("\n").splitlines()
            lines += [".PP", ".nf", *(escape(row) for row in rows), ".fi"]
        else:
            lines += [".PP", escape(" ".join(paragraph.split()))]
    return lines


def escape(text: str) -> str:
    """Escape text for roff: no line becomes a request, and a hyphen stays one that can be copied into a shell."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    escaped = re.sub(r"[^\x00-\x7f]", lambda match: f"\\[u{ord(match[0]):04X}]", escaped)
    return r"\&" + escaped if escaped[:1] in (".", "'") else escaped


def write(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for program in MODULES:
        path = folder / f"{program}.1"
        path.write_text(page(program), encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "man" / "man1"
    print(f"{len(write(target))} pages in {target}")
