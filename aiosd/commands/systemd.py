"""The unit with which systemd runs aiosd for one user: what `aiosd systemd-unit` prints.

    $ aiosd systemd-unit > ~/.config/systemd/user/aiosd.service
    $ systemctl --user daemon-reload
    $ systemctl --user enable --now aiosd
    $ loginctl enable-linger             to have it run while you are logged out, too

aiosd uses sd_notify(3): for systemd the unit has started when the system serves. The message is sent by the supervisor,
a child of the process that systemd started (hence NotifyAccess=all). TERM is sent only to that process, which ends the
agents in order (KillMode=mixed). If an agent runs out of memory, the others must not end (OOMPolicy=continue).
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
    """The unit for this installation of aiosd, with this process's AIOS_HOME."""
    program = shutil.which(sys.argv[0]) or os.path.abspath(sys.argv[0])
    home = os.environ.get(ENV_HOME, "")
    environment = f"Environment={_quoted(f'{ENV_HOME}={os.path.abspath(home)}')}\n" if home else ""
    return UNIT.format(program=_quoted(os.path.abspath(program)), environment=environment)


def _quoted(text: str) -> str:
    """Quoted for systemd, where % begins a specifier and blanks separate words."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if any(c in text for c in " \t\\'") else text
