"""The unit with which systemd runs aiosd for one user: what `aiosd systemd-unit` prints.

    $ aiosd systemd-unit > ~/.config/systemd/user/aiosd.service
    $ systemctl --user daemon-reload
    $ systemctl --user enable --now aiosd
    $ loginctl enable-linger             to have it run while you are logged out, too

aiosd speaks sd_notify(3) itself: the unit is started when the system serves. The message comes from the supervisor, a
child of the process that systemd started. TERM goes to that process alone, which ends agents in order; an agent that
runs out of memory is no reason to end the others.
"""

from __future__ import annotations

import os
import shutil
import sys

from libaios.wire import ENV_HOME

UNIT = """\
[Unit]
Description=aiosd, an operating system for LLM agents
Documentation=man:aiosd(1)

[Service]
Type=notify
NotifyAccess=all
{environment}ExecStart={program}
ExecReload={program} reload
KillMode=mixed
TimeoutStartSec=15min
TimeoutStopSec=60
Restart=on-failure
OOMPolicy=continue
LimitNOFILE=524288

[Install]
WantedBy=default.target
"""


def unit() -> str:
    """For this installation of aiosd, and for the home that this process sees."""
    program = shutil.which(sys.argv[0]) or os.path.abspath(sys.argv[0])
    home = os.environ.get(ENV_HOME, "")
    environment = f"Environment={_quoted(f'{ENV_HOME}={os.path.abspath(home)}')}\n" if home else ""
    return UNIT.format(program=_quoted(os.path.abspath(program)), environment=environment)


def _quoted(text: str) -> str:
    """As systemd reads it: % begins a specifier, and blanks part words."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if any(c in text for c in " \t\\'") else text
