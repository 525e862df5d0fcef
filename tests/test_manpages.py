"""Manual pages: one for each command, with all of its help, in roff that groff accepts without a warning."""

from __future__ import annotations

import configparser
import importlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from aiosd.commands import MODULES
from tests.conftest import System
from tools import manpages


@pytest.mark.parametrize("program", MODULES)
def test_a_page_has_all_options_and_commands(program: str) -> None:
    page = manpages.page(program).replace("\\-", "-")
    command: click.Command = importlib.import_module(MODULES[program]).command
    commands = [command]
    if isinstance(command, click.Group):
        context = click.Context(command)
        commands += [one for name in command.list_commands(context) if (one := command.get_command(context, name))]
    for option in (word for one in commands for p in one.params if isinstance(p, click.Option) for word in p.opts):
        assert option in page
    for one in commands[1:]:
        assert f".SS {one.name} " in page
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "SEE ALSO"):
        assert f".SH {section}\n" in page


def test_requests_of_roff_are_escaped() -> None:
    assert manpages.escape(".so /etc/passwd") == r"\&.so /etc/passwd"
    assert manpages.escape(r"'\n --x") == r"\&'\en \-\-x"
    assert manpages.escape("…") == r"\[u2026]"


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff here")
def test_groff_and_man_accept_them(tmp_path: Path) -> None:
    for path in manpages.write(tmp_path / "man1"):
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", path], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), path
        assert path.stem.upper() in done.stdout
        if shutil.which("man"):
            env = os.environ | {"MANWIDTH": "80", "LC_ALL": "C.UTF-8"}
            shown = subprocess.run(["man", "-l", path], capture_output=True, text=True, timeout=60, env=env)
            assert shown.returncode == 0, shown.stderr


def test_the_unit_is_one_that_systemd_reads(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd(start=False)
    text = system.run("aiosd", "systemd-unit", env={"AIOS_HOME": "/srv/my home/50%"}, check=True).stdout
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    service = dict(unit["Service"])
    assert (service["Type"], service["NotifyAccess"], service["KillMode"]) == ("notify", "all", "mixed")
    assert service["Environment"] == '"AIOS_HOME=/srv/my home/50%%"'
    assert os.access(service["ExecStart"], os.X_OK)
    assert service["ExecReload"] == f"{service['ExecStart']} reload"
    if shutil.which("systemd-analyze"):
        (tmp_path / "aiosd.service").write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "--user", "verify", tmp_path / "aiosd.service"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "aiosd.service" not in done.stderr
