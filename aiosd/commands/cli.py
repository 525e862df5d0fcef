"""aiosd: starts the system, in the foreground or (-d) in the background; says how it stands; stops it.

$ aiosd -d
aiosd: ready (nano; ~/.local/state/aios)
$ aiosd status
aiosd 0.1.0, ready, up 12 s, pid 4711
…
$ aiosd stop
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from aiosd import config
from aiosd.commands import edge
from aiosd.errors import AiosdError, WorldError
from aiosd.units import format_duration, format_size
from libaios.client import Home, NoKernel
from libaios.wire import ENV_HOME, NoArgs, Set, Status, Sys

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from aiosd.config import Settings

EXAMPLES = """
  aiosd                                   the embedded model, in the foreground
  aiosd -d --model llama.gguf --ctx 8192  in the background; returns when it serves
  aiosd --model big.gguf --model small=tiny.gguf --slots 16
  aiosd status                            what runs where
  aiosd set policy rr                     change it while it runs
  aiosd stop                              end it, and everything in it
  eval "$(aiosd completion bash)"         complete commands, options, pids and names
"""

SHELLS = ("bash", "zsh", "fish")


def _settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each of `config.KEYS`."""
    for key in reversed(config.KEYS):
        extra: dict[str, Any] = {"is_flag": True} if not key.metavar else {"metavar": key.metavar, "type": _Value(key)}
        help_text = f"{key.help} [{key.env}]"
        function = click.option(key.flag, key.name, default=None, help=help_text, **extra)(function)
    return function


class _Value(click.ParamType[Any]):
    """A value that `config` knows how to read."""

    def __init__(self, key: config.Key) -> None:
        self.name = key.name
        self._read = key.read
        self._words = key.words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value)
        except ValueError as err:
            self.fail(str(err), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return edge.completions(dict.fromkeys(self._words, ""), incomplete)


def _complete_value(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of the setting that is named before it."""
    key = config.BY_NAME.get(context.params.get("name", ""))
    return edge.completions(dict.fromkeys(key.words if key else [], ""), incomplete)


@edge.new(
    click.Group,
    "Run the operating system for LLM agents. Without a command: start it, in the foreground, until SIGTERM or "
    "Ctrl-C. It prints a line that begins with `aiosd: ready` when it can serve.\n\n"
    "Settings are taken from options, else from the environment, else from the file aiosd.toml in AIOS_HOME (or "
    "in ~/.config/aios). SIGHUP rereads them.",
    "[OPTIONS]",
    EXAMPLES,
    invoke_without_command=True,
)
@click.option("-d", "--daemon", is_flag=True, help="Start in the background; returns when it serves.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]PATH|nano",
    type=click.Path(),
    help="A GGUF; again and again: several. [AIOSD_MODEL]",
)
@click.option("--home", metavar="DIR", type=click.Path(), help="Where socket, data and logs lie. [AIOS_HOME]")
@click.option("--config", "file", metavar="FILE", type=click.Path(), help="Settings, instead of aiosd.toml.")
@_settings_options
@click.pass_context
def command(
    context: click.Context,
    /,
    daemon: bool,
    models: tuple[str, ...],
    home: str | None,
    file: str | None,
    **flags: Any,
) -> int:
    if home is not None:
        os.environ[ENV_HOME] = os.path.abspath(home)
    if context.invoked_subcommand is not None:
        return 0
    given = {name: value for name, value in flags.items() if value is not None}
    if models:
        given["model"] = list(models)
    try:
        settings = config.load(given, Home(), None if file is None else Path(os.path.abspath(file)))
        return _to_background(settings) if daemon else _serve(settings)
    except AiosdError as err:
        raise edge.Failed(str(err)) from None


# ── start ─────────────────────────────────────────────────────────────────────────────────────────────────


def _serve(settings: Settings) -> int:
    """Be the guardian, until the system ends."""
    from aiosd.init import guardian, notify

    try:
        return guardian.main(settings)
    except AiosdError as err:
        notify.failed(settings, str(err))
        raise


def _to_background(settings: Settings) -> int:
    """Start a guardian in a session of its own; return when it serves, or has said why it cannot."""
    from aiosd.init import guardian

    guardian.prepare(settings.home)
    log = settings.home.data / "aiosd.log"
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_daemon(dataclasses.replace(settings, ready_fd=writing), log)
    os.close(writing)
    try:
        with open(reading, encoding="utf-8", errors="replace") as words:
            state, _, line = words.readline().rstrip("\n").partition(" ")
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        raise
    if state == "ready":
        print(line, file=sys.stderr)
        return 0
    raise edge.Failed(line if state == "error" else f"ended before it could serve; see {log}")


def _be_daemon(settings: Settings, log: Path) -> NoReturn:
    """In the child. What it has to say goes to the log; the starter hears of success or failure by ready_fd."""
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as err:
            raise WorldError(f"{log}: {err.strerror}") from err
        for fd, number in ((null, 0), (out, 1), (out, 2)):
            os.dup2(fd, number)
        os.close(null)
        os.close(out)
        code = _serve(settings)
    except AiosdError as err:
        edge.complain("aiosd", str(err))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────


@command.command("status", context_settings=edge.SETTINGS, short_help="Say how the system stands.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@click.option("--check", is_flag=True, help="Check the books as well; exits with 1 when they do not balance.")
def status(as_json: bool, check: bool) -> int:
    """Say how the system stands: models and where they run, agents, limits, counters."""
    with edge.connect() as client:
        found: dict[str, Any] = client.call(Sys.STATUS, Status(check), dict[str, Any])
    if as_json:
        from msgspec import json

        print(json.format(json.encode(found)).decode())
    else:
        print("\n".join(describe(found)))
    return 1 if check and found.get("check") else 0


def describe(found: dict[str, Any]) -> list[str]:
    """The status for people. What this function does not know by name is shown under its own."""
    rest = dict(found)
    head = [f"aiosd {rest.pop('version', '')}", str(rest.pop("state", ""))]
    if "uptime_s" in rest:
        head.append(f"up {format_duration(rest.pop('uptime_s'))}")
    head.append(f"pid {rest.pop('pid', '?')}")
    lines = [", ".join(part for part in head if part)]
    models, checked = rest.pop("models", []), rest.pop("check", None)
    agents = rest.pop("agents", {})
    states = ", ".join(f"{count} {stat}" for stat, count in sorted(agents.items()))
    rows: dict[str, Any] = {name: rest.pop(name) for name in ("home", "logs", "log", "policy") if name in rest}
    rows["agents"] = f"{sum(agents.values())}{f' ({states})' if states else ''}"
    if "max_agents" in rest:
        rows["agents"] += f", at most {rest.pop('max_agents')}"
    rows |= rest
    lines += [f"  {name.replace('_', ' '):18} {_value(name, value)}" for name, value in rows.items()]
    for model in models:
        lines += _describe_model(dict(model))
    if checked is not None:
        lines += [f"check: {problem}" for problem in checked] or ["check: all books balance"]
    return lines


def _describe_model(model: dict[str, Any]) -> list[str]:
    info, stats = dict(model.pop("info", None) or {}), model.pop("stats", None) or {}
    default = " (default)" if model.pop("default", False) else ""
    lines = [f"model {model.pop('name', '?')}{default}, {model.pop('state', '?')}, pid {model.pop('pid', '?')}"]
    rows = {"path": model.pop("path", info.get("path", ""))}
    if info:
        rows["runs"] = (
            f"{info.pop('n_slots', '?')} slots of {info.pop('n_ctx', '?')} tokens, "
            f"GPU layers: {info.pop('gpu_layers', 0) or 'none'}"
        )
        for known in ("name", "path", "default"):
            info.pop(known, None)
    rows |= {name: value for name, value in (model | info).items() if value not in ("", None)} | stats
    return [*lines, *(f"  {name.replace('_', ' '):18} {_value(name, value)}" for name, value in rows.items())]


def _value(name: str, value: Any) -> str:
    if isinstance(value, dict):
        inherited = "bytes" if name.endswith("bytes") else ""
        parts = (f"{key.replace('_', ' ')} {_value(inherited or key, part)}" for key, part in value.items())
        return ", ".join(parts) or "-"
    if isinstance(value, list):
        return ", ".join(_value(name, part) for part in value) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith(("bytes", "budget")):
        return format_size(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# ── set ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Setting(click.Choice[str]):
    """As in aiosd.toml, or as an option is written: log-level."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = str(value).replace("-", "_")
        if word not in self.choices:
            self.fail(f"{value!r} is none of {', '.join(self.choices)}", param, ctx)
        return word


@command.command("set", context_settings=edge.SETTINGS, short_help="Change a setting of the running system.")
@click.argument("name", metavar="NAME", type=_Setting([*config.LIVE]))
@click.argument("value", shell_complete=_complete_value)
def change(name: str, value: str) -> int:
    """Change a setting of the running system.

    \b
      aiosd set policy fair            fifo, rr, priority, mlfq or fair; open calls go on under it
      aiosd set quantum 64,10          tokens and seconds, whichever is first
      aiosd set shares web=4,batch=1   what groups get under fair, in agents of nice 0
      aiosd set log_level debug
      aiosd set stop_timeout 30

    It holds until aiosd ends or reads its settings again (SIGHUP); what is to last belongs into aiosd.toml.
    """
    with edge.connect() as client:
        old, new = client.call(Sys.SET, Set(name, value), tuple[str, str])
    print(f"{name} {new or '-'} (was {old or '-'})")
    return 0


# ── stop ──────────────────────────────────────────────────────────────────────────────────────────────────


@command.command("stop", context_settings=edge.SETTINGS, short_help="End the system and everything in it.")
@click.option("--timeout", type=edge.Seconds(min=0), default=60.0, metavar="S", help="How long to wait (60).")
def stop(timeout: float) -> int:
    """End the system and everything in it; return when it has ended.

    Agents get TERM, and KILL a few seconds later; data is flushed.
    """
    end = time.monotonic() + timeout
    guardian = -1
    try:
        try:
            with edge.connect() as client:
                guardian = _pidfd(client.call(Sys.STATUS, Status(), dict[str, Any], timeout=timeout)["pid"])
                client.call(Sys.SHUTDOWN, NoArgs(), None, timeout=timeout)
        except (NoKernel, TimeoutError) as err:
            guardian = _pidfd_of_lock() if guardian < 0 else guardian
            if guardian < 0:
                raise err from None
            signal.pidfd_send_signal(guardian, signal.SIGTERM)  # it runs, but its kernel does not answer
        except ConnectionError:
            pass  # it went while we asked
        if guardian >= 0 and not _ended(guardian, end - time.monotonic()):
            raise edge.Failed(f"has not ended within {timeout:g} s")
    finally:
        if guardian >= 0:
            os.close(guardian)
    return 0


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _pidfd_of_lock() -> int:
    """The guardian that the home's lock file names, if that process is one."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((Home().data / "lock").read_text())
        guardian = _pidfd(pid)
        if guardian >= 0 and b"aiosd" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return guardian
        if guardian >= 0:
            os.close(guardian)
    return -1


def _ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


# ── completion ────────────────────────────────────────────────────────────────────────────────────────────


@command.command("completion", context_settings=edge.SETTINGS, short_help="Print the completion for a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> int:
    """Print the completion of all commands for a shell, to be evaluated by it.

    \b
      bash:  eval "$(aiosd completion bash)"     in ~/.bashrc
      zsh:   eval "$(aiosd completion zsh)"      in ~/.zshrc
      fish:  aiosd completion fish | source      in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from aiosd.commands import MODULES

    kind = get_completion_class(shell)
    assert kind is not None
    for program in MODULES:
        variable = edge.completion_variable(program)
        print(kind(command, {}, program, variable).source())
    return 0
